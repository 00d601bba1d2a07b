"""Evaluate a checkpoint on every item of a split, exactly once each.

    python evaluate.py --run tiny                       # the result of distill.py, plain prompt
    python evaluate.py --run tiny --checkpoint warmup   # init, warmup, mine, distill, or a folder
    python evaluate.py --run tiny --checkpoint mine --skills        # memory-augmented baseline
    python evaluate.py --preset alfworld-7b --checkpoint init --eval_split valid_unseen

Prints success by task type and overall with counts and Wilson 95% intervals; writes
runs/<run>/eval-....json.

The usual protocol of the field draws 128 validation episodes with repetition, so about 84 of the
140 games, and its standard error at 90% is 2.7 points; here every game counts once. Sampling is at
temperature 0.4, as in the GiGPO paper.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
import envs
import parallel
from common import SkillBank, UserError, flag, plan_rollouts, rollout, wilson


@dataclass
class Evaluation:
    checkpoint: str = flag(
        "distill", "init, warmup, mine or distill of the run, or a model folder or hub name"
    )
    eval_split: str = flag("", "split to evaluate on; empty: valid_seen (ALFWorld), test (WebShop)")
    eval_temperature: float = flag(0.4, "sampling temperature; 0 is greedy")
    skills: bool = flag(False, "retrieve the run's active skills into the prompt")
    eval_items: int = flag(0, "only the first so many items, spread over the split; 0: all")
    out: str = flag(
        "", "where to write the JSON; empty: runs/<run>/eval-<split>-<checkpoint>[-skills].json"
    )


def evaluate(model, tokenizer, config, items, temperature, bank=None) -> list:
    """One episode for each item, in waves of 256 -> [Episode]."""
    episodes = []
    for start in range(0, len(items), 256):
        wave = items[start : start + 256]
        plan = plan_rollouts(wave, config, bank, ("active",), members=1, skilled=1)
        seed = config.seed + start
        episodes += rollout(
            model, tokenizer, config, plan, temperature=temperature, seed=seed, desc="evaluate"
        )
    return episodes


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


def choose(config, choice):
    """The checkpoint's name in a run, or a model -> (model path, skill bank or None)."""
    root, name = Path("runs") / config.run, choice.checkpoint
    if name in ("warmup", "mine", "distill"):
        path = root / name / "model"
        if not path.exists():
            remedy = f"run `python {name}.py --run {config.run}`, or use --checkpoint init"
            raise UserError(f"{path} is missing: {remedy}")
    else:
        path = config.model if name == "init" else name
    folder = root / ("distill" if name == "distill" else "mine")
    return path, SkillBank.load(folder, config) if choice.skills else None


def main():
    config, choice = common.parse_config("evaluate", __doc__.split("\n")[0], Evaluation)
    device = common.set_up(config)
    split = choice.eval_split or envs.EVAL_SPLIT[config.env]
    items = common.list_items(config, split)
    rules = common.goal_rules(config)
    shared = envs.shared_items(config.env, config.split, split, config.data, **rules)
    if shared:
        raise UserError(f"{len(shared)} items are in {config.split} and {split} both")
    if choice.eval_items:
        items = items[:: max(1, len(items) // choice.eval_items)][: choice.eval_items]
    path, bank = choose(config, choice)
    model, tokenizer = common.load_policy(path, config, device, trainable=False)
    episodes = evaluate(model, tokenizer, config, items, choice.eval_temperature, bank)

    results, name = table(episodes), choice.checkpoint
    arm = "with skills" if bank else "plain prompt"
    print(f"{name}, {arm}: {len(items)} items of {split}, T={choice.eval_temperature}")
    print(f"{'task type':<10}{'solved':>10}{'success':>10}{'95% interval':>18}{'score':>8}  steps")
    for task_type, r in results.items():
        counts, interval = f"{r['solved']}/{r['n']}", f"[{r['low']:.3f}, {r['high']:.3f}]"
        line = f"{task_type:<10}{counts:>10}{r['success']:>10.3f}{interval:>18}"
        print(f"{line}{r['score']:>8.3f}{r['steps']:>7.1f}")
    label = (Path(name).name if "/" in name else name) + ("-skills" if bank else "")
    default = Path("runs") / config.run / f"eval-{split}-{label}.json"
    out = Path(choice.out) if choice.out else default
    record = {"checkpoint": str(path), "skills": bool(bank), "seed": config.seed}
    record |= {"split": split, "temperature": choice.eval_temperature}
    record |= {"results": results, "items": {e.item: e.success for e in episodes}}
    if parallel.rank() == 0:
        common.write_atomically(out, json.dumps(record, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    common.run_script(main)
