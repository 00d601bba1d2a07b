"""Success by task type over training seeds and evaluation seeds, from what `evaluate.py` wrote.

    python -m tools.subtasks 'SIRI=runs/alfworld-siri-s*/eval-*.json' 'GiGPO=runs/...'

Each argument is a column: a name and a pattern of evaluation files of one panel. The files of a
run's folder are its evaluation seeds; an item's success is averaged over them. The 95% intervals
draw runs and items with repetition, as in tools/study.py.
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


def read_panel(pattern) -> tuple:
    """Files -> (items, success [runs, items] averaged over a run's files, solved, played)."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise UserError(f"{pattern}: no such file; evaluate first, and quote the pattern")
    runs = defaultdict(list)
    for file in files:
        runs[Path(file).parent].append(read_json(file)["items"])
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
            cells.append(between(interval(values)))
        lines.append(f"| {name} | {len(chosen)} | {' | '.join(cells)} |")
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
