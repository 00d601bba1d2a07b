"""tools/study.py: what it runs, how it pairs and averages, and the page that it generates."""

import copy
import json
import math
import re
import shlex
import shutil
import statistics
import time
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import simulate_studies
from conftest import ROOT

from config import ABLATIONS, UserError, read_json
from tools import study


def plan(**changes):
    """The arguments of a small study."""
    small = {"name": "n", "title": "", "variants": ["siri"], "seeds": ["1"], "flags": "--tasks 8"}
    small |= {
        "results": "results/study.json",
        "mine_iterations": 3,
        "distill_iterations": 4,
        "points": 2,
        "eval_items": 120,
    }
    return SimpleNamespace(**small | {"jobs": 1} | changes)


def two_seeds(gain):
    """Variant -> seed -> curve; siri solves `gain` items of ten more at the end, and pairs matter:
    the seeds differ by far more than the variants, and the control names them the other way round.
    """
    control = {seed: [[0, n, 10], [100, n, 10]] for seed, n in (("2", 6), ("1", 0))}
    one = [[50, 0, 10], [150, gain, 10]]
    two = [[70, 6, 10], [170, 6 + gain, 10]]
    return {"gigpo": control, "siri": {"1": one, "2": two}}


# --- statistics -----------------------------------------------------------------------------------


