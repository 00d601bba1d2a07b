"""ALFWorld as a plain-Python engine.

    game = open_item(".../valid_seen/<task>/<trial>/game.tw-pddl")
    obs = game.reset()                                   # Observation(text, task, task_type, ...)
    obs, reward, done, info = game.step("go to desk 1")  # 1.0 and done at the goal

An ALFWorld game is a small deterministic state machine written in PDDL. This file plays it with a
few Python sets, in microseconds, and equals the stock package on every observation, admissible
action, reward and end: `python -m tests.certify_alfworld` certifies that on your data.

Two differences are deliberate, as in the agent code behind the published numbers: the
`-= Welcome to TextWorld =-` header is cut, and `help` works but is not listed.

A damaged file is refused when it is opened, and nothing in it is ever evaluated. The stock package
does evaluate the expressions in a game's grammar, so it is given known grammars only, unless the
caller trusts the file ("textworld-trusted").
"""

import hashlib
import itertools
import math
import re
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

from config import UserError, read_json
from worlds import Observation

# What every world tells `envs.py` about itself (see worlds/README.md).
NAME = "text game ALFWorld"  # in the request for a skill
ROLE = "You are an agent in a household, playing the text game ALFWorld."  # starts every prompt
TASK_IN_FIRST_OBSERVATION = True  # so the first prompt does not repeat it
FALLBACK_CHARS = 30  # of a response without an action, sent to the world
LONGEST_PROMPT = math.inf  # characters; a longer prompt is written without history
DATA = "~/.cache/alfworld"  # where alfworld-download puts the games
EVAL_SPLIT = "valid_seen"  # what evaluate.py takes by default

TASK_TYPES = {  # folder prefix -> the short name used in tables and as the bucket of a skill
    "pick_and_place_simple": "pick",
    "look_at_obj_in_light": "look",
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "heat",
    "pick_cool_then_place_in_recep": "cool",
    "pick_two_obj_and_place": "pick2",
}


# --- Reading a game file --------------------------------------------------------------------------

# The engine below is the meaning of one PDDL domain and one text grammar. A file with any other is
# refused, because we would play it wrongly, and the stock package would run what it contains. These
# are digests without PDDL comments, blanks and the task: first of the games of json_2.1.1 (all
# 3,693 have the same), then of the alfworld 0.4 package, which worlds/household.py uses.
KNOWN_DOMAINS = {  # digest -> the receptacle types that clean, the only difference between the two
    "19173ff725cec7a19423ce0f88d59f3a": {"sinktype", "sinkbasintype"},
    "6cbbf3d0d19be02716db87fd6ef0fe64": {"sinkbasintype"},
}
KNOWN_GRAMMARS = {"2c8a548cb7aadbae284e060072ec979a", "fca35e80ccc38a92d510a900d93af529"}
KNOWN_GOALS = {  # digest of the goal's shape -> the kind of goal
    "b378720431add8353960afc1cea9b366": "pick",
    "67bf8fb8dfb58e8b6762f09b3df7c1ac": "look",
    "6e805ac5e90438f6a9a0bbe046a03326": "clean",
    "6753937fc906afb79875e439da5154a6": "heat",
    "bfe80e790f1f807cb451f5f8f348c52b": "cool",
    "5f710eed17999b86718838d3483129ff": "pick2",
}
TASK = re.compile(r"Your task is to: ([\w ,.'-]+?)\.?\"")  # in a grammar: plain words, no code
FACT = re.compile(r"\((\w+) ([\w ]+)\)", re.ASCII)
FACTS = {  # predicate of a start state -> the kinds of its arguments
    "atLocation": ("agent", "location"),
    "receptacleAtLocation": ("receptacle", "location"),
    "receptacleType": ("receptacle", "rtype"),
    "objectType": ("object", "otype"),
    "canContain": ("rtype", "otype"),
    "inReceptacle": ("object", "receptacle"),
    "inReceptacleObject": ("object", "object"),
    "objectAtLocation": ("object", "location"),
    "openable": ("receptacle",),
    "opened": ("receptacle",),
} | dict.fromkeys(
    "pickupable cleanable heatable coolable toggleable sliceable isReceptacleObject isClean isHot "
    "isCool isToggled isSliced".split(),
    ("object",),
)


