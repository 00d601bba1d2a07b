"""The house: what may import what, and how much a reader meets before the mathematics."""

import ast
import re

from conftest import ROOT

ORDER = ["config", "worlds", "envs", "skills", "tiny", "runtime", "common"]  # then phases, tools


def modules() -> dict:
    """Name -> file of every module of the project but the tests."""
    files = [p for p in ROOT.rglob("*.py") if not {".venv", "runs", "tests"} & set(p.parts)]
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports() -> dict:
    """Module -> the modules of the project it imports, at its top or within a function."""
    known = modules()
    found = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    target = f"{node.module}.{alias.name}"
                    target = target if target in known else node.module
                    found[name] |= {target} & set(known)
    return found


def room(name) -> int:
    """The place of a module in the order; phases and tools come last, and the command that makes
    the tiny policies, which nothing imports.
    """
    if name == "tiny.imitate":
        return len(ORDER)
    first = name.split(".")[0]
    return ORDER.index(first) if first in ORDER else len(ORDER)


def test_no_arrow_runs_back_up():
    for name, targets in imports().items():
        for target in targets:
            same_folder = name.split(".")[0] == target.split(".")[0]
            assert room(target) < room(name) or same_folder or room(name) == len(ORDER), (
                f"{name} imports {target}"
            )


def test_no_circle():
    graph = imports()
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in graph[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_worlds_know_no_torch():
    for path in (ROOT / "worlds").glob("*.py"):
        found = re.search(r"^\s*(import|from) (torch|transformers)", path.read_text(), re.M)
        assert not found, path


def test_phases_import_nothing_from_each_other_or_from_tools():
    for name, targets in imports().items():
        if name in ("warmup", "mine", "distill", "evaluate"):
            assert not targets & {"warmup", "mine", "distill", "evaluate"}
            assert not any(target.startswith("tools") for target in targets)


def test_top_level_and_common_stay_small_and_open_with_the_mathematics():
    assert len(list(ROOT.glob("*.py"))) <= 8
    lines = (ROOT / "common.py").read_text().splitlines()
    assert len(lines) <= 600
    assert any(line.startswith("def internalization_loss") for line in lines[:200])
    for script, most in {"warmup.py": 71, "mine.py": 124, "distill.py": 101}.items():
        assert len((ROOT / script).read_text().splitlines()) <= most, script


def test_lines_have_a_hundred_columns_at_most():
    for path in modules().values():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"
