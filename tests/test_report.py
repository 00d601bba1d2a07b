"""The page and the picture of a run: texts stay text, marks show what was distilled."""

import dataclasses
import json
import re

import numpy as np
import pytest

from config import Config, UserError
from runtime import saves
from tools import report, study

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>&\"'"
ACTION = f"<action>{EVIL}</action>"
EVALUATION = "eval-test-distill-T0.4-s0.json"


def write_run(root, success, **changes):
    """A run folder written by hand, hostile in every text."""
    (root / "distill").mkdir(parents=True)
    phases = [("warmup", k) for k in (1, 2)] + [("mine", 1), ("distill", 1)]
    text = ""
    for number, (phase, k) in enumerate(phases, 1):
        record = {"phase": phase, "iteration": k, "episodes_so_far": 8 * number}
        record |= {"success_plain": 0.1 * number}
        if phase != "warmup":
            record |= {"success_skill": 0.5, "delta": -0.25, "active": 1, "candidate": 2}
            record |= {"retired": 0, "lambda": 0.1, "gated_share": 0.3}
        text += json.dumps(record) + "\n"
    (root / "metrics.jsonl").write_text(text)
    skill = {"condition": EVIL, "strategy": EVIL, "bucket": EVIL, "utility": 0.2, "n": 3}
    skill |= {"status": EVIL, "born": 1, "deltas": [0.5, 0, -0.25]}
    (root / "distill" / "skills.jsonl").write_text(json.dumps(skill) + "\n")
    flags = dataclasses.asdict(Config()) | {"model": EVIL}
    (root / "distill" / "config.json").write_text(json.dumps(flags))
    saves.seal(root / "distill", "distill")
    said = f"<think>{ACTION}</think>{ACTION}{EVIL}"
    step = {"saw": EVIL, "said": said, "did": EVIL, "reward": 1, "advantage": 0.5}
    distilled = [step | {"weight": w, "distilled": ACTION} for w in (0.5, 1.0, 0.0)]
    lines = []
    for skills, steps in (([EVIL], [*distilled, step]), ([], [step])):
        where = {"phase": "distill", "iteration": 1, "group": "g", "delta": 0.5, "task": EVIL}
        lines.append(where | {"skills": skills, "success": bool(skills), "steps": steps})
    (root / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"n": 10, "solved": round(10 * success), "success": success, "low": 0.1, "high": 0.95}
    record = {"checkpoint": EVIL, "skills": False, "results": {"all": counts | {"score": 0.8}}}
    record |= {"seed": 0, "split": "test", "digest": EVIL, "temperature": 0.4, "iteration": 1}
    record |= changes
    (root / EVALUATION).write_text(json.dumps(record))
    return record


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report.py", "--run", "r", "--control", "c"])
    write_run(tmp_path / "runs" / "r", success=0.7)
    write_run(tmp_path / "runs" / "c", success=0.2)
    return tmp_path / "runs"


def page(runs) -> str:
    report.main()
    return (runs / "r" / "report.html").read_text()


def test_no_text_of_a_run_becomes_html(runs):
    record = json.loads((runs / "r" / EVALUATION).read_text())
    record["results"]["all"]["n"] = EVIL
    (runs / "r" / EVALUATION).write_text(json.dumps(record))
    html = page(runs)
    assert "<script" not in html and "<img src=x" not in html
    assert html.count("&lt;script&gt;") > 20
    assert "http" not in html  # it fetches nothing
    assert (runs / "r" / "plot.png").stat().st_size > 20_000 and "data:image/png;base64," in html


def test_what_was_distilled_is_marked_at_its_last_occurrence_darker_with_its_weight(runs):
    marks = page(runs).split("<mark")[1:]
    assert len(marks) == 2  # of four steps with a skill one has weight 0, and one has no weight
    for mark, alpha, weight in zip(marks, ("0.45", "0.75"), ("0.50", "1.00"), strict=True):
        style, marked = mark.split("</mark>")[0].split(">", 1)
        assert f'{alpha})" title="w = {weight}"' in style
        assert marked.startswith("&lt;action&gt;") and marked.endswith("&lt;/action&gt;")
        assert "&lt;action&gt;" not in mark.split("</mark>")[1].split("</div>")[0]
    step = {"said": "a b", "weight": 9.0}
    assert report.response(step | {"distilled": "c"}) == "a b" == report.response(step)
    assert ", 0.75)" in report.response(step | {"distilled": "b"})


