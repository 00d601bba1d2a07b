"""The ALFWorld engine and its files. `python -m tests.certify_alfworld` is the full comparison."""

import gzip
import itertools
import json
import random
import re
import tarfile
from pathlib import Path

import pytest
from conftest import SHARED

import envs
from config import UserError
from tests import certify_alfworld, record_games
from tests.faults import damaged_worlds
from worlds import Observation, alfworld, household

RECORDED = json.loads(gzip.decompress(record_games.FILE.read_bytes()))


@pytest.fixture
def stock():
    pytest.importorskip(
        "textworld",
        reason="the stock engine is not here; it needs a compiler: pip install textworld",
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


def test_no_data_folder_and_empty_split_name_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="ALFWORLD_DATA"):
        envs.list_items("alfworld", "train", tmp_path)
    (tmp_path / "json_2.1.1" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="no game.tw-pddl"):
        envs.list_items("alfworld", "train", tmp_path)
    with pytest.raises(UserError, match="choose one of"):
        envs.list_items("alfworld", "test", tmp_path)


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


@pytest.mark.usefixtures("stock")
def test_an_engine_that_was_checked_plays_what_was_checked(games, tmp_path, monkeypatch):
    """A file exchanged after the check would run its code: it is read once."""
    reads = []
    monkeypatch.setattr(
        alfworld, "read_json", lambda p: reads.append(p) or json.loads(Path(p).read_text())
    )
    path = envs.list_items("alfworld", "train", games)[0]
    assert envs.make_env("alfworld", path, "textworld").env._game_file is None
    assert reads == [path]


def goal_of(problem, kind):
    """The types of the goal, in order: object and place, or lamp and object."""
    return re.findall(rf"{kind} \?\w+ (\w+)\)", problem.split("(:goal")[1])


@pytest.mark.parametrize("number", range(6))
def test_a_goal_of_what_is_not_in_the_room_is_refused(games, tmp_path, number):
    """It could never be won, and the whole group would learn nothing."""
    name, data, _ = household.make_game(list(household.ROOMS_OF)[number], random.Random(1), 7)
    problem = data["pddl_problem"]
    init, goal = problem.split("(:goal")
    for old in {*goal_of(problem, "objectType"), *goal_of(problem, "receptacleType")}:
        other = {**data, "pddl_problem": f"{init}(:goal{goal.replace(old, 'WindowType')}"}
        with pytest.raises(UserError, match="its goal needs .* not there"):
            alfworld.parse_game(other, f"{name}/game.tw-pddl")


def test_a_goal_without_its_appliance_or_its_second_object_is_refused():
    name, data, _ = household.make_game("pick_heat_then_place_in_recep", random.Random(1), 7)
    for pattern, message in (
        (r"\(receptacleType \w+ MicrowaveType\)", "no place to heat"),
        (r"\(heatable \w+\)", "goal needs"),
    ):
        problem = re.sub(pattern, "", data["pddl_problem"])
        assert problem != data["pddl_problem"]
        with pytest.raises(UserError, match=message):
            alfworld.parse_game({**data, "pddl_problem": problem}, f"{name}/game.tw-pddl")
    name, data, _ = household.make_game("pick_two_obj_and_place", random.Random(0), 0)
    (kind, *_) = goal_of(data["pddl_problem"], "objectType")
    one = re.sub(rf"\(objectType \w+ {kind}\)", "", data["pddl_problem"], count=1)
    with pytest.raises(UserError, match="goal needs"):
        alfworld.parse_game({**data, "pddl_problem": one}, f"{name}/game.tw-pddl")