def digest(text: str) -> str:
    """32 hex digits of a text, blind to white space."""
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:32]


class Game(SimpleNamespace):
    """The unchanging part of a game, shared by the members of a group: see `parse_game`."""


@lru_cache(maxsize=1024)
def load_game(path: str) -> Game:
    """Read one `game.tw-pddl`. UserError for a damaged, unsolvable or unknown kind of game."""
    return parse_game(read_json(path), path)


def parse_game(data: dict, path: str) -> Game:
    """The content of a `game.tw-pddl` -> Game; the folder in `path` gives the task type.

    UserError as from `load_game`: a game that is returned can be played to its end.
    """
    if not isinstance(data, dict):
        raise damaged(path, "no JSON object")
    texts = [data.get(name) for name in ("pddl_domain", "grammar", "pddl_problem")]
    domain, grammar, problem = texts
    walkthrough = data.get("walkthrough", [])
    texts += walkthrough if isinstance(walkthrough, list) else [None]
    if not all(isinstance(text, str) and text.isascii() for text in texts):
        raise damaged(path, "pddl_domain, grammar, pddl_problem or walkthrough is no plain text")
    if not data.get("solvable", True):
        raise UserError(f"{path}: marked unsolvable; remove it from the split")
    task_type = task_type_of(path)
    if task_type == "unknown":
        names = list(TASK_TYPES)
        raise UserError(f"{path}: its folder must be <task type>-.../<trial>/ with one of {names}")
    task = TASK.search(grammar)
    if task is None:
        raise damaged(path, "no task of plain words in its grammar")
    parts = re.split(r"\(:(?:init|goal)", problem)
    if len(parts) != 3:
        raise damaged(path, "its problem has no start or no goal")
    head, init, goal_text = parts
    kind = KNOWN_GOALS.get(digest(re.sub(r"\b\w+Type\)", "T)", goal_text)))
    cleaners = KNOWN_DOMAINS.get(digest(re.sub(r"(?m);.*$", "", domain)))
    start, end = task.span(1)
    without_task = grammar[:start] + grammar[end:]
    if kind is None or cleaners is None or digest(without_task) not in KNOWN_GRAMMARS:
        raise UserError(
            f"{path}: a domain, grammar or goal that is not ALFWorld's own; delete it or download "
            "it again. The stock package plays it with --engine textworld-trusted, but that runs "
            "the code in its grammar"
        )

    facts = read_facts(head, init, path)
    starts = {loc for _, loc in facts["atLocation"]}
    if len(starts) != 1:
        raise damaged(path, "the agent is nowhere, or in two places")
    (start,) = starts
    located = sorted(facts["receptacleAtLocation"])
    targets = [name.lower() for name in re.findall(r"objectType \?\w+ (\w+)", goal_text)]
    places = [name.lower() for name in re.findall(r"receptacleType \?\w+ (\w+)", goal_text)]
    if kind == "pick2" and (len(set(targets)) > 1 or len(set(places)) > 1):  # it names both twice
        raise damaged(path, "its goal names two kinds of objects or places")
    otype = targets[-1]
    place = targets[0] if kind == "look" else places[0]  # the lamp is an object too
    things, receptacles = multimap(facts["objectType"], 1), multimap(facts["receptacleType"], 1)
    name = readable_names({arg for args in facts.values() for fact in args for arg in fact})
    traits = {t: {fact[0] for fact in facts[t]} for t, kinds in FACTS.items() if len(kinds) == 1}
    at = {loc: [r for r, there in located if there == loc] for _, loc in located}
    goto = {f"go to {name[r]}": ("go", loc, r) for r, loc in located}
    help_text = re.search(r"(Available commands:.*?)\"", grammar.replace("\\n", "\n"), re.S)
    game = Game(  # ids are in lower case
        path=str(path),
        task=task.group(1),
        task_type=task_type,
        goal=(kind, otype, place),  # (short task type, object type, receptacle or lamp type)
        targets=things[otype] & traits.get(f"{kind}able", things[otype]),  # that can be treated
        places=things[place] & traits["toggleable"] if kind == "look" else receptacles[place],
        name=name,  # id -> the name in the text, "mug 2"
        otype=multimap(facts["objectType"]),  # object -> its types
        rtype=multimap(facts["receptacleType"]),  # receptacle -> its types
        can_contain=facts["canContain"],  # (receptacle type, object type)
        appliances={"clean": cleaners, "heat": {"microwavetype"}, "cool": {"fridgetype"}},
        traits=traits,  # predicate ("pickupable", "openable", ...) -> ids
        at=at,  # location -> sorted receptacles there
        goto={  # location -> {"go to ...": action} that leave it
            here: {text: action for text, action in goto.items() if action[1] != here}
            for here in {start, *at}
        },
        start=start,  # the agent's first location
        inside=multimap(facts["inReceptacle"], 1),  # receptacle -> objects in it at the start
        lying=multimap(facts["objectAtLocation"], 1),  # location -> objects recorded there
        held_inside=multimap(facts["inReceptacleObject"], 1),  # an object (a bowl) -> objects in it
        help_text=help_text.group(1),
        walkthrough=walkthrough,
    )
    check_goal(game)
    return game


