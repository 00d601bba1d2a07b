"""The embedded default: demonstrations, tokenizer and the imitation that makes the tiny policy."""

import json
import random

import pytest
from conftest import ROOT

import envs
from runtime.policy import SHIPPED
from skills import parse_skill
from tiny import household, shop
from tiny.imitate import train_policy
from worlds import alfworld


def solved(kind_wanted, plan, count=24):
    """How many of `count` games of one kind a demonstrator with this plan solves."""
    task_type = next(t for t, short in alfworld.TASK_TYPES.items() if short == kind_wanted)
    rng = random.Random(0)
    wins = 0
    for number in range(count):
        folder, data, _ = household.make_game(task_type, rng, number)
        game = alfworld.parse_game(data, f"{folder}/game.tw-pddl")
        wins += household.demonstrate(alfworld.AlfWorld(game), plan, rng)[1]
    return wins


def plan(appliance=None, complete=False, search=""):
    return {"appliance": appliance, "complete": complete, "search": search}


@pytest.mark.parametrize(
    "kind, right, wrong",
    [
        ("clean", plan("sinkbasin"), plan("fridge")),
        ("cool", plan("fridge"), plan("microwave")),
        ("look", plan(complete=True), plan()),
        ("pick2", plan(complete=True), plan()),
    ],
)
def test_right_skills_solve_tasks_and_wrong_ones_do_not(kind, right, wrong):
    assert solved(kind, right) > 16 and solved(kind, wrong) < 8


def test_a_skill_overrides_the_habit():
    habit = plan("microwave", True)
    advice = household.strategy_text("clean", "sinkbasin", search="shelf")
    assert household.follow([advice], habit, ["shelf", "bed"]) == plan("sinkbasin", False, "shelf")
    second = household.strategy_text("pick2", complete=True)
    assert household.follow([second], plan(), [])["complete"]


@pytest.mark.parametrize("lessons, count", [(household.lessons, 600), (shop.lessons, 400)])
def test_lessons_hold_plain_steps_skilled_steps_and_parsable_summaries(lessons, count):
    pairs = lessons(count, seed=3)
    summaries = [answer for _, answer in pairs if answer.startswith("{")]
    skilled = [prompt for prompt, _ in pairs if "Experience that may help" in prompt]
    assert len(pairs) == count and summaries and 0.25 * count < len(skilled) < 0.75 * count
    assert all(parse_skill(text) for text in summaries)
    assert all(envs.parse_action(answer)[1] for _, answer in pairs if answer not in summaries)
    assert pairs == lessons(count, seed=3) != lessons(count, seed=4)


def test_a_short_version_of_the_training_command_learns_and_is_reproducible(tmp_path):
    long = train_policy(tmp_path / "a", seed=1, count=600, hidden=32, layers=1)
    short = train_policy(tmp_path / "b", seed=1, count=150, hidden=32, layers=1)
    again = train_policy(tmp_path / "c", seed=1, count=150, hidden=32, layers=1)
    assert long < short - 0.5 and short == again
    weights = [(tmp_path / d / "model.safetensors").read_bytes() for d in "bc"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_policy_is_small_and_says_how_it_was_made(name):
    folder = ROOT / SHIPPED[name]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    assert "python -m tiny.imitate" in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
