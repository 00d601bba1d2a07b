"""Variants x seeds at equal episodes: all variants of a seed go on from one warm-up checkpoint.

    python -m tools.study run --name shop --variants siri,gigpo,no-gate --seeds 1,2,3 --jobs 2
    python -m tools.study table                # results/study.json -> study.md and study.png

Each seed has one run of `warmup.py`, a fork of it through `mine.py` for all variants that are alike
in phase 1, and a fork of that through `distill.py` for each variant. The plain prompt is evaluated
after the warm-up, after mining and at --points points of phase 2. A command whose evaluation is
there is skipped, so the same line goes on where it was stopped. --jobs seeds run at once, or the
variants of fewer seeds.

The seeds join those of earlier calls, whose runs may be gone, and the study the others in the file
--results, as name -> {title, variants, ...}:

    variants   variant -> seed -> [[episodes, solved, items], ...], a point for each evaluation
    pools      instead: studies whose seeds are taken together; `only` some of their variants
    explained  variant -> means over the seeds and the iterations of phases 1 and 2; empty where
               the seeds are of several calls
    panel      whether the figure shows the study; or title -> variants, a panel for each
    compared   whether a second figure, <name>-differences.png, shows each variant minus SIRI

Each interval is Student's t, 95%, over the seeds' differences to GiGPO and to SIRI: it speaks of
other seeds on the same items.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from config import ABLATIONS, UserError, read_json, read_jsonl, read_text, write_atomically
from runtime.flags import check_name
from runtime.run import run_script

ROOT = Path(__file__).resolve().parent.parent
FIXED = ("flags", "mine_iterations", "distill_iterations", "points", "eval_items")  # of a study

VARIANTS = {  # name: (in tables and figures, flags of phases 1 and 2, more flags of phase 2)
    "init": ("prompt alone", "", ""),  # the initial policy: nothing is trained
    "siri": ("SIRI", "", ""),
    "gigpo": ("GiGPO", "--without skills", ""),
    "grpo": ("GRPO", "--without skills --step_weight 0", ""),
    "response-strong": ("SIRI, all tokens, lambda 1", "", "--without action_mask --lambda_max 1"),
    "action-strong": ("SIRI, lambda 1", "", "--lambda_max 1"),
    "nothing": ("no skill shown", "--show nothing", ""),
    "neutral": ("neutral words shown", "--show neutral", ""),
    "other": ("skills of other tasks shown", "--show other", ""),
    "writer": ("another writer's skills", "--miner http://127.0.0.1:8123/v1", ""),  # tiny/writer.py
}
IN_PHASE_2 = ("internalization", "gate", "weight", "action_mask")  # phase 1 is the same without
CONTROLS = ("gigpo", "siri")  # what the other variants are compared with
KEPT = "+skills"
KNOWN = f"{', '.join(VARIANTS)}, no-<ablation> for --without <ablation>, and <variant>{KEPT} for "
KNOWN += "the same runs evaluated with their active skills in the prompt"

BLUE, ORANGE, GREEN, GRAY = "#1f5fa8 #d9822b #3a8f5c #8a8f98".split()  # of all figures
COLORS = {"gigpo": GRAY, "siri": BLUE, "response-strong": GREEN}
OTHER_COLORS = (ORANGE, "#7b5ea7", "#b0413e", "#4aa3a2", "#a08030")


def describe(variant) -> tuple[str, str, str]:
    """A line of VARIANTS, or what `no-<ablation>` and `<variant>+skills` stand for."""
    name, kept, _ = variant.partition(KEPT)
    ablation = name.removeprefix("no-")
    if name not in (*VARIANTS, *(f"no-{x}" for x in ABLATIONS)):
        raise UserError(f"--variants {variant}: choose of {KNOWN}")
    title, flag = f"without {ablation.replace('_', ' ')}", f"--without {ablation}"
    line = (title, "", flag) if ablation in IN_PHASE_2 else (title, flag, "")
    title, both, later = VARIANTS.get(name, line)
    return (f"{title}, evaluated with its skills" if kept else title, both, later)


# --- Running --------------------------------------------------------------------------------------


def chain(args, variant, seed) -> list[dict]:
    """The stages of one variant and seed, in order: a command, then an evaluation."""
    _, both, later = describe(variant)
    variant, kept, _ = variant.partition(KEPT)
    warm = f"{args.name}-warmup-s{seed}"
    mined = f"{args.name}-mine-{variant if both else 'siri'}-s{seed}"
    fresh = f"{args.flags} --seed {seed}"

    def stage(run, phase, flags, iteration=None):
        point = f"-{iteration}" if phase == "distill" else ""
        skills = bool(kept and iteration)  # there is none before phase 1
        out = f"runs/{run}/study-{phase}{point}{'-skills' if skills else ''}.json"
        found = {"run": run, "phase": phase, "flags": flags, "iteration": iteration}
        return found | {"skills": skills, "out": out}

    start, before = stage(warm, "warmup", fresh), f"--fork {warm}"
    if variant in ("init", "no-warmup"):  # the initial policy, with which mine.py then begins
        start, before = stage(warm, "init", fresh), fresh
    if variant == "init":
        return [start]
    last = args.mine_iterations
    stages = [start, stage(mined, "mine", f"{before} {both} --mine_iterations {last}", last)]
    for last in np.linspace(0, args.distill_iterations, args.points + 1)[1:].round().astype(int):
        flags = f"--fork {mined} {both} {later} --distill_iterations {last}"
        stages.append(stage(f"{args.name}-{variant}-s{seed}", "distill", flags, int(last)))
    return stages


def command(script, run, flags):
    """Run a script on one thread, its output in runs/<run>.log; UserError with its last line."""
    log = Path("runs") / f"{run}.log"
    log.parent.mkdir(exist_ok=True)
    line = [sys.executable, str(ROOT / script), "--run", run, *shlex.split(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    print(f"{script} {run}", flush=True)
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        last = (read_text(log, "replace").strip().splitlines() or ["no word why"])[-1]
        raise UserError(f"{' '.join(line[1:])}: {last} (see {log})")


def run_seed(args, seed):
    """The warm-up, then the variants; those that mine on their own at once, if --jobs allows."""
    mining = defaultdict(list)  # run of mine.py -> stages
    for variant in args.variants:
        start, *later = chain(args, variant, seed)
        run_stages(args, [start])
        if later:
            mining[later[0]["run"]] += later
    for stages in mining.values():  # what shares a run is evaluated before that goes on
        stages.sort(key=lambda x: (x["phase"] == "distill", x["run"], x["iteration"]))
    with ThreadPoolExecutor(max(1, args.jobs // len(args.seeds))) as pool:
        list(pool.map(lambda stages: run_stages(args, stages), mining.values()))


def run_stages(args, stages):
    """Every stage whose evaluation is not there. UserError if its run has gone on beyond it."""
    for stage in stages:
        run, phase, out = stage["run"], stage["phase"], Path(stage["out"])
        if out.exists():
            continue
        how = f"--checkpoint {phase} --eval_items {args.eval_items} --out {out}"
        how += " --skills" if stage["skills"] else ""
        if phase == "init":  # there is no run yet whose flags the evaluation could take
            how += f" {stage['flags']}"
        else:
            command(f"{phase}.py", run, stage["flags"])
        command("evaluate.py", run, how)
        reached = read_json(out, ["iteration"])["iteration"]
        if stage["iteration"] not in (None, reached):
            out.unlink()
            wanted = f"iteration {stage['iteration']} of {phase} was to be evaluated"
            raise UserError(f"runs/{run}: {wanted}, but it is at {reached}; remove that folder")


def remember(args):
    """Keep what a study is; UserError when it is to be another one under the same name."""
    path = Path("runs") / f"study-{args.name}.json"
    wanted = {name: getattr(args, name) for name in FIXED}
    earlier = [read_json(path)] if path.exists() else []
    if "command" in (recorded := read_studies(args.results).get(args.name, {})):
        earlier.append(vars(parse(shlex.split(recorded["command"])[3:])))
    for known, name in product(earlier, FIXED):
        if known[name] != wanted[name]:
            was = f"was begun with --{name} {known[name]}, not {wanted[name]}"
            raise UserError(f"the study {args.name} {was}; give this one another --name")
    write_atomically(path, json.dumps(wanted, indent=1))


def read_studies(path) -> dict:
    return read_json(path) if Path(path).exists() else {}


def collect(args, earlier) -> dict:
    """What results/study.json keeps of a study that has run, beside the seeds of earlier calls."""
    variants = defaultdict(dict, earlier.get("variants", {}))
    explained = earlier.get("explained", {})
    for variant in args.variants:
        logs, tokens = [], []  # the latter of an episode of the last evaluation
        for seed in args.seeds:
            stages = chain(args, variant, seed)
            logs.append(read_metrics(stages[-1]["run"]) if variant != "init" else [])
            points = variants[variant][seed] = []
            for stage in stages:
                last = stage["iteration"] or float("inf")
                before = [x for x in logs[-1] if x["phase"] == stage["phase"]]
                counts = [x["episodes_so_far"] for x in before if x["iteration"] <= last]
                found = read_json(stage["out"], ["items", "results"])
                items = found["items"].values()
                points.append([max(counts, default=0), sum(items), len(items)])
            tokens.append(found["results"]["all"]["tokens"])
        explained[variant] = {}
        if len(logs) == len(variants[variant]):
            explained[variant] = explain(logs) | {"tokens": round(float(np.mean(tokens)))}
    return {"variants": variants, "explained": explained}


def read_metrics(run) -> list[dict]:
    """The log of a run. UserError where there is none, or a line of it is damaged."""
    path = Path("runs") / run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; run warmup.py, or give another --run")
    return read_jsonl(path, ["phase", "iteration", "episodes_so_far"])


def explain(logs) -> dict:
    """What may explain a difference: means over the seeds, and the iterations of phases 1 and 2."""
    later = [line for log in logs for line in log if line["phase"] != "warmup"]
    first = [log[0] for log in logs if log]
    values = {
        "first_success": [line["success_plain"] for line in first],
        "first_contrast": [1 - line["no_contrast"] for line in first],
        "active": [line["active"] > 0 for line in later],
    }
    for name in ("no_contrast", "delta", "gated_share"):
        values[name] = [line[name] for line in later if line.get(name) is not None]
    return {name: round(float(np.mean(found)), 5) for name, found in values.items() if found}


# --- Statistics -----------------------------------------------------------------------------------

# Student's t, 97.5%, by degrees of freedom from 1 to 20; the last serves beyond, a little too wide
T = """12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228
2.201 2.179 2.160 2.145 2.131 2.120 2.110 2.101 2.093 2.086""".split()


def interval(values) -> tuple[float, float] | None:
    """95% interval of the mean of independent values, or None for a single one."""
    n = len(values)
    if n < 2:
        return None
    half = float(T[min(n - 1, 20) - 1]) * np.std(values, ddof=1) / n**0.5
    return np.mean(values) - half, np.mean(values) + half


def measures(curve) -> dict:
    """Episodes of one seed; success after the warm-up, at the end, its mean over those between."""
    episodes, solved, items = np.array(curve, float).T
    success = solved / items
    area = success[0]  # of a policy that is not trained
    if len(curve) > 1:
        area = np.trapezoid(success, episodes) / (episodes[-1] - episodes[0])
    return {"episodes": episodes[-1], "warmup": success[0], "end": success[-1], "curve": area}


def differences(curves, control, measure) -> list[float]:
    """Variant - control for each seed that both have. UserError where their plans differ."""
    pairs = [(curve, control[seed]) for seed, curve in curves.items() if seed in control]
    if any(plan(ours) != plan(theirs) for ours, theirs in pairs if len(ours) > 1):
        raise UserError("variant and control were evaluated at other episodes or items")
    found = [measures(ours)[measure] - measures(theirs)[measure] for ours, theirs in pairs]
    return [round(difference, 12) for difference in found]  # a tie is exactly 0


def plan(curve) -> list:
    """Episodes since the first point, and items, of each point."""
    return [(episodes - curve[0][0], items) for episodes, _, items in curve]


def variants_of(studies, name) -> dict:
    """variant -> seed -> curve. A study that pools others has the variants common to all."""
    study = studies[name]
    if "pools" not in study:
        return study["variants"]
    parts = [studies[part]["variants"] for part in study["pools"]]
    pooled = {}
    for variant in study.get("only", parts[0]):
        if all(variant in part for part in parts):
            seeds = [item for part in parts for item in part[variant].items()]
            plans = [plan(curve) for _, curve in seeds]
            if len(dict(seeds)) < len(seeds) or any(own != plans[0] for own in plans):
                raise UserError(f"{name} pools a seed twice, or studies with other evaluations")
            pooled[variant] = dict(seeds)
    return pooled


# --- Table and figure -----------------------------------------------------------------------------

HEAD = ["study", "variant", "seeds", "episodes", "after warm-up", "at the end", "over the curve"]
HEAD += [f"{where}, minus {describe(x)[0]}" for x in CONTROLS for where in ("curve", "end")]


def rows(studies, name) -> list[list[str]]:
    """A study's lines of the table, a variant each; empty cells where there is no such control."""
    variants = variants_of(studies, name)
    lines = []
    for variant, curves in variants.items():
        found = [measures(curve) for curve in curves.values()]
        means = {key: np.mean([x[key] for x in found]) for key in found[0]}
        line = [studies[name]["title"], describe(variant)[0], str(len(found))]
        line += [f"{means['episodes']:.0f}"]
        line += [f"{means[key]:.3f}" for key in ("warmup", "end", "curve")]
        for control, key in product(CONTROLS, ("curve", "end")):
            peers = variants.get(control, {}) if variant != control else {}
            line.append(estimate(differences(curves, peers, key)))
        lines.append(line)
    return lines