def damaged(path, what) -> UserError:
    return UserError(f"{path}: damaged game file, {what}; delete it or download it again")


def read_facts(head, init, path) -> dict:
    """The start state of a PDDL problem -> {predicate: its tuples of ids}, in lower case.

    UserError for anything that is none of FACTS, or has an id that `head` does not declare.
    """
    kinds = dict(re.findall(r"(\w+) - (\w+)", head.lower()))
    facts = defaultdict(set)
    for predicate, ids in FACT.findall(init):
        args = tuple(ids.lower().split())
        if FACTS.get(predicate) != tuple(kinds.get(arg) for arg in args):
            raise damaged(path, f"({predicate} {ids}) is no fact of this game")
        facts[predicate].add(args)
    if FACT.sub("", init).strip() != ")":
        raise damaged(path, "its start holds something that is no fact")
    return facts


def check_goal(game):
    """UserError for a goal that is reached at the start, or needs what is not in the room."""
    kind, otype, place = game.goal
    standing = {r for receptacles in game.at.values() for r in receptacles}
    lying = {o for r in standing for o in game.inside[r]}
    appliances = game.appliances.get(kind)
    if appliances and not any(game.rtype[r] & appliances for r in standing):
        raise damaged(game.path, f"no place to {kind} what its goal needs")
    objects = game.targets & game.traits["pickupable"] & lying
    if len(objects) < (2 if kind == "pick2" else 1) or not game.places & (standing | lying):
        raise damaged(game.path, f"its goal needs {otype} and {place}, which are not there")
    env = AlfWorld(game)
    env.reset()
    if env.won:
        raise damaged(game.path, "its goal is reached at the start")


def multimap(pairs, key=0) -> dict:
    """{(a, b), ...} -> {a: {b, ...}}, or by b with key 1; an empty set for what is not there."""
    result = defaultdict(set)
    for pair in pairs:
        result[pair[key]].add(pair[1 - key])
    return result


def readable_names(ids) -> dict:
    """`mug_bar__plus_01...` -> "mug 2". Among the ids of a kind the first in sorted order gets the
    highest number, as in alfworld's demangler. An id without `_bar_` gets a trailing blank.
    """
    names = {i: i + " " for i in ids if "_bar_" not in i}
    kinds = {i: i.split("_bar_")[0] + "basin" * ("basin" in i) for i in ids - names.keys()}
    count = Counter(kinds.values())
    for i in sorted(kinds):
        names[i] = f"{kinds[i]} {count[kinds[i]]}"
        count[kinds[i]] -= 1
    return names


