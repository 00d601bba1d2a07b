"""The embedded household: small games in ALFWorld's format, and lessons in playing them.

The games are written in the domain and grammar of the `alfworld` package, so stock ALFWorld plays
them too; `write_games` makes them in seconds where they are missing.

The lessons are demonstrations by a deliberately ignorant demonstrator, three things an instruct
model would know: to act from the plain prompt, imperfectly (it knows the moves, but often forgets
to clean, heat or cool, or takes the wrong appliance for it, and forgets the second object or the
lamp); to act on a skill written in the prompt, right or wrong; and to summarize an episode it is
shown as a condition and a strategy. What it does not know, the three phases find out.
`tiny/imitate.py` makes a policy of them.
"""

import json
import random
from pathlib import Path

import envs
from worlds import alfworld

GAMES = Path("runs/tiny-games")  # as $ALFWORLD_DATA: json_2.1.1/<split>/<task>/<trial>/game.tw-pddl
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
TRAITS = {
    "Cleanable": "cleanable",
    "Heatable": "heatable",
    "Coolable": "coolable",
    "Sliceable": "sliceable",
}


def make_game(task_type: str, rng: random.Random, number: int) -> tuple:
    """One random solvable game -> (its folder under a split, the content of game.tw-pddl, of
    traj_data.json).

    A room of 6 to 9 receptacles, zero to three objects in each, written in the domain and grammar
    of the alfworld package; the walkthrough is found by a planner that sees everything and proved
    by playing it.
    """
    from alfworld.gen import constants
    from alfworld.gen.goal_library import gdict
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    allowed = constants.VAL_RECEPTACLE_OBJECTS
    holds = {r: sorted(OBJECTS & objects) for r, objects in allowed.items()}  # of each receptacle
    room = rng.choice(ROOMS_OF[task_type])
    always, optional = (names.split() for names in ROOMS[room])
    receptacles = always + rng.sample(optional, min(len(optional), rng.randint(6, 9) - len(always)))
    kinds = sorted(set(receptacles))

    # the task: an object type, where it must go, and for "look" the lamp
    lamp = rng.choice(["DeskLamp", "FloorLamp"]) if task_type == "look_at_obj_in_light" else ""
    fits = constants.VAL_ACTION_OBJECTS.get(NEEDS.get(task_type), None)
    choices = [
        (o, goal)
        for goal in kinds
        for o in holds[goal]
        if (fits is None or o in fits) and any(o in holds[r] for r in kinds if r != goal)
    ]
    target, goal = rng.choice(choices)
    elsewhere = [i for i, r in enumerate(receptacles) if r != goal and target in holds[r]]
    copies = 2 if task_type == "pick_two_obj_and_place" else 1
    placed = [(target, rng.choice(elsewhere)) for _ in range(copies)]
    if lamp:
        placed.append((lamp, rng.randrange(len(receptacles))))
    for i, r in enumerate(receptacles):
        others = [o for o in holds[r] if o != target]
        placed += [(rng.choice(others), i) for _ in range(rng.randint(0, 3)) if others]

    def identify(kind, suffix=""):  # an ALFRED-style id, Mug|+01.23|-00.45|+02.10
        signs = rng.choices(["plus", "minus"], k=3)
        where = [
            f"_bar__{sign}_{rng.randint(0, 3):02d}_dot_{rng.randint(0, 99):02d}" for sign in signs
        ]
        return kind.removesuffix("Basin") + "".join(where) + suffix

    r_ids = [identify(r, "_bar_" + r if r.endswith("Basin") else "") for r in receptacles]
    o_ids = [identify(o) for o, _ in placed]
    spots = [
        f"loc_bar_{i}_bar_{rng.randint(1, 9)}_bar_{rng.randint(0, 3)}_bar_60"
        for i in range(len(receptacles))
    ]
    start = "loc_bar_0_bar_0_bar_0_bar_30"
    facts = [f"(atLocation agent1 {start})"]
    for r, r_id, spot in zip(receptacles, r_ids, spots):
        facts += [f"(receptacleType {r_id} {r}Type)", f"(receptacleAtLocation {r_id} {spot})"]
        facts += [f"(openable {r_id})"] if r in constants.OPENABLE_CLASS_LIST else []
    for (o, i), o_id in zip(placed, o_ids):
        facts += [
            f"(objectType {o_id} {o}Type)",
            f"(inReceptacle {o_id} {r_ids[i]})",
            f"(objectAtLocation {o_id} {spots[i]})",
        ]
        facts += [f"(toggleable {o_id})"] if o == lamp else [f"(pickupable {o_id})"]
        facts += [f"({TRAITS[t]} {o_id})" for t in TRAITS if o in constants.VAL_ACTION_OBJECTS[t]]
    object_kinds = sorted({o for o, _ in placed} | {target})
    facts += [f"(canContain {r}Type {o}Type)" for r in kinds for o in object_kinds if o in holds[r]]
    objects = {
        "agent": ["agent1"],
        "location": [start, *spots],
        "receptacle": r_ids,
        "object": o_ids,
        "rtype": [f"{r}Type" for r in sorted({*kinds, "SinkBasin", "Microwave", "Fridge"})],
        "otype": [f"{o}Type" for o in sorted({*object_kinds, "Knife", "ButterKnife"})],
    }
    declared = "\n".join(
        f"    {name} - {kind}" for kind, names in objects.items() for name in names
    )
    wish = gdict[task_type]["pddl"].format(obj=target, recep=goal, toggle=lamp).replace("#", "-")
    task = rng.choice(gdict[task_type]["templates"]).format(
        obj=target.lower(), recep=goal.lower(), toggle=lamp.lower()
    )
    problem = (
        f"(define (problem tiny_{number})\n(:domain alfred)\n(:objects\n{declared}\n)\n(:init\n    "
    )
    problem += "\n    ".join(facts) + f"\n)\n{wish}"
    folder = f"{task_type}-{target}-None-{lamp or goal}-{number}/trial_T{number:08d}"
    data = {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(),
        "grammar": Path(ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", task),
        "pddl_problem": problem,
        "solvable": True,
    }
    data["walkthrough"] = solve(alfworld.parse_game(data, f"{folder}/game.tw-pddl"))
    params = {
        "object_target": target,
        "parent_target": "" if lamp else goal,
        "toggle_target": lamp,
        "mrecep_target": "",
    }
    trajectory = {
        "task_type": task_type,
        "task_id": folder,
        "scene": {"floor_plan": room},
        "pddl_params": params,
    }
    trajectory["pddl_params"]["object_sliced"] = False
    trajectory["turk_annotations"] = {"anns": [{"task_desc": task}]}
    return folder, data, trajectory


def solve(game: alfworld.Game) -> list:
    """The natural solution, by someone who sees into every receptacle; proved by playing it."""
    env, plan = alfworld.AlfWorld(game), []
    obs = env.reset()
    kind, target, place = game.goal

    def do(action):
        nonlocal obs
        assert action in obs.admissible, f"{game.path}: {action!r} is not admissible"
        plan.append(action)
        obs = env.step(action)[0]

    def go(r):  # stand at r with it open
        if f"go to {game.name[r]}" in obs.admissible:
            do(f"go to {game.name[r]}")
        if f"open {game.name[r]}" in obs.admissible:
            do(f"open {game.name[r]}")

    whole = {o: r for r, objects in game.inside.items() for o in objects}
    wanted = [
        o for o in sorted(whole) if target in game.otype[o] and place not in game.rtype[whole[o]]
    ]
    goals = sorted(r for r in game.rtype if place in game.rtype[r])
    for o in wanted[: 2 if kind == "pick2" else 1]:
        go(whole[o])
        do(f"take {game.name[o]} from {game.name[whole[o]]}")
        if kind == "look":
            lamp = next(o for o in sorted(whole) if place in game.otype[o])
            go(whole[lamp])
            do(f"use {game.name[lamp]}")
            break
        for verb, _, types in game.appliances:
            if verb == kind:
                appliance = next(r for r in sorted(game.rtype) if game.rtype[r] & types)
                if f"go to {game.name[appliance]}" in obs.admissible:
                    do(f"go to {game.name[appliance]}")
                do(f"{verb} {game.name[o]} with {game.name[appliance]}")
        go(goals[0])
        do(f"move {game.name[o]} to {game.name[goals[0]]}")
    assert env.won, f"{game.path}: the walkthrough does not win"
    return plan


def write_games(root: Path = GAMES, splits=SPLITS, seed: int = 0) -> Path:
    """Write the missing splits under `root`, deterministic from the seed."""
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


RIGHT = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}


