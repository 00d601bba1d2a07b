"""Draw the three phases of a run into one PNG, from its metrics.jsonl and eval-*.json alone.

    python -m tools.plot --run tiny                # writes runs/tiny/plot.png
    python -m tools.plot --run tiny --control tiny-control    # with GiGPO from the same warm-up

Four panels over the iterations: success of the plain and of the skill arm, Delta_g, skills by
status, and lambda with the share of gated tokens. Evaluations (plain prompt, Wilson 95% intervals)
stand where their phase ends.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from config import UserError, read_json, read_jsonl
from runtime.run import run_script

PHASES = {
    "warmup": "phase 0\nwarm-up",
    "mine": "phase 1\nmining",
    "distill": "phase 2\ninternalization",
}
PLAIN = "#1f5fa8"
SKILL = "#d9822b"
GREEN = "#3a8f5c"
GRAY = "#8a8f98"
LEGEND = {"frameon": False, "fontsize": 9}
NAN = float("nan")  # leaves a gap in a line


def smooth(values, width=3):
    """Centred moving average that skips missing values (None)."""
    result = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - width // 2) : i + width // 2 + 1] if v is not None]
        result.append(sum(window) / len(window) if window else None)
    return result


def with_gaps(values) -> list:
    return [NAN if v is None else v for v in values]


def read_metrics(root: Path) -> list:
    if not (root / "metrics.jsonl").exists():
        raise UserError(f"{root}/metrics.jsonl: no such file; run warmup.py, or give another --run")
    return read_jsonl(root / "metrics.jsonl")


def draw(root: Path, out: Path, control: Path | None = None):
    """Draw the run in folder `root`, with its control's success, to the PNG `out`.

    UserError if there are no metrics.
    """
    records = read_metrics(root)
    ends = {}  # phase -> its last iteration, counted through all phases
    for number, record in enumerate(records, 1):
        ends[record["phase"]] = number

    heights = {"height_ratios": [3, 1.6, 1.6, 1.6], "constrained_layout": True}
    figure, axes = plt.subplots(4, 1, figsize=(9, 10), sharex=True, **heights)
    success, delta, counts, weight = axes
    draw_success(success, records)
    draw_evaluations(success, root, ends)
    if control:
        draw_control(success, control)
    success.legend(loc="upper left", **LEGEND)
    draw_delta(delta, records)
    draw_skills(counts, records)
    share = draw_internalization(weight, records)
    draw_phases(axes, ends)
    for axis in (*axes, share):
        axis.spines["top"].set_visible(False)
    figure.savefig(out, dpi=130)
    plt.close(figure)
    print(f"drawn to {out}")


def column(records, name) -> tuple:
    """(iterations, values): what a metric was in each iteration, None where it was not logged."""
    return range(1, len(records) + 1), [record.get(name) for record in records]


def draw_success(axis, records):
    """Success of the two arms: a dot for each iteration, and a smoothed line."""
    arms = {"plain arm": ("success_plain", PLAIN), "skill arm": ("success_skill", SKILL)}
    for arm, (name, color) in arms.items():
        x, values = column(records, name)
        axis.plot(x, with_gaps(values), ".", color=color, alpha=0.35)
        line = smooth(values)
        line = [None if raw is None else mean for mean, raw in zip(line, values, strict=True)]
        axis.plot(x, with_gaps(line), color=color, label=f"{arm}, training rollouts")
    axis.set(ylabel="success", ylim=(0, 1))


def draw_evaluations(axis, root, ends):
    """The evaluations without skills of each checkpoint, with their intervals."""
    label = "evaluation, plain prompt, 95%"
    for phase, end in {"init": 0, **ends}.items():
        for path in sorted(root.glob(f"eval-*-{phase}-T*.json")):
            result = read_json(path)["results"]["all"]
            y = result["success"]
            x = end + 0.25
            error = [[y - result["low"]], [result["high"] - y]]
            look = {"fmt": "D", "color": "black", "capsize": 3, "ms": 5}
            axis.errorbar([x], [y], yerr=error, label=label, **look)
            axis.annotate(f"{y:.2f}", (x, y), xytext=(7, -3), textcoords="offset points")
            label = None  # one line in the legend is enough


def draw_control(axis, root):
    """The control's success, which is all plain, and its last evaluation."""
    records = read_metrics(root)
    x, values = column(records, "success_plain")
    axis.plot(x, with_gaps(smooth(values)), "--", color=GRAY, label="control: GiGPO alone")
    for path in sorted(root.glob("eval-*-distill-T*.json")):
        y = read_json(path)["results"]["all"]["success"]
        axis.plot([len(records) + 0.25], [y], "D", color=GRAY, ms=5)


def draw_delta(axis, records):
    x, values = column(records, "delta")
    heights = [v or 0 for v in values]
    axis.bar(x, heights, color=[GREEN if v >= 0 else SKILL for v in heights], width=0.7)
    axis.axhline(0, color=GRAY, lw=0.8)
    axis.set(ylabel="mean Δ_g")


def draw_skills(axis, records):
    for status, color in (("candidate", GRAY), ("active", GREEN), ("retired", SKILL)):
        x, values = column(records, status)
        axis.plot(x, with_gaps(values), color=color, label=status, drawstyle="steps-mid")
    axis.set(ylabel="skills")
    axis.legend(loc="upper left", **LEGEND)


def draw_internalization(axis, records):
    """Lambda, and on an axis of its own, which is returned, the share of gated tokens."""
    share = axis.twinx()
    x, values = column(records, "lambda")
    axis.plot(x, with_gaps(values), color=PLAIN, label="λ(k)")
    axis.set(ylabel="λ", xlabel="iteration", ylim=(0, top_of(values)))
    x, values = column(records, "gated_share")
    label = "gated share of skill-arm tokens"
    share.plot(x, with_gaps(values), color=SKILL, label=label)
    share.set(ylabel="gated share", ylim=(0, top_of(values)))
    lines = axis.get_lines() + share.get_lines()
    axis.legend(lines, [line.get_label() for line in lines], loc="upper left", **LEGEND)
    return share


def top_of(values) -> float:
    """The upper limit of an axis, with room for the legend."""
    return 1.5 * max([v for v in values if v] or [1])


def draw_phases(axes, ends):
    """A dotted line where each phase ends, and its name above."""
    start = 0
    for phase, end in ends.items():
        for axis in axes:
            axis.axvline(end + 0.5, color=GRAY, lw=0.8, ls=":")
        middle = (start + end) / 2 + 0.5
        axes[0].text(middle, 1.02, PHASES[phase], ha="center", fontsize=9, color="#444")
        start = end


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="tiny", help="name of the run")
    parser.add_argument("--control", default="", help="name of its control, a run too")
    parser.add_argument("--out", default="", help="the PNG; empty: runs/<run>/plot.png")
    args = parser.parse_args()
    root = Path("runs") / args.run
    control = Path("runs") / args.control if args.control else None
    draw(root, Path(args.out or root / "plot.png"), control)


if __name__ == "__main__":
    run_script(main)