# --- Playing --------------------------------------------------------------------------------------


CHANGES = {  # verb: its sentence, the trait its object gains, the trait it loses
    "open": ("You open the {a}.", "opened", None),
    "close": ("You close the {a}.", None, "opened"),
    "take": ("You pick up the {a} from the {b}.", None, None),
    "move": ("You move the {a} to the {b}.", None, None),
    "use": ("You turn on the {a}.", "isToggled", None),
    "slice": ("You sliced the {a} with the {b}.", "isSliced", None),
    "clean": ("You clean the {a} using the {b}.", "isClean", None),
    "heat": ("You heat the {a} using the {b}.", "isHot", "isCool"),
    "cool": ("You cool the {a} using the {b}.", "isCool", "isHot"),
}


class AlfWorld:
    """One running game: `reset()` starts it, `step(action)` plays any string."""

    def __init__(self, game: Game):
        self.game = game

    def reset(self) -> Observation:
        """Start the game, always the same -> what the agent sees first."""
        game = self.game
        self.location = game.start
        self.held = None
        self.inside = defaultdict(set, {r: set(objects) for r, objects in game.inside.items()})
        self.lying = defaultdict(set, {loc: set(objects) for loc, objects in game.lying.items()})
        self.removed = set()  # (object, receptacle): was taken from there and not put back
        changing = (gained for _, gained, _ in CHANGES.values() if gained)
        self.now = {trait: set(game.traits[trait]) for trait in changing}  # that hold now
        self.won = self.at_goal()
        return self.observe(self.look(intro=True) + f"\n\nYour task is to: {game.task}.")

    def step(self, action: str):
        """Play an action -> (Observation, reward, done, info); an inadmissible one does nothing."""
        command = self.commands.get(action.strip())
        text = self.apply(*command) if command else "Nothing happens."
        self.won = self.at_goal()
        reward = float(self.won)
        return self.observe(text), reward, self.won, {"success": self.won, "score": reward}

    def observe(self, text) -> Observation:
        self.commands = self.find_commands()
        listed = tuple(sorted(c for c in self.commands if c != "help"))
        return Observation(text, self.game.task, self.game.task_type, listed)

    def find_commands(self) -> dict:
        """Applicable commands -> (verb, first id, second id): the preconditions of the actions."""
        game = self.game
        name = game.name
        traits = game.traits
        held = self.held
        commands = dict(game.goto[self.location])
        commands.update({c: (c, None, None) for c in ("inventory", "look", "help")})
        for r in game.at.get(self.location, ()):
            reachable = r not in traits["openable"] or r in self.now["opened"]
            commands[f"examine {name[r]}"] = ("examine receptacle", r, None)
            if r in traits["openable"]:
                verb = "close" if reachable else "open"
                commands[f"{verb} {name[r]}"] = (verb, r, None)
            for o in self.inside[r]:
                if held is None and reachable and o in traits["pickupable"]:
                    commands[f"take {name[o]} from {name[r]}"] = ("take", o, r)
                if o in traits["toggleable"]:
                    commands[f"use {name[o]}"] = ("use", o, r)
            if held is None:
                continue
            pairs = itertools.product(game.rtype[r], game.otype[held])
            if reachable and not game.can_contain.isdisjoint(pairs):
                commands[f"move {name[held]} to {name[r]}"] = ("move", held, r)
            for verb, kinds in game.appliances.items():
                if held in traits[f"{verb}able"] and game.rtype[r] & kinds:
                    commands[f"{verb} {name[held]} with {name[r]}"] = (verb, held, r)
        if held is not None:
            commands[f"examine {name[held]}"] = ("examine object", held, None)
            if game.otype[held] & {"knifetype", "butterknifetype"}:
                for o in self.lying[self.location] & traits["sliceable"]:
                    commands[f"slice {name[o]} with {name[held]}"] = ("slice", o, held)
        return commands

    def apply(self, verb, a, b) -> str:
        """The effects of one PDDL action, and the sentence the grammar gives it."""
        name = self.game.name
        sentence, gained, lost = CHANGES.get(verb, ("", None, None))
        if gained:
            self.now[gained].add(a)
        if lost:
            self.now[lost].discard(a)
        if verb == "take":
            self.inside[b].discard(a)
            self.lying[self.location].discard(a)
            self.removed.add((a, b))
            self.held = a
        if verb == "move":
            self.inside[b].add(a)
            self.lying[self.location].add(a)
            self.removed.discard((a, b))
            self.held = None
        if sentence:
            seen = f" {self.describe(a)}" if verb == "open" else ""
            return sentence.format(a=name[a], b=name.get(b)) + seen
        if verb == "go":
            self.location = a
            return f"You arrive at {name[b]}. {self.describe(b)}"
        if verb == "examine receptacle":
            return self.describe(a)
        if verb == "examine object":
            return self.describe_held(a)
        if verb == "inventory":
            carried = f"carrying: a {name[self.held]}" if self.held else "not carrying anything"
            return f"You are {carried}."
        return self.look() if verb == "look" else self.game.help_text

    def describe(self, r) -> str:
        """A receptacle: closed, or what is in it."""
        name = self.game.name[r]
        content = listing(self.game.name[o] for o in sorted(self.inside[r]))
        if r not in self.game.traits["openable"]:
            return f"On the {name}, you see {content}."
        if r in self.now["opened"]:
            return f"The {name} is open. In it, you see {content}."
        return f"The {name} is closed."

    def describe_held(self, o) -> str:
        """The object in hand: what is in it, else what was done to it."""
        name = self.game.name
        traits = self.game.traits
        if o in traits["isReceptacleObject"]:
            content = listing(name[inner] for inner in sorted(self.game.held_inside[o]))
            return f"This is a normal {name[o]}. In it, you see {content}."
        now = {trait for trait, objects in self.now.items() if o in objects}
        heat = "hot" if "isHot" in now else "cool" if "isCool" in now else None
        words = " and ".join(filter(None, (heat, "clean" if "isClean" in now else None)))
        if words and "isSliced" in now:
            return f"This is a {words} sliced {name[o]}."
        if words:
            return f"This is a {'cold' if words == 'cool' else words} {name[o]}."
        if o in traits["toggleable"] and "isToggled" in now:
            return f"This {name[o]} is on."
        if o in traits["sliceable"] and "isSliced" in now:
            return f"This is a sliced {name[o]}."
        return f"There's nothing special about {name[o]}."

    def look(self, intro=False) -> str:
        """What stands here, and what was taken from it and put down next to it.

        In the middle of the room the intro lists the whole room, and a later `look` sees nothing (a
        quirk of the grammar).
        """
        game = self.game
        here = game.at.get(self.location)
        if not here:
            everywhere = sorted(r for receptacles in game.at.values() for r in receptacles)
            room = listing(game.name[r] for r in everywhere) if intro else "nothing"
            return f"You are in the middle of a room. Looking quickly around you, you see {room}."
        floor = []
        for o in sorted(self.lying[self.location]):
            floor += [game.name[o] for r in here if (o, r) in self.removed]
        facing = listing((game.name[r] for r in here), article="")
        return f"You are facing the {facing}. Next to it, you see {listing(floor)}."

    def at_goal(self) -> bool:
        game = self.game
        kind = game.goal[0]
        if kind == "look":  # hold the object where a switched-on lamp stands
            here = {o for r in game.at.get(self.location, ()) for o in self.inside[r]}
            return self.held in game.targets and bool(here & game.places & self.now["isToggled"])
        ready = game.targets
        if kind in game.appliances:
            ready = ready & self.now[CHANGES[kind][1]]
        needed = 2 if kind == "pick2" else 1
        return any(len(self.inside[r] & ready) >= needed for r in game.places)


