"""The ALFWorld engine and its files. `python -m tests.certify_alfworld` is the full comparison."""

import gzip
import importlib
import itertools
import json
import random
import re
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SHARED

import envs
from config import UserError
from runtime import run
from tests import certify_alfworld, record_games
from tests.faults import damaged_worlds
from worlds import Observation, alfworld, household

RECORDED = json.loads(gzip.decompress(record_games.FILE.read_bytes()))


@pytest.fixture
def stock():
    pytest.importorskip(
        "textworld",
        reason="the stock engine is not here: `make stock` installs it, with a C++ compiler",
    )


def recorded_game(number) -> alfworld.Game:
    return alfworld.parse_game(RECORDED[number]["file"], RECORDED[number]["path"])


@pytest.mark.parametrize("number", range(len(RECORDED)))
def test_fast_engine_equals_the_recorded_games_of_stock_alfworld(number):
    """`python -m tests.record_games` recorded them: observation, actions, reward and end."""
    recorded = RECORDED[number]
    game = alfworld.AlfWorld(recorded_game(number))
    for action, text, admissible, reward, done in recorded["steps"]:
        result = game.reset() if action is None else game.step(action)
        task_type = alfworld.task_type_of(recorded["path"])
        obs = Observation(text, recorded["task"], task_type, tuple(admissible))
        expected = (obs, reward, done, {"success": done, "score": reward})
        assert result == (obs if action is None else expected), action


@pytest.mark.parametrize("number, verb", [(3, "cool"), (4, "heat"), (10, "heat")])
def test_what_is_heated_is_no_longer_cool_and_the_other_way_round(number, verb):
    """Hot and cool at once would look hot, and win as cool."""
    game = alfworld.AlfWorld(recorded_game(number))
    game.reset()
    for action in game.game.walkthrough:
        game.step(action)
        treated = re.match("(heat|cool) (.*) with", action)
        if treated:
            place = {"heat": "microwave 1", "cool": "fridge 1"}[verb]
            game.step(f"go to {place}")
            assert game.step(f"{verb} {treated[2]} with {place}")[0].text.startswith("You ")
    assert not game.won and game.held is None


@pytest.mark.usefixtures("stock")
def test_the_stock_engine_still_plays_what_was_recorded():
    again = json.loads(json.dumps(record_games.record(1, length=20)))
    assert again == RECORDED[1] | {"steps": RECORDED[1]["steps"][:21]}


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
@pytest.mark.usefixtures("stock")
def test_fast_engine_equals_stock_alfworld_on_real_games(tmp_path):
    """A game of each type, the smallest of the first: the stock engine's time grows with it."""
    smallest = {}
    with tarfile.open(SHARED / "alfworld_json_2.1.1_train_valid_seen.tar.xz") as archive:
        for member in itertools.islice(archive, 1000):
            if member.name.endswith("game.tw-pddl"):
                kind = alfworld.task_type_of(member.name)
                content = archive.extractfile(member).read()
                if kind not in smallest or len(content) < len(smallest[kind][1]):
                    smallest[kind] = (member.name, content)
    assert len(smallest) == 6
    rng = random.Random(0)
    for name, content in smallest.values():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        differences = [d for _, d in certify_alfworld.play_both(str(path), rng, steps=10) if d]
        assert not differences, f"{name}: {differences[0]}"


def test_generated_games_are_of_all_types_and_won_by_their_walkthrough_only_at_its_end(games):
    paths = envs.list_items("alfworld", "train", games)
    assert {alfworld.task_type_of(p) for p in paths} == set(alfworld.TASK_TYPES.values())
    for path in paths:
        env = envs.make_env("alfworld", path)
        obs = env.reset()
        rewards = []
        for action in env.game.walkthrough:
            assert action in obs.admissible
            obs, reward, done, info = env.step(action)
            rewards.append(reward)
        assert rewards == [0.0] * (len(rewards) - 1) + [1.0] and done and info["success"]


def test_train_and_held_out_games_are_disjoint(games):
    def problem(path):
        return json.loads(Path(path).read_text())["pddl_problem"].split("(:objects")[1]

    train = {problem(p) for p in envs.list_items("alfworld", "train", games)}
    held_out = {problem(p) for p in envs.list_items("alfworld", "valid_seen", games)}
    assert len(train) == len(held_out) == 12 and not train & held_out


