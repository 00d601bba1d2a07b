"""Certify the fast ALFWorld engine against the stock alfworld package, step by step.

    python -m tests.certify_alfworld --data $ALFWORLD_DATA --split train,valid_seen --games 40

Every game is played with its walkthrough mixed with random admissible, inadmissible and malformed
actions; on each step the observation, the admissible actions, the reward and the end must be equal.
40 games of each task type take about 20 minutes, nearly all of it in the stock engine.
`tests/test_alfworld.py` plays a few.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import envs
from runtime.run import run_script
from worlds import alfworld

MALFORMED = [
    "nonsense",
    "",
    " look ",
    "help",
    "Look",
    "go to",
    "take mug 1 from fridge 1",
    "open drawer 1",
    "x" * 500,
]
SECONDS = Counter()  # engine and call -> seconds, for the speeds printed at the end


def timed(name, call, *args):
    """call(*args), its seconds added to SECONDS[name]."""
    start = time.perf_counter()
    result = call(*args)
    SECONDS[name] += time.perf_counter() - start
    return result


def play_both(path: str, rng: random.Random, steps: int):
    """Yield (action, what differs or None) for the reset and for each of `steps` actions.

    What differs is (stock's, ours): the observation, or (observation, reward, done, info).
    """
    stock = timed("stock start", envs.make_env, "alfworld", path, "textworld")
    fast = timed("fast start", envs.make_env, "alfworld", path)
    walkthrough = list(json.loads(Path(path).read_text())["walkthrough"])
    theirs = timed("stock start", stock.reset)
    ours = timed("fast start", fast.reset)
    yield "reset", None if theirs == ours else (theirs, ours)
    obs = ours
    for _ in range(steps):
        quiet = [a for a in obs.admissible if not a.startswith("go to")]  # changes the state
        draw = rng.random()
        if walkthrough and draw < 0.4:
            action = walkthrough.pop(0)
        elif draw < 0.75:
            action = rng.choice(quiet)
        elif draw < 0.9:
            action = rng.choice(obs.admissible)
        else:
            action = rng.choice(MALFORMED)
        theirs = timed("stock", stock.step, action)
        ours = timed("fast", fast.step, action)
        yield action, None if theirs == ours else (theirs, ours)
        obs = ours[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder that holds json_2.1.1 (default $ALFWORLD_DATA)")
    parser.add_argument("--split", default="valid_seen", help="split, or several joined by commas")
    parser.add_argument("--types", default="", help="task types, joined by commas; default all")
    parser.add_argument("--games", type=int, default=40, help="games of each task type")
    parser.add_argument("--steps", type=int, default=30, help="actions played in each game")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    by_type = defaultdict(list)
    for split in args.split.split(","):
        for path in envs.list_items("alfworld", split, args.data):
            by_type[alfworld.task_type_of(path)].append(path)
    games = 0
    steps = 0
    mismatches = 0
    start = time.time()
    for task_type, paths in by_type.items():
        if args.types and task_type not in args.types.split(","):
            continue
        chosen = rng.sample(paths, min(args.games, len(paths)))
        for path in chosen:
            for action, difference in play_both(path, rng, args.steps):
                if difference:
                    mismatches += 1
                    theirs, ours = difference
                    print(f"MISMATCH {path} after {action!r}", flush=True)
                    print(f"  stock {theirs}\n  fast  {ours}", flush=True)
        games += len(chosen)
        steps += len(chosen) * args.steps
        spent = time.time() - start
        line = f"{task_type}: {len(chosen)} games, {mismatches} mismatches, {spent:.0f} s"
        print(line, flush=True)
    print(f"{games} games, {steps} steps: {mismatches} mismatches")
    stock = SECONDS["stock"] / steps
    fast = SECONDS["fast"] / steps
    stock_start = SECONDS["stock start"] / games
    fast_start = SECONDS["fast start"] / games
    print(f"stock: {stock * 1e3:.1f} ms a step, {stock_start:.2f} s to load and reset a game")
    print(f"fast:  {fast * 1e6:.1f} us a step, {fast_start * 1e3:.2f} ms to load and reset a game")
    print(f"{stock / fast:.0f} times as fast")
    sys.exit(1 if mismatches else 0)


if __name__ == "__main__":
    run_script(main)
