"""What the documents say of the code holds: references, the paper-to-code map, the forks."""

import os
import re
import runpy
import shutil
import sys
from functools import partial

import pytest
from conftest import ROOT

from config import read_json
from tests.faults import runs
from tools import report, walkthrough

OTHERS = {".venv", "mutants", "runs", "tests"}
SOURCES = [p for p in ROOT.rglob("*.py") if not OTHERS & set(p.relative_to(ROOT).parts)]
METHOD = (ROOT / "docs" / "method.md").read_text()
FORK = (ROOT / "docs" / "fork.md").read_text()
WALKTHROUGH = (ROOT / "docs" / "walkthrough.md").read_text()


def test_every_equation_the_code_names_is_there():
    """A reference to a note that is not in the project helps nobody."""
    tags = {int(n) for n in re.findall(r"\\tag\{(\d+)\}", METHOD)}
    assert tags == set(range(1, len(tags) + 1))
    named = set()
    for path in SOURCES:
        text = path.read_text()
        for first, last in re.findall(r"method Eq\. (\d+)(?: to (\d+))?", text):
            named |= {int(first), int(last or first)}
        for first, last in re.findall(r"GiGPO Eq\. (\d+)(?: to (\d+))?", text):
            assert 3 <= int(first) <= int(last or first) <= 8, path  # the equations of that paper
        for section in re.findall(r"docs/method\.md, section (\d)", text):
            assert f"\n## {section}. " in METHOD, path
        assert not re.search(r"\bmethod (section )?\d|\bM \d\.\d", text), path
    assert named and named <= tags


def test_every_entry_of_the_paper_to_code_map_exists():
    readme = (ROOT / "README.md").read_text()
    entries = re.findall(r"`([\w/]+\.py):(\w+)(?:\.(\w+))?`", readme)
    assert len(entries) >= 9
    for file, name, method in entries:
        text = (ROOT / file).read_text()
        assert re.search(rf"^(def|class) {name}\b|^    {name}: ", text, re.M), f"{file}:{name}"
        if method:
            assert re.search(rf"^    def {method}\b", text, re.M), f"{file}:{method}"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_every_file_a_document_links_to_exists(page):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link


def test_every_logged_name_is_in_the_glossary():
    glossary = (ROOT / "docs" / "reference.md").read_text()
    files = ("runtime/metrics.py", "common.py", "warmup.py", "mine.py", "distill.py")
    text = "".join((ROOT / file).read_text() for file in files)
    logged = set(re.findall(r'^        "(\w+)": (?:mean|success_rate|len|sum|float)', text, re.M))
    logged |= set(re.findall(r'\b(?:metrics|log|values)\["(\w+)"\] =', text))
    assert len(logged) > 20
    for name in logged:
        assert f"`{name}`" in glossary, name


def test_the_table_of_the_readme_is_the_demo_that_was_run():
    shown = ("before training", "after mining", report.SIRI, report.CONTROL)
    rows = [row for row in read_json(ROOT / "results/demo.json") if row["name"] in shown]
    readme = (ROOT / "README.md").read_text()
    block = readme.split("<!-- demo:begin -->\n")[1].split("\n<!-- demo:end -->")[0]
    assert block == report.markdown_table(rows)


# --- docs/walkthrough.md --------------------------------------------------------------------------


def test_each_link_of_the_walkthrough_is_the_line_that_it_names():
    """Where lines have moved: python -m tools.walkthrough --links"""
    assert WALKTHROUGH.count(".py#L") == len(walkthrough.LINK.findall(WALKTHROUGH)) > 30
    assert walkthrough.link(WALKTHROUGH) == WALKTHROUGH


def test_the_walkthrough_has_every_equation_and_one_screen_for_each_step():
    rows = re.findall(r"^\| (\d+) \| .* \| .*\d.* \| \[.*\.py:\d+\]", WALKTHROUGH, re.M)
    tags = re.findall(r"\\tag\{(\d+)\}", METHOD)
    assert rows == tags
    assert len(re.findall(r"^## \d\. ", WALKTHROUGH, re.M)) == 8
    assert len(WALKTHROUGH.splitlines()) <= 250


