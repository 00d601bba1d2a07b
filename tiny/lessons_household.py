"""Lessons in the household: what a tiny policy is taught before any reinforcement learning.

A deliberately ignorant demonstrator shows three things an instruct model would know: to act from
the plain prompt, imperfectly (it knows the moves, but often forgets to clean, heat or cool, or
takes the wrong appliance for it, and forgets the second object or the lamp); to act on a skill in
the prompt, right or wrong; and to summarize an episode as a condition and a strategy. What it does
not know, the three phases find out.

`tiny/imitate.py` makes a policy of the lessons. Their games are small ones made for them, or the
training games of a data folder, such as the real ones.
"""

import itertools
import json
import random
from collections import defaultdict

import envs
from config import PRESETS, Config
from worlds import alfworld
from worlds.household import ROOMS_OF, make_game

OBS_CHARS = PRESETS["tiny-household"]["mine_obs_chars"]  # in the prompt for a summary

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


def first(obs, start):
    """The first admissible action with this start, or None."""
    return next((action for action in obs.admissible if action.startswith(start)), None)


def strategy_text(kind, appliance=None, complete=True, search="") -> str:
    """What an episode or a skill says to do; `follow` below reads it back."""
    before = f"search the {search} first, " if search else ""
    if appliance:
        verb = VERB_AT[appliance]
        return f"{before}take the object to the {appliance} and {verb} it there, then put it away"
    if kind == "pick2" and complete:
        return f"{before}put one object away, then find the second one and put it there too"
    if kind == "look" and complete:
        return f"{before}take the object, then go to the lamp and use it"
    return f"{before}find the object, take it and put it in its place"


def habits(kind, rng, knows=0.0) -> dict:
    """The ignorant demonstrator's plan. It often forgets the second object or the lamp; of the
    appliance it knows nothing (knows = 0), or the right one that often, else it mostly forgets it.
    """
    appliance = None
    if kind in APPLIANCE_FOR:
        appliance = rng.choice(list(VERB_AT))
        draw = rng.random() if knows else 1.0
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
    offer = first(obs, f"take {target} ")
    if offer is None:
        return f"I want {target}, not here"
    return f"I want {offer.removeprefix('take ').split(' from ')[0]}"


