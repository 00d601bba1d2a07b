"""Evaluate a checkpoint on every item of a split, exactly once each.

    python evaluate.py                                  # the result of distill.py, plain prompt
    python evaluate.py --run slow --checkpoint warmup   # init, warmup, mine, distill, or a folder
    python evaluate.py --checkpoint mine --skills       # memory-augmented baseline
    python evaluate.py --preset alfworld-7b --checkpoint init --eval_split valid_unseen

Prints success by task type with Wilson 95% intervals; writes runs/<run>/eval-....json, with a
digest of the items and what is in them: equal digests, equal panels. Interrupted, the same command
goes on.
"""

import hashlib
import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import envs
from common import open_groups, rollout
from config import PHASES, UserError, flag, read_json, read_text, write_atomically
from runtime import parallel, saves
from runtime.flags import parse_config
from runtime.policy import Policy, load_policy
from runtime.run import append, list_items, load_state, run_script, set_up
from skills import SkillBank

SETTINGS = (  # of a config that change what is played
    "history",
    "max_steps",
    "max_prompt_tokens",
    "max_response_tokens",
    "dtype",
    "show",
    "top_k",
)
WAVE = 64  # items played together, after which the results are on the disk


@dataclass
class Evaluation:
    checkpoint: str = flag("distill", "init, or a phase of the run, or a model", group="evaluation")
    eval_split: str = flag("", "empty: valid_seen (ALFWorld) or test (WebShop)")
    eval_temperature: float = flag(0.4, "of the sampling; 0 is greedy", at_least=0, below=100)
    eval_seed: int = flag(0, "of the sampling", at_least=0, below=2**32)
    skills: bool = flag(False, "retrieve the run's active skills into the prompt")
    eval_items: int = flag(0, "so many items, spread over the split; 0: all", at_least=0)
    out: str = flag("", "the JSON; empty: runs/<run>/eval-<split>-<checkpoint>-....json")


def evaluate(policy, config, items, temperature, seed, bank=None, done=None) -> list[dict]:
    """One episode for each item, wave by wave -> {item, task_type, success, score, steps, tokens}
    of each; tokens are those of all its prompts and responses. The waves that an interrupted
    evaluation left in the file `done` are not played again. UserError if an item cannot be played.
    """
    outcomes = read_outcomes(done, items)
    for start in range(len(outcomes), len(items), WAVE):
        groups = open_groups(items[start : start + WAVE], config, members=1)
        for (episode,) in groups if bank else ():
            episode.skills = bank.retrieve(episode.task, episode.task_type, ("active",))
            episode.shown = bank.shown(episode.skills)
        desc = f"evaluate {start + len(groups)}/{len(items)}"
        episodes = rollout(policy, config, groups, seed + start, temperature=temperature, desc=desc)
        if len(episodes) < len(groups):
            raise UserError("some items cannot be played, see above; fix or remove them")
        played = []
        for e in episodes:
            outcome = {"item": e.item, "task_type": e.task_type, "success": bool(e.success)}
            tokens = sum(len(s.prompt_ids) + len(s.response_ids) for s in e.steps)
            outcome |= {"score": float(e.score), "steps": len(e.steps), "tokens": tokens}
            played.append(outcome)
        outcomes += played
        if done and parallel.rank() == 0:
            append(done, played)
    return outcomes