def test_the_numbers_of_the_walkthrough_give_each_other():
    """`(10.00 - 4.17) / 5.00 = 1.17` holds as it is printed, up to the rounding."""
    names = {"max": max, "min": min, "clip": lambda x, low, high: min(max(x, low), high)}
    sums = re.findall(r"[|,;] ((?:[-+\d.(]|max|min|clip)[^|;=`]*) = (-?[\d.]+)", WALKTHROUGH)
    assert len(sums) >= 12
    for formula, value in sums:
        found = eval(formula.replace("·", "*").replace("^", "**"), names)
        assert found == pytest.approx(float(value), rel=0.01, abs=0.01), f"{formula} = {value}"
    credit = re.findall(r"^\| \d \| \d \| `.*` \| (.*) \|$", WALKTHROUGH, re.M)
    for row in credit:
        *_, episode, step, joint = map(float, row.split(" | "))
        assert episode + step == pytest.approx(joint, abs=0.011)
    state = re.findall(r"^\| `.*` \| [\d.]+ \| (-?[\d.]+) \| (\d+) \|$", WALKTHROUGH, re.M)
    assert len(credit) >= 6 and len(state) >= 3
    assert sum(float(A_S) * int(rows) for A_S, rows in state) == pytest.approx(0, abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif("REGENERATE" not in os.environ, reason="a run of two minutes: make pages")
def test_the_walkthrough_is_what_its_command_writes(tmp_path, monkeypatch):
    """Up to the last digits, which depend on the processor."""
    monkeypatch.chdir(tmp_path)
    page = walkthrough.write(*walkthrough.run())
    number = r"-?\d+\.\d+"
    assert re.sub(number, "#", page) == re.sub(number, "#", WALKTHROUGH)
    found, kept = (list(map(float, re.findall(number, text))) for text in (page, WALKTHROUGH))
    assert found == pytest.approx(kept, rel=0.02, abs=0.01)


# --- docs/fork.md ---------------------------------------------------------------------------------


def sections():
    """Title -> text of the sections that edit something."""
    parts = re.split(r"^## ", FORK, flags=re.M)[1:]
    return {part.split("\n")[0]: part for part in parts if ", replace\n" in part}


def run_fork(title, games, project) -> str:
    """Apply a section to a copy of the project and run its commands -> the metrics it logged."""
    text = sections()[title]
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "tests", "results", "__pycache__")
    shutil.copytree(ROOT, project, ignore=skip)
    block = r"```python\n(.*?)```"
    for file, old, new in re.findall(
        rf"In `([\w/.]+)`, replace\n\n{block}\n\nby\n\n{block}", text, re.S
    ):
        content = (project / file).read_text()
        assert content.count(old) == 1, f"{file}: {old}"
        (project / file).write_text(content.replace(old, new))
    for file, content in re.findall(rf"New file `([\w/.]+)`\n\n{block}", text, re.S):
        (project / file).write_text(content)
    commands = re.search(r"^Run\n\n```\n(.*?)```", text, re.S | re.M).group(1)
    for command in commands.strip().splitlines():
        words = command.split()[1:]
        if "--data" not in words and "warmup.py" in words:
            words += ["--preset", "tiny-household", "--data", str(games)]
        code = runs.wait(runs.fork(project, partial(run_of_copy, project, words)))
        assert code == 0, runs.said(project)[-2000:]
    return next((project / "runs").glob("*/metrics.jsonl")).read_text()


def run_of_copy(project, words):
    """A command with the modules of `project`, and of this process only what others made."""
    own = {path.stem for path in project.iterdir()}
    for name in [name for name in sys.modules if name.split(".")[0] in own]:
        del sys.modules[name]
    sys.path.insert(0, str(project))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*words, "--device", "cpu"]  # a forked process has no GPU
        runpy.run_path(words[0], run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("title", sections())
def test_a_fork_applies_and_runs(title, games, tmp_path):
    expected = {
        "Another loss term": '"imitation": ',
        "Another world": '"lock"',
        "Another writer of skills": '"mined_added"',
        "Variants of our own": r'"grad_cosine": (?s:.*)"internalization_rows": [1-9](?s:.*)'
        r'"control_norms": \[',
    }
    assert re.search(expected[title], run_fork(title, games, tmp_path / "copy"))
