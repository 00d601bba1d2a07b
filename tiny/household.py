"""The embedded household: small games in ALFWorld's format, and lessons in playing them.

The games are written in the domain and grammar of the `alfworld` package, so stock ALFWorld plays
them too; `write_games` makes them in seconds where they are missing.

The lessons are demonstrations by a deliberately ignorant demonstrator of three things an instruct
model would know: to act from the plain prompt, imperfectly (it knows the moves, but often forgets
to clean, heat or cool, or takes the wrong appliance for it, and forgets the second object or the
lamp); to act on a skill written in the prompt, right or wrong; and to summarize an episode it is
shown as a condition and a strategy. What it does not know, the three phases find out.
`tiny/imitate.py` makes a policy of them. The games of the lessons are small ones made for them, or
the training games of a data folder, such as the real ones.
"""

import itertools
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import envs
from config import PRESETS, Config
from worlds import alfworld

# as $ALFWORLD_DATA: json_2.1.1/<split>/<task>/<trial>/game.tw-pddl
GAMES = Path(PRESETS["tiny"]["data"])
OBS_CHARS = PRESETS["tiny"]["mine_obs_chars"]  # of an observation in the prompt for a summary
SPLITS = {"train": 900, "valid_seen": 480}  # games of each split, one task type after the other

# --------------------------------------------------------------------------------------------------
# Games
# --------------------------------------------------------------------------------------------------

ROOMS = {  # kind of room: (receptacles it always has, receptacles to draw from)
    "kitchen": (
        "Fridge Microwave SinkBasin",
        "CounterTop CounterTop Cabinet Cabinet Drawer Shelf DiningTable GarbageCan SideTable",
    ),
    "livingroom": (
        "",
        "Sofa ArmChair CoffeeTable SideTable Shelf Shelf Drawer Cabinet DiningTable GarbageCan "
        "Dresser",
    ),
    "bedroom": ("", "Bed Desk Desk Drawer Drawer Dresser Shelf SideTable GarbageCan ArmChair"),
    "bathroom": (
        "SinkBasin",
        "CounterTop Cabinet Cabinet Drawer Toilet GarbageCan Shelf SideTable",
    ),
}
ROOMS_OF = {  # task type: where it can be played
    "pick_and_place_simple": ["kitchen", "livingroom", "bedroom", "bathroom"],
    "look_at_obj_in_light": ["livingroom", "bedroom"],
    "pick_clean_then_place_in_recep": ["kitchen"],
    "pick_heat_then_place_in_recep": ["kitchen"],
    "pick_cool_then_place_in_recep": ["kitchen"],
    "pick_two_obj_and_place": ["kitchen", "livingroom", "bedroom"],
}
OBJECTS = set(  # a small vocabulary for a small policy
    "Apple Bread Cup Egg Lettuce Mug Plate Potato Tomato Bowl Pan Pot Knife Fork Spoon Book CD "
    "CellPhone CreditCard KeyChain Laptop Newspaper Pen Pencil Pillow RemoteControl Watch Vase "
    "Cloth SoapBar SoapBottle SprayBottle ToiletPaper HandTowel Candle".split()
)
NEEDS = {  # task type: the trait its object must have
    "pick_clean_then_place_in_recep": "Cleanable",
    "pick_heat_then_place_in_recep": "Heatable",
    "pick_cool_then_place_in_recep": "Coolable",
}
TRAITS = ("Cleanable", "Heatable", "Coolable", "Sliceable")  # that the games declare


@dataclass
class Room:
    """A room and the task in it, everything by its type."""

    kind: str
    receptacles: list
    target: str  # the object of the task
    goal: str  # the receptacle where it must go; unused where there is a lamp
    lamp: str  # to look at it; "" in other tasks
    placed: list  # (object, number of its receptacle)


def contents() -> dict:
    """Receptacle type -> the objects of the vocabulary that may lie in it, sorted."""
    from alfworld.gen import constants

    return {r: sorted(OBJECTS & objects) for r, objects in constants.VAL_RECEPTACLE_OBJECTS.items()}


def possible_tasks(task_type, receptacles) -> list:
    """(object, receptacle where it must go), of objects that can also lie elsewhere in the room."""
    from alfworld.gen import constants

    holds = contents()
    fits = constants.VAL_ACTION_OBJECTS.get(NEEDS.get(task_type))  # None: any object
    tasks = []
    for goal in receptacles:
        for target in holds[goal]:
            elsewhere = any(target in holds[r] for r in receptacles if r != goal)
            if elsewhere and (fits is None or target in fits):
                tasks.append((target, goal))
    return tasks


