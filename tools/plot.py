"""Draw the three phases of a run into one PNG, from its metrics.jsonl and eval-*.json alone.

    python -m tools.plot --run tiny                # writes runs/tiny/plot.png

Four panels over the iterations: success of the plain and of the skill arm, Delta_g, skills by
status, and lambda with the share of gated tokens. Evaluations (plain prompt, Wilson 95% intervals)
stand where their phase ends.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common import UserError, read_jsonl, run_script

PHASES = {
    "warmup": "phase 0\nwarm-up",
    "mine": "phase 1\nmining",
    "distill": "phase 2\ninternalization",
}
PLAIN, SKILL, GREEN, GRAY = "#1f5fa8", "#d9822b", "#3a8f5c", "#8a8f98"


def smooth(values, width=3):
    """Centred moving average that skips missing values."""
    result = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - width // 2) : i + width // 2 + 1] if v is not None]
        result.append(sum(window) / len(window) if window else None)
    return result


def draw(root: Path, out: Path):
    if not (root / "metrics.jsonl").exists():
        raise UserError(f"{root}/metrics.jsonl: no such file; run warmup.py, or give another --run")
    records = read_jsonl(root / "metrics.jsonl")
    x = list(range(1, len(records) + 1))
    column = lambda name: [r.get(name) for r in records]  # noqa: E731
    ends = {
        phase: max(i for i, r in zip(x, records) if r["phase"] == phase)
        for phase in dict.fromkeys(column("phase"))
    }

    figure, axes = plt.subplots(
        4,
        1,
        figsize=(9, 10),
        sharex=True,
        height_ratios=[3, 1.6, 1.6, 1.6],
        constrained_layout=True,
    )
    top, middle, counts, bottom = axes
    for name, color, label in (
        ("success_plain", PLAIN, "plain arm"),
        ("success_skill", SKILL, "skill arm"),
    ):
        raw = column(name)
        top.plot(x, [float("nan") if v is None else v for v in raw], ".", color=color, alpha=0.35)
        line = [float("nan") if r is None or v is None else v for v, r in zip(smooth(raw), raw)]
        top.plot(x, line, color=color, label=f"{label}, training rollouts")
    marks = {"init": 0, **ends}
    for phase, at in marks.items():
        for path in root.glob(f"eval-*-{phase}.json"):
            r = json.loads(path.read_text())["results"]["all"]
            error = [[r["success"] - r["low"]], [r["high"] - r["success"]]]
            label = "evaluation, plain prompt, 95%" if phase == "init" else None
            top.errorbar(
                [at + 0.25],
                [r["success"]],
                yerr=error,
                fmt="D",
                color="black",
                capsize=3,
                ms=5,
                label=label,
            )
            top.annotate(
                f"{r['success']:.2f}",
                (at + 0.25, r["success"]),
                xytext=(7, -3),
                textcoords="offset points",
            )
    top.set(ylabel="success", ylim=(0, 1))
    top.legend(loc="lower right", frameon=False, fontsize=9)

    delta = column("delta")
    middle.bar(
        x,
        [v or 0 for v in delta],
        color=[GREEN if (v or 0) >= 0 else SKILL for v in delta],
        width=0.7,
    )
    middle.axhline(0, color=GRAY, lw=0.8)
    middle.set(ylabel="mean Δ_g")

    for status, color in (("candidate", GRAY), ("active", GREEN), ("retired", SKILL)):
        counts.plot(
            x,
            [float("nan") if v is None else v for v in column(status)],
            color=color,
            label=status,
            drawstyle="steps-mid",
        )
    counts.set(ylabel="skills")
    counts.legend(loc="upper left", frameon=False, fontsize=9)

    bottom.plot(
        x, [float("nan") if v is None else v for v in column("lambda")], color=PLAIN, label="λ(k)"
    )
    top_of = lambda name: 1.5 * max([v for v in column(name) if v] or [1])  # noqa: E731
    bottom.set(ylabel="λ", xlabel="iteration", ylim=(0, top_of("lambda")))  # room for the legend
    share = bottom.twinx()
    share.plot(
        x,
        [float("nan") if v is None else v for v in column("gated_share")],
        color=SKILL,
        label="gated share of skill-arm tokens",
    )
    share.set(ylabel="gated share", ylim=(0, top_of("gated_share")))
    handles = bottom.get_lines() + share.get_lines()
    bottom.legend(
        handles, [h.get_label() for h in handles], loc="upper left", frameon=False, fontsize=9
    )

    start = 0
    for phase, end in ends.items():
        for axis in axes:
            axis.axvline(end + 0.5, color=GRAY, lw=0.8, ls=":")
        top.text(
            (start + end) / 2 + 0.5, 1.02, PHASES[phase], ha="center", fontsize=9, color="#444"
        )
        start = end
    for axis in (*axes, share):
        axis.spines["top"].set_visible(False)
    figure.savefig(out, dpi=130)
    print(f"drawn to {out}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="tiny", help="name of the run")
    parser.add_argument("--out", default="", help="the PNG; empty: runs/<run>/plot.png")
    args = parser.parse_args()
    root = Path("runs") / args.run
    draw(root, Path(args.out or root / "plot.png"))


if __name__ == "__main__":
    run_script(main)
