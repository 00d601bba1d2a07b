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
    record = {"checkpoint": EVIL, "skills": False, "results": {"all": counts}}
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


def test_the_table_says_whether_the_control_differs(run):
    (run.parent / "c").mkdir()
    for name in ("metrics.jsonl", "eval-test-distill-T0.4-s0.json"):
        (run.parent / "c" / name).write_text((run / name).read_text())
    rows = report.evaluations("r", "c")
    assert [row["episodes"] for row in rows] == [8, 8]
    assert "+0.000: no difference" in report.conclusion(rows)
    rows[1] |= {"success": 0.1, "high": 0.2}
    assert "+0.600: their intervals do not overlap" in report.conclusion(rows)
    assert "| after `distill.py`: SIRI | 8 | 7 of 10 | 0.700 |" in report.markdown_table(rows)
