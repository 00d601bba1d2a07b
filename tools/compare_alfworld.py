"""Certify the fast ALFWorld engine against the stock alfworld package, step by step.

    python -m tools.compare_alfworld --data $ALFWORLD_DATA --split train,valid_seen --games 40

Every game is played with its walkthrough mixed with random admissible, inadmissible and malformed
actions; on each step the observation, the admissible actions, the reward and the end must be equal.
40 games of each task type take about 20 minutes, nearly all of it in the stock engine.
`tests/test_envs.py` plays a few.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import envs

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
    start = time.perf_counter()
    result = call(*args)
    SECONDS[name] += time.perf_counter() - start
    return result


def play_both(path: str, rng: random.Random, steps: int):
    """Yield (action, what differs or None) for the reset and for each of `steps` actions."""
    stock = timed("stock start", envs.make_env, "alfworld", path, "textworld")
    fast = timed("fast start", envs.make_env, "alfworld", path)
    walkthrough = list(json.loads(Path(path).read_text())["walkthrough"])
    theirs, ours = timed("stock start", stock.reset), timed("fast start", fast.reset)
    yield "reset", None if theirs == ours else (theirs, ours)
    for _ in range(steps):
        quiet = [a for a in ours.admissible if not a.startswith("go to")]  # changes the state
        draw = rng.random()
        if walkthrough and draw < 0.4:
            action = walkthrough.pop(0)
        else:
            action = rng.choice(
                quiet if draw < 0.75 else ours.admissible if draw < 0.9 else MALFORMED
            )
        theirs, ours = timed("stock", stock.step, action), timed("fast", fast.step, action)
        yield action, None if theirs == ours else (theirs, ours)
        ours = ours[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default=None, help="folder that holds json_2.1.1 (default $ALFWORLD_DATA)"
    )
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
            by_type[envs.task_type_of(path)].append(path)
    played, mismatches, start = Counter(), 0, time.time()
    for task_type, paths in by_type.items():
        if args.types and task_type not in args.types.split(","):
            continue
        for path in rng.sample(paths, min(args.games, len(paths))):
            played[task_type] += 1
            for action, difference in play_both(path, rng, args.steps):
                played["steps"] += 1
                if difference:
                    mismatches += 1
                    print(
                        f"MISMATCH {path} after {action!r}\n  stock {difference[0]}\n"
                        f"  fast  {difference[1]}",
                        flush=True,
                    )
        print(
            f"{task_type}: {played[task_type]} games, {mismatches} mismatches, "
            f"{time.time() - start:.0f} s",
            flush=True,
        )
    games, steps = sum(played.values()) - played["steps"], played["steps"]
    steps -= games  # the resets were counted too
    print(f"{games} games, {steps} steps: {mismatches} mismatches")
    stock, fast = SECONDS["stock"] / steps, SECONDS["fast"] / steps
    starts = [SECONDS[f"{name} start"] / games for name in ("stock", "fast")]
    print(f"stock: {stock * 1e3:.1f} ms a step, {starts[0]:.2f} s to load and reset a game")
    print(f"fast:  {fast * 1e6:.1f} us a step, {starts[1] * 1e3:.2f} ms to load and reset a game")
    print(f"{stock / fast:.0f} times as fast")
    sys.exit(1 if mismatches else 0)


if __name__ == "__main__":
    main()