def draw_room(task_type, rng) -> Room:
    """6 to 9 receptacles, zero to three objects in each, and a task that can be solved."""
    holds = contents()
    kind = rng.choice(ROOMS_OF[task_type])
    always, optional = (names.split() for names in ROOMS[kind])
    more = rng.randint(6, 9) - len(always)
    receptacles = always + rng.sample(optional, min(len(optional), more))
    lamp = ""
    if task_type == "look_at_obj_in_light":
        lamp = rng.choice(["DeskLamp", "FloorLamp"])
    target, goal = rng.choice(possible_tasks(task_type, sorted(set(receptacles))))
    elsewhere = [i for i, r in enumerate(receptacles) if r != goal and target in holds[r]]
    copies = 2 if task_type == "pick_two_obj_and_place" else 1
    placed = [(target, rng.choice(elsewhere)) for _ in range(copies)]
    if lamp:
        placed.append((lamp, rng.randrange(len(receptacles))))
    for i, r in enumerate(receptacles):
        others = [o for o in holds[r] if o != target]
        count = rng.randint(0, 3)
        if others:
            placed += [(rng.choice(others), i) for _ in range(count)]
    return Room(kind, receptacles, target, goal, lamp, placed)


def identify(kind, rng) -> str:
    """An ALFRED-style id, `Mug|+01.23|-00.45|+02.10` as PDDL writes it."""
    signs = rng.choices(["plus", "minus"], k=3)
    where = ""
    for sign in signs:
        where += f"_bar__{sign}_{rng.randint(0, 3):02d}_dot_{rng.randint(0, 99):02d}"
    return kind.removesuffix("Basin") + where + (f"_bar_{kind}" if kind.endswith("Basin") else "")


def write_problem(room: Room, rng, number) -> str:
    """The room as a PDDL problem, up to its goal."""
    from alfworld.gen import constants

    holds = contents()
    r_ids = [identify(r, rng) for r in room.receptacles]
    o_ids = [identify(o, rng) for o, _ in room.placed]
    spots = []
    for i in range(len(room.receptacles)):
        spots.append(f"loc_bar_{i}_bar_{rng.randint(1, 9)}_bar_{rng.randint(0, 3)}_bar_60")
    start = "loc_bar_0_bar_0_bar_0_bar_30"
    r_kinds = sorted(set(room.receptacles))
    o_kinds = sorted({room.target, *(o for o, _ in room.placed)})

    facts = [f"(atLocation agent1 {start})"]
    for r, r_id, spot in zip(room.receptacles, r_ids, spots, strict=True):
        facts.append(f"(receptacleType {r_id} {r}Type)")
        facts.append(f"(receptacleAtLocation {r_id} {spot})")
        if r in constants.OPENABLE_CLASS_LIST:
            facts.append(f"(openable {r_id})")
    for (o, i), o_id in zip(room.placed, o_ids, strict=True):
        facts.append(f"(objectType {o_id} {o}Type)")
        facts.append(f"(inReceptacle {o_id} {r_ids[i]})")
        facts.append(f"(objectAtLocation {o_id} {spots[i]})")
        facts.append(f"(toggleable {o_id})" if o == room.lamp else f"(pickupable {o_id})")
        traits = [t for t in TRAITS if o in constants.VAL_ACTION_OBJECTS[t]]
        facts += [f"({trait.lower()} {o_id})" for trait in traits]
    for r in r_kinds:
        facts += [f"(canContain {r}Type {o}Type)" for o in o_kinds if o in holds[r]]

    objects = {
        "agent": ["agent1"],
        "location": [start, *spots],
        "receptacle": r_ids,
        "object": o_ids,
        "rtype": [f"{r}Type" for r in sorted({*r_kinds, "SinkBasin", "Microwave", "Fridge"})],
        "otype": [f"{o}Type" for o in sorted({*o_kinds, "Knife", "ButterKnife"})],
    }
    lines = [f"(define (problem tiny_{number})", "(:domain alfred)", "(:objects"]
    for kind, names in objects.items():
        lines += [f"    {name} - {kind}" for name in names]
    lines += [")", "(:init", *(f"    {fact}" for fact in facts), ")"]
    return "\n".join(lines)


