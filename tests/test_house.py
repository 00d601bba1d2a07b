"""The house: what may import what, and how much a reader meets before the mathematics."""

import ast
import re
import sys
from functools import cache

from conftest import ROOT

from config import ABLATIONS

ORDER = ["config", "worlds", "envs", "skills", "runtime", "common"]  # then phases, tools and tiny


@cache
def modules() -> dict:
    """Name -> file of every module of the project but the tests."""
    others = {".venv", "mutants", "runs", "tests"}
    files = [p for p in ROOT.rglob("*.py") if not others & set(p.relative_to(ROOT).parts)]
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
    """The place of a module in the order; phases, tools and tiny come last, which none imports."""
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


def imported(tree) -> set:
    """Every module that is imported somewhere in a syntax tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_every_package_that_is_imported_is_pinned():
    """What comes by chance with another package can go with it."""
    tests = {path.stem: path for path in ROOT.glob("tests/**/*.py")}
    known = {p.stem for p in ROOT.iterdir()} | set(tests) | set(sys.stdlib_module_names)
    known |= {"alfworld", "textworld"}  # see the next two tests
    listed = ""
    for file, paths in (("", modules()), ("tests/", tests)):
        listed += (ROOT / f"{file}requirements.txt").read_text()
        pinned = set(re.findall(r"^(?:torch-(?=optimi))?([\w-]+)==[\d.]+(?:$|  #)", listed, re.M))
        assert len(pinned) == len(re.findall(r"^\w", listed, re.M))
        for path in paths.values():
            names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
            assert names <= known | pinned, path


def test_only_the_stock_engine_imports_what_needs_a_compiler():
    """Of alfworld, these modules need nothing."""
    plain = {"alfworld.gen", "alfworld.gen.goal_library", "alfworld.info"}
    for path in ROOT.rglob("*.py"):
        if not {".venv", "runs"} & set(path.parts):
            for node in ast.parse(path.read_text()).body:
                if getattr(node, "name", "") != "load_stock":
                    found = {m for m in imported(node) if re.match("textworld|alfworld", m)}
                    assert found <= plain, path


def test_alfworld_is_installed_alone_and_in_one_version():
    files = ("README.md", "requirements.txt", "Makefile", "worlds/household.py")
    text = "".join((ROOT / file).read_text() for file in files)
    assert len(set(re.findall(r"alfworld==[\d.]+", text))) == 1
    assert len(re.findall("--no-deps (?:alfworld==|\\$\\(ALFWORLD)", text)) == len(files)


def test_phases_import_nothing_from_each_other_or_from_tools():
    for name, targets in imports().items():
        if name in ("warmup", "mine", "distill", "evaluate"):
            assert not targets & {"warmup", "mine", "distill", "evaluate"}
            assert not any(target.startswith("tools") for target in targets)


def test_the_top_level_is_eight_files_and_common_opens_with_the_mathematics():
    assert len(list(ROOT.glob("*.py"))) <= 8
    lines = (ROOT / "common.py").read_text().splitlines()
    assert any(line.startswith("def internalization_loss") for line in lines[:200])


@cache
def defined_in(module) -> set:
    """The names of a module's functions and classes, and those it assigns."""
    tree = ast.parse(modules()[module].read_text())
    own = {node.name for node in tree.body if hasattr(node, "name")}
    targets = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign))]
    return own | {n.id for x in targets for n in ast.walk(x) if isinstance(n, ast.Name)}


def test_a_name_is_imported_from_its_home():
    """Names were handed on through `common`, so nobody saw where they live."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in modules():
                for alias in node.names:
                    module = f"{node.module}.{alias.name}" in modules()
                    known = module or alias.name in defined_in(node.module)
                    assert known, f"{name}: {node.module}.{alias.name}"


def test_the_phases_take_names_and_not_the_whole_of_common():
    for script in ("warmup", "mine", "distill", "evaluate"):
        assert not re.search(
            r"^import common|\bcommon\.", (ROOT / f"{script}.py").read_text(), re.M
        )


def test_each_ablation_is_one_or_two_lines_and_grep_finds_them():
    code = "".join(path.read_text() for path in modules().values() if path.name != "config.py")
    for name in ABLATIONS:
        assert 1 <= len(re.findall(rf'"{name}" (?:not )?in (?:self\.)?config\.without', code)) <= 3


def test_every_text_file_is_opened_with_its_encoding():
    """Or a run would depend on the locale."""
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if re.match(r"open\(", call) or re.search(r"\.(read|write)_text\([^()]*\)$", call):
                assert re.search(r"utf-8|'[rwa]b'", call), f"{path}: {call}"
