"""One run as a picture and as one self-contained HTML page; its evaluations as a table.

    python -m tools.report --run tiny                          # runs/tiny/plot.png and report.html
    python -m tools.report --run tiny --control tiny-control   # with GiGPO from the same warm-up

Prints the evaluations of the run, and of its control's end, in one table, also as table.json. The
page adds every skill with its life, and some games with a skill in the prompt and without. Tokens
that phase 2 distilled are marked, darker for a greater weight w. The page needs no network and runs
no script; every text of a model or a world is escaped.
"""

import base64
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from config import read_json, read_jsonl, write_atomically
from runtime.flags import check_name, saved_flags
from runtime.run import run_script
from tools.study import BLUE, GRAY, GREEN, ORANGE, piped, read_metrics, save

# --- The table ------------------------------------------------------------------------------------

SIRI = "SIRI, after distillation"
CONTROL = "control: GiGPO alone"
NAMES = {"init": "before training", "warmup": "after warm-up", "mine": "after mining"}
NAMES["distill"] = SIRI
PANEL = ["split", "digest", "temperature", "seed"]
HEAD = ["checkpoint", "training episodes", "solved", "success (95% interval)"]


def evaluations(name, control="") -> list[dict]:
    """A dict for each evaluation of a run's checkpoints, and those of its control's end."""
    rows = []
    for run in filter(None, (name, control)):
        logged = read_metrics(run)
        for checkpoint in NAMES if run == name else ["distill"]:
            at = {x["iteration"]: x["episodes_so_far"] for x in logged if x["phase"] == checkpoint}
            names = (f"eval-*-{checkpoint}-T*.json", f"eval-*-{checkpoint}-skills-T*.json")
            for path in sorted(path for name in names for path in Path("runs", run).glob(name)):
                record = read_json(path, [*PANEL, "iteration", "skills", "results"])
                label = NAMES[checkpoint] if run == name else CONTROL
                label += ", skills in the prompt" if record["skills"] else ""
                panel = [record[key] for key in PANEL]
                row = {"name": label, "episodes": at.get(record["iteration"], 0), "panel": panel}
                rows.append(row | record["results"]["all"])
    return rows


def cells_of(row) -> list[str]:
    success = f"{row['success']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    return [row["name"], str(row["episodes"]), f"{row['solved']} of {row['n']}", success]


def markdown_table(rows) -> str:
    return piped([HEAD, ["---"] * len(HEAD), *map(cells_of, rows)])


# --- The picture ----------------------------------------------------------------------------------

PHASES = {"warmup": "phase 0\nwarm-up", "mine": "phase 1\nmining"}
PHASES["distill"] = "phase 2\ninternalization"
LEGEND = {"loc": "upper left", "facecolor": "white", "edgecolor": "none", "fontsize": 9}
BESIDE = LEGEND | {"bbox_to_anchor": (1.01, 1.0)}  # to the right of a panel
NARROW = 0.3  # width of an iteration of the warm-up, in which little happens


def edges_of(records) -> np.ndarray:
    """[iterations + 1]: where on the x axis each iteration begins and ends."""
    widths = [NARROW if record["phase"] == "warmup" else 1.0 for record in records]
    return np.cumsum([0.0, *widths])


def line_of(records, name) -> tuple:
    """(x, values): a metric in the middle of each iteration, NaN where it was not logged."""
    edges = edges_of(records)
    values = np.array([record.get(name) for record in records], float)
    return (edges[1:] + edges[:-1]) / 2, values


def smooth(values) -> list[float]:
    """The mean of each value and its neighbours; gaps stay gaps."""
    around = [values[max(0, i - 1) : i + 2] for i in range(len(values))]
    return [np.nan if np.isnan(v) else np.nanmean(a) for v, a in zip(values, around, strict=True)]