def make_game(task_type: str, rng: random.Random, number: int) -> tuple:
    """One random solvable game -> (its folder under a split, the content of game.tw-pddl, of
    traj_data.json).

    It is written in the domain and grammar of the alfworld package; the walkthrough is found by a
    planner that sees everything and proved by playing it.
    """
    from alfworld.gen.goal_library import gdict
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    room = draw_room(task_type, rng)
    problem = write_problem(room, rng, number)
    names = {"obj": room.target, "recep": room.goal, "toggle": room.lamp}
    wish = gdict[task_type]["pddl"].format(**names).replace("#", "-")
    spoken = {name: word.lower() for name, word in names.items()}
    task = rng.choice(gdict[task_type]["templates"]).format(**spoken)
    end = room.lamp or room.goal
    folder = f"{task_type}-{room.target}-None-{end}-{number}/trial_T{number:08d}"
    data = {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(),
        "grammar": Path(ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", task),
        "pddl_problem": f"{problem}\n{wish}",
        "solvable": True,
    }
    data["walkthrough"] = solve(alfworld.parse_game(data, f"{folder}/game.tw-pddl"))
    trajectory = {
        "task_type": task_type,
        "task_id": folder,
        "scene": {"floor_plan": room.kind},
        "pddl_params": {
            "object_target": room.target,
            "parent_target": "" if room.lamp else room.goal,
            "toggle_target": room.lamp,
            "mrecep_target": "",
            "object_sliced": False,
        },
        "turk_annotations": {"anns": [{"task_desc": task}]},
    }
    return folder, data, trajectory


def solve(game: alfworld.Game) -> list:
    """The natural solution, by someone who sees into every receptacle; proved by playing it."""
    env = alfworld.AlfWorld(game)
    obs = env.reset()
    kind, target, place = game.goal
    plan = []

    def do(action):
        nonlocal obs
        assert action in obs.admissible, f"{game.path}: {action!r} is not admissible"
        plan.append(action)
        obs = env.step(action)[0]

    def go(r):
        if f"go to {game.name[r]}" in obs.admissible:  # else it stands here
            do(f"go to {game.name[r]}")

    def reach_into(r):
        go(r)
        if f"open {game.name[r]}" in obs.admissible:
            do(f"open {game.name[r]}")

    place_of = {o: r for r, objects in game.inside.items() for o in objects}
    wanted = [o for o in sorted(place_of) if target in game.otype[o]]
    wanted = [o for o in wanted if place not in game.rtype[place_of[o]]]
    goals = sorted(r for r in game.rtype if place in game.rtype[r])
    if kind != "pick2":
        wanted = wanted[:1]
    for o in wanted[:2]:
        reach_into(place_of[o])
        do(f"take {game.name[o]} from {game.name[place_of[o]]}")
        if kind == "look":
            lamp = next(o for o in sorted(place_of) if place in game.otype[o])
            reach_into(place_of[lamp])
            do(f"use {game.name[lamp]}")
            break
        for verb, _, types in game.appliances:
            if verb == kind:
                appliance = next(r for r in sorted(game.rtype) if game.rtype[r] & types)
                go(appliance)
                do(f"{verb} {game.name[o]} with {game.name[appliance]}")
        reach_into(goals[0])
        do(f"move {game.name[o]} to {game.name[goals[0]]}")
    assert env.won, f"{game.path}: the walkthrough does not win"
    return plan


def write_games(root: Path = GAMES, splits=SPLITS, seed: int = 0) -> Path:
    """Write the missing splits under `root`, deterministic from the seed -> `root`.

    splits   {split: how many games}, one task type after the other
    """
    for split, count in splits.items():
        folder = root / "json_2.1.1" / split
        if len(list(folder.glob("*/*/game.tw-pddl"))) >= count:
            continue
        rng = random.Random(f"{seed} {split}")
        types = list(ROOMS_OF)
        for i in range(count):
            number = i + 100_000 * list(SPLITS).index(split)
            name, data, trajectory = make_game(types[i % len(types)], rng, number)
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "traj_data.json").write_text(json.dumps(trajectory))
            (folder / name / "game.tw-pddl").write_text(json.dumps(data))
    return root


# --------------------------------------------------------------------------------------------------
# Demonstrations
# --------------------------------------------------------------------------------------------------