def test_games_are_a_function_of_the_seed(games, tmp_path):
    household.make(tmp_path, {"train": 6})
    for path in tmp_path.rglob("*.tw-pddl"):
        assert path.read_text() == (games / path.relative_to(tmp_path)).read_text()


def test_same_item_is_the_same_game_and_games_are_independent(games):
    path = envs.list_items("alfworld", "train", games)[0]
    a = envs.make_env("alfworld", path)
    b = envs.make_env("alfworld", path)
    untouched = envs.make_env("alfworld", path)
    assert a.reset() == b.reset() == untouched.reset()
    for action in a.game.walkthrough:
        a.step(action)
    assert a.won and not b.won
    assert b.step("look") == untouched.step("look")
    assert a.reset() == untouched.reset() and not a.won  # a reset forgets what was done


def change(path, out, **changes):
    target = out / "pick_and_place_simple-Mug-None-Shelf-1" / "trial" / "game.tw-pddl"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(json.loads(Path(path).read_text()) | changes))
    return str(target)


@pytest.mark.usefixtures("stock")
def test_code_in_a_grammar_runs_only_where_the_game_is_trusted(games, tmp_path):
    """The stock package evaluates what stands in braces, in the task as in any other sentence."""
    path = envs.list_items("alfworld", "train", games)[0]
    grammar = json.loads(Path(path).read_text())["grammar"]
    task = alfworld.load_game(path).task
    ran = tmp_path / "ran"
    code = f"{{open('{ran}','w')}}"
    room = "You are in the middle of a room."
    two = f'a.", "Your task is to: {code}'
    for old, new in ((task, code), (task, two), (room, f"Your task is to: {code}"), (room, code)):
        item = change(path, tmp_path, grammar=grammar.replace(old, new))
        for engine in ("fast", "textworld"):
            alfworld.load_game.cache_clear()
            with pytest.raises(UserError):
                envs.make_env("alfworld", item, engine)
    assert not ran.exists()
    envs.make_env("alfworld", item, "textworld-trusted").reset()
    assert ran.exists()  # so the code above was code
    with pytest.raises(UserError, match="--engine textworld-trusted, but that runs the code"):
        envs.make_env("alfworld", item, "textworld")


PLAIN = "pddl_domain, grammar, pddl_problem or walkthrough is no plain text"
PARTS = "its problem has no start or no goal"
NOWHERE = "the agent is nowhere, or in two places"
NO_FACT = "its start holds something that is no fact"
GOAL = "(?=[^:]*$)"  # what comes before it is in the goal
DAMAGED = [  # number of a recorded game, its field, what in it becomes what, what the error says
    (0, "pddl_domain", None, None, PLAIN),
    (0, "grammar", None, [], PLAIN),
    (0, "pddl_problem", "agent1", "agent\ud800", PLAIN),
    (0, "walkthrough", None, 5, PLAIN),
    (0, "walkthrough", None, [1], PLAIN),
    (0, "grammar", "Your task", "Your tusk", "no task of plain words in its grammar"),
    (0, "pddl_problem", r"\(:goal", "", PARTS),
    (0, "pddl_problem", r"\(:init", "(:init(:init", PARTS),
    (0, "pddl_problem", r"(\(atLocation)", r"\1 x", r"\(atLocation x .*\) is no fact of this game"),
    (0, "pddl_problem", r"\(atLocation", "(at", r"\(at agent1 .*\) is no fact of this game"),
    (0, "pddl_problem", r"Fork\S* - object", "", r"\(\w+ Fork.*\) is no fact of this game"),
    (0, "pddl_problem", r"\(:init", "(:init \x1b[2J", NO_FACT),
    (0, "pddl_problem", r"\(openable", "((openable", NO_FACT),
    (0, "pddl_problem", r"\(atLocation .*\)", "", NOWHERE),
    (
        0,
        "pddl_problem",
        r"\(atLocation agent1 .*0\)",
        r"\g<0>(atLocation agent1 loc_bar_0_bar_1_bar_0_bar_60)",
        NOWHERE,
    ),
    (3, "pddl_problem", r"\(receptacleType \w+ MicrowaveType\)", "", "no place to heat what .*"),
    (3, "pddl_problem", r"\(heatable \w+\)", "", "its goal needs mugtype and fridgetype, .*"),
    (3, "pddl_problem", "MugType" + GOAL, "MyType", "its goal needs mytype and .*"),
    (3, "pddl_problem", "FridgeType" + GOAL, "BedType", "its goal needs mugtype and bedtype, .*"),
    (1, "pddl_problem", "FloorLampType" + GOAL, "DeskLampType", "its goal needs .* desklamptype.*"),
    (
        5,
        "pddl_problem",
        r"(?s)\(objectType Plate_\w+ \w+\)(?=.*\(objectType Plate_)",
        "",
        "its goal needs .*",
    ),
    (5, "pddl_problem", r"(\?o1) PlateType", r"\1 ForkType", "its goal names two kinds of .*"),
    (5, "pddl_problem", r"(\?o1) PlateType", r"\1 DeskType", "its goal names two kinds of .*"),
    (
        5,
        "pddl_problem",
        r"DeskType\)(\s+\(inReceptacle \?o1)",
        r"BedType)\1",
        "its goal names two kinds of .*",
    ),
    (
        0,
        "pddl_problem",
        r"(?s)(\(receptacleType (Sink\S+) .*\(inReceptacle Fork_\S+) \S+\)",
        r"\1 \2)",
        "its goal is reached at the start",
    ),
]


