"""Lessons in shopping: what a tiny policy is taught before any reinforcement learning.

As in the household, the demonstrator is ignorant on purpose. It finds the product, but often buys
without choosing the options that the task names. It follows a skill that says which to choose,
right or wrong, and summarizes what an episode chose. That all named options have to be chosen, the
three phases find out.
"""

import itertools
import json
import random
import tempfile
from collections import defaultdict
from pathlib import Path

import envs
from config import PRESETS
from worlds import webshop
from worlds.shop import make_catalogue

PRESET = PRESETS["tiny"]  # the lessons show prompts as it makes them
GOALS = 500  # of a turn of catalogues


def strategy_text(chosen) -> str:
    """What an episode or a skill says to do; `follow` reads it back."""
    if not chosen:
        return "search for the product, open it and buy it at once"
    return f"open the product, choose the {' and the '.join(chosen)} of the task, then buy it"


def follow(strategies, plan, names) -> list:
    """The options, of the task's `names`, to choose after reading skills: all that any names."""
    if not strategies:
        return plan
    text = " ".join(strategies)
    return [name for name in names if f"the {name} " in text]


def demonstrate(env, plan, rng, max_steps=11) -> list:
    """Shop for the goal, choosing the options in `plan` -> [(observation, thought, action, slip)].

    Slips are random clicks, to show how to go on after one.
    """
    obs = env.reset()
    steps = []
    while not env.done and len(steps) < max_steps:
        slip = env.kind != "search" and rng.random() < 0.05
        thought, action = next_move(env, obs, plan)
        if slip:
            action = rng.choice([a for a in obs.admissible if a != "click[buy now]"])
        steps.append((obs, thought, action, slip))
        obs = env.step(action)[0]
    return steps


def next_move(env, obs, plan) -> tuple:
    """(thought, action) on the page that `obs` shows."""
    goal = env.goal
    instruction = product_of(env)["instruction"]
    wanted = instruction.removeprefix("Find me ")  # the task's own words, to be copied
    if env.kind == "search":
        return f"I want {wanted}", f"search[{wanted}]"
    if env.kind == "results":
        if goal["asin"] in obs.text:
            return f"I open the {wanted}", f"click[{goal['asin'].lower()}]"
        return "I do not see it", "click[next >]"
    if env.kind == "subpage" or env.asin != goal["asin"]:
        return "I go back", "click[< prev]"
    for name, value in goal["goal_options"].items():
        if name in plan and name not in env.options:
            return f"I choose {name}: {value}", f"click[{value}]"
    return "I buy it", "click[buy now]"


def product_of(env) -> dict:
    """The product that the goal is about."""
    return env.catalogue.product(env.catalogue.number[env.goal["asin"]])


def summarize(category, offered, history) -> str:
    """What an instruct model would write of an episode; `offered` has the values of each option."""
    actions = {action for _, action in history}
    chosen = [name for name in offered if actions & {f"click[{v}]" for v in offered[name]}]
    condition = f"shopping for {category}"
    return json.dumps({"condition": condition, "strategy": strategy_text(chosen)})


def lessons(count, seed, knows=0.45, difficulties=(None,), data=None, split="train") -> list:
    """`count` (prompt, response) pairs: plain steps, steps under skills, and summaries.

    knows          how often the demonstrator chooses an option that the task names, without a skill
    difficulties   of the catalogues made for the lessons, in turns
    data           a data folder, whose goals of `split` are shown instead
    """
    rng = random.Random(f"{seed} lessons")
    # a goal gives about ten; a catalogue has one difficulty, and few lessons too are of all
    goals = max(1, min(GOALS, count // 10) // len(difficulties))
    games = goals_of(data, rng, split) if data else made_goals(seed, goals, difficulties)
    pairs = []
    while len(pairs) < count:
        pairs += lesson(next(games), rng, knows)
    return pairs[:count]


def made_goals(seed, goals, difficulties):
    """Goals without end, so many of a catalogue, the difficulties in turns."""
    for number in itertools.count(1):
        difficulty = difficulties[number % len(difficulties)]
        with tempfile.TemporaryDirectory() as name:
            folder = make_catalogue(Path(name), 240, f"lessons {seed} {number}", difficulty)
            webshop.build_cache(folder, folder / "cache")
            catalogue = webshop.Catalogue(folder / "cache")
            for goal in catalogue.goal_names()[:goals]:
                yield webshop.WebShop(catalogue.goal(goal), catalogue)


def goals_of(data, rng, split):
    """Goals of a data folder's split without end, shuffled, the products in turns."""
    items = defaultdict(list)
    for item in envs.list_items("webshop", split, data):
        items[webshop.identity(item, split)].append(item)
    while True:
        for product in rng.sample(list(items), len(items)):
            yield envs.make_env("webshop", rng.choice(items[product]))


def lesson(env, rng, knows=0.45) -> list:
    """Two episodes for one goal, plain and with skills, each maybe with its summary."""
    category = env.goal["category"]
    names = list(env.goal["goal_options"])
    offered = {name: product_of(env)["options"][name] for name in names}
    pairs = []

    def some(share):
        return [name for name in names if rng.random() < share]

    for with_skill in (False, True):
        plan = some(knows)
        skills = []
        if with_skill:
            for _ in range(rng.choice([1, 1, 2])):
                skills.append((f"shopping for {category}", strategy_text(some(0.7))))
            plan = follow([strategy for _, strategy in skills], plan, names)
        history = []
        for obs, thought, action, slip in demonstrate(env, plan, rng):
            if not slip:
                answer = f"<think>{thought}</think><action>{action}</action>"
                prompt = envs.build_prompt(obs, history, skills, PRESET["history"])
                pairs.append((prompt, answer))
            history.append((obs.text, action))
        if rng.random() < 0.5:
            task = env.goal["instruction_text"]
            chars = PRESET["mine_obs_chars"]
            prompt = envs.build_mining_prompt(task, category, history, (), chars, "webshop")
            pairs.append((prompt, summarize(category, offered, history)))
    return pairs