def draw(run, control=""):
    """The figure of a run, with its control's success."""
    records = read_metrics(run)
    edges = edges_of(records)
    ends = {record["phase"]: edges[number] for number, record in enumerate(records, 1)}
    heights = {"height_ratios": [3, 1.4, 1.4, 1.4], "constrained_layout": True}
    figure, axes = plt.subplots(4, 1, figsize=(9.5, 8.5), sharex=True, **heights)
    success, delta, skills, weight = axes

    for half, color in (("plain", BLUE), ("skill", ORANGE)):
        x, values = line_of(records, f"success_{half}")
        success.plot(x, values, ".", color=color, alpha=0.35)
        success.plot(x, smooth(values), color=color, label=f"{half} half")
    if control:
        x, values = line_of(read_metrics(control), "success_plain")
        success.plot(x, smooth(values), "--", color=GRAY, label=CONTROL)
    places = {NAMES[phase]: (end, "black") for phase, end in {"init": 0.0, **ends}.items()}
    places[CONTROL] = (edges[-1], GRAY)
    draw_evaluations(success, evaluations(run, control), places)
    success.set(ylabel="success", ylim=(-0.04, 1.04))

    x, values = line_of(records, "delta")
    delta.bar(x, np.nan_to_num(values), color=np.where(values >= 0, GREEN, ORANGE), width=0.7)
    delta.axhline(0, color=GRAY, lw=0.8)
    delta.set(ylabel="mean Δ_g")

    for status, color in (("candidate", GRAY), ("active", GREEN), ("retired", ORANGE)):
        skills.plot(*line_of(records, status), color=color, label=status, drawstyle="steps-mid")
    skills.yaxis.get_major_locator().set_params(integer=True)
    skills.set(ylabel="skills")

    share = weight.twinx()
    lambdas = weight.plot(*line_of(records, "lambda"), color=BLUE, label="λ(k)")
    x, values = line_of(records, "gated_share")
    shares = share.plot(x, values, color=ORANGE, label="gated share of the skill half's tokens")
    weight.set(ylabel="λ", xlabel="iteration", ylim=(0, None))
    share.set(ylabel="gated share", ylim=(0, None))

    success.legend(**BESIDE)
    skills.legend(**BESIDE)
    weight.legend(handles=lambdas + shares, **LEGEND)  # phases 0 and 1 are empty there
    ticks = {}  # iteration -> x, as many as there is room for
    for number, x in enumerate((edges[1:] + edges[:-1]) / 2, 1):
        if not ticks or x - max(ticks.values()) >= edges[-1] / 20:
            ticks[number] = x
    weight.set_xticks(list(ticks.values()), [str(number) for number in ticks])
    weight.set_xlim(-0.03 * edges[-1], 1.06 * edges[-1])
    start = 0.0
    for phase, end in ends.items():
        for axis in axes if start else ():
            axis.axvline(start, color=GRAY, lw=0.8, ls=":")
        axes[0].text((start + end) / 2, 1.06, PHASES[phase], ha="center", fontsize=9)
        start = end
    return figure


def draw_evaluations(axis, rows, places):
    """The evaluations of the plain prompt, at places: name -> (x, color)."""
    points = [(*places[row["name"]], row["success"], row) for row in rows if row["name"] in places]
    label = "evaluation, 95%"
    for x, color, y, row in points:
        error = [[y - row["low"]], [row["high"] - y]]
        look = {"fmt": "D", "color": color, "capsize": 3, "ms": 5, "zorder": 4}
        axis.errorbar([x], [y], yerr=error, label=label, **look)
        label = None  # one line in the legend is enough
        below = any(at == x and other > y for at, _, other, _ in points)
        place = {"xytext": (6, -14 if below else 5), "textcoords": "offset points", "zorder": 5}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.annotate(f"{y:.2f}", (x, y), color=color, bbox=box, **place)


