"""The ALFWorld engine and its files. `python -m tools.compare_alfworld` is the full comparison."""

import itertools
import json
import random
import tarfile
from pathlib import Path

import pytest
from conftest import SHARED

import envs
from config import UserError
from tiny import household
from tools import compare_alfworld
from worlds import alfworld


def test_fast_engine_equals_stock_alfworld_on_generated_games(games):
    """A game of each type, its walkthrough mixed with random and malformed actions."""
    rng = random.Random(0)
    seen = set()
    for path in envs.list_items("alfworld", "valid_seen", games):
        if alfworld.task_type_of(path) not in seen:
            seen.add(alfworld.task_type_of(path))
            differences = [d for _, d in compare_alfworld.play_both(path, rng, steps=10) if d]
            assert not differences, f"{path}: {differences[0]}"
    assert len(seen) == 6


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
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
        differences = [d for _, d in compare_alfworld.play_both(str(path), rng, steps=10) if d]
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
    household.write_games(tmp_path, {"train": 6})
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


def test_corrupt_unsolvable_and_foreign_games_are_refused_by_name(games, tmp_path):
    path = envs.list_items("alfworld", "train", games)[0]
    alfworld.load_game.cache_clear()
    with pytest.raises(UserError, match="unsolvable"):
        alfworld.load_game(change(path, tmp_path, solvable=False))
    domain = json.loads(Path(path).read_text())["pddl_domain"]
    foreign = domain.replace("(isClean ?o)\n", "(isHot ?o)\n", 1)
    for broken in (dict(pddl_problem="(define"), dict(grammar=None), dict(grammar="no task")):
        alfworld.load_game.cache_clear()
        with pytest.raises(UserError, match="corrupt"):
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