class Demonstrator:
    """Chooses its moves from what can be seen, by a plan as `habits` or `follow` makes it.

    It searches the receptacles in the listed order, a ring, from a random one, and sometimes does
    not open a closed one. `usual` as `usual_places` gives it; a thing it lacks may be anywhere.
    """

    def __init__(self, goal, plan, ring, rng, usual):
        self.kind, self.target, self.place = (word.removesuffix("type") for word in goal)
        self.plan = plan
        self.ring = ring
        self.rng = rng
        self.usual = dict(usual)
        self.start = rng.randrange(len(ring))  # place in the ring
        self.here = None  # the receptacle it went to last
        kinds = {kind_of(r) for r in ring}
        self.appliance = plan["appliance"] if plan["appliance"] in kinds else None
        self.likely = [r for r in ring if kind_of(r) == plan["search"]]  # before the ring
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

    def search(self, obs) -> str:
        """Take the object, else open what is here, else go on."""
        for action in obs.admissible:
            taken = action.split(" from ")[0]
            if action.startswith(f"take {self.target} ") and taken not in self.placed:
                return action
        for action in obs.admissible:
            closed = action.removeprefix("open ")
            if closed in self.opened or closed == action or not self.may_hold(closed, self.target):
                continue
            self.opened.add(closed)
            if self.rng.random() < 0.9:
                return action
        while self.likely:
            following = self.likely.pop(0)
            if following == self.here:
                return "look"
            if f"go to {following}" in obs.admissible:  # else that is within reach, and was seen
                return f"go to {following}"
        return self.go_on(obs, self.target)

    def use_lamp(self, obs, held) -> str:
        if not self.plan["complete"]:
            self.done = True
            return f"examine {held}"
        return first(obs, f"use {self.place} ") or self.go_on(obs, self.place)

    def treat(self, obs) -> str:
        """Clean, heat or cool what is in hand, with the appliance of the plan."""
        offer = first(obs, f"{VERB_AT[self.appliance]} ")
        if not offer and not self.within_reach(self.appliance, obs):
            return self.travel(self.appliance)
        self.treated = True  # or cannot be, here
        return offer or self.travel(self.place)

    def put_away(self, obs, held) -> str:
        goal = self.within_reach(self.place, obs)
        if not goal:
            return self.travel(self.place)
        if f"move {held} to {goal}" not in obs.admissible:
            return f"open {goal}"
        self.placed.add(f"take {held}")
        self.treated = False
        one_more = self.kind == "pick2" and self.plan["complete"] and len(self.placed) < 2
        self.done = not one_more
        return f"move {held} to {goal}"

    def within_reach(self, kind, obs):
        """The receptacle of a kind where it stands, or None; several may share a place."""
        here = [r for r in self.ring if kind_of(r) == kind and f"go to {r}" not in obs.admissible]
        return self.here if self.here in here else next(iter(here), None)

    def travel(self, kind) -> str:
        """Towards the first receptacle of a kind."""
        goal = min((r for r in self.ring if kind_of(r) == kind), default=None)
        return f"go to {goal}" if goal else "look"

    def go_on(self, obs, thing) -> str:
        """To the next receptacle of the ring that may hold the thing and is not where it stands."""
        after = (self.ring.index(self.here) if self.here else self.start) + 1
        following = self.ring[after:] + self.ring[:after]
        elsewhere = [r for r in following if f"go to {r}" in obs.admissible]
        likely = [r for r in elsewhere if self.may_hold(r, thing)]
        return f"go to {(likely or elsewhere)[0]}"

    def may_hold(self, receptacle, thing) -> bool:
        kind = kind_of(receptacle)
        return kind == self.plan["search"] or kind in self.usual.get(thing, [kind])


def demonstrate(env, plan, rng, max_steps=20, usual=(), slips=0.06):
    """Play one episode by `plan` -> ([(observation, thought, action, slip)], solved).

    Slips are random or wrong moves, to show how to go on after one. An episode the demonstrator
    believes to be finished goes on with a few idle looks.
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
            actor.here = action.removeprefix("go to ")
        obs, _, won, _ = env.step(action)
    return steps, won


def summarize(kind, history, rng) -> str:
    """What an instruct model would write of an episode, solved or not, as the skill's JSON."""
    actions = [action for _, action in history]
    tools = [kind_of(a.split(" with ")[1]) for a in actions if " with " in a]
    appliance = next((tool for tool in tools if tool in VERB_AT), None)
    moves = sum(a.startswith("move ") for a in actions)
    complete = moves > 1 or any(a.startswith("use ") for a in actions)
    found_in = [kind_of(a.split(" from ")[1]) for a in actions if a.startswith("take ")]
    condition = rng.choice(CONDITIONS[kind])
    hint = rng.random() < 0.2
    search = found_in[0] if hint and found_in else ""
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
    data    a data folder, whose games of `split` are shown; None: small ones, made for the lessons
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
    for number in itertools.count(500_000):  # above those that `household.make` gives
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
    return alfworld.multimap(
        (kind_of(game.name[thing]), kind_of(game.name[r]))
        for game in games
        for r, things in game.inside.items()
        for thing in things
    )


def lesson(game, knows, rng, **how) -> list:
    """Two episodes of one game, plain and with skills, each maybe with its summary."""
    kind = game.goal[0]
    receptacles = sorted({kind_of(game.name[r]) for r in game.rtype})
    pairs = []
    for with_skill in (False, True):
        plan = habits(kind, rng, knows)
        skills = []
        if with_skill:
            count = rng.choice([1, 1, 2])
            skills = [advise(kind, receptacles, knows, rng) for _ in range(count)]
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
            prompt = envs.build_mining_prompt(game.task, kind, history, (), OBS_CHARS, "alfworld")
            pairs.append((prompt, summarize(kind, history, rng)))
    return pairs
