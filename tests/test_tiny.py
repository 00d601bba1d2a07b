"""The embedded default: demonstrations, tokenizer and the imitation that makes the tiny policy."""

import json
import random

import common
import envs
import pytest
import tiny
import tiny_shop


def solved(kind_wanted, plan, count=24):
    """How many of `count` games of one kind a demonstrator with this plan solves."""
    task_type = next(t for t, short in envs.TASK_TYPES.items() if short == kind_wanted)
    rng, wins = random.Random(0), 0
    for number in range(count):
        folder, data, _ = tiny.make_game(task_type, rng, number)
        game = envs.parse_game(data, f"{folder}/game.tw-pddl")
        wins += tiny.demonstrate(envs.AlfWorld(game), plan, rng)[1]
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
    advice = tiny.strategy_text("clean", "sinkbasin", search="shelf")
    assert tiny.follow([advice], habit, ["shelf", "bed"]) == plan("sinkbasin", False, "shelf")
    second = tiny.strategy_text("pick2", complete=True)
    assert tiny.follow([second], plan(), [])["complete"]


@pytest.mark.parametrize("lessons, count", [(tiny.lessons, 600), (tiny_shop.lessons, 400)])
def test_lessons_hold_plain_steps_skilled_steps_and_parsable_summaries(lessons, count):
    pairs = lessons(count, seed=3)
    summaries = [answer for _, answer in pairs if answer.startswith("{")]
    skilled = [prompt for prompt, _ in pairs if "Experience that may help" in prompt]
    assert len(pairs) == count and summaries and 0.25 * count < len(skilled) < 0.75 * count
    assert all(common.parse_skill(text) for text in summaries)
    assert all(envs.parse_action(answer)[1] for _, answer in pairs if answer not in summaries)
    assert pairs == lessons(count, seed=3) != lessons(count, seed=4)


def test_tokenizer_round_trips_and_survives_its_file(policy, tmp_path):
    tokenizer = policy[1]
    text = "<think>a mug</think><action>go to desk 1</action> \n\n{'x': \"y\"} 12 caf\u00e9 \u597d"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    model = policy[0]
    model.save_pretrained(tmp_path)
    loaded = common.load_policy(tmp_path, common.Config(**common.PRESETS["tiny"]), "cpu")[1]
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_short_version_of_the_training_command_learns_and_is_reproducible(tmp_path):
    long = tiny.train_policy(tmp_path / "a", seed=1, count=1500, hidden=32, layers=1)
    short = tiny.train_policy(tmp_path / "b", seed=1, count=300, hidden=32, layers=1)
    again = tiny.train_policy(tmp_path / "c", seed=1, count=300, hidden=32, layers=1)
    assert long < short - 0.5 and short == again
    weights = [(tmp_path / d / "model.safetensors").read_bytes() for d in "bc"]
    assert weights[0] == weights[1]


def test_shipped_policy_is_small_and_says_how_it_was_made():
    size = sum(path.stat().st_size for path in tiny.POLICY.iterdir())
    assert size < 5e6
    assert "python tiny.py train" in (tiny.POLICY / "README.md").read_text()
    config = json.loads((tiny.POLICY / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