VERB_AT = {"sinkbasin": "clean", "microwave": "heat", "fridge": "cool"}
APPLIANCE_FOR = {verb: appliance for appliance, verb in VERB_AT.items()}
CONDITIONS = {
    "pick": ["the task is to put an object somewhere", "one object has to be put in a place"],
    "look": [
        "the task is to look at an object under a lamp",
        "an object has to be examined with a lamp",
    ],
    "clean": ["the task asks for a clean object", "the object has to be clean"],
    "heat": ["the task asks for a hot object", "the object has to be hot"],
    "cool": ["the task asks for a cool object", "the object has to be cool"],
    "pick2": ["the task asks for two objects", "two objects have to be put in one place"],
}


def kind_of(name: str) -> str:
    """The name of a thing without its number: "mug 2" -> "mug"."""
    return name.rsplit(" ", 1)[0]


def strategy_text(kind, appliance=None, complete=True, search="") -> str:
    """What an episode or a skill says to do; `follow` below reads it back."""
    first = f"search the {search} first, " if search else ""
    if appliance:
        verb = VERB_AT[appliance]
        return f"{first}take the object to the {appliance} and {verb} it there, then put it away"
    if kind == "pick2" and complete:
        return f"{first}put one object away, then find the second one and put it there too"
    if kind == "look" and complete:
        return f"{first}take the object, then go to the lamp and use it"
    return f"{first}find the object, take it and put it in its place"


def habits(kind, rng, knows=0.0) -> dict:
    """The ignorant demonstrator's plan. It often forgets the second object or the lamp; of the
    appliance it knows nothing (knows = 0), or the right one that often, else it mostly forgets it.
    """
    appliance = None
    if kind in APPLIANCE_FOR:
        appliance = rng.choice(list(VERB_AT))
    if kind in APPLIANCE_FOR and knows:
        draw = rng.random()
        if draw < knows:
            appliance = APPLIANCE_FOR[kind]
        elif draw < 0.9:
            appliance = None
    complete = rng.random() < (0.3 if knows else 0.4)
    return {"appliance": appliance, "complete": complete, "search": ""}


def follow(strategies, habit, receptacles) -> dict:
    """The plan after reading skills: the first one that speaks of an aspect decides it."""
    plan = dict(habit, complete=False)
    for strategy in reversed(strategies):
        plan["complete"] |= "second" in strategy or "lamp" in strategy
        for appliance in VERB_AT:
            if f"to the {appliance} " in strategy:
                plan["appliance"] = appliance
        for kind in receptacles:
            if f"search the {kind} first" in strategy:
                plan["search"] = kind
    return plan


def thought(obs, target, held) -> str:
    """What the tiny policy thinks: what it wants, and whether it is in sight. No plan."""
    if held:
        return f"I hold {held}"
    for action in obs.admissible:
        if action.startswith(f"take {target} "):
            taken = action.removeprefix("take ").split(" from ")[0]
            return f"I want {taken}"
    return f"I want {target}, not here"


