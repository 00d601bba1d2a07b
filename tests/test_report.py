"""The page of a run: what a model or a world wrote stays text, marks show what is distilled."""

import json

import pytest

from config import PRESETS, Config
from tools import report

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>&\"'"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder written by hand, hostile in every text."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs" / "r"
    (root / "distill").mkdir(parents=True)
    config = vars(Config(**PRESETS["tiny"])) | {"model": EVIL}
    (root / "config.json").write_text(json.dumps(config))
    metrics = {"phase": "distill", "iteration": 1, "success_plain": 0.5, "episodes_so_far": 8}
    (root / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    skill = {"condition": EVIL, "strategy": EVIL, "bucket": EVIL, "utility": 0.2, "n": 3}
    skill |= {"status": "active", "born": 1, "deltas": [0.5, 0, -0.25]}
    (root / "distill" / "skills.jsonl").write_text(json.dumps(skill) + "\n")
    said = f"<think>{EVIL}</think><action>{EVIL}</action>"
    lines = []
    for skills, success in (([EVIL], True), ([], False)):
        steps = [
            {"saw": EVIL, "said": said, "did": EVIL, "reward": 1, "advantage": a} for a in (0.5, -1)
        ]
        where = {"phase": "distill", "iteration": 1, "group": "g", "delta": 0.5, "task": EVIL}
        lines.append(where | {"skills": skills, "success": success, "steps": steps})
    (root / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"n": 10, "solved": 7, "success": 0.7, "low": 0.4, "high": 0.9, "score": 0.8}
    record = {"checkpoint": EVIL, "skills": False, "results": {"all": counts}, "seed": 0}
    record |= {"split": "test", "digest": "d", "temperature": 0.4}
    record["items"] = {f"{EVIL}{n}": n < 7 for n in range(10)}
    (root / "eval-test-distill-T0.4-s0.json").write_text(json.dumps(record))
    return root


def test_no_text_of_a_run_becomes_html(run):
    html = report.run_page("r", "", 3)
    assert "<script" not in html and "<img src=x" not in html
    assert html.count("&lt;script&gt;") > 10
    assert "http" not in html.replace("http-equiv", "")  # it fetches nothing


def test_the_distilled_action_is_marked_and_no_other(run):
    html = report.run_page("r", "", 3)
    assert html.count("<mark") == 1  # skill arm, Delta_g > 0, A > 0: one of four steps
    marked = html[html.index("<mark") :].split("</mark>")[0]
    assert 'title="w = 0.50"' in marked and "&lt;/action&gt;" in marked and "think" not in marked


def test_marks_follow_the_ablations_of_the_run(run):
    config = json.loads((run / "config.json").read_text())
    step = {"said": "<think>a</think><action>b</action>", "advantage": 4.0}
    assert report.weight_of(step, config) == 1.0
    assert report.weight_of(step, config | {"normalize_std": False}) == 0.4  # in rewards of 10
    assert report.weight_of({"advantage": -1}, config) == 0
    assert report.weight_of({"advantage": -1}, config | {"internalize_weight": "one"}) == 1
    record = {"phase": "distill", "skills": ["s"], "delta": -0.5}
    assert not report.is_gated(record, config)
    assert report.is_gated(record, config | {"internalize_gate": "none"})
    assert not report.is_gated(record | {"delta": 0.5}, config | {"lambda_max": 0})
    whole = report.response(step, config | {"internalize_tokens": "response"}, True)
    assert whole.startswith("<mark")


def test_run_and_control_are_compared_on_the_same_panel_without_skills(run):
    control = run.parent / "c"
    control.mkdir()
    name = "eval-test-distill-T0.4-s0.json"
    record = json.loads((run / name).read_text())
    (control / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    skilled = json.dumps(record | {"skills": True})
    (run / "eval-test-distill-skills-T0.4-s0.json").write_text(skilled)
    (control / name).write_text(json.dumps(record | {"digest": "another"}))
    assert report.conclusion(report.evaluations("r", "c")) == ""
    record["items"] = dict.fromkeys(record["items"], False)
    (control / name).write_text(json.dumps(record))
    rows = report.evaluations("r", "c")
    assert [row["episodes"] for row in rows] == [8, 8, 8]
    said = report.conclusion(rows)
    assert "+0.700 (95% over the items: +0.401 to +0.999)" in said, said
    assert "| after `distill.py`: SIRI | 8 | 7 of 10 | 0.700 |" in report.markdown_table(rows)