@pytest.mark.parametrize("number, field, old, new, said", DAMAGED)
def test_a_damaged_game_is_refused_when_it_is_opened(number, field, old, new, said):
    """Found only in a step, it would end the rollout of all games; never won, teach nothing."""
    path = RECORDED[number]["path"]
    file = dict(RECORDED[number]["file"])
    whole = file[field]
    file[field] = new if old is None else re.sub(old, new, whole)
    assert file[field] != whole
    with pytest.raises(UserError) as error:
        alfworld.parse_game(file, path)
    remedy = "; delete it or download it again"
    assert re.fullmatch(f"{path}: damaged game file, {said}{remedy}", str(error.value))
    assert str(error.value).isprintable()


def test_damaged_games_shops_and_caches_are_refused_or_play_on():
    outcome = damaged_worlds.run(90, seed=1)
    assert {became for _, became in outcome} == {"refused", "playable"}, outcome
    assert outcome["cache", "playable"] == 30


def test_foreign_unsolvable_and_broken_files_are_refused_by_name(games, tmp_path):
    path = RECORDED[0]["path"]
    file = RECORDED[0]["file"]
    with pytest.raises(UserError, match="no JSON object") as error:
        alfworld.parse_game([file], path)
    assert path in str(error.value)
    with pytest.raises(UserError, match=f"{path}: marked unsolvable"):
        alfworld.parse_game(file | {"solvable": False}, path)
    with pytest.raises(UserError, match=r"x/y: its folder must be .*'pick_heat_then_place"):
        alfworld.parse_game(file, "x/y")
    shorter = {
        name: value for name, value in file.items() if name not in ("solvable", "walkthrough")
    }
    game = alfworld.parse_game(shorter, Path(path))  # neither is needed
    assert (game.path, game.walkthrough, game.task_type) == (path, [], "pick")
    for field, old, new in (
        ("pddl_domain", "(isClean ?o)\n", "(isHot ?o)\n"),
        ("grammar", "You are carrying", "You carry"),
        ("pddl_problem", "(inReceptacle ?o ?r)", "(inReceptacle ?r ?o)"),
    ):
        assert file[field].count(old)
        with pytest.raises(UserError, match="--engine textworld-trusted, but that runs the code"):
            alfworld.parse_game(file | {field: file[field].replace(old, new, 1)}, path)
    (tmp_path / "half").write_text('{"grammar": ')
    with pytest.raises(UserError, match="not readable as JSON"):
        envs.make_env("alfworld", tmp_path / "half")
    with pytest.raises(UserError, match="no such file"):
        envs.make_env("alfworld", tmp_path / "nothing")
    with pytest.raises(UserError, match="--engine x: choose"):
        envs.make_env("alfworld", path, "x")


class StandIn:
    """For the stock package: what it was given, and what it says."""

    def __init__(self, env, shuffle):
        assert shuffle is False
        self.given = [env]
        task = "Your task is to: =-\n\nYour task is to: look up."
        self.says = "-= Welcome to TextWorld, ALFRED! =-\n\n" + task

    def load(self, data):
        if data["walkthrough"] == ["broken"]:
            raise SystemExit("x\n" * 200)
        self.given.append(data)

    def reset(self):
        return SimpleNamespace(feedback=self.says, admissible_commands=["go", "help", "look"])

    def step(self, action):
        return SimpleNamespace(feedback=action, admissible_commands=["help"]), 1, True