def listing(names, article="a ") -> str:
    """Names -> the text "a mug 1, a plate 2, and a knife 1"; "nothing" for none."""
    names = [article + name for name in names]
    if len(names) < 2:
        return names[0] if names else "nothing"
    return ", ".join(names[:-1]) + ", and " + names[-1]


def load_stock() -> tuple:
    """EnvInfos, PddlEnv and AlfredDemangler of the stock package. UserError without it."""
    try:
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld import EnvInfos
        from textworld.envs import PddlEnv
    except ImportError:
        reason = "the stock engine is not installed; run `make stock`, with a C++ compiler"
        raise UserError(f"--engine textworld: {reason}") from None
    return EnvInfos, PddlEnv, AlfredDemangler


class TextWorldGame:
    """The same game through the stock package, slow, the reference; `trusted` plays any file."""

    def __init__(self, path: str, trusted: bool = False):
        EnvInfos, PddlEnv, AlfredDemangler = load_stock()
        data = read_json(path)  # once, so that what is played is what was checked
        if not trusted:
            parse_game(data, path)
        infos = EnvInfos(won=True, admissible_commands=True)
        self.env = AlfredDemangler(PddlEnv(infos), shuffle=False)
        self.task_type = task_type_of(path)
        try:
            self.env.load(data)
        except (Exception, SystemExit) as error:  # of any kind: its parsers let everything through
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            raise damaged(path, f"the stock package cannot read it ({reason})") from None

    def observe(self, state, text) -> Observation:
        listed = tuple(c for c in state.admissible_commands if c != "help")
        return Observation(text, self.task, self.task_type, listed)

    def reset(self) -> Observation:
        state = self.env.reset()
        text = state.feedback.split("=-\n\n", 1)[-1]
        self.task = text.rsplit("Your task is to: ", 1)[-1].rstrip(".")
        return self.observe(state, text)

    def step(self, action: str):
        state, score, done = self.env.step(action)
        info = {"success": done, "score": float(score)}
        return self.observe(state, state.feedback), float(score), done, info