def test_a_goal_that_is_reached_at_the_start_is_refused():
    """Any first action would be rewarded."""
    name, data, _ = household.make_game("pick_and_place_simple", random.Random(0), 0)
    problem = data["pddl_problem"]
    (kind,), (place,) = goal_of(problem, "objectType"), goal_of(problem, "receptacleType")
    mug = re.search(rf"\(objectType (\S+) {kind}\)", problem).group(1)
    shelf = re.search(rf"\(receptacleType (\S+) {place}\)", problem).group(1)
    done = re.sub(rf"\(inReceptacle {mug} \S+\)", f"(inReceptacle {mug} {shelf})", problem)
    with pytest.raises(UserError, match="reached at the start"):
        alfworld.parse_game({**data, "pddl_problem": done}, f"{name}/game.tw-pddl")


@pytest.mark.parametrize(
    "old, new",
    [
        ("(atLocation agent1", "(atLocation agent1 loc_bar_9"),  # an argument too many
        ("(receptacleAtLocation ", "(receptacleAtLocation x"),  # an id that is not declared
        ("(objectType ", "(objectTypes "),  # a predicate that is not known
        ("(pickupable ", "(pickupable (pickupable "),  # brackets
        (" - object", " - objects"),
        ("(:init", "(:init \x1b[2J"),
        ("(:goal", ""),
        ("(atLocation agent1 loc_bar_0_bar_0_bar_0_bar_30)", ""),
    ],
)
def test_a_damaged_problem_is_refused_when_it_is_opened(old, new):
    """Found only in a step, it would end the rollout of all games."""
    name, data, _ = household.make_game("pick_and_place_simple", random.Random(0), 0)
    assert old in data["pddl_problem"]
    problem = data["pddl_problem"].replace(old, new, 1)
    with pytest.raises(UserError, match="damaged") as error:
        alfworld.parse_game({**data, "pddl_problem": problem}, f"{name}/game.tw-pddl")
    assert name in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "field, value",
    [
        ("pddl_domain", 5),
        ("grammar", []),
        ("pddl_problem", None),
        ("walkthrough", 5),
        ("walkthrough", [1]),
        ("pddl_domain", "\ud800"),
    ],
)
def test_a_field_of_another_type_is_refused_when_it_is_opened(field, value):
    name, data, _ = household.make_game("pick_and_place_simple", random.Random(0), 0)
    with pytest.raises(UserError, match="damaged"):
        alfworld.parse_game({**data, field: value}, f"{name}/game.tw-pddl")
    with pytest.raises(UserError, match="damaged"):
        alfworld.parse_game([data], f"{name}/game.tw-pddl")


def test_damaged_games_shops_and_caches_are_refused_or_play_on():
    outcome = damaged_worlds.run(90, seed=1)
    assert {became for _, became in outcome} == {"refused", "playable"}, outcome
    assert outcome["cache", "playable"] == 30


def test_corrupt_unsolvable_and_foreign_games_are_refused_by_name(games, tmp_path):
    path = envs.list_items("alfworld", "train", games)[0]
    alfworld.load_game.cache_clear()
    with pytest.raises(UserError, match="unsolvable"):
        alfworld.load_game(change(path, tmp_path, solvable=False))
    domain = json.loads(Path(path).read_text())["pddl_domain"]
    foreign = domain.replace("(isClean ?o)\n", "(isHot ?o)\n", 1)
    for broken in ({"pddl_problem": "(define"}, {"grammar": None}, {"grammar": "no task"}):
        alfworld.load_game.cache_clear()
        with pytest.raises(UserError, match="damaged"):
            alfworld.load_game(change(path, tmp_path, **broken))
    alfworld.load_game.cache_clear()
    with pytest.raises(UserError, match="--engine textworld"):
        alfworld.load_game(change(path, tmp_path, pddl_domain=foreign))
    truncated = tmp_path / "game.tw-pddl"
    truncated.write_text(Path(path).read_text()[:5000])
    with pytest.raises(UserError, match="not readable as JSON"):
        alfworld.load_game(str(truncated))
    with pytest.raises(UserError, match="no such file"):
        alfworld.load_game(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="--engine x: choose"):
        envs.make_env("alfworld", path, "x")
