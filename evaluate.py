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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import common
import envs
from common import Policy, SkillBank, UserError, plan_groups, rollout
from config import PHASES, flag, write_atomically
from runtime import parallel, saves
from runtime.policy import load_policy
from runtime.run import goal_rules, list_items, load_state, set_up


@dataclass
class Outcome:
    """How one item went."""

    item: str
    task_type: str
    success: bool
    score: float
    steps: int


@dataclass
class Evaluation:
    checkpoint: str = flag(
        "distill", "init, warmup, mine or distill of the run, or a model folder or hub name"
    )
    eval_split: str = flag("", "split to evaluate on; empty: valid_seen (ALFWorld), test (WebShop)")
    eval_temperature: float = flag(0.4, "sampling temperature; 0 is greedy")
    eval_seed: int = flag(0, "seed of the sampling")
    skills: bool = flag(False, "retrieve the run's active skills into the prompt")
    eval_items: int = flag(0, "only so many items, spread evenly over the split; 0: all")
    out: str = flag(
        "", "the JSON; empty: runs/<run>/eval-<split>-<checkpoint>[-skills]-T<temp>-s<seed>.json"
    )


def check(choice):
    """UserError for a value that no evaluation could have."""
    for name in ("eval_temperature", "eval_seed", "eval_items"):
        value = getattr(choice, name)
        if not 0 <= value < 2**32:
            raise UserError(f"--{name} {value}: must be 0 or more, and below 2^32")


WAVE = 64  # items played together, after which the results are on the disk


def evaluate(policy, config, items, temperature, seed, bank=None, done=None) -> list:
    """One episode for each item, wave by wave -> [Outcome].

    done   a file: the waves that an interrupted evaluation left in it are not played again

    UserError if an item cannot be played.
    """
    outcomes = read_outcomes(done, items)
    for start in range(len(outcomes), len(items), WAVE):
        wave = items[start : start + WAVE]
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
        desc = f"evaluate {start + len(wave)}/{len(items)}"
        episodes = rollout(policy, config, groups, seed + start, temperature=temperature, desc=desc)
        if len(episodes) < len(wave):
            raise UserError("some items cannot be played, see above; mend or remove them")
        played = [
            Outcome(e.item, e.task_type, bool(e.success), float(e.score), len(e.steps))
            for e in episodes
        ]
        outcomes += played
        if done and parallel.rank() == 0:
            with open(done, "a") as file:
                file.write("".join(json.dumps(asdict(outcome)) + "\n" for outcome in played))
    return outcomes


def read_outcomes(path, items) -> list:
    """The whole waves that an interrupted evaluation of these items left; the file then has no more
    than these. None of it where it is not what this evaluation would have written.
    """
    if path is None or not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # a kill may have left half of the last line
    lines = lines[: len(lines) // WAVE * WAVE]
    try:
        outcomes = [Outcome(**json.loads(line)) for line in lines]
    except (ValueError, TypeError):
        outcomes = []
    if [outcome.item for outcome in outcomes] != items[: len(outcomes)]:
        outcomes = []
    if parallel.rank() == 0:
        kept = "".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
        write_atomically(path, kept)
    parallel.wait()
    return outcomes


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


def table(outcomes) -> dict:
    """Task type, and "all" -> {n, solved, success, low, high, score, steps}."""
    groups = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.task_type].append(outcome)
    groups = dict(sorted(groups.items())) | {"all": outcomes}
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
            "steps": float(np.mean([e.steps for e in chosen])),
        }
    return result


def choose_checkpoint(config, choice) -> tuple:
    """The checkpoint's name in a run, or a model -> (model path, skill bank or None)."""
    root = Path("runs") / config.run
    name = choice.checkpoint
    if name in PHASES:
        folder = saves.find(root, name)
        if folder is None:
            remedy = f"run `python {name}.py --run {config.run}`, or use --checkpoint init"
            raise UserError(f"{root / name}/model is missing: {remedy}")
        path = folder / "model"
    else:
        path = config.model if name == "init" else name
    if not choice.skills:
        return path, None
    folder = root / ("distill" if name == "distill" else "mine")
    return path, SkillBank.load(saves.find(root, folder.name) or folder, config)


def iteration_of(path):
    """After which iteration of its phase a checkpoint was saved; None for any other model."""
    folder = Path(path).parent
    return load_state(folder)["iteration"] if (folder / saves.MANIFEST).exists() else None


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


def waves_file(out, config, choice, items, path, bank) -> Path:
    """Where the waves of this very evaluation are kept until it is whole: same model, items,
    settings and skills; after any change the name is another one.
    """
    manifest = Path(path).parent / saves.MANIFEST  # of a save, whose files were hashed just now
    if manifest.exists():
        model = manifest.read_text()
    else:
        model = saves.files_of(Path(path)) if Path(path).is_dir() else str(path)
    skills = [asdict(skill) for skill in bank.skills] if bank else None
    flags = {name: value for name, value in asdict(config).items() if name not in ("run", "device")}
    identity = [model, items, skills, flags, choice.eval_temperature, choice.eval_seed]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(f"{out.stem}-{key}.waves")


def main():
    config, choice = common.parse_config("evaluate", __doc__, Evaluation)
    check(choice)
    device = set_up(config)
    split = choice.eval_split or envs.world(config.env).EVAL_SPLIT
    items = choose_items(config, choice, split)
    path, bank = choose_checkpoint(config, choice)
    name = choice.checkpoint
    label = name.strip("/").replace("/", "-") + ("-skills" if bank else "")
    suffix = f"T{choice.eval_temperature:g}-s{choice.eval_seed}"
    suffix += f"-n{len(items)}" if choice.eval_items else ""
    default = Path("runs") / config.run / f"eval-{split}-{label}-{suffix}.json"
    out = Path(choice.out) if choice.out else default
    done = waves_file(out, config, choice, items, path, bank)
    policy = Policy(*load_policy(path, config, device, trainable=False))
    outcomes = evaluate(
        policy, config, items, choice.eval_temperature, choice.eval_seed, bank, done
    )

    results = table(outcomes)
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
    record = {
        "checkpoint": str(path),
        "skills": bool(bank),
        "seed": choice.eval_seed,
        "split": split,
        "digest": items_digest,
        "iteration": iteration_of(path),
        "temperature": choice.eval_temperature,
        "results": results,
        "items": {outcome.item: outcome.success for outcome in outcomes},
    }
    if parallel.rank() == 0:
        write_atomically(out, json.dumps(record, indent=1))
        done.unlink(missing_ok=True)
    print(f"written to {out}")


if __name__ == "__main__":
    common.run_script(main)