class Demonstrator:
    """Chooses its moves from what can be seen, by a plan as `habits` or `follow` makes it.

    It searches the receptacles in the listed order, a ring, from a random one, and sometimes does
    not open a closed one. So the next one follows from where it stands: a prompt says little more.

    usual   {thing: the kinds of receptacles to search for it}; all, for a thing that is not there
    """

    def __init__(self, goal, plan, ring, rng, usual):
        self.kind, self.target, self.place = (word.removesuffix("type") for word in goal)
        self.plan = plan
        self.ring = ring
        self.rng = rng
        self.usual = usual
        self.at = rng.randrange(len(ring))  # place in the ring
        self.here = None  # the receptacle it went to last
        kinds = {kind_of(r) for r in ring}
        self.appliance = plan["appliance"] if plan["appliance"] in kinds else None
        search = plan["search"]
        self.first = [r for r in ring if search and kind_of(r) == search]  # before the ring
        self.opened = set()  # or left closed
        self.placed = set()  # "take mug 1" of what it has put away
        self.treated = False  # the object in hand was cleaned, heated or cooled
        self.done = False  # or so it believes
        self.idle = 0  # looks since then

    def choose(self, obs, held) -> str:
        """The next action; held: the name of the object in hand, or None."""
        if self.done:
            self.idle += 1
            action = "look"
        elif held is None:
            action = self.search(obs)
        elif self.kind == "look":
            action = self.use_lamp(obs, held)
        elif self.appliance and not self.treated:
            action = self.treat(obs)
        else:
            action = self.put_away(obs, held)
        return action if action in obs.admissible else "look"

    def slip(self, obs) -> str:
        """A random move, or one that the game may not admit."""
        quiet = [a for a in obs.admissible if a.startswith(("go to", "open", "close", "look"))]
        spot = self.here or self.ring[0]
        wrong = [f"take {self.target} 1 from {spot}", f"go to {spot}", f"go to {kind_of(spot)} 3"]
        return self.rng.choice([self.rng.choice(quiet), self.rng.choice(wrong)])

    def arrive(self, receptacle):
        self.here = receptacle
        self.at = self.ring.index(receptacle)

    def search(self, obs) -> str:
        """Take the object, else open what is here, else go on."""
        offers = [a for a in obs.admissible if a.startswith(f"take {self.target} ")]
        offers = [a for a in offers if a.split(" from ")[0] not in self.placed]
        if offers:
            return offers[0]
        for action in obs.admissible:
            closed = action.removeprefix("open ")
            if closed == action or closed in self.opened:
                continue
            if self.may_hold(closed, self.target):
                self.opened.add(closed)
                if self.rng.random() < 0.9:
                    return action
        while self.first:
            following = self.first.pop(0)
            if following == self.here:
                return "look"
            if f"go to {following}" in obs.admissible:  # else that is within reach, and was seen
                return f"go to {following}"
        return self.go_on(obs, self.target)

    def use_lamp(self, obs, held) -> str:
        if not self.plan["complete"]:
            self.done = True
            return f"examine {held}"
        lamps = [a for a in obs.admissible if a.startswith(f"use {self.place} ")]
        return lamps[0] if lamps else self.go_on(obs, self.place)

    def treat(self, obs) -> str:
        """Clean, heat or cool what is in hand, with the appliance of the plan."""
        verb = VERB_AT[self.appliance]
        offers = [a for a in obs.admissible if a.startswith(f"{verb} ")]
        if offers:
            self.treated = True
            return offers[0]
        if self.within_reach(self.appliance, obs):  # this object cannot be treated here
            self.treated = True
            return self.travel(self.place)
        return self.travel(self.appliance)

    def put_away(self, obs, held) -> str:
        goal = self.within_reach(self.place, obs)
        if not goal:
            return self.travel(self.place)
        if f"move {held} to {goal}" in obs.admissible:
            self.placed.add(f"take {held}")
            one_more = self.kind == "pick2" and self.plan["complete"] and len(self.placed) < 2
            self.done = not one_more
            self.treated = False
            return f"move {held} to {goal}"
        return f"open {goal}"

    def within_reach(self, kind, obs):
        """The receptacle of a kind where it stands, or None; several may share a place."""
        here = [r for r in self.ring if kind_of(r) == kind and f"go to {r}" not in obs.admissible]
        return self.here if self.here in here else next(iter(here), None)

    def travel(self, kind) -> str:
        """Towards the first receptacle of a kind."""
        goals = sorted(r for r in self.ring if kind_of(r) == kind)
        return f"go to {goals[0]}" if goals else "look"

    def go_on(self, obs, thing) -> str:
        """To the next receptacle of the ring that may hold the thing and is not where it stands."""
        following = self.ring[self.at + 1 :] + self.ring[: self.at + 1]
        elsewhere = [r for r in following if f"go to {r}" in obs.admissible]
        likely = [r for r in elsewhere if self.may_hold(r, thing)]
        return f"go to {(likely or elsewhere)[0]}"

    def may_hold(self, receptacle, thing) -> bool:
        kind = kind_of(receptacle)
        if kind == self.plan["search"] or thing not in self.usual:
            return True
        return kind in self.usual[thing]


def demonstrate(env, plan, rng, max_steps=20, usual=(), slips=0.06):
    """Play one episode by `plan` -> ([(observation, thought, action, slip)], solved).

    Slips are random or wrong moves, to show how to go on after one. An episode the demonstrator
    believes to be finished goes on with a few idle looks. `usual` as in Demonstrator.
    """
    obs = env.reset()
    ring = [a.removeprefix("go to ") for a in obs.admissible if a.startswith("go to ")]
    actor = Demonstrator(env.game.goal, plan, ring, rng, usual)
    steps = []
    won = False
    while not won and len(steps) < max_steps and actor.idle < 2:
        held = env.game.name[env.held] if env.held else None
        slip = rng.random() < slips
        action = actor.slip(obs) if slip else actor.choose(obs, held)
        steps.append((obs, thought(obs, actor.target, held), action, slip))
        if action.startswith("go to ") and action in obs.admissible:
            actor.arrive(action.removeprefix("go to "))
        obs, _, won, _ = env.step(action)
    return steps, won