def estimate(values) -> str:
    """`+0.125 (+0.046 to +0.204), 9 of 10`: of so many seeds so many are ahead. "" of none."""
    if not values:
        return ""
    if len(values) == 1 or np.ptp(values) == 0:
        return f"{values[0]:+.3f} ({'one seed' if len(values) == 1 else 'in every seed'})"
    low, high = interval(values)
    ahead = sum(value > 0 for value in values)
    return f"{np.mean(values):+.3f} ({low:+.3f} to {high:+.3f}), {ahead} of {len(values)}"


def markdown(studies) -> str:
    """The table of results, which is the generated part of results/study.md."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for name in studies:
        lines += rows(studies, name)
    return piped(lines)


def reasons(studies) -> str:
    """The table of what may explain them, its columns as in the JSON."""
    found = []  # (study, variant, values)
    for study in studies.values():
        for variant, values in study.get("explained", {}).items():
            found.append((study["title"], describe(variant)[0], values))
    columns = list(dict.fromkeys(key for *_, values in found for key in values))
    lines = [["study", "variant", *columns], ["---"] * (2 + len(columns))]
    for *names, values in found:
        lines.append([*names, *(f"{values[x]:.3g}" if x in values else "" for x in columns)])
    return piped(lines)


def piped(lines) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def replace_block(path, name, text):
    """Put `text` between <!-- name:begin --> and <!-- name:end --> of a page."""
    block = rf"(?<=<!-- {name}:begin -->\n).*?(?=\n<!-- {name}:end -->)"
    page, found = re.subn(block, lambda _: text, read_text(path), flags=re.S)
    if not found:
        raise UserError(f"{path}: no <!-- {name}:begin --> ... <!-- {name}:end -->")
    write_atomically(path, page)


def panels(studies) -> list[tuple]:
    """(title, variant -> seed -> curve) of each panel of the figure."""
    found = []
    for name, study in studies.items():
        variants = variants_of(studies, name)
        wanted = study.get("panel") or {}
        wanted = {study["title"]: variants} if wanted is True else wanted
        found += [(title, {v: variants[v] for v in names}) for title, names in wanted.items()]
    return found


def draw(studies, path):
    """A panel each: the seeds as thin lines, their mean; dashed where evaluated with skills."""
    shown = panels(studies)
    size = {"figsize": (3.7 * len(shown), 3.7), "constrained_layout": True}
    figure, axes = plt.subplots(1, len(shown), sharey=True, squeeze=False, **size)
    colors = dict(COLORS)
    labels = {}
    for axis, (title, variants) in zip(axes[0], shown, strict=True):
        for variant, curves in variants.items():
            base, kept, _ = variant.partition(KEPT)
            color = colors.setdefault(base, OTHER_COLORS[len(colors) % len(OTHER_COLORS)])
            points = np.array(list(curves.values()), float)  # [seeds, points, 3]
            episodes = points[:, :, 0].mean(0)
            success = points[:, :, 1] / points[:, :, 2]
            style = "--" if kept else "-"
            axis.plot(points[:, :, 0].T, success.T, style, color=color, alpha=0.3, lw=0.7)
            (line,) = axis.plot(episodes, success.mean(0), f"o{style}", color=color, ms=4)
            labels.setdefault(describe(variant)[0], line)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="episodes", ylim=(0, 1))
        axis.locator_params(axis="x", nbins=5)
    axes[0, 0].set_ylabel("held-out success (thin: one seed)")
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def draw_differences(studies, path):
    """Studies under each other: each variant - SIRI over the curve, its mean and 95% interval."""
    shown = {}  # title -> {variant's name: differences}
    for name in [name for name, study in studies.items() if study.get("compared")]:
        variants = variants_of(studies, name)
        lines = shown[studies[name]["title"]] = {}
        for variant, curves in variants.items():
            found = differences(curves, variants["siri"], "curve")
            if variant not in ("siri", "init") and len(found) > 1:
                lines[f"{describe(variant)[0]} ({len(found)} seeds)"] = found
    if not shown:
        return
    heights = [len(lines) + 1 for lines in shown.values()]
    size = {"figsize": (9, 1 + 0.27 * sum(heights)), "constrained_layout": True}
    ratios = {"height_ratios": heights}
    figure, axes = plt.subplots(len(shown), sharex=True, squeeze=False, gridspec_kw=ratios, **size)
    for axis, (title, lines) in zip(axes[:, 0], shown.items(), strict=True):
        for row, values in enumerate(lines.values()):
            low, high = interval(values)
            color = GRAY if low <= 0 <= high else BLUE  # whether it excludes zero
            axis.plot([low, high], [row, row], color=color, lw=1.5)
            axis.plot(np.mean(values), row, "o", color=color, ms=4)
        axis.axvline(0, color="black", lw=0.7)
        axis.set(yticks=range(len(lines)), yticklabels=lines, ylim=(len(lines) - 0.5, -0.5))
        axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("success over the curve, minus SIRI (95%; blue: zero is outside)")
    save(figure, path)


def save(figure, path):
    """Write a figure, its axes open at the top and the right."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run_study(args) -> str:
    remember(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: run_seed(args, seed), args.seeds))
    studies = read_studies(args.results)
    earlier = studies.get(args.name, {})
    study = {"title": args.name, "panel": True} | earlier | collect(args, earlier)
    study["title"] = args.title or study["title"]
    study["command"] = "python -m tools.study " + shlex.join(sys.argv[1:])
    text = json.dumps(studies | {args.name: study}, indent=1)
    curves = r"\[[\d\s,\[\]]+\]"  # each on one line
    text = re.sub(curves, lambda curve: "".join(curve[0].split()), text)
    write_atomically(args.results, text + "\n")
    return f"{markdown({args.name: study})}\n\n{reasons({args.name: study})}"


