"""The embedded default: demonstrations, tokenizer and the imitation that makes the tiny policy."""

import json
import random
import re

import pytest
from conftest import ROOT

import envs
from config import UserError
from runtime.policy import SHIPPED
from skills import parse_skill
from tiny import household, shop
from tiny.imitate import encode, train_policy, train_tokenizer
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


def test_lessons_of_a_data_folder_show_its_training_games_only(games):
    """A lesson from the other split would leak the evaluation."""
    train = envs.list_items("alfworld", "train", games)
    first = {envs.make_env("alfworld", item).reset().text for item in train}
    prompts = [prompt for prompt, _ in household.lessons(600, seed=3, data=games)]
    shown = [p for p in prompts if "You observe: " in p]
    shown = {p.split("You observe: ")[1].split("\nAdmissible actions")[0] for p in shown}
    assert len(shown) > 6 and shown <= first

    drawn = household.training_games(games, random.Random(0))
    drawn = [next(drawn) for _ in range(12)]
    assert {game.path for game in drawn} == set(train)
    assert len({game.task_type for game in drawn[:6]}) == 6  # the task types in turns


def test_a_demonstrator_who_knows_solves_the_games_of_a_data_folder(games):
    drawn = household.training_games(games, random.Random(0))
    usual = household.usual_places([next(drawn) for _ in range(12)])
    rng = random.Random(0)
    wins = 0
    for _ in range(24):
        game = next(drawn)
        right = plan(household.APPLIANCE_FOR.get(game.goal[0]), complete=True)
        wins += household.demonstrate(alfworld.AlfWorld(game), right, rng, 50, usual)[1]
    assert wins > 20


def test_receptacles_that_share_a_place_are_searched_and_filled():
    """In real rooms one cannot go to what stands where one is; the demonstrator only looked."""
    rng = random.Random(0)
    wins = 0
    for number in range(24):
        folder, data, _ = household.make_game("pick_and_place_simple", rng, number)
        data["pddl_problem"] = re.sub(
            r"loc_bar_([1-9]\d*)_bar_\d_bar_\d_bar_60",
            lambda spot: f"loc_bar_{(int(spot[1]) + 1) // 2}_bar_9_bar_9_bar_60",
            data["pddl_problem"],
        )
        game = alfworld.parse_game(data, f"{folder}/game.tw-pddl")
        assert max(len(receptacles) for receptacles in game.at.values()) == 2
        wins += household.demonstrate(alfworld.AlfWorld(game), plan(), rng, 50, slips=0.0)[1]
    assert wins > 20


def test_the_search_leaves_out_what_never_holds_the_object(games):
    game = alfworld.load_game(envs.list_items("alfworld", "train", games)[0])
    target = game.goal[1].removesuffix("type")
    (place,) = {r for r, things in game.inside.items() for o in things if target in game.name[o]}
    usual = {target: {household.kind_of(game.name[place])}}
    steps, _ = household.demonstrate(
        alfworld.AlfWorld(game), plan(complete=True), random.Random(0), 3, usual, slips=0.0
    )
    assert household.kind_of(steps[0][2].removeprefix("go to ")) in usual[target]


def test_short_tokens_spell_the_same_text():
    texts = [prompt + answer for prompt, answer in household.lessons(300, seed=3)]
    long, short = train_tokenizer(texts), train_tokenizer(texts, short=True)
    ids = encode(short, texts)
    assert [short.decode(row) for row in ids] == texts
    assert sum(map(len, ids)) < 0.8 * sum(map(len, encode(long, texts)))


def test_a_data_folder_for_the_shop_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="leave it out"):
        train_policy(tmp_path, world="webshop", data="x")


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
