"""The ALFWorld engine, its files, its prompts. `compare_alfworld.py` is the full comparison."""

import json
import random
import time
from pathlib import Path

from tools import compare_alfworld
import pytest
from conftest import SHARED

import envs
import tiny
from envs import Observation, UserError, build_prompt, parse_action


def test_fast_engine_equals_stock_alfworld_on_generated_games(games):
    """A game of each type, its walkthrough mixed with random and malformed actions."""
    rng, seen = random.Random(0), set()
    for path in envs.list_items("alfworld", "valid_seen", games):
        if envs.task_type_of(path) not in seen:
            seen.add(envs.task_type_of(path))
            differences = [d for _, d in compare_alfworld.play_both(path, rng, steps=15) if d]
            assert not differences, f"{path}: {differences[0]}"
    assert len(seen) == 6


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_fast_engine_equals_stock_alfworld_on_real_games(tmp_path):
    import tarfile

    wanted, rng = {}, random.Random(0)
    with tarfile.open(SHARED / "alfworld_json_2.1.1_train_valid_seen.tar.xz") as archive:
        for member in archive:
            if member.name.endswith("game.tw-pddl"):
                kind = envs.task_type_of(member.name)
                if kind not in wanted:
                    archive.extract(member, tmp_path, filter="data")
                    wanted[kind] = tmp_path / member.name
            if len(wanted) == 6:
                break
    for path in wanted.values():
        differences = [d for _, d in compare_alfworld.play_both(str(path), rng, steps=12) if d]
        assert not differences, f"{path}: {differences[0]}"


def test_generated_games_are_of_all_types_and_won_by_their_walkthrough_only_at_its_end(games):
    paths = envs.list_items("alfworld", "train", games)
    assert {envs.task_type_of(p) for p in paths} == set(envs.TASK_TYPES.values())
    for path in paths:
        env = envs.make_env("alfworld", path)
        obs, rewards = env.reset(), []
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
    tiny.write_games(tmp_path, {"train": 6})
    for path in tmp_path.rglob("*.tw-pddl"):
        assert path.read_text() == (games / path.relative_to(tmp_path)).read_text()


def test_128_games_load_in_a_second_and_step_in_microseconds(games):
    envs.load_game.cache_clear()
    paths, start = envs.list_items("alfworld", "train", games), time.perf_counter()
    for path in paths:
        envs.load_game(path)
    assert (time.perf_counter() - start) * 128 / len(paths) < 1
    env, rng = envs.make_env("alfworld", paths[0]), random.Random(0)
    obs, start = env.reset(), time.perf_counter()
    for _ in range(2000):
        obs, *_ = env.step(rng.choice(obs.admissible))
    assert (
        time.perf_counter() - start
    ) / 2000 < 45e-6 * 5  # stock takes 45 ms; 5x slack for a busy machine


def test_same_item_is_the_same_game_and_a_copy_is_independent(games):
    path = envs.list_items("alfworld", "train", games)[0]
    a, b = envs.make_env("alfworld", path), envs.make_env("alfworld", path)
    assert a.reset() == b.reset()
    twin = a.copy()
    for action in a.game.walkthrough:
        a.step(action)
    assert a.won and not twin.won and twin.step("look") == b.step("look")


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
    envs.load_game.cache_clear()
    with pytest.raises(UserError, match="unsolvable"):
        envs.load_game(change(path, tmp_path, solvable=False))
    foreign = json.loads(Path(path).read_text())["pddl_domain"].replace(
        "(isClean ?o)\n", "(isHot ?o)\n", 1
    )
    for broken in (dict(pddl_problem="(define"), dict(grammar=None), dict(grammar="no task")):
        envs.load_game.cache_clear()
        with pytest.raises(UserError, match="corrupt"):
            envs.load_game(change(path, tmp_path, **broken))
    envs.load_game.cache_clear()
    with pytest.raises(UserError, match="--engine textworld"):
        envs.load_game(change(path, tmp_path, pddl_domain=foreign))
    truncated = tmp_path / "game.tw-pddl"
    truncated.write_text(Path(path).read_text()[:5000])
    with pytest.raises(UserError, match="not readable as JSON"):
        envs.load_game(str(truncated))
    with pytest.raises(UserError, match="no such file"):
        envs.load_game(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="--env"):
        envs.make_env("chess", path)


@pytest.mark.parametrize(
    "text, action, valid",
    [
        ("<think>so</think><action>Go to Desk 1</action>", "go to desk 1", True),
        ("<think>so</think><action> look </action><action>go</action>", "look", True),
        ("<action>look</action>", "look", False),  # no thought
        ("<think>so<action>look</action>", "look", False),  # thought not closed
        ("<think>好</think><action>look</action>", "look", False),  # CJK
        (
            "<think>so</think> I will go to the desk and look at it",
            "l go to the desk and look at it",
            False,
        ),
        ("", "", False),
        ("<think></think><action></action>", "", True),
        ("</action><action>", "</action><action>", False),
    ],
)
def test_parse_action(text, action, valid):
    assert parse_action(text) == (action[-envs.FALLBACK_CHARS["alfworld"] :], valid)


OBS = Observation("You see a desk 1.", "put a mug in desk", "pick", ("go to desk 1", "look"))


def test_prompt_fields_and_order():
    history = [("alpha", "a"), ("beta", "b"), ("gamma", "c")]
    prompt = build_prompt(OBS, history, [("it is dark", "use the lamp")])
    order = [
        "put a mug in desk",
        "When it is dark: use the lamp",
        "Steps taken so far: 3",
        "Observation 2: 'beta'",
        "Action 3: 'c'",
        "step 4, you observe: You see a desk 1.",
        "'go to desk 1'\n'look'",
        "<think>",
        "<action>",
    ]
    places = [prompt.index(part) for part in order]
    assert places == sorted(places)
    assert "alpha" not in prompt  # only the last two steps are repeated


def test_skills_are_in_the_prompt_of_the_first_step_too_and_change_nothing_else():
    skill = [("it is dark", "use the lamp")]
    for history in ([], [("o", "a")]):
        with_skill, plain = (
            build_prompt(OBS, history, skill).split("\n"),
            build_prompt(OBS, history).split("\n"),
        )
        assert [line for line in with_skill if line not in plain] == [
            "Experience that may help:",
            "- When it is dark: use the lamp",
        ]