def parse(words):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="draw a file; its table into the page of its name")
    run = commands.add_parser("run", help="train, evaluate, and add to a file")
    for command in (table, run):
        known = "a JSON file of studies; table and picture go next to it"
        command.add_argument("--results", default="results/study.json", help=known)
    run.add_argument("--name", required=True, help="of the study; its runs begin with it")
    run.add_argument("--title", default="", help="in the table and above its panel")
    run.add_argument("--variants", default="siri,gigpo", help=f"of {KNOWN}")
    run.add_argument("--seeds", default="1,2,3,4,5")
    run.add_argument("--flags", default="", help="flags of every phase of every variant")
    run.add_argument("--mine_iterations", type=int, default=4)
    run.add_argument("--distill_iterations", type=int, default=12)
    run.add_argument("--points", type=int, default=3, help="evaluations within phase 2")
    run.add_argument("--eval_items", type=int, default=0, help="of the panel; 0: all of it")
    run.add_argument("--jobs", type=int, default=1, help="seeds, or variants of a seed, at once")
    return parser.parse_args(words)


def main():
    args = parse(sys.argv[1:])
    if args.command == "run":
        check_name("name", args.name)
        if args.jobs < 1:
            raise UserError(f"--jobs {args.jobs}: must be 1 at least")
        if not 0 < args.points <= args.distill_iterations:
            limits = f"1 to --distill_iterations {args.distill_iterations}"
            raise UserError(f"--points {args.points}: must be {limits}")
        try:
            shlex.split(args.flags)
        except ValueError as error:
            raise UserError(f"--flags {args.flags}: {error}") from None
        args.variants, args.seeds = args.variants.split(","), args.seeds.split(",")
        for variant in args.variants:
            describe(variant)  # a wrong one is to be known at once
        print(run_study(args))
    else:
        path = Path(args.results)
        studies = read_json(path)
        page = path.with_suffix(".md")
        if page.exists():
            replace_block(page, "study", markdown(studies))
        else:
            print(f"{markdown(studies)}\n")
        draw(studies, path.with_suffix(".png"))
        draw_differences(studies, path.with_name(f"{path.stem}-differences.png"))
        print(reasons(studies))


if __name__ == "__main__":
    run_script(main)
