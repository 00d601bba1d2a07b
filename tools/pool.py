"""One question to several studies of the same plan on different seeds: all their seeds together.

    python -m tools.pool --studies shop-3,shop-3-new,shop-3-more --looks 3
    python -m tools.pool --studies shop-3,shop-3-more --variant response-strong --control siri
    python -m tools.pool --studies shop-3-more --out new-seeds

Reads results/study-<name>.json, writes results/pool-<out>.json (each seed, and the numbers below)
and .png (each seed's difference against what its warm-up had reached). Prints, for the mean over
the curve and for the end:

    mean difference of the seeds  +- t SE,  SE^2 = Var(differences) / seeds

with Student's t. When a sample is looked at each time that it has grown, one look in twenty is no
longer all that goes wrong by chance: --looks L widens the interval to 1 - 0.05 / L (Bonferroni).
The intervals are for other seeds on the same items; those of tools/study.py also for other items.
"""

import argparse
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from config import UserError, read_json, write_atomically
from runtime.run import run_script
from tools.study import CONTROL, curve_means, matrix, save, t_quantile


def differences(results, variant, control) -> list:
    """A dict for each seed of one study: success after the warm-up, and the two differences."""
    for name in (variant, control):
        if name not in results:
            raise UserError(f"no variant {name} there, but {', '.join(results)}")
    ours = results[variant]
    theirs = results[control]
    if list(ours) != list(theirs) or lengths(ours) != lengths(theirs):
        raise UserError(f"{variant} and {control}: other seeds or points; finish the study first")
    warmups = matrix(ours, 0).mean(1)  # [seeds]
    curve = (curve_means(ours) - curve_means(theirs)).mean(1)
    end = (matrix(ours, -1) - matrix(theirs, -1)).mean(1)
    return [
        {"seed": seed, "warmup": float(w), "curve": float(c), "end": float(e)}
        for seed, w, c, e in zip(ours, warmups, curve, end, strict=True)
    ]


def lengths(curves) -> list:
    """The episodes of each seed's points, counted from the end of its warm-up."""
    return [[point[0] - curve[0][0] for point in curve] for curve in curves.values()]


def student_interval(values, looks=1) -> tuple:
    """(low, high) of the mean, for 1 - 0.05 / looks."""
    if len(values) < 2:
        raise UserError("an interval needs two seeds")
    t = t_quantile(len(values) - 1, 1 - 0.025 / looks)
    half = t * np.std(values, ddof=1) / len(values) ** 0.5
    return np.mean(values) - half, np.mean(values) + half


def summarize(rows, looks) -> dict:
    """The pooled numbers of both measures."""
    result = {"seeds": len(rows), "looks": looks}
    for measure in ("curve", "end"):
        values = [row[measure] for row in rows]
        result[measure] = float(np.mean(values))
        result[f"{measure}_95"] = [float(x) for x in student_interval(values)]
        result[f"{measure}_looks"] = [float(x) for x in student_interval(values, looks)]
        result[f"{measure}_ahead"] = sum(value > 0 for value in values)
    return result


def sentence(pooled, measure) -> str:
    """`+0.071 (95% -0.003 to +0.144; 98.3% ...)`: as the README and results/study.md have it."""
    low, high = pooled[f"{measure}_95"]
    text = f"{pooled[measure]:+.3f} (95% {low:+.3f} to {high:+.3f}"
    if pooled["looks"] > 1:
        low, high = pooled[f"{measure}_looks"]
        text += f"; {100 - 5 / pooled['looks']:.1f}% {low:+.3f} to {high:+.3f}"
    return text + ")"


def draw(studies, pooled, title, path):
    figure, axis = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    axis.axhline(0, color="0.6", lw=0.8)
    axis.axhspan(*pooled["curve_95"], color="0.5", alpha=0.15, lw=0)
    axis.axhline(pooled["curve"], color="0.3", lw=1.2, ls="--", label="mean, and its 95% interval")
    for name, rows in studies.items():
        x = [row["warmup"] for row in rows]
        axis.plot(x, [row["curve"] for row in rows], "o", ms=6, label=f"{name}: its seeds")
    axis.set(xlabel="held-out success after the warm-up", ylabel=f"{title}, over the curve")
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", required=True, help="names, of the same plan")
    parser.add_argument("--variant", default="siri")
    parser.add_argument("--control", default=CONTROL)
    parser.add_argument("--out", default="", help="results/pool-<out>; empty: variant-control")
    parser.add_argument("--looks", type=int, default=1, help="how often the sample was looked at")
    args = parser.parse_args()
    if args.looks < 1:
        raise UserError(f"--looks {args.looks}: must be 1 at least")
    studies = {}
    plans = []
    for name in args.studies.split(","):
        results = read_json(f"results/study-{name}.json")
        studies[name] = differences(results, args.variant, args.control)
        plans += lengths(results[args.variant])
    rows = [row for seeds in studies.values() for row in seeds]
    seeds = [row["seed"] for row in rows]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--studies {args.studies}: a seed occurs twice among {', '.join(seeds)}")
    if any(plan != plans[0] for plan in plans):
        raise UserError(f"--studies {args.studies}: not of one plan, evaluated at other episodes")
    pooled = summarize(rows, args.looks)
    out = f"results/pool-{args.out or f'{args.variant}-{args.control}'}"
    write_atomically(f"{out}.json", json.dumps({"studies": studies} | pooled, indent=1))
    draw(studies, pooled, f"{args.variant} - {args.control}", f"{out}.png")
    for measure in ("curve", "end"):
        ahead = f"ahead in {pooled[f'{measure}_ahead']} of {len(rows)} seeds"
        print(f"{measure}: {sentence(pooled, measure)}, {ahead}")


if __name__ == "__main__":
    run_script(main)
