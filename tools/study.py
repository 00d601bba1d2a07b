"""Variants x seeds at equal episodes: all variants of a seed go on from one warm-up checkpoint.

    python -m tools.study --name shop --variants siri,gigpo --seeds 1,2,3,4,5 --jobs 2 \\
        --flags "--env webshop --tasks 8"
    python -m tools.study --name shop --variants siri,gigpo --seeds 1,2,3,4,5 --table   # draw again

For each seed one run of `warmup.py`; forks of it through `mine.py`, one for all variants that are
alike in phase 1; forks of these through `distill.py`, in --points stages; and after the warm-up,
after mining and after each stage an evaluation of the whole held-out split, plain prompt. Every
command whose result is there is skipped, so the study goes on where it was stopped. `--jobs`
processes run side by side, each on one thread.

Writes results/study-<name>.md (a table: mean over seeds, 95% interval, paired difference with the
control) and .png (held-out success against episodes, mean and spread of the seeds), .json (every
item of every evaluation).

The intervals are for other seeds and other items (`interval`); with one seed they are over items
alone. Differences are paired: the same seeds and items for the variant and for the control.
"""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from config import UserError, read_json, read_jsonl, write_atomically
from runtime.run import load_state, run_script

ROOT = Path(__file__).resolve().parent.parent
CONTROL = "gigpo"
FIXED = ("flags", "mine_iterations", "distill_iterations", "points", "eval_items")  # of a study
VARIANTS = {  # name: (flags of both phases, flags of phase 2 alone); one line makes an ablation
    "gigpo": ("--skill_share 0", ""),
    "siri": ("", ""),
    "no-internalization": ("", "--lambda_max 0"),
    "response": ("", "--internalize_tokens response"),
    "response-strong": ("", "--internalize_tokens response --lambda_max 1.0"),
    "action-strong": ("", "--lambda_max 1.0"),
    "no-gate": ("", "--internalize_gate none"),
    "no-weight": ("", "--internalize_weight one"),
    "no-validation": ("--validate false", ""),
    "grpo": ("--step_weight 0", ""),
    "arm-baselines": ("--arm_baselines true", ""),
    "kl": ("", "--internalize_tokens response --internalize_loss kl"),
    "hand-off": ("", "--internalize_tokens response --hand_off true"),
    "placebo": ("--placebo true", ""),
    "given": ("--given_skills given-skills.jsonl --mine_episodes 0", ""),  # a file you write: a
    # line is {"condition": "...", "strategy": "...", "bucket": "<task type or category>"}
}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the study; its runs begin with it")
    parser.add_argument("--variants", default="siri,gigpo", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--flags", default="", help="flags of every phase of every variant")
    parser.add_argument("--mine_iterations", type=int, default=4)
    parser.add_argument("--distill_iterations", type=int, default=12)
    parser.add_argument("--points", type=int, default=3, help="evaluations within phase 2")
    parser.add_argument("--eval_items", type=int, default=0, help="of the panel; 0: all of it")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--table", action="store_true", help="no runs, only table and figure")
    args = parser.parse_args()
    args.variants = args.variants.split(",")
    args.seeds = args.seeds.split(",")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be 1 at least")
    for variant in args.variants:
        if variant not in VARIANTS:
            raise UserError(f"--variants {variant}: choose of {', '.join(VARIANTS)}")
    return args


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


def command(script, run, *flags):
    """Run a script on one thread, its output in runs/<run>.log; UserError with its last line."""
    log = Path("runs") / f"{run}.log"
    log.parent.mkdir(exist_ok=True)
    words = [word for part in flags for word in shlex.split(part)]
    line = [sys.executable, str(ROOT / script), "--run", run, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        done = subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        last = log.read_text().strip().splitlines()[-1]
        raise UserError(f"{' '.join(line[1:])}: {last} (see {log})")


def finished(run, phase, iterations) -> bool:
    """Whether a run has saved so many iterations of a phase."""
    return saved_iteration(run, phase) >= iterations


def saved_iteration(run, phase) -> int:
    """The iteration of a phase's last save; -1 where there is none."""
    folder = Path("runs") / run / phase
    return load_state(folder)["iteration"] if (folder / "state.pt").exists() else -1


def evaluated(args, run, checkpoint, label) -> dict:
    """The evaluation of a checkpoint, made when it is not there yet."""
    out = Path("runs") / run / f"study-{label}.json"
    if not out.exists():
        items = f"--eval_items {args.eval_items}"
        command("evaluate.py", run, f"--checkpoint {checkpoint}", f"--out {out}", items)
    return read_json(out)


def warm_up(args, seed):
    run = f"{args.name}-warmup-s{seed}"
    if not (Path("runs") / run / "study-warmup.json").exists():
        command("warmup.py", run, args.flags, f"--seed {seed}")
    evaluated(args, run, "init", "init")
    evaluated(args, run, "warmup", "warmup")


def mined_by(args, variant, seed) -> str:
    """The run whose phase 1 a variant goes on from: that of the first one with the same flags."""
    alike = [name for name in VARIANTS if VARIANTS[name][0] == VARIANTS[variant][0]]
    return f"{args.name}-mine-{alike[0]}-s{seed}"


def mine(args, run, seed, flags):
    """Phase 1 and its evaluation."""
    if not finished(run, "mine", args.mine_iterations):
        fork = f"--fork {args.name}-warmup-s{seed}"
        command("mine.py", run, fork, flags, f"--mine_iterations {args.mine_iterations}")
    evaluated(args, run, "mine", "mine")


def distill(args, variant, seed):
    """Phase 2 of one variant and seed, with its evaluations."""
    run = f"{args.name}-{variant}-s{seed}"
    fork = f"--fork {mined_by(args, variant, seed)}"
    flags = " ".join(VARIANTS[variant])
    for iterations in stages(args):
        if not finished(run, "distill", iterations):
            command("distill.py", run, fork, flags, f"--distill_iterations {iterations}")
        if iterations == saved_iteration(run, "distill"):  # a later one was evaluated before
            evaluated(args, run, "distill", f"distill-{iterations}")


def stages(args) -> list:
    """The iterations of phase 2 after which there is an evaluation."""
    cuts = np.linspace(0, args.distill_iterations, args.points + 1)[1:]
    return [int(round(cut)) for cut in cuts]


def run_all(args):
    pairs = [(variant, seed) for seed in args.seeds for variant in args.variants]
    mines = {mined_by(args, *pair): (pair[1], VARIANTS[pair[0]][0]) for pair in pairs}
    waves = {
        "warm-ups": [(warm_up, args, seed) for seed in args.seeds],
        "mining": [(mine, args, run, *rest) for run, rest in mines.items()],
        "phase 2": [(distill, args, *pair) for pair in pairs],
    }
    for name, wave in waves.items():  # one after the other: a fork needs what it goes on from
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(*job) for job in wave]
            for future in tqdm(futures, desc=name, unit="run"):
                future.result()


# --------------------------------------------------------------------------------------------------
# What came of it
# --------------------------------------------------------------------------------------------------


def collect(args) -> dict:
    """variant -> seed -> [(episodes, {item: solved})], from the warm-up to the end."""
    results = {}
    for variant in args.variants:
        results[variant] = {}
        for seed in args.seeds:
            run = Path("runs") / f"{args.name}-{variant}-s{seed}"
            warmup = Path("runs") / f"{args.name}-warmup-s{seed}" / "study-warmup.json"
            metrics = read_jsonl(run / "metrics.jsonl")
            curve = [(episodes_at(metrics, "warmup", 10**9), read_json(warmup)["items"])]
            mined = Path("runs") / mined_by(args, variant, seed) / "study-mine.json"
            at = episodes_at(metrics, "mine", args.mine_iterations)
            curve.append((at, read_json(mined)["items"]))
            for iterations in stages(args):
                items = read_json(run / f"study-distill-{iterations}.json")["items"]
                curve.append((episodes_at(metrics, "distill", iterations), items))
            results[variant][seed] = curve
    return results


def episodes_at(metrics, phase, iteration) -> int:
    """Episodes a run had rolled out by the end of an iteration of a phase."""
    lines = [x for x in metrics if x["phase"] == phase and x["iteration"] <= iteration]
    return lines[-1]["episodes_so_far"]


def matrix(curves, point) -> np.ndarray:
    """[seeds, items] of 0 and 1: what each seed solved at a point of its curve."""
    rows = []
    for curve in curves.values():
        items = curve[point][1]
        rows.append([items[name] for name in sorted(items)])
    return np.array(rows, float)


def interval(values, lowest=-1.0) -> tuple:
    """95% interval of the mean of [seeds, items], were the seeds others, and the items.

    mean +- t SE,  SE^2 = Var(means of the seeds) / seeds + Var(means of the items) / items,
    with Student's t for seeds - 1 degrees of freedom: drawing five seeds with repetition instead
    gives an interval 0.63 as wide, which is too narrow. One seed: its items alone, t = 1.96; one
    item, the mean of a panel: the seeds alone. What a mean cannot be (below `lowest`, above 1) is
    cut off.
    """
    n_seeds, n_items = values.shape
    variance = 0.0
    t = 1.96
    if n_items > 1:
        variance += values.mean(0).var(ddof=1) / n_items
    if n_seeds > 1:
        variance += values.mean(1).var(ddof=1) / n_seeds
        t = t_quantile(n_seeds - 1)
    half = t * variance**0.5
    return max(lowest, values.mean() - half), min(1.0, values.mean() + half)


def t_quantile(freedom, share=0.975) -> float:
    """What Student's t is below with probability `share`: its density summed up from 0 to there."""
    x = np.linspace(0, 200, 200_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    steps = (density[1:] + density[:-1]) / 2 * (x[1] - x[0])
    return float(np.interp(share - 0.5, scale * np.cumsum(steps), x[1:]))


def curve_means(curves) -> np.ndarray:
    """[seeds, items]: each item's success averaged over all points after the warm-up, weighted by
    the episodes between them: the area under the curve, item by item.
    """
    per_seed = []
    for curve in curves.values():
        episodes = np.array([point[0] for point in curve], float)
        names = sorted(curve[0][1])
        solved = np.array([[items[name] for name in names] for _, items in curve], float)  # [P, I]
        widths = np.diff(episodes)[:, None]  # [P - 1, 1]
        middle = (solved[1:] + solved[:-1]) / 2  # [P - 1, I]
        per_seed.append((widths * middle).sum(0) / widths.sum())
    return np.array(per_seed)


def diagnostics(args, variant) -> dict:
    """Means over iterations and seeds of what explains the result."""
    lines = []
    active = []
    for seed in args.seeds:
        run = Path("runs") / f"{args.name}-{variant}-s{seed}"
        metrics = [x for x in read_jsonl(run / "metrics.jsonl") if x["phase"] != "warmup"]
        lines += metrics
        active.append(sum(x["active"] > 0 for x in metrics) / len(metrics))
    names = ("no_contrast", "delta", "gated_share", "grad_norm_rl", "grad_norm_internalization")
    result = {"iterations with an active skill": float(np.mean(active))}
    for name in (*names, "grad_cosine"):
        values = [x[name] for x in lines if x.get(name) is not None]
        result[name] = float(np.mean(values)) if values else None
    return result


def table(args, results) -> str:
    control = results.get(CONTROL)
    lines = [
        "| variant | episodes | success at the end | 95% interval | difference with the control |"
        " 95% interval | mean over the curve | difference | 95% interval |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    start = matrix(next(iter(results.values())), 0)
    at = np.mean([curve[0][0] for curve in next(iter(results.values())).values()])
    first = f"{start.mean():.3f} | {between(interval(start, lowest=0.0))}"
    lines.append(f"| after warm-up | {at:.0f} | {first} | | | | | |")
    for variant, curves in results.items():
        end = matrix(curves, -1)
        whole = curve_means(curves)
        episodes = np.mean([curve[-1][0] for curve in curves.values()])
        row = [variant, f"{episodes:.0f}", f"{end.mean():.3f}", between(interval(end, 0.0))]
        if control and variant != CONTROL:
            gain = end - matrix(control, -1)
            more = whole - curve_means(control)
            row += [f"{gain.mean():+.3f}", between(interval(gain)), f"{whole.mean():.3f}"]
            row += [f"{more.mean():+.3f}", between(interval(more))]
        else:
            row += ["", "", f"{whole.mean():.3f}", "", ""]
        lines.append(f"| {' | '.join(row)} |")
    explained = {variant: diagnostics(args, variant) for variant in results}
    names = list(explained[args.variants[0]])
    lines += ["", f"| variant | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for variant, values in explained.items():
        cells = ["-" if value is None else f"{value:.3g}" for value in values.values()]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def between(bounds) -> str:
    low, high = bounds
    return f"{low:+.3f} to {high:+.3f}" if low < 0 else f"{low:.3f} to {high:.3f}"


def mean_curve(axis, variant, curves):
    """Success against episodes: the mean of the seeds, and their range as a band."""
    episodes = np.mean([[point[0] for point in curve] for curve in curves.values()], axis=0)
    success = [[np.mean(list(items.values())) for _, items in curve] for curve in curves.values()]
    success = np.array(success)  # [seeds, points]
    (line,) = axis.plot(episodes, success.mean(0), marker="o", ms=4, label=variant)
    axis.fill_between(episodes, success.min(0), success.max(0), color=line.get_color(), alpha=0.12)


def draw(args, results, path):
    figure, axis = plt.subplots(figsize=(7.5, 4.5), constrained_layout=True)
    for variant, curves in results.items():
        mean_curve(axis, variant, curves)
    axis.set(xlabel="episodes", ylabel="held-out success, plain prompt", ylim=(0, 1))
    axis.set_title(f"{args.name}: mean and range of {len(args.seeds)} seeds", fontsize=10)
    axis.legend(frameon=False)
    save(figure, path)


def save(figure, path):
    """Write a figure, its axes open at the top and the right."""
    for axis in figure.axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def remember(args):
    """Keep what a study is; UserError when it is to be another one under the same name."""
    path = Path("runs") / f"study-{args.name}.json"
    wanted = {name: getattr(args, name) for name in FIXED}
    if path.exists():
        for name, was in read_json(path).items():
            if was != wanted[name]:
                reason = f"was begun with --{name} {was}, not {wanted[name]}"
                raise UserError(f"the study {args.name} {reason}; give this one another --name")
    write_atomically(path, json.dumps(wanted, indent=1))


def main():
    args = parse()
    start = time.time()
    remember(args)
    if not args.table:
        run_all(args)
    results = collect(args)
    Path("results").mkdir(exist_ok=True)
    words = " ".join(shlex.quote(word) for word in sys.argv[1:] if word != "--table")
    text = f"`python -m tools.study {words}`\n\n{platform.processor() or platform.machine()}, "
    text += f"{len(args.seeds)} seeds, {time.time() - start:.0f} s in this call\n\n"
    text += table(args, results)
    write_atomically(f"results/study-{args.name}.md", text + "\n")
    write_atomically(f"results/study-{args.name}.json", json.dumps(results))
    draw(args, results, f"results/study-{args.name}.png")
    print(text)


if __name__ == "__main__":
    run_script(main)
