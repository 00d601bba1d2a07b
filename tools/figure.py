"""The three phases with their equations in one picture: docs/phases.png, which the README shows.

    python -m tools.figure
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

INK = "#22262b"
PLAIN = "#1f5fa8"  # the plain prompt
SKILL = "#d9822b"  # the prompt with skills

PHASES = [
    (
        "warmup.py",
        "Phase 0: warm-up",
        [
            ("plain prompts $x_t$", PLAIN),
            (r"$A = A^E + w_S\,A^S$", INK),
            (r"$L_{GiGPO} + \beta\,L_{KL}$", INK),
            ("until enough episodes\nsucceed: $N_{succ} \\geq N_{req}$", INK),
        ],
    ),
    (
        "mine.py",
        "Phase 1: mining and validation",
        [
            ("own successes $\\rightarrow$ skills\n(condition, strategy)", INK),
            ("half of each group with a\nskill in the prompt, $x^s_t$", SKILL),
            ("half plain, $x_t$", PLAIN),
            (r"$\Delta_g = R^{skill}_g - R^{plain}_g$", INK),
            (r"$u_s \leftarrow (1-\alpha)\,u_s + \alpha\,\Delta_g$", INK),
        ],
    ),
    (
        "distill.py",
        "Phase 2: internalization",
        [
            ("what the skill half did,\nwhere $\\Delta_g > 0$,", SKILL),
            ("becomes likelier under\nthe plain prompt $x_t$", PLAIN),
            (r"$L_{int} = -\,\frac{\sum gate\; w\,\log\pi(y\,|\,x_t)}{\sum gate}$", INK),
            (r"$w = clip(A,\,0,\,c)$", INK),
            (r"$L_{GiGPO} + \beta\,L_{KL} + \lambda(k)\,L_{int}$", INK),
        ],
    ),
]


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    figure, axis = plt.subplots(figsize=(12, 4.7))
    axis.set(xlim=(0, 12.3), ylim=(0, 4.7))
    axis.axis("off")
    for number, (script, title, lines) in enumerate(PHASES):
        left = 0.1 + 4.1 * number
        style = "round,pad=0.02,rounding_size=0.1"
        box = FancyBboxPatch(
            (left, 0.45), 3.75, 3.45, boxstyle=style, fc="#f6f7f9", ec="#c9ced6"
        )
        axis.add_patch(box)
        axis.text(left, 4.45, title, fontsize=12, weight="bold", color=INK, va="center")
        axis.text(left, 4.15, script, fontsize=10, family="monospace", color="#5b6470", va="center")
        for i, (line, color) in enumerate(lines):
            y = 3.85 - 3.35 * (i + 0.5) / len(lines)
            axis.text(left + 1.88, y, line, fontsize=11.5, color=color, ha="center", va="center")
        if number:
            arrow = {"arrowstyle": "-|>", "color": "#5b6470", "lw": 1.6}
            axis.annotate("", xy=(left - 0.02, 2.2), xytext=(left - 0.33, 2.2), arrowprops=arrow)
    end = "then the skills are dropped: at inference there is the plain prompt only"
    axis.text(6.15, 0.16, end, fontsize=11, color=PLAIN, ha="center", va="center")
    figure.savefig("docs/phases.png", dpi=110, bbox_inches="tight")
    print("drawn to docs/phases.png")


if __name__ == "__main__":
    main()
