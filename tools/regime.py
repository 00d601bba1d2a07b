"""When do skills help? Several studies, easy to hard, side by side.

    python -m tools.regime --studies shop-1,shop-2,shop-3,shop-4 --title "options a task names"

Reads results/study-<name>.json, which `tools/study.py` writes, and the runs' metrics (of a study
whose runs are gone: what regime.json has of them). Writes results/regime.md (one table), .png (one
panel for each study) and .json (the numbers of the table). Rows of other studies stay as they are.

| column        | meaning                                                                          |
|---------------|----------------------------------------------------------------------------------|
| rare          | success of the plain policy at T = 1 in the first iteration of warm-up           |
| contrast      | groups of that iteration in which some members succeed and some fail             |
| curve, end    | difference with the control, paired by seeds and items (`study.interval`): mean  |
|               | success over the episodes after the warm-up; at the end                          |
| to 0.8        | episodes until success 0.8 on held-out items, linear between evaluations, mean   |
|               | over seeds; a seed that does not get there counts with its last episode          |
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from config import UserError, read_json, read_jsonl, write_atomically
from runtime.run import run_script
from tools.study import CONTROL, between, curve_means, interval, matrix, mean_curve, save


def episodes_until(curve, goal) -> float:
    """Episodes at which one seed's curve first reaches `goal`, between two points by a line."""
    before = None
    for episodes, items in curve:
        success = np.mean(list(items.values()))
        if success >= goal:
            if before is None:
                return episodes
            share = (goal - before[1]) / (success - before[1])
            return before[0] + share * (episodes - before[0])
        before = (episodes, success)
    return before[0]


def beginning(name, seeds) -> tuple:
    """(plain success, share of groups with a contrast) in the first iteration of the warm-up."""
    if not Path(f"runs/{name}-warmup-s{min(seeds)}").exists():
        known = [row for row in read_json("results/regime.json") if row["study"] == name]
        if not known:
            raise UserError(f"runs/{name}-warmup-s*: gone, and results/regime.json has no {name}")
        return known[0]["rare"], known[0]["contrast"]
    first = [read_jsonl(f"runs/{name}-warmup-s{seed}/metrics.jsonl")[0] for seed in seeds]
    success = np.mean([x["success"] for x in first])
    return float(success), 1 - float(np.mean([x["no_contrast"] for x in first]))


def summarize(name) -> list:
    """A dict of the table's numbers for each variant of a study."""
    results = read_json(f"results/study-{name}.json")
    if CONTROL not in results:
        raise UserError(f"results/study-{name}.json: no variant {CONTROL} to compare with")
    control = results[CONTROL]
    success, contrast = beginning(name, control)
    rows = []
    for variant, curves in results.items():
        whole = curve_means(curves)
        end = matrix(curves, -1)
        row = {
            "study": name,
            "variant": variant,
            "seeds": len(curves),
            "rare": success,
            "contrast": contrast,
            "warmup": float(matrix(curves, 0).mean()),
            "curve": float(whole.mean()),
            "end": float(end.mean()),
            "to_0.8": float(np.mean([episodes_until(c, 0.8) for c in curves.values()])),
        }
        for label, values, base in (
            ("curve", whole, curve_means(control)),
            ("end", end, matrix(control, -1)),
        ):
            gain = values - base
            row[f"{label}_gain"] = float(gain.mean())
            row[f"{label}_interval"] = [float(x) for x in interval(gain)]
        rows.append(row)
    return rows


def table(rows) -> str:
    lines = [
        "| study | plain success, T = 1 | groups with a contrast | variant | after warm-up | end |"
        " curve - control | 95% interval | end - control | 95% interval | episodes to 0.8 |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        cells = [row["study"], f"{row['rare']:.3f}", f"{row['contrast']:.2f}", row["variant"]]
        cells += [f"{row['warmup']:.3f}", f"{row['end']:.3f}"]
        for label in ("curve", "end"):
            shown = row["variant"] != CONTROL
            cells.append(f"{row[f'{label}_gain']:+.3f}" if shown else "")
            cells.append(between(row[f"{label}_interval"]) if shown else "")
        lines.append(f"| {' | '.join(cells)} | {row['to_0.8']:.0f} |")
    return "\n".join(lines)


def draw(names, rows, title, path):
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.6 * len(names), 3.4), sharey=True, constrained_layout=True
    )
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for variant, curves in read_json(f"results/study-{name}.json").items():
            mean_curve(axis, variant, curves)
        rare = next(row["rare"] for row in rows if row["study"] == name)
        axis.set_title(f"{name}: plain success {rare:.3f} at first", fontsize=9)
        axis.set(xlabel="episodes", ylim=(0, 1))
    np.atleast_1d(axes)[0].set_ylabel("held-out success, plain prompt")
    np.atleast_1d(axes)[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", required=True, help="names, easy to hard")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    names = args.studies.split(",")
    known = Path("results/regime.json")
    earlier = read_json(known) if known.exists() else []
    rows = [row for row in earlier if row["study"] not in names]
    rows += [row for name in names for row in summarize(name)]
    rows.sort(key=lambda row: -row["rare"])  # easy to hard
    text = table(rows)
    write_atomically("results/regime.json", json.dumps(rows, indent=1))
    write_atomically("results/regime.md", text + "\n")
    draw(names, rows, args.title, Path("results/regime.png"))
    print(text)


if __name__ == "__main__":
    run_script(main)