def habits(kind, rng, knows=0.0) -> dict:
    """The ignorant demonstrator's plan. It often forgets the second object or the lamp; of the
    appliance it knows nothing (knows = 0), or the right one that often, else it mostly forgets it.
    """
    appliance = rng.choice(list(VERB_AT)) if kind in RIGHT else None
    if knows and kind in RIGHT:
        draw = rng.random()
        appliance = RIGHT[kind] if draw < knows else (None if draw < 0.9 else appliance)
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
    seen = [a for a in obs.admissible if a.startswith(f"take {target} ")]
    number = seen[0].split(" from ")[0].rsplit(" ", 1)[1] if seen else ", not here"
    return f"I want {target}{'' if not seen else ' '}{number}"


def demonstrate(env, plan, rng, max_steps=20):
    """Play one episode by `plan` from what can be seen -> [(observation, thought, action, slip)],
    and whether it was solved. Slips are random or wrong moves, to show how to go on after one.

    The search goes through the receptacles in the listed order from a random one, sometimes not
    opening a closed one; an episode the demonstrator believes to be finished goes on with a few
    idle looks.
    """
    obs, game = env.reset(), env.game
    kind, target, place = (word.removesuffix("type") for word in game.goal)
    placed, done, worked, opened, idle, steps = set(), False, False, set(), 0, []
    ring = [a.removeprefix("go to ") for a in obs.admissible if a.startswith("go to ")]
    at = rng.randrange(len(ring))
    first = [r for r in ring if plan["search"] and r.startswith(plan["search"] + " ")]
    kind_of = lambda name: name.rsplit(" ", 1)[0]  # noqa: E731

    def travel(goal_kind):  # the next move towards a receptacle of that kind
        goals = sorted(r for r in ring if kind_of(r) == goal_kind)
        return f"go to {goals[0]}" if goals else "look"

    here = None
    while len(steps) < max_steps and idle < 2:
        held = env.held and game.name[env.held]
        act = None
        offers = [a for a in obs.admissible if a.startswith(f"take {target} ")]
        offers = [a for a in offers if a.split(" from ")[0] not in placed]
        slip = rng.random() < 0.06
        if slip:
            quiet = [a for a in obs.admissible if a.startswith(("go to", "open", "close", "look"))]
            spot = here or ring[0]
            wrong = [f"take {target} 1 from {spot}", f"go to {spot}", f"go to {kind_of(spot)} 3"]
            act = rng.choice([rng.choice(quiet), rng.choice(wrong)])
        elif done:
            act, idle = "look", idle + 1
        elif held is None:
            if offers:
                act = offers[0]
            elif here and f"open {here}" in obs.admissible and here not in opened:
                opened.add(here)
                act = f"open {here}" if rng.random() < 0.9 else None
            if act is None and first:
                act = f"go to {first.pop(0)}"
            elif act is None:
                at = (at + 1) % len(ring)
                act = (
                    f"go to {ring[at]}"
                    if ring[at] != here
                    else f"go to {ring[(at + 1) % len(ring)]}"
                )
        elif kind == "look":
            lamps = [a for a in obs.admissible if a.startswith("use ")]
            if not plan["complete"]:
                act, done = f"examine {held}", True
            elif lamps:
                act = lamps[0]
            else:
                at = (at + 1) % len(ring)
                act = (
                    f"go to {ring[at]}"
                    if ring[at] != here
                    else f"go to {ring[(at + 1) % len(ring)]}"
                )
        elif plan["appliance"] and not worked:
            verbs = [a for a in obs.admissible if a.startswith(VERB_AT[plan["appliance"]] + " ")]
            if verbs:
                act, worked = verbs[0], True
            elif here and kind_of(here) == plan["appliance"]:
                act, worked = travel(place), True  # this object cannot be treated here
            else:
                act = travel(plan["appliance"])
        else:
            moves = [a for a in obs.admissible if a.startswith("move ")]
            if here and kind_of(here) == place and moves:
                act = moves[0]
                placed.add(f"take {held}")
                done = not (kind == "pick2" and plan["complete"] and len(placed) < 2)
                worked = False
            elif here and kind_of(here) == place and f"open {here}" in obs.admissible:
                act = f"open {here}"
            else:
                act = travel(place)
        if act not in obs.admissible and not slip:
            act = "look"
        steps.append((obs, thought(obs, target, held), act, slip))
        if act.startswith("go to ") and act in obs.admissible:
            here = act.removeprefix("go to ")
            at = ring.index(here)
        obs, _, won, _ = env.step(act)
        if won:
            return steps, True
    return steps, False