def test_the_stock_engine_gets_the_file_that_was_checked_and_speaks_as_ours(tmp_path, monkeypatch):
    """With a stand-in, so that this is tested without it too."""
    parents = ["alfworld.agents", "alfworld.agents.environment"]
    stock = {name: SimpleNamespace() for name in parents} | {
        "textworld": SimpleNamespace(EnvInfos=lambda **kinds: kinds),
        "textworld.envs": SimpleNamespace(PddlEnv=lambda infos: infos),
        "alfworld.agents.environment.alfred_tw_env": SimpleNamespace(AlfredDemangler=StandIn),
    }
    for name, module in stock.items():
        monkeypatch.setitem(sys.modules, name, module)
    path = tmp_path / RECORDED[4]["path"]
    path.parent.mkdir(parents=True)
    file = RECORDED[4]["file"]
    foreign = {**file, "grammar": file["grammar"].replace("You are carrying", "You carry")}
    reads = []  # once: a file exchanged after the check would run its code
    read = alfworld.read_json
    monkeypatch.setattr(alfworld, "read_json", lambda path: reads.append(path) or read(path))
    for content, engine in ((file, "textworld"), (foreign, "textworld-trusted")):
        path.write_text(json.dumps(content))
        game = envs.make_env("alfworld", str(path), engine)
        assert game.env.given == [{"won": True, "admissible_commands": True}, content]
    assert reads == [str(path)] * 2
    with pytest.raises(UserError, match="not ALFWorld's own"):
        envs.make_env("alfworld", str(path), "textworld")
    text = "Your task is to: =-\n\nYour task is to: look up."
    start = Observation(text, "look up", "cool", ("go", "look"))
    assert game.reset() == start
    game.env.says = game.env.says.split("\n\n", 1)[1].replace(" =-", "")  # without a header
    assert game.reset().text == "Your task is to:\n\nYour task is to: look up."
    after = Observation("help", "look up", "cool", ())
    assert game.step("help") == (after, 1.0, True, {"success": True, "score": 1.0})
    path.write_text(json.dumps(file | {"walkthrough": ["broken"]}))
    with pytest.raises(UserError) as error:
        envs.make_env("alfworld", str(path), "textworld")
    reason = ("SystemExit " + "x " * 200)[:200]
    said = f"{path}: damaged game file, the stock package cannot read it ({reason});"
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("engine", ["textworld", "textworld-trusted"])
def test_without_the_stock_engine_one_line_says_how_to_install_it(config, monkeypatch, engine):
    """When a run starts, too: of a game that does not open it would only leave the group out."""
    monkeypatch.setitem(sys.modules, "textworld", None)
    path = envs.list_items("alfworld", "train", config.data)[0]
    config.engine = engine
    message = "run `make stock`, with a C.. compiler$"
    with pytest.raises(UserError, match=message):
        envs.make_env("alfworld", path, engine)
    with pytest.raises(UserError, match=message):
        run.list_items(config, "train")


def test_without_alfworld_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "alfworld.gen", None)
    monkeypatch.delitem(sys.modules, "worlds.household")
    with pytest.raises(UserError, match="^alfworld is missing: pip install --no-deps alfworld=="):
        importlib.import_module("worlds.household")


def test_a_split_is_its_games_in_order_without_those_that_stock_leaves_out(tmp_path):
    folder = tmp_path / "json_2.1.1" / "train"
    names = ["b/t2", "b/t1", "a/t", "pick-movable_recep-1/t", "pick-AppleSliced-None/t", "c/sub/t"]
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "game.tw-pddl").touch()
    (folder / "a" / "t" / "other.tw-pddl").touch()
    games = alfworld.list_items(tmp_path, "train")
    assert games == [f"{folder}/{name}/game.tw-pddl" for name in ("a/t", "b/t1", "b/t2")]
    assert [alfworld.item_name(game) for game in games] == ["a/t", "b/t1", "b/t2"]
    assert alfworld.identity(games[0], "train") == "a/t"
    (tmp_path / "json_2.1.1" / "file").touch()
    with pytest.raises(UserError, match=r"choose one of \['train'\], run alfworld-download"):
        alfworld.list_items(tmp_path, "test")
    with pytest.raises(UserError, match="for --env alfworld: run alfworld-download, .* ALFWORLD_D"):
        envs.list_items("alfworld", "train", tmp_path / "nothing")
