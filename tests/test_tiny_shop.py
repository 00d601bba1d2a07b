"""The synthetic catalogue and the shopping lessons."""

import random

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
        shop.demonstrate(env, plan=list(env.goal["goal_options"]), rng=rng, max_steps=15)
        wins += env.score == 1.0
        shop.demonstrate(env, plan=[], rng=rng, max_steps=15)
        losses += env.score < 1.0
    assert wins >= 36 and losses >= 36


def test_a_skill_decides_which_options_are_chosen():
    strategies = [shop.strategy_text(["size", "color"]), shop.strategy_text(["flavor"])]
    assert shop.follow(strategies, ["pack"]) == ["color", "size", "flavor"]
    assert shop.follow([shop.strategy_text([])], ["pack"]) == []
    assert shop.follow([], ["pack"]) == ["pack"]


def test_catalogue_of_the_demo_has_a_hundred_held_out_goals_of_other_products(tmp_path):
    folder = str(shop.write_catalogue(tmp_path / "shop"))
    train, test = (envs.list_items("webshop", split, folder) for split in ("train", "test"))
    assert len(test) >= 100 and len(train) > 500
    assert not envs.shared_items("webshop", "train", "test", folder)