def summarize(kind, history, rng) -> str:
    """What an instruct model would write of an episode, solved or not, as the skill's JSON."""
    actions = [action for _, action in history]
    tools = [a.split(" with ")[1].rsplit(" ", 1)[0] for a in actions if " with " in a]
    appliance = next((tool for tool in tools if tool in VERB_AT), None)
    moves = sum(a.startswith("move ") for a in actions)
    complete = moves > 1 or any(a.startswith("use ") for a in actions)
    takes = [a.split(" from ")[1].rsplit(" ", 1)[0] for a in actions if a.startswith("take ")]
    condition, hint = rng.choice(CONDITIONS[kind]), rng.random() < 0.2
    search = takes[0] if takes and hint else ""
    strategy = strategy_text(kind, appliance, complete, search)
    return json.dumps({"condition": condition, "strategy": strategy})


def lessons(count, seed, knows=0.0):
    """`count` (prompt, response) pairs: plain steps, steps under skills, and summaries."""
    rng = random.Random(f"{seed} lessons")
    types, pairs, number = list(ROOMS_OF), [], 500_000
    while len(pairs) < count:
        task_type = types[number % len(types)]
        folder, data, _ = make_game(task_type, rng, number)
        number += 1
        game = alfworld.parse_game(data, f"{folder}/game.tw-pddl")
        kind, receptacles = (
            game.goal[0],
            sorted({game.name[r].rsplit(" ", 1)[0] for r in game.rtype}),
        )
        for with_skill in (False, True):
            plan, skills = habits(kind, rng, knows), []
            if with_skill:
                for _ in range(rng.choice([1, 1, 2])):
                    advice = habits(kind, rng, 0.7 if knows else 0.0)
                    search = rng.choice(receptacles) if rng.random() < 0.4 else ""
                    text = strategy_text(kind, advice["appliance"], rng.random() < 0.7, search)
                    skills.append((rng.choice(CONDITIONS[kind]), text))
                plan = follow([strategy for _, strategy in skills], plan, receptacles)
            steps, _ = demonstrate(alfworld.AlfWorld(game), plan, rng)
            history = []
            for obs, words, action, slip in steps:
                answer = f"<think>{words}</think><action>{action}</action>"
                searching = "not here" in words and action.startswith(("go to", "open"))
                if not slip and (not searching or rng.random() < 0.6):  # searches are long
                    pairs.append((envs.build_prompt(obs, history, skills), answer))
                history.append((obs.text, action))
            if rng.random() < 0.7:
                prompt = envs.build_mining_prompt(game.task, kind, history, obs_chars=60)
                pairs.append((prompt, summarize(kind, history, rng)))
    return pairs[:count]