def students_quantile(freedom) -> float:
    """The point below which 97.5% of the density of Student's t lie, by summing it up."""
    x = np.linspace(0, 200, 200_001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    steps = (density[1:] + density[:-1]) / 2 * (x[1] - x[0])
    return float(np.interp(0.475, np.cumsum(steps), x[1:]))


def test_the_interval_is_students_over_independent_values():
    """mean +- t s / sqrt(n), t as printed in tables: 12.706 for two values, 2.262 for ten."""
    assert len(study.T) == 20
    for freedom, t in enumerate(study.T, 1):
        assert float(t) == pytest.approx(students_quantile(freedom), abs=6e-4), freedom
    for n, t in ((2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (21, 2.086), (60, 2.086)):
        values = [math.sin(7 * k) for k in range(n)]
        half = t * statistics.stdev(values) / math.sqrt(n)
        middle = statistics.fmean(values)
        assert study.interval(values) == pytest.approx((middle - half, middle + half)), n
    assert study.interval([0.3]) is None


def test_a_tie_is_no_difference_whatever_floats_make_of_it():
    one, other = ([[64, 10, 120], [320, a, 120], [576, b, 120]] for a, b in ((20, 21), (21, 19)))
    assert study.differences({"1": one}, {"1": other}, "curve") == [0]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """The table of results/README.md, from its simulation: 2,000 studies a number."""
    page = (ROOT / "results" / "README.md").read_text()
    block = page.split("<!-- coverage:begin -->\n")[1].split("\n<!-- coverage:end -->")[0]
    assert block == simulate_studies.table()
    shares = [float(share) for share in re.findall(r"([\d.]+)%", block.split("---")[-1])]
    assert len(shares) == 12 and min(shares) > 93.5  # 95 less three standard errors


def test_the_mean_over_the_curve_weighs_points_by_the_episodes_between():
    curve = [[64, 0, 10], [164, 0, 10], [464, 8, 10], [564, 10, 10]]
    found = study.measures(curve)
    assert (found["warmup"], found["end"]) == (0.0, 1.0)
    assert found["curve"] == pytest.approx((100 * 0 + 300 * 0.4 + 100 * 0.9) / 500)


def test_differences_are_paired_by_seed_and_refuse_other_seeds_and_plans():
    found = two_seeds(2)
    assert study.differences(found["siri"], found["gigpo"], "end") == pytest.approx([0.2, 0.2])
    assert study.differences(found["siri"], found["gigpo"], "curve") == pytest.approx([0.1, 0.1])
    some = {"1": found["siri"]["1"]}  # a variant may have fewer
    assert study.differences(some, found["gigpo"], "end") == pytest.approx([0.2])
    assert study.differences(found["gigpo"], some | {"9": []}, "end") == pytest.approx([-0.2])
    assert study.differences(some, {}, "end") == [] and study.estimate([]) == ""
    for wrong in ([120, 0, 10], [100, 0, 12]):
        other = found["gigpo"] | {"1": [[0, 0, 10], wrong]}
        with pytest.raises(UserError, match="other episodes or items"):
            study.differences(found["siri"], other, "end")


def test_pooled_studies_count_each_seed_once_and_are_of_one_plan():
    first, second = two_seeds(2), {}
    for variant, curves in two_seeds(4).items():
        second[variant] = {f"{seed}0": curve for seed, curve in curves.items()}
    studies = {"a": {"variants": first}, "b": {"variants": second | {"kl": {}}}}
    studies["both"] = {"title": "both", "pools": ["a", "b"]}
    pooled = study.variants_of(studies, "both")
    assert list(pooled) == ["gigpo", "siri"]  # kl is not in both
    gains = study.differences(pooled["siri"], pooled["gigpo"], "end")
    assert gains == pytest.approx([0.2, 0.2, 0.4, 0.4])
    siri = study.rows(studies | {"x": studies["both"] | {"only": ["siri"]}}, "x")
    assert len(siri) == 1 and siri[0][2] == "4" and siri[0][7] == ""  # nothing to compare with
    studies["b"] = studies["a"]
    with pytest.raises(UserError, match="a seed twice"):
        study.variants_of(studies, "both")
    studies["b"] = {"variants": {v: {"9": [[0, 1, 10], [200, 5, 10]]} for v in first}}
    with pytest.raises(UserError, match="other evaluations"):
        study.variants_of(studies, "both")


def test_a_line_of_the_table_is_the_variant_minus_its_control():
    curves = two_seeds(2)
    curves["siri"]["2"][-1][1] = 6  # one seed gains, the other does not: a tie is not ahead
    gigpo, siri = study.rows({"s": {"title": "t", "variants": curves}}, "s")
    assert gigpo[:7] == ["t", "GiGPO", "2", "100", "0.300", "0.300", "0.300"]
    assert siri[:7] == ["t", "SIRI", "2", "160", "0.300", "0.400", "0.350"]
    assert siri[7] == "+0.050 (-0.585 to +0.685), 1 of 2"  # 12.706 * 0.05
    assert siri[8] == "+0.100 (-1.171 to +1.371), 1 of 2"
    less = ["-0.050 (-0.685 to +0.585), 0 of 2", "-0.100 (-1.371 to +1.171), 0 of 2"]
    assert gigpo[7:] == ["", "", *less]
    assert siri[9:] == ["", ""]


def test_no_interval_is_printed_where_there_is_none():
    one = {v: {"1": curves["1"]} for v, curves in two_seeds(2).items()}
    assert study.rows({"s": {"title": "t", "variants": one}}, "s")[1][8] == "+0.200 (one seed)"
    alike = study.rows({"s": {"title": "t", "variants": two_seeds(0)}}, "s")
    assert alike[1][8] == "+0.000 (in every seed)"


# --- what is run ----------------------------------------------------------------------------------


def test_flags_reach_the_phases_that_they_are_for():
    warmup, mine, *distill = study.chain(plan(), "response-strong", "1")
    assert warmup["flags"] == "--tasks 8 --seed 1"
    assert mine["flags"].split() == "--fork n-warmup-s1 --mine_iterations 3".split()
    later = "--fork n-mine-siri-s1 --without action_mask --lambda_max 1 --distill_iterations"
    assert [" ".join(s["flags"].split()) for s in distill] == [f"{later} 2", f"{later} 4"]
    assert [stage["iteration"] for stage in distill] == [2, 4]
    outs = [stage["out"].split("/")[-1] for stage in (warmup, mine, *distill)]
    assert outs == [f"study-{x}.json" for x in ("warmup", "mine", "distill-2", "distill-4")]
    many = study.chain(plan(points=4, distill_iterations=12), "siri", "1")[2:]
    assert [stage["iteration"] for stage in many] == [3, 6, 9, 12]
    gigpo = study.chain(plan(), "gigpo", "1")
    assert all("--without skills" in stage["flags"] for stage in gigpo[1:])
    assert "--fork n-mine-gigpo-s1 " in gigpo[-1]["flags"] and "--without" not in gigpo[0]["flags"]


def test_an_ablation_needs_no_line_of_its_own(monkeypatch):
    monkeypatch.setattr(study, "ABLATIONS", (*ABLATIONS, "anything_new"))
    for name, in_mining in (("gate", False), ("validation", True), ("anything_new", True)):
        _, mine, *distill = study.chain(plan(), f"no-{name}", "1")
        assert (f"--without {name}" in mine["flags"]) == in_mining
        assert mine["run"] == ("n-mine-no-" + name if in_mining else "n-mine-siri") + "-s1"
        assert all(stage["flags"].count(f"--without {name}") == 1 for stage in distill)
    assert study.describe("no-action_mask")[0] == "without action mask"
    for wrong in ("sari", "no-sari", "gate", "no-gate+skill", "+skills"):
        with pytest.raises(UserError, match=re.escape(f"--variants {wrong}: choose of init")):
            study.describe(wrong)


def test_skills_are_kept_in_the_prompt_of_the_evaluations_alone(scripts):
    """The variant is the runs of another one, evaluated once more at each point but the first."""
    title, *flags = study.describe("no-internalization+skills")
    assert title == "without internalization, evaluated with its skills"
    assert flags == list(study.describe("no-internalization")[1:])
    plain = study.chain(plan(), "no-internalization", "1")
    kept = study.chain(plan(), "no-internalization+skills", "1")
    assert [stage["skills"] for stage in kept] == [False, True, True, True]
    assert not any(stage["skills"] for stage in plain)
    outs = [stage["out"].replace("-skills.json", ".json") for stage in kept]
    assert outs == [stage["out"] for stage in plain] and kept[0] == plain[0]
    study.run_seed(plan(variants=["siri+skills", "siri"]), "1")
    runs = [line.split()[1] for line in scripts.said if "evaluate.py" in line]
    assert runs == ["n-warmup-s1", *["n-mine-siri-s1"] * 2, *["n-siri-s1"] * 4]
    flags = ["--skills" in line for line in scripts.said if "evaluate.py" in line]
    assert sum(flags) == 3
    iterations = [line.split()[-1] for line in scripts.said if line.startswith("distill.py")]
    assert iterations == ["2", "2", "4", "4"]  # both evaluations come before the run goes on


def test_the_initial_policy_is_evaluated_once_and_stands_at_all_episodes(scripts):
    (stage,) = study.chain(plan(), "init", "1")
    assert (stage["phase"], stage["skills"]) == ("init", False)
    study.run_seed(plan(variants=["init"]), "1")
    assert [line.split()[0] for line in scripts.said] == ["evaluate.py"]
    control = {"1": [[64, 0, 10], [164, 0, 10], [264, 8, 10]]}
    init = {"1": [[0, 1, 10]]}
    assert study.measures(init["1"]) == {"episodes": 0, "warmup": 0.1, "end": 0.1, "curve": 0.1}
    assert study.differences(init, control, "end") == pytest.approx([-0.7])
    assert study.differences(init, control, "curve") == pytest.approx([0.1 - 0.2])


def test_without_warmup_mining_begins_with_the_initial_policy():
    start, mine, *_ = study.chain(plan(), "no-warmup", "1")
    assert start["phase"] == "init" and "--fork" not in mine["flags"]
    assert "--tasks 8 --seed 1" in mine["flags"] and "--without warmup" in mine["flags"]


def tokens_of(run):
    """More of them in the runs of a later seed."""
    return {"results": {"all": {"tokens": 1000.4 + 100 * int(run[-1])}}}


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Every command in order; a phase script is at the iteration it was sent to, at the least."""
    monkeypatch.chdir(tmp_path)
    said = []
    reached = {}

    def command(script, run, flags):
        said.append(f"{script} {run} {flags}")
        words = flags.split()
        if script != "evaluate.py":
            iteration = int(words[-1]) if "iterations" in words[-2] else 5
            reached[run] = max(iteration, reached.get(run, 0))
            return
        out = tmp_path / words[words.index("--out") + 1]
        out.parent.mkdir(parents=True, exist_ok=True)
        iteration = None if "init" in words else reached[run]
        solved = {f"i{k}": k < (iteration or 0) for k in range(6)}
        out.write_text(json.dumps({"iteration": iteration, "items": solved} | tokens_of(run)))

    monkeypatch.setattr(study, "command", command)
    return SimpleNamespace(said=said, reached=reached, root=tmp_path)


def test_a_seed_warms_up_once_and_mines_once_for_variants_that_are_alike(scripts):
    study.run_seed(plan(variants=["siri", "no-gate", "gigpo"], points=1), "2")
    done = [line.split()[1] for line in scripts.said if "evaluate.py" not in line]
    runs = ("warmup", "mine-siri", "no-gate", "siri", "mine-gigpo", "gigpo")
    assert done == [f"n-{run}-s2" for run in runs]


def test_variants_that_mine_on_their_own_run_at_once_where_jobs_allow(scripts, monkeypatch):
    both = Barrier(2, timeout=10)  # breaks when one waits for the other to end
    alone = study.command

    def command(script, run, flags):
        if script == "mine.py":
            both.wait()
        alone(script, run, flags)

    monkeypatch.setattr(study, "command", command)
    study.run_seed(plan(variants=["siri", "gigpo"], jobs=2), "1")
    first = [said.split()[:2] for said in scripts.said[:2]]
    assert first == [["warmup.py", "n-warmup-s1"], ["evaluate.py", "n-warmup-s1"]]
    assert len(scripts.said) == 14


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_more_seeds_run_at_once_than_jobs(scripts, monkeypatch, jobs):
    running, most = [], []
    alone = study.command

    def command(*given):
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        running.pop()
        alone(*given)

    monkeypatch.setattr(study, "command", command)
    monkeypatch.setattr(study, "collect", lambda args, earlier: {"variants": {}})
    study.run_study(plan(seeds=["1", "2", "3", "4"], jobs=jobs))
    assert max(most) == jobs


def test_a_stage_is_evaluated_from_its_own_checkpoint_before_the_next_begins(scripts):
    study.run_seed(plan(), "1")
    done = [(said.split()[0], said.split()[1]) for said in scripts.said]
    phases = [("warmup", "n-warmup-s1"), ("mine", "n-mine-siri-s1")] + [
        ("distill", "n-siri-s1")
    ] * 2
    assert done == [(f"{s}.py", r) for phase, r in phases for s in (phase, "evaluate")]
    for (phase, _), said in zip(phases, scripts.said[1::2], strict=True):
        assert f"--checkpoint {phase} --eval_items 120 --out runs/" in said
    assert [read_json(f"runs/n-siri-s1/study-distill-{k}.json")["iteration"] for k in (2, 4)] == [
        2,
        4,
    ]


def test_the_initial_policy_is_evaluated_with_the_flags_of_its_study(scripts):
    """There is no run yet that it could take them from, and nothing to train."""
    study.run_seed(plan(variants=["no-warmup"]), "1")
    evaluation, mine, *_ = scripts.said
    assert evaluation.startswith("evaluate.py n-warmup-s1 --checkpoint init --eval_items 120 --out")
    assert evaluation.endswith(" --tasks 8 --seed 1") and mine.startswith("mine.py n-mine-no-")
    assert not any("--tasks" in said for said in scripts.said[2:])


def test_finished_commands_are_skipped_and_a_run_that_went_on_is_not_taken_for_an_earlier_stage(
    scripts,
):
    study.run_seed(plan(), "1")
    before = list(scripts.said)
    study.run_seed(plan(), "1")
    assert scripts.said == before
    out = scripts.root / "runs/n-siri-s1/study-distill-2.json"
    out.unlink()
    with pytest.raises(UserError, match="iteration 2 of distill was to be evaluated, but .* at 4"):
        study.run_seed(plan(), "1")
    assert not out.exists()


def test_a_study_keeps_each_stage_with_its_own_episodes_and_explains_phases_1_and_2(
    scripts, monkeypatch
):
    """Stages are not shifted by one, and the warm-up's last iteration is its point."""
    args = plan(variants=["siri", "no-warmup"])
    lines = [("warmup", k) for k in (1, 2)] + [("mine", k) for k in (1, 2, 3)]
    lines += [("distill", k) for k in (1, 2, 3, 4)]
    for variant in args.variants:
        own = [x for x in lines if variant == "siri" or x[0] != "warmup"]
        text = ""
        for number, (phase, k) in enumerate(own, 1):
            record = {"phase": phase, "iteration": k, "episodes_so_far": 64 * number, "delta": None}
            share = 0.9 if phase == "warmup" else 0.5
            record |= {"success_plain": 1 / number, "no_contrast": share}
            text += json.dumps(record | {"active": int(phase == "distill")}) + "\n"
        folder = scripts.root / "runs" / f"n-{variant}-s1"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(study.sys, "argv", ["study.py", "run", "--flags", "--tasks 8"])
    (scripts.root / "results").mkdir()
    (scripts.root / "results/study.json").write_text('{"earlier": {"title": "kept"}}')
    assert "| n | SIRI | 1 |" in study.run_study(args)
    kept = read_json("results/study.json")
    assert kept["earlier"] == {"title": "kept"}
    assert kept["n"]["command"] == "python -m tools.study run --flags '--tasks 8'"
    curves = kept["n"]["variants"]
    assert curves["siri"]["1"] == [[128, 5, 6], [320, 3, 6], [448, 2, 6], [576, 4, 6]]
    assert curves["no-warmup"]["1"] == [[0, 0, 6], [192, 3, 6], [320, 2, 6], [448, 4, 6]]
    explained = kept["n"]["explained"]["siri"]
    expected = {"first_success": 1.0, "first_contrast": 0.1, "active": 0.57143, "no_contrast": 0.5}
    assert explained == pytest.approx(expected | {"tokens": 1100})
    for folder in list((scripts.root / "runs").glob("*-s1")):
        shutil.copytree(folder, str(folder)[:-1] + "2")
    last = scripts.root / "runs/n-siri-s2/study-distill-4.json"
    last.write_text(json.dumps(read_json(last) | tokens_of("s2")))
    found = study.collect(plan(variants=["siri"], seeds=["1", "2"]), {})["explained"]
    assert found["siri"]["tokens"] == 1150  # the mean of 1,100.4 and 1,200.4


def test_a_later_call_adds_its_seeds_to_the_study_of_that_name(scripts, monkeypatch):
    """On a fresh machine: of the first call nothing but results/study.json is there."""
    common = {"iteration": 1, "active": 0, "success_plain": 0.5, "no_contrast": 0.5}
    log = ""
    for phase, episodes in (("warmup", 64), ("distill", 128)):
        log += json.dumps(common | {"phase": phase, "episodes_so_far": episodes}) + "\n"
    fixed = "--flags '--tasks 8' --mine_iterations 3 --distill_iterations 4 --eval_items 120"
    other = {"variants": {"no-kl": {"7": [[0, 1, 6]]}}, "explained": {"no-kl": {"delta": 0.5}}}
    for seed, title in (("1", "two seeds"), ("2", "")):
        args = plan(variants=["siri", "gigpo"], seeds=[seed], title=title)
        for variant in args.variants:
            study.write_atomically(f"runs/n-{variant}-s{seed}/metrics.jsonl", log)
        words = shlex.split(f"run --name n --seeds {seed} --points 2 {fixed}")
        monkeypatch.setattr(study.sys, "argv", ["study.py", *words])
        said = study.run_study(args)
        kept = read_json("results/study.json")["n"]
        assert [list(x) for x in kept["variants"].values()] == 2 * [["1", "2"][: int(seed)]]
        assert bool(kept["explained"]["siri"]) == (seed == "1")
        if seed == "1":
            assert kept["explained"]["siri"]["tokens"] == 1100
        joined = study.collect(args, copy.deepcopy(other))  # another variant's stay as they were
        assert all(joined[name]["no-kl"] == other[name]["no-kl"] for name in other)
        shutil.rmtree("runs")
    assert kept["title"] == "two seeds" and "| two seeds | SIRI | 2 |" in said
    with pytest.raises(UserError, match="n was begun with --points 2, not 1"):
        study.run_study(plan(points=1))
    shutil.rmtree("runs", ignore_errors=True)
    Path("results/study.json").rename("other.json")
    with pytest.raises(UserError, match="n was begun with --points 2, not 1"):
        study.run_study(plan(points=1, results="other.json"))


def test_the_recorded_commands_can_be_read():
    """Or no seed could join their studies."""
    recorded = [
        x["command"] for x in read_json(ROOT / "results/study.json").values() if "command" in x
    ]
    assert all(study.parse(shlex.split(x)[3:]).flags for x in recorded) and len(recorded) > 5


def test_a_study_of_another_plan_needs_another_name(tmp_path, monkeypatch):
    """Or its evaluations would be mixed with those of the first."""
    monkeypatch.chdir(tmp_path)
    study.remember(plan())
    study.remember(plan())
    for name, value in {"mine_iterations": 2, "flags": "", "points": 1, "eval_items": 0}.items():
        with pytest.raises(UserError, match=f"--{name} .*, not {value}"):
            study.remember(plan(**{name: value}))


def test_a_command_that_fails_is_told_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "mine.py").write_text("import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] * 3)")
    with pytest.raises(UserError, match=r"mine.py --run r --seed 1: 111 \(see runs/r.log\)"):
        study.command("mine.py", "r", "--seed 1")


# --- the page -------------------------------------------------------------------------------------


def test_the_page_holds_what_its_data_say():
    """`python -m tools.study table` writes it."""
    page = (ROOT / "results" / "study.md").read_text()
    block = page.split("<!-- study:begin -->\n")[1].split("\n<!-- study:end -->")[0]
    assert block == study.markdown(read_json(ROOT / "results" / "study.json"))
    assert "| three options | SIRI | 10 |" in block
    assert "| +0.125 (+0.046 to +0.204), 9 of 10 |" in block


def test_the_table_command_writes_the_page_and_the_picture(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    page = tmp_path / "results" / "study.md"
    known = page.read_text()
    page.write_text(known.replace("| three options | SIRI | 10 |", "| another | line | 9 |"))
    (tmp_path / "results" / "study.png").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["study.py", "table"])
    study.main()
    assert page.read_text() == known
    assert (tmp_path / "results" / "study.png").stat().st_size > 20_000
    studies = read_json("results/study.json")
    assert capsys.readouterr().out == f"{study.reasons(studies)}\n"
    page.unlink()  # as in a results file of one's own: the table is printed
    study.main()
    printed = f"{study.markdown(studies)}\n\n{study.reasons(studies)}\n"
    assert capsys.readouterr().out == printed


def test_what_may_explain_a_difference_is_a_table_of_its_own():
    studies = {
        "a": {"title": "A", "explained": {"siri": {"x": 0.12345, "y": 2.0}, "gigpo": {"y": 0.5}}},
        "b": {"title": "B"},
        "c": {"title": "C", "explained": {"no-gate": {"z": 1e-5}}},
    }
    assert (
        study.reasons(studies)
        == """\
| study | variant | x | y | z |
| --- | --- | --- | --- | --- |
| A | SIRI | 0.123 | 2 |  |
| A | GiGPO |  | 0.5 |  |
| C | without gate |  |  | 1e-05 |"""
    )


def test_flags_of_the_command(monkeypatch):
    seen = []
    monkeypatch.setattr(study, "run_study", lambda args: seen.append(args) or "done")
    monkeypatch.setattr("sys.argv", ["study.py", "run", "--name", "n"])
    study.main()
    plan = {"mine_iterations": 4, "distill_iterations": 12, "points": 3, "eval_items": 0}
    plan |= {"name": "n", "title": "", "flags": "", "jobs": 1, "command": "run"}
    plan |= {"variants": ["siri", "gigpo"], "seeds": ["1", "2", "3", "4", "5"]}
    plan |= {"results": "results/study.json"}
    assert vars(seen[0]) == plan
    words = """--name m --title T --flags=--tasks --variants no-gate,siri --seeds 7 --jobs 2
    --mine_iterations 1 --distill_iterations 7 --points 5 --eval_items 6 --results t.json""".split()
    monkeypatch.setattr("sys.argv", ["study.py", "run", *words])
    study.main()
    plan = {"mine_iterations": 1, "distill_iterations": 7, "points": 5, "eval_items": 6}
    plan |= {"name": "m", "title": "T", "flags": "--tasks", "jobs": 2, "command": "run"}
    plan |= {"results": "t.json"}
    assert vars(seen[1]) == plan | {"variants": ["no-gate", "siri"], "seeds": ["7"]}
    for wrong, message in (
        ("--jobs 0", "must be 1 at least"),
        ("--points 0", "--points 0: must be 1 to --distill_iterations 12"),
        ("--points 4 --distill_iterations 3", "--points 4: must be 1 to --distill_iterations 3"),
        ("--variants x", "--variants x: "),
    ):
        monkeypatch.setattr("sys.argv", ["study.py", "run", "--name", "n", *wrong.split()])
        with pytest.raises(UserError, match=message):
            study.main()
    assert len(seen) == 2


def test_a_block_is_replaced_between_its_markers(tmp_path):
    page = tmp_path / "p.md"
    page.write_text("a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n")
    study.replace_block(page, "x", "new")
    assert page.read_text() == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n"
    with pytest.raises(UserError, match="no <!-- y:begin -->"):
        study.replace_block(page, "y", "new")


def test_the_figure_names_each_variant_once_in_one_colour_everywhere(monkeypatch):
    figures = []
    monkeypatch.setattr(study, "save", lambda figure, path: figures.append(figure))
    studies = {
        n: {"title": f"title {n}", "variants": two_seeds(2), "panel": n < "c"} for n in "abc"
    }
    studies["b"]["variants"]["no-gate"] = studies["b"]["variants"]["siri"]
    studies["c"]["variants"]["siri+skills"] = two_seeds(3)["siri"]
    studies["c"]["panel"] = {"the gap": ["siri", "siri+skills"]}
    study.draw(studies, "nowhere")
    (figure,) = figures
    assert [axis.get_title() for axis in figure.axes] == ["title a", "title b", "the gap"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["GiGPO", "SIRI", "without gate", "SIRI, evaluated with its skills"]
    means = [[x for x in axis.lines if x.get_marker() == "o"] for axis in figure.axes]
    colors = [[line.get_color() for line in lines] for lines in means]
    assert colors[0] == [study.GRAY, study.BLUE] and colors[1][:2] == colors[0]
    assert len(set(colors[1])) == 3
    plain, kept = means[2]
    assert plain.get_color() == kept.get_color() == study.BLUE
    assert (plain.get_linestyle(), kept.get_linestyle()) == ("-", "--")
    siri = [x for x in figure.axes[0].lines if x.get_color() == study.BLUE]  # its two seeds, first
    drawn = [line.get_xydata().round(6).tolist() for line in siri]
    assert drawn == [[[50, 0], [150, 0.2]], [[70, 0.6], [170, 0.8]], [[60, 0.3], [160, 0.5]]]


def test_the_second_figure_compares_with_siri_and_says_where_zero_is_outside(monkeypatch):
    figures = []
    monkeypatch.setattr(study, "save", lambda figure, path: figures.append((figure, path)))
    curves = {str(seed): [[0, 1, 10], [10, 3 + seed, 10]] for seed in (1, 2, 3)}
    more = {"1": 2, "2": 2, "3": 3}
    better = {seed: [a, [10, b[1] + more[seed], 10]] for seed, (a, b) in curves.items()}
    one = {"1": curves["1"]}
    variants = {"init": curves, "gigpo": curves, "siri": curves, "no-gate": better, "grpo": one}
    studies = {"a": {"title": "A", "variants": variants}, "b": {"title": "B", "variants": variants}}
    study.draw_differences(studies, "nowhere")
    assert not figures  # no study asks for it
    studies["b"]["compared"] = True
    study.draw_differences(studies, "there")
    ((figure, path),) = figures
    (axis,) = figure.axes
    assert path == "there" and axis.get_title(loc="left") == "B"
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["GiGPO (3 seeds)", "without gate (3 seeds)"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first row is on top
    means = [line for line in axis.lines if line.get_marker() == "o"]
    gains = [0.1, 0.1, 0.15]  # of the gate's rows, over two points
    assert [line.get_xdata()[0] for line in means] == pytest.approx([0, np.mean(gains)])
    bars = [line.get_xdata() for line in axis.lines if line.get_color() == study.BLUE]
    assert bars[0] == pytest.approx(study.interval(gains))
    assert [line.get_color() for line in means] == [study.GRAY, study.BLUE]
