"""Damaged games, catalogues and caches: each is refused in one line when opened, or plays on.

    python -m tests.faults.damaged_worlds --count 600

A third of the mutants are ALFWorld games (game.tw-pddl, traj_data.json), a third WebShop's files, a
third caches of a whole shop. One line says what became of them; any other error is a crash.
"""

import argparse
import contextlib
import json
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import envs
from config import UserError
from worlds import alfworld, household, shop, webshop

VALUES = [None, True, 0, -1, 1.5, 10**400, float("nan"), "", "x", "\ud800", "\x1b[2J", [], [1], {}]
VALUES += [{"x": 1}, ["a", None], [["a"]], 'Your task is to: {1/0}"', 10**19, "$1.2.3 to $x", "/"]


# --- ways to damage -------------------------------------------------------------------------------


def damage_bytes(content: bytes, rng) -> bytes:
    """Cut off, emptied, a few bytes changed, or a piece dropped or repeated."""
    at = rng.randrange(len(content))
    piece = content[at : at + rng.choice([1, 10, 1000])]
    way = rng.randrange(6)
    if way == 0:
        return content[:at]
    if way == 1:
        return b""
    if way == 2:
        return content[:at] + content[at + len(piece) :]
    if way == 3:
        return content[:at] + piece + content[at:]
    changed = bytearray(content)
    for _ in range(rng.choice([1, 3, 30])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def damage_json(data, rng):
    """Somewhere in the tree a value of another type, a key dropped, renamed or doubled."""
    if not data or not isinstance(data, (dict, list)) or rng.random() < 0.1:
        return rng.choice(VALUES)
    keys = list(data) if isinstance(data, dict) else range(len(data))
    key = rng.choice(list(keys))
    way = rng.randrange(6)
    if way < 4:
        data[key] = damage_json(data[key], rng)
    elif way == 4:
        del data[key]
    elif isinstance(data, dict):
        data[rng.choice(["x", "asin", "grammar", key.upper()])] = data[key]
    else:
        data.append(data[key])
    return data


def damage_pddl(data, rng):
    """Words of the problem, the domain or the grammar dropped, doubled, swapped, or the goal's
    types exchanged for others of the game, or for none.
    """
    name = rng.choice(["pddl_problem"] * 4 + ["pddl_domain", "grammar"])
    words = re.split(r"(\s+|[()])", data[name])
    spots = [i for i, word in enumerate(words) if word.strip()]
    a, b = rng.choice(spots), rng.choice(spots)
    way = rng.randrange(5)
    if way < 2:
        words[a], words[b] = words[b], words[a] if way else words[b]
    elif way == 2:
        words[a] = ""
    elif way == 3:
        words[a] += rng.choice([" ", ")", "(", ";", "x", "\n"]) + words[b]
    else:
        name = "pddl_problem"
        init, goal = data[name].split("(:goal")
        types = re.findall(r"\w+Type(?=\))", init) + ["NoType"]
        data[name] = init + "(:goal" + re.sub(r"\w+Type(?=\))", lambda _: rng.choice(types), goal)
        return data
    data[name] = "".join(words)
    return data


# --- one mutant -----------------------------------------------------------------------------------


def play(world, item, rng):
    """Open an item and play it with random admissible actions, 60 at most."""
    env = envs.make_env(world, item)
    obs = env.reset()
    for _ in range(60):
        action = rng.choice(obs.admissible).replace("<your query>", rng.choice(["red", "soft mug"]))
        obs, reward, done, info = env.step(action)
        "".join([obs.text, obs.task, *obs.admissible]).encode()  # a tokenizer can read it
        if done:
            return


def mutate_file(path, rng, pddl=False):
    way = rng.choice(["bytes", "json", "json", "pddl", "pddl"] if pddl else ["bytes", "json"])
    if way == "bytes":
        path.write_bytes(damage_bytes(path.read_bytes(), rng))
    else:
        data = json.loads(path.read_text())
        damage = damage_pddl if way == "pddl" else damage_json
        path.write_text(json.dumps(damage(data, rng)))


def game(folder, rng, number):
    """A generated game of which one file is damaged, played."""
    kinds = list(household.ROOMS_OF)
    name, data, trajectory = household.make_game(kinds[number % 6], rng, number)
    (folder / name).mkdir(parents=True)
    files = {"game.tw-pddl": data, "traj_data.json": trajectory}
    for file, content in files.items():
        (folder / name / file).write_text(json.dumps(content))
    file = "traj_data.json" if rng.random() < 0.1 else "game.tw-pddl"
    mutate_file(folder / name / file, rng, pddl=file == "game.tw-pddl")
    play("alfworld", str(folder / name / "game.tw-pddl"), rng)


def goods(folder, rng, number):
    """A shop of twelve products of which one file is damaged, a few goals played."""
    shop.make_catalogue(folder, 12, number)
    if rng.random() < 0.3:
        human = {"instruction": "a", "instruction_attributes": ["b"], "instruction_options": ["c"]}
        asin = json.loads((folder / "items_shuffle.json").read_text())[0]["asin"]
        (folder / "items_human_ins.json").write_text(json.dumps({asin: [human]}))
    mutate_file(rng.choice(sorted(folder.glob("items_*.json"))), rng)
    for split in ("train", "test"):
        items = envs.list_items("webshop", f"{split}:verl", folder)
        for item in rng.sample(items, min(3, len(items))):
            play("webshop", item, rng)


def cache(folder, rng, number):
    """A file of a whole shop's cache damaged or removed: the shop must be as before."""
    shop.make_catalogue(folder, 12, 0)
    first = webshop.load_catalogue(str(folder))
    (built,) = [path for path in webshop.CACHE.iterdir() if path.is_dir()]
    file = rng.choice(sorted(built.iterdir()))
    before = file.read_bytes()
    file.unlink()
    if rng.random() < 0.9:
        file.write_bytes(damage_bytes(before, rng))
    webshop.load_catalogue.cache_clear()
    again = webshop.load_catalogue(str(folder))
    assert [again.product(i) for i in range(12)] == [first.product(i) for i in range(12)]
    assert again.goal_names() == first.goal_names()
    if file.name != "checksums.json":  # it may have got a blank more, and say the same
        assert file.read_bytes() == before, file


def run(count, seed=0) -> Counter:
    """Damage and open `count` worlds -> what became of them."""
    rng = random.Random(seed)
    outcome = Counter()
    kept = webshop.CACHE
    for number in range(count):
        kind = (game, goods, cache)[number % 3]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "world"
            folder.mkdir()
            webshop.CACHE = Path(name) / "cache"
            webshop.load_catalogue.cache_clear()
            alfworld.load_game.cache_clear()
            became = "playable"
            try:
                with contextlib.redirect_stdout(None):
                    kind(folder, rng, number)
            except UserError as error:
                became = "refused"
                line = str(error)
                if not line.isprintable() or name not in line:
                    became = "crashes"
                    print(f"{kind.__name__} {number}: an unclear message {line!r}")
            except Exception:
                became = "crashes"
                print(f"{kind.__name__} {number}\n{traceback.format_exc()}")
            if list(webshop.CACHE.glob("*.part")):
                became = "crashes"
                print(f"{kind.__name__} {number}: left an unfinished cache")
            outcome[kind.__name__, became] += 1
    webshop.CACHE = kept
    return outcome


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=600, help="mutants")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcome = run(args.count, args.seed)
    parts = []
    for kind in ("game", "goods", "cache"):
        counts = [f"{outcome[kind, became]} {became}" for became in ("refused", "playable")]
        parts.append(f"{kind} {', '.join(counts)}")
    crashes = sum(n for (_, became), n in outcome.items() if became == "crashes")
    print(f"{args.count} mutants: {'; '.join(parts)}; {crashes} crashes")
    sys.exit(1 if crashes else 0)


if __name__ == "__main__":
    main()