# --- What envs.py calls ---------------------------------------------------------------------------


def open_item(item: str, engine: str = "fast"):
    """One game by the path of its `game.tw-pddl`. UserError for one that is damaged or foreign.

    engine   "fast"; "textworld", the stock one; "textworld-trusted", the stock one for any file,
             whose code then runs
    """
    if engine in ("textworld", "textworld-trusted"):
        return TextWorldGame(item, trusted=engine == "textworld-trusted")
    if engine != "fast":
        raise UserError(f"--engine {engine}: choose fast or textworld")
    return AlfWorld(load_game(str(item)))


def list_items(root, split: str, engine: str = "fast") -> list[str]:
    """The paths of a split's games, sorted; as in stock, without those of movable receptacles and
    sliced objects. UserError when there are none, or no stock engine that is asked for.
    """
    if engine != "fast":
        load_stock()  # at the start, since a game that does not open is left out
    folder = Path(root) / "json_2.1.1"
    games = sorted(str(path) for path in (folder / split).glob("*/*/game.tw-pddl"))
    games = [path for path in games if not re.search("movable|Sliced", item_name(path))]
    if not games:
        found = sorted(path.name for path in folder.glob("*") if path.is_dir())
        remedy = f"choose one of {found}, " if found else ""
        remedy += "run alfworld-download, or set ALFWORLD_DATA or --data"
        raise UserError(f"no game.tw-pddl in {folder / split}, for --env alfworld: {remedy}")
    return games


def files(items) -> list:
    """The files behind the items: they are these files."""
    return items


def item_name(item) -> str:
    """The task and the trial, whatever the data folder."""
    return "/".join(Path(item).parts[-3:-1])


def identity(item, split: str) -> str:
    """What two splits must not share: the game."""
    return item_name(item)


def shown(text, task) -> str:
    """An observation as a prompt shows it."""
    return text


def task_type_of(item) -> str:
    """The short task type ("clean", "pick2", ...) of a game, from its folder name."""
    return TASK_TYPES.get(Path(item).parent.parent.name.split("-")[0], "unknown")
