"""Success by task type over training seeds and evaluation seeds, from what `evaluate.py` wrote.

    python -m tools.subtasks 'GiGPO=runs/alfworld-gigpo-s*/eval-valid_seen-distill-T0.4-*.json' \\
        'SIRI=runs/alfworld-siri-s*/eval-valid_seen-distill-T0.4-*.json'

Each argument is a column: a name and a pattern of evaluation files that differ in the seed alone.
The files of a run's folder are its evaluation seeds; an item's success is averaged over them. The
95% intervals are those of tools/study.py. Below the table: each column less the first, the runs in
the order of their names being pairs.
"""

import argparse
import glob
from collections import defaultdict
from pathlib import Path

import numpy as np

import envs
from config import UserError, read_json
from runtime.run import run_script
from tools.study import between, interval

ALIKE = ("split", "iteration", "temperature", "skills")  # in all evaluations of a column


def read_panel(pattern) -> tuple:
    """Files -> (items, success [runs, items] averaged over a run's files, number of files)."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise UserError(f"{pattern}: no such file; evaluate first, and quote the pattern")
    runs = defaultdict(list)
    how = set()
    for file in files:
        record = read_json(file)
        runs[Path(file).parent].append(record["items"])
        how.add((Path(record["checkpoint"]).name, *(record[name] for name in ALIKE)))
    if len(how) > 1:
        raise UserError(f"{pattern}: the files differ in more than the seed: {sorted(how)}")
    if len({len(evaluations) for evaluations in runs.values()}) > 1:
        raise UserError(f"{pattern}: some runs have more evaluations than others")
    items = sorted(next(iter(runs.values()))[0])
    success = []
    for evaluations in runs.values():
        if any(sorted(evaluation) != items for evaluation in evaluations):
            raise UserError(f"{pattern}: the files are of different panels")
        success.append(np.mean([[e[item] for item in items] for e in evaluations], axis=0))
    return items, np.array(success, float), len(files)


def kind(item) -> str:
    """The task type of an ALFWorld game, by its name; "all" for other worlds."""
    types = envs.world("alfworld").TASK_TYPES
    return next((short for name, short in types.items() if f"/{name}-" in f"/{item}"), "all")


def table(columns) -> str:
    """{name: what `read_panel` gives} -> Markdown."""
    items = next(iter(columns.values()))[0]
    if any(other != items for other, _, _ in columns.values()):
        raise UserError("the columns are of different panels")
    kinds = [kind(item) for item in items]
    lines = [
        f"| task type | games | {' | '.join(f'{name} | 95% interval' for name in columns)} |",
        "|---|---|" + "---|---|" * len(columns),
    ]
    for name in [*sorted(set(kinds) - {"all"}), "all"]:
        chosen = [i for i, own in enumerate(kinds) if name in (own, "all")]
        cells = []
        for _, success, files in columns.values():
            values = success[:, chosen]
            solved = round(values.mean() * files * len(chosen))
            cells.append(f"{solved} of {files * len(chosen)}, {values.mean():.3f}")
            cells.append(between(interval(values, lowest=0.0)))
        lines.append(f"| {name} | {len(chosen)} | {' | '.join(cells)} |")
    first, *others = columns
    for name in others:
        if len(columns[name][1]) == len(columns[first][1]):
            gain = columns[name][1] - columns[first][1]
            lines += ["", f"{name} - {first}: {gain.mean():+.3f} ({between(interval(gain))})"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("columns", nargs="+", metavar="NAME=PATTERN")
    columns = {}
    for argument in parser.parse_args().columns:
        name, _, pattern = argument.partition("=")
        columns[name] = read_panel(pattern)
    print(table(columns))


if __name__ == "__main__":
    run_script(main)
