"""The embedded default's second world: a small WebShop catalogue and lessons in shopping.

    python -m tiny.imitate --world webshop --count 32000 ...    # see policy_webshop/README.md

The catalogue is in the original's format (`items_shuffle.json`, `items_ins_v2.json`), so everything
from search to reward is the real engine. As in ALFWorld, the demonstrator that the tiny policy
imitates is ignorant on purpose: it finds the product, but often buys without choosing the options
that the task names. It follows a skill that says which to choose, right or wrong, and summarizes
what an episode chose. That all named options have to be chosen, the three phases find out.
"""

import json
import random
import tempfile
from pathlib import Path

import envs
from worlds import webshop

SHOP = Path("runs/tiny-shop")
HISTORY = 1  # past steps in a prompt, as in the preset: pages are long for a small policy

OPTIONS = {
    "color": ["red", "blue", "green", "black", "white", "pink", "gray"],
    "size": ["small", "medium", "large"],
    "scent": ["lemon", "rose", "mint", "vanilla"],
    "flavor": ["apple", "cherry", "honey", "salt"],
    "pack": ["single", "double", "family"],
}
CATEGORIES = {  # category: (levels above the product, options, attributes, products)
    "fashion": (
        "Clothing › Basics", ["color", "size"], "soft warm slim loose light thick",
        "shirt jacket sock hat scarf glove",
    ),
    "beauty": (
        "Beauty › Care", ["scent"], "gentle natural fresh mild creamy clear",
        "soap lotion shampoo cream mask balm",
    ),
    "grocery": (
        "Grocery › Snacks", ["flavor", "pack"], "sweet crunchy organic dark dry raw",
        "cookie cereal chip nut cracker candy",
    ),
    "garden": (
        "Home › Living", ["size", "color"], "sturdy round flat tall modern wooden",
        "chair table lamp shelf basket rug",
    ),
    "electronics": (
        "Electronics › Parts", ["color"], "fast slim wireless portable quiet bright",
        "cable charger speaker mouse keyboard radio",
    ),
}  # fmt: skip
BRANDS = "Arbo Belka Cando Delmar Evora Fenix Gilda Hanse Iris Jolin Kapro Lumo".split()


