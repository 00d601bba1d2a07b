"""Evaluate a checkpoint on every item of a split, exactly once each.

    python evaluate.py --run tiny                       # the result of distill.py, plain prompt
    python evaluate.py --run tiny --checkpoint warmup   # init, warmup, mine, distill, or a folder
    python evaluate.py --run tiny --checkpoint mine --skills        # memory-augmented baseline
    python evaluate.py --preset alfworld-7b --checkpoint init --eval_split valid_unseen

Prints success by task type and overall with counts and Wilson 95% intervals; writes
runs/<run>/eval-....json, with a digest of the items' names: equal digests, equal panels.

The usual protocol of the field draws 128 validation episodes with repetition, so about 84 of the
140 games, and its standard error at 90% is 2.7 points; here every game counts once. Sampling is at
temperature 0.4, as in the GiGPO paper.
"""

import hashlib
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
import envs
from common import Policy, SkillBank, UserError, plan_groups, rollout
from config import flag, write_atomically
from runtime import parallel
from runtime.policy import load_policy
from runtime.run import goal_rules, list_items, set_up


@dataclass
class Evaluation:
    checkpoint: str = flag(
        "distill", "init, warmup, mine or distill of the run, or a model folder or hub name"
    )
    eval_split: str = flag("", "split to evaluate on; empty: valid_seen (ALFWorld), test (WebShop)")
    eval_temperature: float = flag(0.4, "sampling temperature; 0 is greedy")
    eval_seed: int = flag(0, "seed of the sampling")
    skills: bool = flag(False, "retrieve the run's active skills into the prompt")
    eval_items: int = flag(0, "only the first so many items, spread over the split; 0: all")
    out: str = flag(
        "", "the JSON; empty: runs/<run>/eval-<split>-<checkpoint>[-skills]-T<temp>-s<seed>.json"
    )


def evaluate(policy, config, items, temperature, seed, bank=None) -> list:
    """One episode for each item, in waves of 256 -> [Episode]."""
    episodes = []
    for start in range(0, len(items), 256):
        wave = items[start : start + 256]
        skilled = 1 if bank else 0
        groups = plan_groups(
            wave,
            config,
            members=1,
            skilled=skilled,
            bank=bank,
            statuses=("active",),
            training=False,
        )
        episodes += rollout(
            policy, config, groups, seed + start, temperature=temperature, desc="evaluate"
        )
    return episodes


def wilson(successes: int, n: int) -> tuple:
    """95% Wilson score interval of a rate."""
    if n == 0:
        return 0.0, 1.0
    z = 1.96
    rate = successes / n
    center = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def table(episodes) -> dict:
    """Task type, and "all" -> {n, solved, success, low, high, score, steps}."""
    groups = defaultdict(list)
    for e in episodes:
        groups[e.task_type].append(e)
    groups = dict(sorted(groups.items())) | {"all": episodes}
    result = {}
    for name, chosen in groups.items():
        solved = sum(e.success for e in chosen)
        low, high = wilson(solved, len(chosen))
        result[name] = {
            "n": len(chosen),
            "solved": solved,
            "success": solved / len(chosen),
            "low": low,
            "high": high,
            "score": float(np.mean([e.score for e in chosen])),
            "steps": float(np.mean([len(e.steps) for e in chosen])),
        }
    return result


def choose_checkpoint(config, choice) -> tuple:
    """The checkpoint's name in a run, or a model -> (model path, skill bank or None)."""
    root = Path("runs") / config.run
    name = choice.checkpoint
    if name in ("warmup", "mine", "distill"):
        path = root / name / "model"
        if not path.exists():
            remedy = f"run `python {name}.py --run {config.run}`, or use --checkpoint init"
            raise UserError(f"{path} is missing: {remedy}")
    else:
        path = config.model if name == "init" else name
    folder = root / ("distill" if name == "distill" else "mine")
    return path, SkillBank.load(folder, config) if choice.skills else None


def choose_items(config, choice, split) -> list:
    """The items of the split. UserError if one of them was trained on."""
    items = list_items(config, split)
    shared = envs.shared_items(config.env, config.split, split, config.data, **goal_rules(config))
    if shared:
        raise UserError(f"{len(shared)} items are in {config.split} and {split} both")
    if choice.eval_items:
        count = min(choice.eval_items, len(items))
        items = [items[i * len(items) // count] for i in range(count)]
    return items


def digest(items, config) -> str:
    """Twelve hex digits of the sorted items, blind to their order and to the data folder."""
    whole = {"split_rule": "verl"}  # the goal, not only its product
    names = ["/".join(envs.world(config.env).identity(item, whole)) for item in items]
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:12]


def main():
    config, choice = common.parse_config("evaluate", __doc__, Evaluation)
    device = set_up(config)
    split = choice.eval_split or envs.world(config.env).EVAL_SPLIT
    items = choose_items(config, choice, split)
    path, bank = choose_checkpoint(config, choice)
    policy = Policy(*load_policy(path, config, device, trainable=False))
    episodes = evaluate(policy, config, items, choice.eval_temperature, choice.eval_seed, bank)

    results = table(episodes)
    name = choice.checkpoint
    arm = "with skills" if bank else "plain prompt"
    items_digest = digest(items, config)
    panel = f"{len(items)} items of {split} ({items_digest})"
    print(f"{name}, {arm}: {panel}, T={choice.eval_temperature}, seed {choice.eval_seed}")
    print(f"{'task type':<10}{'solved':>10}{'success':>10}{'95% interval':>18}{'score':>8}  steps")
    for task_type, r in results.items():
        counts = f"{r['solved']}/{r['n']}"
        interval = f"[{r['low']:.3f}, {r['high']:.3f}]"
        line = f"{task_type:<10}{counts:>10}{r['success']:>10.3f}{interval:>18}"
        print(f"{line}{r['score']:>8.3f}{r['steps']:>7.1f}")
    label = name.strip("/").replace("/", "-") + ("-skills" if bank else "")
    suffix = f"T{choice.eval_temperature:g}-s{choice.eval_seed}"
    suffix += f"-n{len(items)}" if choice.eval_items else ""
    default = Path("runs") / config.run / f"eval-{split}-{label}-{suffix}.json"
    out = Path(choice.out) if choice.out else default
    record = {
        "checkpoint": str(path),
        "skills": bool(bank),
        "seed": choice.eval_seed,
        "split": split,
        "digest": items_digest,
        "temperature": choice.eval_temperature,
        "results": results,
        "items": {e.item: e.success for e in episodes},
    }
    if parallel.rank() == 0:
        write_atomically(out, json.dumps(record, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    common.run_script(main)
