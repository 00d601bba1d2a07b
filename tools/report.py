"""One self-contained HTML page for a run or for studies, to open in any browser.

    python -m tools.report --run tiny                    # writes runs/tiny/report.html
    python -m tools.report --run tiny --control tiny-control        # prints both in one table
    python -m tools.report --studies shop-1,shop-4 --out study.html

The page of a run: its evaluations; its curves (`tools/plot.py`); every skill with its life; and
some games side by side, with the skill in the prompt and without, what phase 2 distills of them
marked: the action, the darker the greater its weight w.
The page needs no network and runs no script; every text of a model or a world is escaped.
"""

import argparse
import base64
import json
from html import escape
from pathlib import Path

import numpy as np

import envs
from config import UserError, read_json, read_jsonl, write_atomically
from runtime.run import run_script
from tools import plot, study

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1100px; margin: 2rem auto;
       padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; } img { max-width: 100%; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left;
       border-bottom: 1px solid #dde2e8; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.pair > div { background: #f5f7f9; border-radius: 8px; padding: .8rem 1rem;
       overflow-wrap: anywhere; }
.step { border-top: 1px solid #dde2e8; padding: .4rem 0; }
.saw { color: #66717e; font-size: 13px; white-space: pre-wrap; }
.said { font-family: ui-monospace, monospace; font-size: 13px; white-space: pre-wrap; }
.skill { background: #fdf1e2; border-radius: 4px; padding: .1rem .4rem; }
.solved { color: #2c7a4b; font-weight: 600; } .failed { color: #a33f2f; font-weight: 600; }
mark { border-radius: 3px; padding: 0 2px; color: inherit; }
.status { border-radius: 4px; padding: 0 .4rem; font-size: 13px; }
.active { background: #d9efe0; } .retired { background: #f3e0d2; }
.candidate { background: #e6e9ee; }
"""
SEEN_CHARS = 400  # of an observation on the page


# --------------------------------------------------------------------------------------------------
# Parts of the page: each returns HTML
# --------------------------------------------------------------------------------------------------


def picture(path) -> str:
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<img alt="{escape(Path(path).stem)}" src="data:image/png;base64,{data}">'


def html_table(head, rows) -> str:
    """Cells are HTML already; a number is set to the right."""
    lines = ["<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    for row in rows:
        cells = []
        for cell in row:
            kind = ' class="number"' if isinstance(cell, (int, float)) else ""
            text = f"{cell:.3f}" if isinstance(cell, float) else str(cell)
            cells.append(f"<td{kind}>{text}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


SIRI = "after `distill.py`: SIRI"
CONTROL = "the control: GiGPO, equal episodes"
NAMES = {  # of checkpoints in a table
    "init": "imitation policy (before)",
    "warmup": "after `warmup.py`",
    "mine": "after `mine.py`",
    "distill": SIRI,
}


def evaluations(name, control="") -> list:
    """A dict for each evaluation of a run's checkpoints, and those of its control's end."""
    rows = []
    for run in filter(None, (name, control)):
        logged = read_jsonl(Path("runs") / run / "metrics.jsonl")
        for checkpoint in NAMES if run == name else ["distill"]:
            for path in sorted((Path("runs") / run).glob(f"eval-*-{checkpoint}-*T*.json")):
                record = read_json(path)
                label = NAMES[checkpoint] if run == name else CONTROL
                label += ", skills in the prompt" if record["skills"] else ""
                ends = [0] + [x["episodes_so_far"] for x in logged if x["phase"] == checkpoint]
                panel = [record[key] for key in ("split", "digest", "temperature", "seed")]
                row = {"name": label, "episodes": ends[-1], "panel": panel}
                rows.append(row | record["results"]["all"] | {"items": record["items"]})
    return rows


def evaluation_rows(rows) -> list:
    """Their cells, as texts: name, episodes, solved, success, 95% interval, mean score."""
    cells = []
    for r in rows:
        interval = f"{r['low']:.3f} to {r['high']:.3f}"
        counts = [str(r["episodes"]), f"{r['solved']} of {r['n']}"]
        cells.append([r["name"], *counts, f"{r['success']:.3f}", interval, f"{r['score']:.3f}"])
    return cells


HEAD = ["checkpoint", "training episodes", "solved", "success", "95% interval", "mean score"]


def markdown_table(rows) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *evaluation_rows(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conclusion(rows) -> str:
    """What the ends of the run and of its control say together: plain prompt, the same panel."""
    by_name = {name: [row for row in rows if row["name"] == name] for name in (SIRI, CONTROL)}
    for siri in by_name[SIRI]:
        for control in by_name[CONTROL]:
            if siri["panel"] == control["panel"]:
                items = sorted(siri["items"])
                gains = [siri["items"][i] - control["items"][i] for i in items]
                low, high = study.interval(np.array([gains], float))
                mean = f"{np.mean(gains):+.3f} (95% over the items: {low:+.3f} to {high:+.3f})"
                return f"SIRI - GiGPO at equal episodes: {mean}. One seed."
    return ""


def life(deltas) -> str:
    """Every Delta_g of a skill as a bar: up where the skill half did better."""
    width = 6 * max(1, len(deltas))
    bars = [f'<svg width="{width}" height="44" role="img" aria-label="Delta_g">']
    bars.append(f'<line x1="0" y1="22" x2="{width}" y2="22" stroke="#8a8f98"/>')
    for i, delta in enumerate(deltas):
        height = max(1, 20 * abs(delta))
        top = 22 - height if delta > 0 else 22
        color = plot.GREEN if delta > 0 else plot.GRAY if delta == 0 else plot.SKILL
        bars.append(
            f'<rect x="{6 * i}" y="{top:.1f}" width="5" height="{height:.1f}" fill="{color}"/>'
        )
    return "".join([*bars, "</svg>"])


def skill_lives(root) -> str:
    folder = root / "distill" if (root / "distill/skills.jsonl").exists() else root / "mine"
    if not (folder / "skills.jsonl").exists():
        return "<p>No skills.</p>"
    order = ("active", "candidate", "retired")
    skills = read_jsonl(folder / "skills.jsonl")
    rows = []
    for s in sorted(skills, key=lambda s: (order.index(s["status"]), -s["utility"])):
        status = f'<span class="status {escape(s["status"])}">{escape(s["status"])}</span>'
        text = f"<b>When {escape(s['condition'])}:</b> {escape(s['strategy'])}"
        origin = f"{escape(s['bucket'])}, iteration {int(s['born'])}"
        record = [float(s["utility"]), int(s["n"])]
        rows.append([status, text + f"<br><small>{origin}</small>", *record, life(s["deltas"])])
    if not rows:
        return "<p>No skill was mined.</p>"
    return html_table(["", "skill", "utility u", "evaluations", "every Δ_g"], rows)


def weight_of(step, config) -> float:
    """w of a step whose gate is open, as `distill.internalization_rows` and L_int make it."""
    if config["internalize_weight"] == "one":
        return min(1.0, config["advantage_clip"])
    sigma_A = 1.0 if config["normalize_std"] else config["success_reward"]
    return min(max(step.get("advantage", 0) / sigma_A, 0), config["advantage_clip"])


def is_gated(record, config) -> bool:
    """Whether phase 2 distilled this episode."""
    delta = record.get("delta") or 0
    opened = delta > 0 or config["internalize_gate"] == "none"
    acts = config["lambda_max"] > 0 or config["hand_off"]
    return bool(record["skills"]) and record["phase"] == "distill" and opened and acts


def response(step, config, is_distilled) -> str:
    """The response; where phase 2 distills the step, its action is marked by its weight."""
    said = step["said"]
    span = envs.action_span(said)
    weight = weight_of(step, config)
    if not is_distilled or span is None or weight == 0:
        return escape(said)
    start = span[0]
    stop = span[1] + len("</action>")
    if config["internalize_tokens"] == "response":
        start = 0
        stop = len(said)
    color = f"rgba(217, 130, 43, {0.15 + 0.6 * weight / config['advantage_clip']:.2f})"
    mark = f'<mark style="background: {color}" title="w = {weight:.2f}">'
    return f"{escape(said[:start])}{mark}{escape(said[start:stop])}</mark>{escape(said[stop:])}"


def episode(record, config) -> str:
    skills = "".join(f'<p class="skill">{escape(skill)}</p>' for skill in record["skills"])
    is_distilled = is_gated(record, config)
    end = '<span class="solved">solved</span>' if record["success"] else ""
    end = end or '<span class="failed">not solved</span>'
    parts = [f"<div><b>{'With the skill' if skills else 'Plain prompt'}</b>, {end}{skills}"]
    for step in record["steps"]:
        seen = escape(step["saw"][:SEEN_CHARS])
        said = response(step, config, is_distilled)
        parts.append(f'<div class="step"><div class="saw">{seen}</div>')
        parts.append(f'<div class="said">{said}</div></div>')
    return "".join([*parts, "</div>"])


def pairs(root, most, config) -> str:
    """Up to `most` iterations in which both arms of a game were written out, spread over the run;
    those first where the arms came out differently.
    """
    if not (root / "episodes.jsonl").exists():
        return "<p>No transcripts (--samples 0).</p>"
    found = {}
    for record in read_jsonl(root / "episodes.jsonl"):
        key = (record["phase"], record["iteration"], record.get("group"))
        found.setdefault(key, {})[bool(record["skills"])] = record
    both = [(key, arms) for key, arms in found.items() if len(arms) == 2]
    telling = [x for x in both if x[1][True]["success"] != x[1][False]["success"]]
    chosen = telling or both
    if len(chosen) > most:
        chosen = [chosen[i * len(chosen) // most] for i in range(most)]
    if not chosen:
        return "<p>No group with both arms was written out.</p>"
    parts = []
    for (phase, iteration, _), arms in chosen:
        delta = arms[True].get("delta")
        effect = "" if delta is None else f", Δ_g = {delta:+.2f}"
        parts.append(f"<h3>{escape(phase)} {iteration}{effect}</h3>")
        parts.append(f"<p>{escape(arms[True]['task'])}</p>")
        halves = episode(arms[True], config) + episode(arms[False], config)
        parts.append(f'<div class="pair">{halves}</div>')
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------
# Pages
# --------------------------------------------------------------------------------------------------


def page(title, sections) -> str:
    body = "\n".join(f"<h2>{escape(name)}</h2>\n{html}" for name, html in sections.items())
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html lang=en>{head}\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"


def run_page(name, control, most) -> str:
    root = Path("runs") / name
    config = read_json(root / "config.json")
    plot.draw(root, root / "plot.png", Path("runs") / control if control else None)
    rows = evaluations(name, control)
    cells = [[escape(cell) for cell in row] for row in evaluation_rows(rows)]
    missing = "<p>No evaluation yet: <code>python evaluate.py</code>.</p>"
    sections = {"Evaluations": html_table(HEAD, cells) if rows else missing}
    sections["Evaluations"] += f"<p>{escape(conclusion(rows))}</p>"
    sections["Curves"] = picture(root / "plot.png")
    sections["Skills and their lives"] = skill_lives(root)
    sections["The same game with the skill and without"] = pairs(root, most, config)
    sections["Flags"] = f"<pre>{escape(json.dumps(config, indent=1))}</pre>"
    return page(f"SIRI run {name}", sections)


def study_page(names) -> str:
    sections = {}
    if len(names) > 1 and Path("results/regime.png").exists():
        text = Path("results/regime.md").read_text()
        sections["All"] = picture("results/regime.png") + from_markdown(text)
    for name in names:
        text = Path(f"results/study-{name}.md").read_text()
        sections[name] = picture(f"results/study-{name}.png") + from_markdown(text)
    return page("Studies: " + ", ".join(names), sections)


def from_markdown(text) -> str:
    """The tables and paragraphs of what `tools/study.py` writes."""
    parts = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("|"):
            cells = [[escape(c.strip()) for c in line.strip("|").split("|")] for line in lines]
            parts.append(html_table(lines[0].strip("| ").split("|"), cells[2:]))
        else:
            parts.append(f"<p>{escape(block)}</p>")
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="", help="name of a run")
    parser.add_argument("--control", default="", help="name of its control, drawn with it")
    parser.add_argument("--studies", default="", help="names of studies, instead of a run")
    parser.add_argument("--pairs", type=int, default=6, help="games shown in both arms")
    parser.add_argument("--out", default="", help="empty: runs/<run>/report.html")
    args = parser.parse_args()
    if bool(args.run) == bool(args.studies):
        raise UserError("give --run NAME or --studies NAMES")
    if args.run:
        text = run_page(args.run, args.control, args.pairs)
        rows = evaluations(args.run, args.control)
        print(f"{markdown_table(rows)}\n\n{conclusion(rows)}")
        record = {"rows": [{k: row[k] for k in row if k != "items"} for row in rows]}
        record["conclusion"] = conclusion(rows)
        write_atomically(Path("runs") / args.run / "table.json", json.dumps(record, indent=1))
    else:
        text = study_page(args.studies.split(","))
    out = Path(args.out or (f"runs/{args.run}/report.html" if args.run else "results/report.html"))
    write_atomically(out, text)
    print(f"written to {out}, {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