def make_catalogue(folder: Path, products: int, seed) -> Path:
    """Write `products` random products with their instructions, in the original's format."""
    rng = random.Random(f"{seed} catalogue")
    items, instructions = [], {}
    while len(items) < products:
        category = rng.choice(list(CATEGORIES))
        levels, options, attributes, nouns = CATEGORIES[category]
        noun, (first, second) = rng.choice(nouns.split()), rng.sample(attributes.split(), 2)
        asin = (first[:3] + second[:3] + noun[:3]).upper()  # an id a small policy can spell
        if asin in instructions:
            continue
        price = rng.randint(5, 90)
        values = {name: sorted(rng.sample(OPTIONS[name], 3)) for name in options}
        items.append(
            {
                "asin": asin,
                "name": f"{rng.choice(BRANDS)} {first} {second} {noun}",
                "full_description": f"A {first} {noun}.",
                "small_description": [f"{first} and {second}"],
                "pricing": f"${price}.0",
                "customization_options": {
                    name: [{"value": value} for value in chosen] for name, chosen in values.items()
                },
                "category": category,
                "query": noun,
                "product_category": f"{levels} › {noun}",
            }
        )
        instructions[asin] = {
            "attributes": [first, second],
            "instruction": f"Find me {first} {second} {noun}",
            "instruction_attributes": [first, second],
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items_ins_v2.json").write_text(json.dumps(instructions))
    (folder / "items_shuffle.json").write_text(json.dumps(items))
    return folder


def write_catalogue(folder: Path = SHOP) -> Path:
    """The catalogue of the demo, written once."""
    done = (folder / "items_shuffle.json").exists()
    return folder if done else make_catalogue(folder, products=240, seed=0)


# --------------------------------------------------------------------------------------------------
# Demonstrations
# --------------------------------------------------------------------------------------------------


def strategy_text(chosen) -> str:
    """What an episode or a skill says to do; `follow` reads it back."""
    if not chosen:
        return "search for the product, open it and buy it at once"
    return f"open the product, choose the {' and the '.join(chosen)} of the task, then buy it"


def follow(strategies, plan) -> list:
    """The options to choose after reading skills: all that any of them names."""
    text = " ".join(strategies)
    named = [name for name in OPTIONS if f"the {name} " in text]
    return named if strategies else plan


def demonstrate(env, plan, rng, max_steps=9):
    """Shop for the goal, choosing the options in `plan` -> [(observation, thought, action, slip)].

    Slips are random clicks, to show how to go on after one.
    """
    obs, goal, steps, done = env.reset(), env.goal, [], False
    words = goal["attributes"] + [goal["query"]]
    while not done and len(steps) < max_steps:
        slip = env.kind != "search" and rng.random() < 0.05
        missing = [n for n in goal["goal_options"] if n in plan and n not in env.options]
        if env.kind == "search":
            thought, action = "I want " + " ".join(words), f"search[{' '.join(words)}]"
        elif env.kind == "results":
            found = goal["asin"] in obs.text
            thought = f"I open the {' '.join(words)}" if found else "I do not see it"
            action = f"click[{goal['asin'].lower()}]" if found else "click[next >]"
        elif env.kind == "subpage" or env.asin != goal["asin"]:
            thought, action = "I go back", "click[< prev]"
        elif missing:
            value = goal["goal_options"][missing[0]]
            thought, action = f"I choose {missing[0]}: {value}", f"click[{value}]"
        else:
            thought, action = "I buy it", "click[buy now]"
        if slip:
            action = rng.choice([a for a in obs.admissible if a != "click[buy now]"])
        steps.append((obs, thought, action, slip))
        obs, _, done, _ = env.step(action)
    return steps


def summarize(category, names, history) -> str:
    """What an instruct model would write of an episode, as the skill's JSON."""
    actions = " ".join(action for _, action in history)
    chosen = [n for n in names if any(f"click[{v}]" in actions for v in OPTIONS[n])]
    condition = f"shopping for {category}"
    return json.dumps({"condition": condition, "strategy": strategy_text(chosen)})


def lessons(count, seed):
    """`count` (prompt, response) pairs: plain steps, steps under skills, and summaries."""
    rng, pairs, number = random.Random(f"{seed} lessons"), [], 0
    while len(pairs) < count:
        number += 1
        with tempfile.TemporaryDirectory() as folder:
            make_catalogue(Path(folder), products=240, seed=f"lessons {seed} {number}")
            webshop.build_cache(folder, Path(folder) / "cache")
            catalogue = webshop.Catalogue(Path(folder) / "cache")
            for name in catalogue.goal_names()[:500]:
                pairs += lesson(webshop.WebShop(catalogue.goal(name), catalogue), rng)
            catalogue.file.close()
    return pairs[:count]


def lesson(env, rng) -> list:
    """Two episodes for one goal, plain and with skills, each with its summary."""
    pairs, category, names = [], env.goal["category"], list(env.goal["goal_options"])
    some = lambda p: [n for n in names if rng.random() < p]  # noqa: E731
    for with_skill in (False, True):
        plan, skills = some(0.45), []
        if with_skill:
            for _ in range(rng.choice([1, 1, 2])):
                skills.append((f"shopping for {category}", strategy_text(some(0.7))))
            plan = follow([strategy for _, strategy in skills], plan)
        history = []
        for obs, thought, action, slip in demonstrate(env, plan, rng):
            if not slip:
                answer = f"<think>{thought}</think><action>{action}</action>"
                pairs.append((envs.build_prompt(obs, history, skills, HISTORY), answer))
            history.append((obs.text, action))
        if rng.random() < 0.5:
            task = env.goal["instruction_text"]
            prompt = envs.build_mining_prompt(task, category, history, (), 60, "webshop")
            pairs.append((prompt, summarize(category, names, history)))
    return pairs