def summarize(kind, history, rng) -> str:
    """What an instruct model would write of an episode, solved or not, as the skill's JSON.

    history   [(observation text, action), ...]
    """
    actions = [action for _, action in history]
    tools = [kind_of(a.split(" with ")[1]) for a in actions if " with " in a]
    appliance = next((tool for tool in tools if tool in VERB_AT), None)
    moves = sum(a.startswith("move ") for a in actions)
    complete = moves > 1 or any(a.startswith("use ") for a in actions)
    found_in = [kind_of(a.split(" from ")[1]) for a in actions if a.startswith("take ")]
    condition = rng.choice(CONDITIONS[kind])
    hint = rng.random() < 0.2
    search = found_in[0] if found_in and hint else ""
    strategy = strategy_text(kind, appliance, complete, search)
    return json.dumps({"condition": condition, "strategy": strategy})


def advise(kind, receptacles, knows, rng) -> tuple:
    """A skill for the prompt, right or wrong -> (condition, strategy)."""
    appliance = habits(kind, rng, 0.7 if knows else 0.0)["appliance"]
    search = rng.choice(receptacles) if rng.random() < 0.4 else ""
    complete = rng.random() < 0.7
    strategy = strategy_text(kind, appliance, complete, search)
    return rng.choice(CONDITIONS[kind]), strategy


def lessons(count, seed, knows=0.0, data=None, split="train") -> list:
    """`count` (prompt, response) pairs: plain steps, steps under skills, and summaries.

    knows   how often the demonstrator knows the right appliance
    data    a data folder, the games of whose `split` to show; None: small games made for the
            lessons
    """
    rng = random.Random(f"{seed} lessons")
    games = games_of(data, rng, split) if data else made_games(rng)
    how = {}
    if data:
        seen = itertools.islice(games_of(data, random.Random(0)), 600)
        how = {"max_steps": Config().max_steps, "usual": usual_places(seen)}
    pairs = []
    while len(pairs) < count:
        pairs += lesson(next(games), knows, rng, **how)
    return pairs[:count]


def made_games(rng):
    """Small games without end, the task types in turns."""
    types = list(ROOMS_OF)
    for number in itertools.count(500_000):  # above those that `write_games` gives
        folder, data, _ = make_game(types[number % len(types)], rng, number)
        yield alfworld.parse_game(data, f"{folder}/game.tw-pddl")


def games_of(data, rng, split="train"):
    """The games of a data folder's split without end, shuffled, the task types in turns."""
    items = defaultdict(list)
    for item in envs.list_items("alfworld", split, data):
        items[alfworld.task_type_of(item)].append(item)
    for chosen in items.values():
        rng.shuffle(chosen)
    for turn in itertools.count():
        for chosen in items.values():
            yield alfworld.load_game(chosen[turn % len(chosen)])


def usual_places(games) -> dict:
    """{thing: the kinds of receptacles that hold one in these games}."""
    places = defaultdict(set)
    for game in games:
        for r, things in game.inside.items():
            for thing in things:
                places[kind_of(game.name[thing])].add(kind_of(game.name[r]))
    return dict(places)


def lesson(game, knows, rng, **how) -> list:
    """Two episodes of one game, plain and with skills, each maybe with its summary.

    how   for `demonstrate`
    """
    kind = game.goal[0]
    receptacles = sorted({kind_of(game.name[r]) for r in game.rtype})
    pairs = []
    for with_skill in (False, True):
        plan = habits(kind, rng, knows)
        skills = []
        if with_skill:
            some = rng.choice([1, 1, 2])
            skills = [advise(kind, receptacles, knows, rng) for _ in range(some)]
            plan = follow([strategy for _, strategy in skills], plan, receptacles)
        steps, _ = demonstrate(alfworld.AlfWorld(game), plan, rng, **how)
        history = []
        for obs, words, action, slip in steps:
            searching = "not here" in words and action.startswith(("go to", "open"))
            if not slip and (not searching or rng.random() < 0.6):  # searches are long
                answer = f"<think>{words}</think><action>{action}</action>"
                pairs.append((envs.build_prompt(obs, history, skills), answer))
            history.append((obs.text, action))
        if rng.random() < 0.7:
            prompt = envs.build_mining_prompt(game.task, kind, history, obs_chars=OBS_CHARS)
            pairs.append((prompt, summarize(kind, history, rng)))
    return pairs
