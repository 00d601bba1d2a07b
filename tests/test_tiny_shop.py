"""The synthetic catalogue and the shopping lessons."""

import random

import pytest

import common
import envs
import tiny_shop
import webshop


@pytest.fixture
def catalogue(tmp_path):
    tiny_shop.make_catalogue(tmp_path, products=60, seed=1)
    webshop.build_cache(tmp_path, tmp_path / "cache")
    return webshop.Catalogue(tmp_path / "cache")


def test_choosing_every_option_of_the_task_succeeds_and_choosing_none_does_not(catalogue):
    rng, wins, losses = random.Random(0), 0, 0
    goals = random.Random(0).sample(catalogue.goal_names(), 40)
    for name in goals:
        env = webshop.WebShop(catalogue.goal(name), catalogue)
        tiny_shop.demonstrate(env, plan=list(env.goal["goal_options"]), rng=rng, max_steps=15)
        wins += env.score == 1.0
        tiny_shop.demonstrate(env, plan=[], rng=rng, max_steps=15)
        losses += env.score < 1.0
    assert wins >= 36 and losses >= 36


def test_a_skill_decides_which_options_are_chosen():
    strategies = [tiny_shop.strategy_text(["size", "color"]), tiny_shop.strategy_text(["flavor"])]
    assert tiny_shop.follow(strategies, ["pack"]) == ["color", "size", "flavor"]
    assert tiny_shop.follow([tiny_shop.strategy_text([])], ["pack"]) == []
    assert tiny_shop.follow([], ["pack"]) == ["pack"]


def test_shopping_lessons_hold_plain_steps_skilled_steps_and_parsable_summaries():
    pairs = tiny_shop.lessons(400, seed=3)
    summaries = [answer for _, answer in pairs if answer.startswith("{")]
    skilled = [prompt for prompt, _ in pairs if "Experience that may help" in prompt]
    assert len(pairs) == 400 and summaries and 100 < len(skilled) < 300
    assert all(common.parse_skill(text) for text in summaries)
    assert all(envs.parse_action(answer)[1] for _, answer in pairs if answer not in summaries)
    assert pairs == tiny_shop.lessons(400, seed=3) != tiny_shop.lessons(400, seed=4)


def test_catalogue_of_the_demo_has_a_hundred_held_out_goals_of_other_products(tmp_path):
    folder = str(tiny_shop.write_catalogue(tmp_path / "shop"))
    train, test = (envs.list_items("webshop", split, folder) for split in ("train", "test"))
    assert len(test) >= 100 and len(train) > 500
    assert not envs.shared_items("webshop", "train", "test", folder)
