"""Any folder, locale, disk and terminal: all goes well there, or one line says why it does not."""

import ast
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import envs
from config import UserError, write_atomically
from runtime import saves
from runtime.run import Run
from worlds import alfworld, shop, webshop

# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["removable disk", "Sliced", "pick_two-x", "söme gämes [1] *", "~"]
)
def test_a_data_folder_may_have_any_name(games, tmp_path, monkeypatch, name):
    folder = Path(shutil.copytree(games, tmp_path / name / "movable"))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALFWORLD_DATA", str(folder))
    known = envs.list_items("alfworld", "train", games)
    for data in (str(folder), f"{folder}/", "link/../movable", "link", ""):
        items = envs.list_items("alfworld", "train", data)
        assert list(map(alfworld.item_name, items)) == list(map(alfworld.item_name, known))
        assert envs.make_env("alfworld", items[0]).reset().task_type == "look"


def test_a_catalogue_may_lie_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop.make_catalogue(tmp_path / "a shop [1] é", products=20, seed=0)
    (tmp_path / "link").symlink_to("a shop [1] é")
    known = []
    for data in (tmp_path / "a shop [1] é", "a shop [1] é/", "./link"):
        items = envs.list_items("webshop", "test", data)
        known.append(list(map(webshop.item_name, items)))
        assert envs.make_env("webshop", items[0]).reset().task
    assert known[0] == known[1] == known[2] != []


def test_games_of_movable_receptacles_and_sliced_objects_are_left_out_by_their_own_names(tmp_path):
    tasks = ["pick-Mug", "pick_two_obj_and_place-AppleSliced-None", "pick_with_movable_recep-Cup"]
    for task in tasks:
        folder = tmp_path / "Sliced movable" / "json_2.1.1" / "train" / task / "trial_1"
        folder.mkdir(parents=True)
        (folder / "game.tw-pddl").touch()
    (item,) = alfworld.list_items(tmp_path / "Sliced movable", "train")
    assert alfworld.item_name(item) == "pick-Mug/trial_1"


def test_the_home_of_nobody_is_a_folder_without_games():
    assert envs.data_root("alfworld", "~/x") == Path.home() / "x"
    assert envs.data_root("alfworld", "~no-such-user/x") == Path("~no-such-user/x")


# --- two processes --------------------------------------------------------------------------------

OWN = "import pathlib, time; from runtime import saves; saves.own(pathlib.Path('runs/t'))"


def test_a_run_belongs_to_one_process_until_that_ends_however_it_ends(
    config, tmp_path, monkeypatch
):
    """Two went on with the same run, and its log had every iteration twice."""
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{OWN}; time.sleep(99)"]
    first = subprocess.Popen(command, env=environment)
    config.run = "t"
    lock = tmp_path / "runs" / "t" / "lock"
    while not (lock.exists() and lock.read_text()):
        assert first.poll() is None
        time.sleep(0.01)
    (lock.parent / "mine").mkdir()  # a damaged save is not set aside under its owner's feet
    who = f"runs/t is in use by process {first.pid} on {socket.gethostname()}: "
    with pytest.raises(UserError, match=re.escape(who)):
        Run(config, "mine")
    assert {path.name for path in lock.parent.iterdir()} == {"mine", "lock"}
    (lock.parent / "mine").rmdir()
    first.kill()
    first.wait()
    Run(config, "mine")
    assert lock.read_text().startswith(f"process {os.getpid()} on ")
    Run(config, "distill")  # the next phase in the same process


def test_a_file_system_without_locks_is_no_reason_not_to_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(saves.fcntl, "lockf", refuse)
    saves.own(tmp_path / "r")
    monkeypatch.setattr(saves, "fcntl", None)  # Windows
    saves.own(tmp_path / "r")


def test_two_processes_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    """Two runs that begin at once make the same embedded games; one ended with "No such file"."""
    replace = os.replace

    def late(part, path):  # here the other one writes the whole file
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        write_atomically(path, "text")
        replace(part, path)

    monkeypatch.setattr(os, "replace", late)
    write_atomically(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- locales --------------------------------------------------------------------------------------

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
SHOP = """
import sys, envs
from runtime.run import run_script
def main():
    items = envs.list_items("webshop", "train", sys.argv[1])
    print(envs.make_env("webshop", items[0]).reset().task, len(items), "é›")
run_script(main)
"""


@pytest.mark.slow
def test_files_are_utf_8_and_texts_are_printed_whatever_the_locale(tmp_path):
    catalogue = shop.make_catalogue(tmp_path / "söme shop", products=20, seed=0)
    path = catalogue / "items_shuffle.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"name": "', '"name": "Lumière '))
    (tmp_path / "script.py").write_text(SHOP)
    command = [sys.executable, "script.py", "söme shop"]
    for environment in (ASCII, {"PYTHONPATH": str(ROOT)}):
        options = {"cwd": tmp_path, "env": os.environ | environment, "capture_output": True}
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stderr.decode()
        assert b"\nFind me " in done.stdout
    assert done.stdout.decode().endswith("é›\n")


def test_every_text_file_is_opened_with_its_encoding():
    for path in (p for p in ROOT.rglob("*.py") if not {".venv", "runs", "tests"} & set(p.parts)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if re.match(r"open\(", call) or re.search(r"\.(read|write)_text\([^()]*\)$", call):
                assert re.search(r"utf-8|'[rwa]b'", call), f"{path}: {call}"
