"""The synthetic catalogue and the shopping lessons."""

import random
import re

import pytest

import envs
from tiny import shop
from worlds import webshop


@pytest.fixture
def catalogue(tmp_path):
    shop.make_catalogue(tmp_path, products=60, seed=1)
    webshop.build_cache(tmp_path, tmp_path / "cache")
    return webshop.Catalogue(tmp_path / "cache")


def test_choosing_every_option_of_the_task_succeeds_and_choosing_none_does_not(catalogue):
    rng = random.Random(0)
    wins = 0
    losses = 0
    goals = random.Random(0).sample(catalogue.goal_names(), 40)
    for name in goals:
        env = webshop.WebShop(catalogue.goal(name), catalogue)
        steps = shop.demonstrate(env, plan=list(env.goal["goal_options"]), rng=rng, max_steps=15)
        words = steps[0][2].removeprefix("search[").removesuffix("]")
        assert f"Find me {words} with " in env.goal["instruction_text"]  # words that can be copied
        wins += env.score == 1.0
        shop.demonstrate(env, plan=[], rng=rng, max_steps=15)
        losses += env.score < 1.0
    assert wins >= 36 and losses >= 36


def test_a_skill_decides_which_options_are_chosen():
    strategies = [shop.strategy_text(["size", "color"]), shop.strategy_text(["flavor"])]
    names = ["color", "flavor", "pack", "size"]
    assert shop.follow(strategies, ["pack"], names) == ["color", "flavor", "size"]
    assert shop.follow([shop.strategy_text([])], ["pack"], names) == []
    assert shop.follow([], ["pack"], names) == ["pack"]


def test_catalogue_of_the_demo_has_a_hundred_held_out_goals_of_other_products(tmp_path):
    folder = str(shop.write_catalogue(tmp_path / "shop"))
    train, test = (envs.list_items("webshop", split, folder) for split in ("train", "test"))
    assert len(test) >= 100 and len(train) > 500
    assert not envs.shared_items("webshop", "train", "test", folder)


def test_few_lessons_too_are_of_all_difficulties():
    """640 lessons had once one catalogue, and so two options in every task."""
    tasks = {
        re.search(r"Find me (.*?) price", prompt).group(1)
        for prompt, _ in shop.lessons(400, seed=0, difficulties=(1, 2, 3, 4))
        if "Find me" in prompt
    }
    named = {sum(f"{name}: " in task for name in shop.OPTIONS) for task in tasks}
    assert named == {1, 2, 3, 4}


def test_lessons_of_a_data_folder_show_its_training_goals_only(tmp_path):
    """A lesson about a held-out product would leak the evaluation."""
    folder = str(shop.make_catalogue(tmp_path / "shop", products=60, seed=1))
    shown = {}
    for split in ("train", "test"):
        pairs = shop.lessons(300, seed=3, data=folder, split=split)
        shown[split] = {re.findall("Find me (.*?) with", prompt)[-1] for prompt, _ in pairs}
    assert shown["train"] and shown["test"] and not shown["train"] & shown["test"]
    drawn = shop.goals_of(folder, random.Random(0), "train")
    drawn = [next(drawn).goal for _ in range(200)]
    products = {goal["asin"] for goal in drawn}
    assert {goal["asin"] for goal in drawn[: len(products)]} == products  # the products in turns
    assert len({goal["instruction_text"] for goal in drawn}) > 2 * len(products)


def test_a_summary_names_the_options_that_were_chosen():
    """In real shops a value is no list of ours, and one value may be part of another."""
    offered = {"color": ["red", "dark red"], "item shape": ["round"], "size": ["dark", "3 ft"]}
    history = [("page", "click[dark red]"), ("page", "click[round]"), ("page", "click[buy now]")]
    text = shop.summarize("garden", offered, history)
    assert "choose the color and the item shape of the task" in text