def test_both_halves_of_a_game_stand_side_by_side_those_that_differ_first(runs):
    html = page(runs)
    assert '<b>Skill half</b>, <span class="solved">' in html and "Δ_g = +0.50" in html
    assert '<b>Plain half</b>, <span class="failed">' in html
    path = runs / "r" / "episodes.jsonl"
    skilled, plain = map(json.loads, path.read_text().splitlines())
    lines = []
    for k in range(8):  # in the second half of the games both halves succeed
        where = {"iteration": k, "task": f"game {k}."}
        lines += [skilled | where, plain | where | {"success": k > 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = report.pairs(runs / "r", 2)
    assert [k for k in range(8) if f"game {k}." in shown] == [0, 2]
    path.unlink()
    assert "No game" in report.pairs(runs / "r", 2)


def test_a_step_shows_its_advantage_and_an_iteration_its_objective(runs):
    path = runs / "r" / "episodes.jsonl"
    skilled, plain = map(json.loads, path.read_text().splitlines())
    values = (2.5, 1.0, -0.5, 0.0)
    for step, advantage in zip(skilled["steps"], values, strict=True):
        step["advantage"] = advantage
    path.write_text("".join(json.dumps(line) + "\n" for line in (skilled, plain)))
    log = runs / "r" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    terms = {"policy": -0.01234, "kl": 2e-4, "entropy": 1.5, "internalization": 0.25, "loss": 0.5}
    log.write_text("".join(json.dumps(line | terms) + "\n" for line in lines))
    shown = report.pairs(runs / "r")
    objective = "L_GiGPO = -0.0123, L_KL = 0.0002, H = 1.5, L_int = 0.25, λ = 0.1, L = 0.5"
    assert objective in shown and report.objective({"policy": 1.0, "kl": None}) == "L_GiGPO = 1"
    green, red = "rgba(44, 122, 75, ", "rgba(190, 60, 45, "
    bars = [f"{green}1.00", f"{green}0.50", f"{red}0.25", f"{red}0.00", f"{green}0.25"]
    assert re.findall(r"border-color: (.*?)\)", shown) == bars
    assert "step 1, A = +2.50, reward 1<" in shown and "step 3, A = -0.50" in shown
    assert shown.count("<details open>") == shown.count("</details>") == 1


def evaluated(folder, name, **changes):
    """An evaluation like that of the run, under another name."""
    record = json.loads((folder / EVALUATION).read_text()) | changes
    (folder / f"{name}.json").write_text(json.dumps(record))


def test_each_evaluation_stands_with_its_checkpoint_episodes_and_panel(runs, capsys):
    """Of the control the end alone is shown: it has the same warm-up."""
    for folder in (runs / "r", runs / "c"):
        evaluated(folder, "eval-test-mine-T0.4-s0", digest="m", seed=3)
        evaluated(folder, "eval-test-warmup-T0.4-s0")  # when it had one iteration of two
    evaluated(runs / "r", "eval-test-mine-skills-T0.4-s0", skills=True, temperature=1.0)
    evaluated(runs / "r", "eval-train-init-T0.4-s0", split="train", iteration=None)
    evaluated(runs / "r", "eval-test-runs-c-distill-model-T0.4-s0")
    rows = report.evaluations("r", "c")
    panel = ["test", EVIL, 0.4, 0]
    assert [(row["name"], row["episodes"], row["panel"]) for row in rows] == [
        ("before training", 0, ["train", EVIL, 0.4, 0]),
        ("after warm-up", 8, panel),
        ("after mining", 24, ["test", "m", 0.4, 3]),
        ("after mining, skills in the prompt", 24, ["test", EVIL, 1.0, 0]),
        ("SIRI, after distillation", 32, panel),
        ("control: GiGPO alone", 32, panel),
    ]
    assert [row["solved"] for row in rows] == [7] * 5 + [2]
    assert report.evaluations("c") == [
        row | {"name": name, "solved": 2, "success": 0.2}
        for row, name in zip(
            (rows[1], rows[2], rows[4]),
            (*list(report.NAMES.values())[1:3], report.SIRI),
            strict=True,
        )
    ]
    assert (
        report.markdown_table(rows[-2:])
        == """\
| checkpoint | training episodes | solved | success (95% interval) |
| --- | --- | --- | --- |
| SIRI, after distillation | 32 | 7 of 10 | 0.700 (0.100 to 0.950) |
| control: GiGPO alone | 32 | 2 of 10 | 0.200 (0.100 to 0.950) |"""
    )
    report.main()
    assert report.markdown_table(rows) in capsys.readouterr().out
    assert json.loads((runs / "r" / "table.json").read_text()) == rows
    (runs / "r" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="metrics.jsonl: no such file; run warmup.py"):
        report.main()


def test_a_metric_is_drawn_in_the_middle_of_its_iterations_with_its_neighbours():
    phases = ("warmup", "mine", "mine", "distill")
    records = [{"phase": phase, "m": m} for m, phase in enumerate(phases)]
    records[1]["m"] = None
    assert report.edges_of(records) == pytest.approx([0, 0.3, 1.3, 2.3, 3.3])
    x, values = report.line_of(records, "m")
    assert x == pytest.approx([0.15, 0.8, 1.8, 2.8])
    nan = float("nan")
    assert values == pytest.approx([0, nan, 2, 3], nan_ok=True)
    assert report.smooth(values) == pytest.approx([0, nan, 2.5, 2.5], nan_ok=True)
    assert report.smooth(np.array([1.0, 2.0, 6.0])) == pytest.approx([1.5, 3.0, 4.0])


def test_the_picture_has_whole_iterations_and_both_ends_with_their_numbers(runs):
    write_run(runs / "d", success=0.66)
    figure = report.draw("r", "d")
    success, delta, skills, weight, share = figure.axes
    figure.canvas.draw()
    assert [text.get_text() for text in weight.get_xticklabels()] == ["1", "2", "3", "4"]
    ends = {text.get_text(): text for text in success.texts if text.get_text()[0] == "0"}
    assert {name: text.get_color() for name, text in ends.items()} == {
        "0.70": "black",
        "0.66": study.GRAY,
    }
    a, b = (text.get_window_extent() for text in ends.values())
    assert not a.overlaps(b)
    by_name = {line.get_label(): line for line in success.lines}
    x, y = by_name["plain half"].get_data()
    assert np.allclose(np.diff(x), [report.NARROW, (1 + report.NARROW) / 2, 1.0])
    assert np.allclose(y, [0.15, 0.2, 0.3, 0.35])  # each value with its neighbours
    assert np.isnan(by_name["skill half"].get_ydata()[:2]).all()
    assert np.allclose(by_name["control: GiGPO alone"].get_ydata(), y)
    assert [bar.get_height() for bar in delta.patches] == [0, 0, -0.25, -0.25]
    assert skills.get_legend() and weight.get_legend() and share.get_ylabel() == "gated share"