def read_outcomes(path, items) -> list[dict]:
    """The whole waves that an interrupted evaluation of these items left; the file then has no more
    than these. None of it where it is not what this evaluation would have written.
    """
    outcomes = []
    if path and parallel.rank() == 0:
        lines = read_text(path).split("\n")[:-1] if path.exists() else []  # a kill may leave half
        try:
            outcomes = [json.loads(line) for line in lines[: len(lines) // WAVE * WAVE]]
            if [outcome["item"] for outcome in outcomes] != items[: len(outcomes)]:
                outcomes = []
        except (ValueError, TypeError, KeyError):
            outcomes = []
        write_atomically(path, "")  # also to know at once whether the result can be written
        append(path, outcomes)
    return parallel.all_gather(outcomes)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a rate."""
    if n == 0:
        return 0.0, 1.0
    z = 1.96
    rate = successes / n
    center = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def summarize(outcomes) -> dict[str, dict]:
    """Task type, and "all" -> {n, solved, success, low, high, score, steps, tokens}."""
    by_type = defaultdict(list)
    for outcome in outcomes:
        by_type[outcome["task_type"]].append(outcome)
    result = {}
    for name, chosen in (dict(sorted(by_type.items())) | {"all": outcomes}).items():
        n = len(chosen)
        solved = sum(e["success"] for e in chosen)
        low, high = wilson(solved, n)
        result[name] = {"n": n, "solved": solved, "success": solved / n, "low": low, "high": high}
        result[name] |= {
            key: float(np.mean([e[key] for e in chosen])) for key in ("score", "steps", "tokens")
        }
    return result


def table(results) -> str:
    """What `summarize` gives, a line for each task type."""
    head = f"{'task type':<12}{'solved':>10}{'success':>9}{'95% interval':>17}{'score':>7}"
    head += "  steps  tokens"
    lines = [head]
    for name, r in results.items():
        counts = f"{r['solved']}/{r['n']}"
        interval = f"{r['low']:.3f} to {r['high']:.3f}"
        line = f"{name:<12}{counts:>10}{r['success']:>9.3f}{interval:>17}"
        lines.append(f"{line}{r['score']:>7.3f}{r['steps']:>7.1f}{r['tokens']:>8.0f}")
    return "\n".join(lines)


def find_checkpoint(config, name) -> str | Path:
    """A phase of the run, "init" or a model -> the path of its model. UserError for a save that is
    damaged or of another phase.
    """
    if name not in PHASES:
        path = config.model if name == "init" else name
        save = Path(path).parent
        if (save / saves.MANIFEST).exists() and (reason := saves.problem(save)):
            raise UserError(f"--checkpoint {path}: {reason}; choose another one")
        return path
    folder = saves.find(Path("runs") / config.run, name)
    if folder is None:
        remedy = f"run `python {name}.py --run {config.run}`, or use --checkpoint init"
        raise UserError(f"runs/{config.run}/{name}/model is missing: {remedy}")
    return folder / "model"


def choose_items(config, split, count) -> list[str]:
    """The items of the split, or `count` of them. UserError if one of them was trained on."""
    items = list_items(config, split)
    identity = envs.world(config.env).identity
    if split != config.split:
        try:
            trained = {identity(item, split) for item in list_items(config, config.split)}
        except UserError as error:  # only one of the two is on this machine
            print(f"{config.split} and {split} were not checked for common items: {error}")
            trained = set()
        shared = trained & {identity(item, split) for item in items}
        if shared:
            raise UserError(f"{len(shared)} items are in {config.split} and {split} both")
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def identity_of(config, choice, panel, path, bank) -> str:
    """Twelve hex digits of this very evaluation: same model, items, settings and skills."""
    manifest = Path(path).parent / saves.MANIFEST  # of a save, whose files were checked just now
    if manifest.exists():
        model = manifest.read_text(encoding="utf-8")
    else:
        model = saves.files_of(Path(path)) if Path(path).is_dir() else str(path)
    flags = {name: value for name, value in asdict(config).items() if name not in ("run", "device")}
    skills = bank.dump() if bank else None
    parts = [model, panel, skills, flags, choice.eval_temperature, choice.eval_seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def check_out(out, record):
    """UserError where `out` is no place for a result, or has that of another evaluation."""
    out.parent.mkdir(parents=True, exist_ok=True)
    known = read_json(out, ["results"]) if out.exists() else {}
    for name, value in record.items():
        if known.get(name, value) != value:
            other = f"{out} is of another evaluation ({name} {known[name]}, not {value})"
            raise UserError(f"{other}; delete it, or give another --out")


def main():
    config, choice = parse_config("evaluate", __doc__, Evaluation)
    device = set_up(config)
    rules = config.split.split(":")[1:]  # "train:human" is evaluated on "test:human"
    split = choice.eval_split or ":".join([envs.world(config.env).EVAL_SPLIT, *rules])
    items = choose_items(config, split, choice.eval_items)
    path = find_checkpoint(config, choice.checkpoint)
    bank = None
    if choice.skills:  # those of phase 2 for its own checkpoint, else those of phase 1
        phase = "distill" if choice.checkpoint == "distill" else "mine"
        root = Path("runs") / config.run
        bank = SkillBank.load(saves.find(root, phase) or root / phase, config)
    temperature, seed = choice.eval_temperature, choice.eval_seed
    label = choice.checkpoint.strip("/").replace("/", "-")
    if bank:
        label += "-skills" if config.show == "skill" else f"-{config.show}"
    name = f"eval-{split.replace(':', '-')}-{label}-T{temperature:g}-s{seed}"
    name += f"-n{len(items)}" if choice.eval_items else ""
    out = Path(choice.out or Path("runs") / config.run / f"{name}.json")
    panel = parallel.by_one(lambda: envs.digest(config.env, items))[:12]
    record = {"checkpoint": str(Path(path)), "skills": bool(bank), "seed": seed, "split": split}
    record |= {"digest": panel, "temperature": temperature}
    record |= {name: getattr(config, name) for name in SETTINGS}
    check_out(out, record)
    policy = Policy(*load_policy(path, config, device, trainable=False))
    done = out.with_name(f"{out.stem}-{identity_of(config, choice, panel, path, bank)}.waves")
    outcomes = evaluate(policy, config, items, temperature, seed, bank, done)

    results = summarize(outcomes)
    print(f"{choice.checkpoint}, {'with skills' if bank else 'plain prompt'}: ", end="")
    print(
        f"{len(items)} items of {split} ({panel}), T={temperature}, seed {seed}\n{table(results)}"
    )
    folder = Path(path).parent
    is_save = (folder / saves.MANIFEST).exists()
    iteration = load_state(folder, ["iteration"])["iteration"] if is_save else None
    record |= {"iteration": iteration, "results": results}
    record["items"] = {outcome["item"]: outcome["success"] for outcome in outcomes}
    if parallel.rank() == 0:
        write_atomically(out, json.dumps(record, indent=1))
        done.unlink(missing_ok=True)
    print(f"written to {out}")


if __name__ == "__main__":
    run_script(main)