# --- The page: each function returns HTML ---------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1d2733; --faint: #5f6a76; --line: #dde2e8;
        --box: #f5f7f9; --skill: #fdf1e2; --solved: #23683f; --failed: #a33f2f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --text: #e3e8ee; --faint: #9aa6b3; --line: #343d47; --box: #1d242b;
          --skill: #43311c; --solved: #7fd0a0; --failed: #f0907f; }
  img { filter: invert(0.91) hue-rotate(180deg); }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
       max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.wide, pre { overflow-x: auto; } img { width: 100%; min-width: 46rem; }
td:has(b) { min-width: 15rem; } td:last-child { min-width: 9rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left;
       border-bottom: 1px solid var(--line); vertical-align: top; }
th { white-space: nowrap; }
summary { cursor: pointer; padding: .4rem 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
.pair > div { background: var(--box); border-radius: 8px; padding: .8rem 1rem;
       overflow-wrap: anywhere; min-width: 0; }
.step { border-left: 6px solid; margin: .6rem 0; padding-left: .6rem; }
.saw, .number { color: var(--faint); font-size: 13px; white-space: pre-wrap; }
.said { font-family: ui-monospace, monospace; font-size: 13px; white-space: pre-wrap; }
.skill { background: var(--skill); border-radius: 4px; padding: .1rem .4rem; }
.solved { color: var(--solved); font-weight: 600; }
.failed { color: var(--failed); font-weight: 600; }
mark { border-radius: 3px; padding: 0 2px; color: inherit; }
"""
KEY = """<p>A green bar marks a step that was better than its peers (A &gt; 0), a red one a worse
one; the stronger, the more. Orange is what L_int distills into the plain prompt, the stronger the
larger its weight w.</p>"""
SEEN_CHARS = 400  # of an observation on the page


def html_table(head, rows) -> str:
    """The cells of `rows` are HTML already."""
    if not rows:
        return "<p>None yet.</p>"
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>{body}</table></div>'


def skill_lives(root) -> str:
    """The last known skills of a run, each with every Delta_g."""
    paths = [root / phase / "skills.jsonl" for phase in ("distill", "mine")]
    names = "condition strategy bucket born status utility n deltas".split()
    skills = next((read_jsonl(path, names) for path in paths if path.exists()), [])
    rows = []
    for s in sorted(skills, key=lambda s: (s["status"], -s["utility"])):
        text = f"<b>When {escape(s['condition'])}:</b> {escape(s['strategy'])}"
        text += f"<br><small>{escape(s['bucket'])}, iteration {int(s['born'])}</small>"
        life = " ".join(f"{delta:+.2f}" for delta in s["deltas"])
        rows.append([escape(s["status"]), text, f"{s['utility']:.3f}", f"{s['n']:d}", life])
    head = ["status", "skill", "utility u", "evaluations", "every Δ_g"]
    return html_table(head, rows)


def response(step) -> str:
    """What was said. What phase 2 distilled of it, near its end, is marked by its weight."""
    said, distilled, weight = step["said"], step.get("distilled"), step.get("weight", 0)
    if weight <= 0 or not distilled or distilled not in said:
        return escape(said)
    before, _, after = said.rpartition(distilled)
    shade = f"rgba(217, 130, 43, {0.15 + 0.6 * min(1.0, weight):.2f})"
    marked = (
        f'<mark style="background: {shade}" title="w = {weight:.2f}">{escape(distilled)}</mark>'
    )
    return f"{escape(before)}{marked}{escape(after)}"


def episode(record) -> str:
    """One half of a game; the bar of a step is green where its advantage is positive, else red."""
    half = "Skill half" if record["skills"] else "Plain half"
    kind, end = ("solved", "solved") if record["success"] else ("failed", "not solved")
    parts = [f'<div><b>{half}</b>, <span class="{kind}">{end}</span>']
    parts += [f'<p class="skill">{escape(skill)}</p>' for skill in record["skills"]]
    for t, step in enumerate(record["steps"], 1):
        advantage = step["advantage"]
        rgb = "44, 122, 75" if advantage > 0 else "190, 60, 45"
        bar = f"border-color: rgba({rgb}, {min(1.0, abs(advantage) / 2):.2f})"
        numbers = f"step {t}, A = {advantage:+.2f}, reward {step['reward']:g}"
        parts.append(f'<div class="step" style="{bar}"><div class="number">{numbers}</div>')
        parts.append(f'<div class="saw">{escape(step["saw"][:SEEN_CHARS])}</div>')
        parts.append(f'<div class="said">{response(step)}</div></div>')
    return "".join([*parts, "</div>"])


def objective(line) -> str:
    """The terms of the objective in an iteration, by its line of the log."""
    names = {"policy": "L_GiGPO", "kl": "L_KL", "entropy": "H", "internalization": "L_int"}
    names |= {"lambda": "λ", "loss": "L"}
    return ", ".join(f"{names[x]} = {line[x]:.3g}" for x in names if line.get(x) is not None)


def pairs(root, most=6) -> str:
    """Up to `most` games with both halves, over the whole run; if any, those that differ."""
    found = defaultdict(dict)
    path, log = root / "episodes.jsonl", root / "metrics.jsonl"
    names = "phase iteration group task success skills delta steps".split()
    for record in read_jsonl(path, names) if path.exists() else ():
        key = (record["phase"], record["iteration"], record["group"])
        found[key][bool(record["skills"])] = record
    games = [(x[True], x[False]) for x in found.values() if len(x) == 2]
    games = [game for game in games if game[0]["success"] != game[1]["success"]] or games
    lines = read_jsonl(log, ["phase", "iteration"]) if games and log.exists() else []
    terms = {(line["phase"], line["iteration"]): objective(line) for line in lines}
    parts = []
    for i in range(min(most, len(games))):
        skill, plain = games[i * len(games) // min(most, len(games))]
        where = (skill["phase"], skill["iteration"])
        effect = "" if skill["delta"] is None else f", Δ_g = {skill['delta']:+.2f}"
        parts.append(f"<details{' open' * (i == 0)}><summary>")
        parts.append(
            f"<b>{escape(where[0])} {where[1]}{effect}</b> {escape(skill['task'])}</summary>"
        )
        parts.append(f'<p class="number">{escape(terms.get(where, ""))}</p>')
        parts.append(f'<div class="pair">{episode(skill)}{episode(plain)}</div></details>')
    return "\n".join(parts) or "<p>No game of which both halves were written out.</p>"


def all_flags(root) -> str:
    text = escape(json.dumps(saved_flags(root), indent=1))
    return f"<details><summary>all of them</summary><pre>{text}</pre></details>"


def run_page(name, rows) -> str:
    """The page of a run that has been drawn."""
    root = Path("runs") / name
    image = base64.b64encode((root / "plot.png").read_bytes()).decode()
    title = escape(f"SIRI run {name}")
    sections = {
        "Evaluations": html_table(HEAD, [map(escape, cells_of(row)) for row in rows]),
        "Curves": f'<div class="wide"><img alt="curves" src="data:image/png;base64,{image}"></div>',
        "Skills and their lives": skill_lives(root),
        "The same game with the skill and without": KEY + pairs(root),
        "Flags": all_flags(root),
    }
    body = "\n".join(f"<h2>{head}</h2>\n{html}" for head, html in sections.items())
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"<!doctype html>\n<html lang=en>{head}\n<h1>{title}</h1>\n{body}\n</html>\n"


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="tiny", help="name of a run")
    parser.add_argument("--control", default="", help="name of its control, a run too")
    args = parser.parse_args()
    check_name("run", args.run)
    check_name("control", args.control or args.run)
    root = Path("runs") / args.run
    rows = evaluations(args.run, args.control)
    save(draw(args.run, args.control), root / "plot.png")
    write_atomically(root / "report.html", run_page(args.run, rows))
    write_atomically(root / "table.json", json.dumps(rows, indent=1))
    print(f"{markdown_table(rows)}\n\nwritten to {root}/report.html and plot.png")


if __name__ == "__main__":
    run_script(main)
