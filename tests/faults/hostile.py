"""Strings that a model may write, or nobody ever wrote, into everything that reads a model's text.

    python -m tests.faults.hostile --count 10000

Random strings, then single pieces repeated to 1,000, 10,000 and 100,000 characters. None may raise
an error, take a second, or reach the table of skills with a character that is not printable.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

import envs
from config import Config
from skills import INSTANCE, SkillBank, parse_skill
from worlds import alfworld, household, shop, webshop

PIECES = (
    ["<action>", "</action>", "<think>", "</think>", "<ACTION", "search[", "click[", "]", "[", "]]"]
    + ["<r> ", "<a> ", "<c> ", "<q> ", "buy now", "next >", "< prev", "description", "red", "shirt"]
    + ["go to ", "take ", "mug 1", " from ", "drawer 3", "look", "inventory", "help", "B0ABCDEF12"]
    + ["```", "```json", '{"condition": "', '", "strategy": "', '"}', "{", "}", '"', "'", "\\", ":"]
    + ["When ", "a 1 ", ". ", "word ", "9", "0", "-1e999", "NaN", "null", "[", ",", "#", "$", "|"]
    + [" ", "  ", "\n", "\r\n", "\t", "\0", "\x1b[31m", "\x7f", "\x85", "\xa0", "\u2028", "\u202e"]
    + ["\ud800", "\udc00", "\\ud800", "\\u0000", "\\u001b", "\ufeff", "\u200d", "\u0301", "\u0130"]
    + [
        "a",
        "y",
        "_",
        "a'",
        "1,",
        "é",
        "ß",
        "好",
        "ひ",
        "カ",
        "한",
        "❤️",
        "👩‍👩‍👧",
        "𝔘",
        "\U0010ffff",
    ]
)
SLOW = 1.0  # seconds that no string of these lengths may take


def draw(rng) -> str:
    """One to forty pieces, one of them maybe repeated; now and then as a skill's JSON."""
    pieces = rng.choices(PIECES, k=rng.randint(1, rng.choice([3, 12, 40])))
    if rng.random() < 0.2:
        pieces[rng.randrange(len(pieces))] *= rng.choice([2, 30, 700, 2000])
    text = "".join(pieces)
    if rng.random() < 0.3:
        cut = rng.randint(0, len(text))
        text = json.dumps({"condition": text[:cut], "strategy": text[cut:]})
    return text


def readers(folder) -> dict:
    """name -> what reads a string; a wrong result is an AssertionError."""
    name, data, _ = household.make_game("pick_heat_then_place_in_recep", random.Random(0), 0)
    game = alfworld.AlfWorld(alfworld.parse_game(data, f"{name}/game.tw-pddl"))
    goods = shop.make_catalogue(folder, 40, 0)
    webshop.build_cache(goods, goods / "cache")
    catalogue = webshop.Catalogue(goods / "cache")
    session = webshop.WebShop(catalogue.goal(catalogue.goal_names()[0]), catalogue)
    bank = SkillBank(Config())

    def play(world, text):
        action, valid = envs.parse_action(text, 30)
        assert isinstance(action, str) and valid in (True, False)
        for said in (text, action, f"search[{text}]", f"click[{text}]"):
            obs, reward, done, info = world.step(said)
            assert isinstance(obs.text, str) and 0 <= reward <= 1 and 0 <= info["score"] <= 1
            if done:
                obs = world.reset()
        prompts = envs.build_prompts(obs, [(obs.text, text)], [(text, text)])
        assert all(isinstance(prompt, str) for prompt in prompts)

    def learn(text):
        for skill in (parse_skill(text), (text[::2], text[1::2])):
            if skill and bank.add(*skill, "pick") == "added":
                assert all(line.isprintable() for line in bank.table().split("\n"))
                assert len(bank.table().split("\n")) == len(bank.skills) + 1
                assert len(": ".join(skill)) <= 640
        bank.skills = bank.skills[-9:]

    game.reset()
    session.reset()
    return {
        "AlfWorld": lambda text: play(game, text),
        "WebShop": lambda text: play(session, text),
        "skills": learn,
        "INSTANCE": INSTANCE.search,
        "mining prompt": lambda text: envs.build_mining_prompt(
            text, text, [(text, text)], [text], 200, "alfworld"
        ),
    }


def run(count, seed=0, longest=100_000) -> dict:
    """Feed `count` random strings and every piece repeated up to `longest` characters.

    -> {"strings", "calls", "crashes", "slowest": (seconds, reader, string)}
    """
    rng = random.Random(seed)
    strings = (draw(rng) for _ in range(count))
    lengths = [n for n in (1_000, 10_000, 100_000, 1_000_000) if n <= longest]
    repeated = (piece * (n // len(piece)) for n in lengths for piece in PIECES)
    result = {"strings": 0, "calls": 0, "crashes": 0, "slowest": (0.0, "", "")}
    with tempfile.TemporaryDirectory() as folder:
        table = readers(Path(folder))
        for texts in (strings, repeated):
            for text in texts:
                result["strings"] += 1
                for name, read in table.items():
                    start = time.perf_counter()
                    try:
                        read(text)
                    except Exception:
                        result["crashes"] += 1
                        print(f"{name} of {text[:200]!r}\n{traceback.format_exc()}")
                    seconds = time.perf_counter() - start
                    result["calls"] += 1
                    result["slowest"] = max(result["slowest"], (seconds, name, text))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="random strings")
    parser.add_argument("--longest", type=int, default=100_000, help="characters of a repetition")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = run(args.count, args.seed, args.longest)
    seconds, name, text = result["slowest"]
    print(
        f"{result['strings']} strings, {result['calls']} calls: {result['crashes']} crashes; "
        f"slowest {seconds:.3f} s: {name} of {len(text)} characters {text[:20]!r}..."
    )
    sys.exit(1 if result["crashes"] or seconds > SLOW else 0)


if __name__ == "__main__":
    main()
