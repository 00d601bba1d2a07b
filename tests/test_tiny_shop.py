"""The synthetic catalogue and the shopping lessons."""

import random
import re

import pytest

import envs
from tiny.lessons_shop import demonstrate, follow, goals_of, lessons, strategy_text, summarize
from worlds import webshop
from worlds.shop import OPTIONS, make, make_catalogue


@pytest.fixture
def catalogue(tmp_path):
    make_catalogue(tmp_path, products=60, seed=1)
    webshop.build_cache(tmp_path, tmp_path / "cache")
    return webshop.Catalogue(tmp_path / "cache")


def test_choosing_every_option_of_the_task_succeeds_and_choosing_none_does_not(catalogue):
    rng = random.Random(0)
    scores = {True: [], False: []}  # all options chosen, or none
    for name in random.Random(0).sample(catalogue.goal_names(), 40):
        env = webshop.WebShop(catalogue.goal(name), catalogue)
        for every, found in scores.items():
            plan = list(env.goal["goal_options"]) if every else []
            steps = demonstrate(env, plan=plan, rng=rng, max_steps=15)
            found.append(env.score)
            words = steps[0][2].removeprefix("search[").removesuffix("]")
            assert f"Find me {words} with " in env.goal["instruction_text"]  # can be copied
    assert sum(score == 1.0 for score in scores[True]) >= 36
    assert sum(score < 1.0 for score in scores[False]) >= 36


def test_a_skill_decides_which_options_are_chosen():
    strategies = [strategy_text(["size", "color"]), strategy_text(["flavor"])]
    names = ["color", "flavor", "pack", "size"]
    assert follow(strategies, ["pack"], names) == ["color", "flavor", "size"]
    assert follow([strategy_text([])], ["pack"], names) == []
    assert follow([], ["pack"], names) == ["pack"]


def test_catalogue_of_the_demo_has_a_hundred_held_out_goals_of_other_products(tmp_path):
    folder = str(make(tmp_path / "tiny-shop-3"))
    train, test = (envs.list_items("webshop", split, folder) for split in ("train", "test"))
    assert len(test) >= 100 and len(train) > 500
    products = [{webshop.identity(item, "train") for item in items} for items in (train, test)]
    assert not products[0] & products[1]


def test_few_lessons_too_are_of_all_difficulties():
    """640 lessons had once one catalogue, and so two options in every task."""
    tasks = {
        re.search(r"Find me (.*?) price", prompt).group(1)
        for prompt, _ in lessons(400, seed=0, difficulties=(1, 2, 3, 4))
        if "Find me" in prompt
    }
    named = {sum(f"{name}: " in task for name in OPTIONS) for task in tasks}
    assert named == {1, 2, 3, 4}


def test_lessons_of_a_data_folder_show_its_training_goals_only(tmp_path):
    """A lesson about a held-out product would leak the evaluation."""
    folder = str(make_catalogue(tmp_path / "shop", products=60, seed=1))
    shown = {}
    for split in ("train", "test"):
        pairs = lessons(300, seed=3, data=folder, split=split)
        shown[split] = {re.findall("Find me (.*?) with", prompt)[-1] for prompt, _ in pairs}
    assert shown["train"] and shown["test"] and not shown["train"] & shown["test"]
    drawn = goals_of(folder, random.Random(0), "train")
    drawn = [next(drawn).goal for _ in range(200)]
    products = {goal["asin"] for goal in drawn}
    assert {goal["asin"] for goal in drawn[: len(products)]} == products  # the products in turns
    assert len({goal["instruction_text"] for goal in drawn}) > 2 * len(products)


def test_a_summary_names_the_options_that_were_chosen():
    """In real shops a value is no list of ours, and one value may be part of another."""
    offered = {"color": ["red", "dark red"], "item shape": ["round"], "size": ["dark", "3 ft"]}
    history = [("page", "click[dark red]"), ("page", "click[round]"), ("page", "click[buy now]")]
    text = summarize("garden", offered, history)
    assert "choose the color and the item shape of the task" in text
