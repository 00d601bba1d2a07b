"""Any folder, locale, disk and terminal: all goes well there, or one line says why it does not."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import envs
import evaluate
from config import Config, UserError, write_atomically
from runtime import saves
from runtime.flags import parse_config
from runtime.policy import load_policy
from runtime.run import Run, run_script
from tools import effects, report, study
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


@pytest.mark.slow
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
    for after in (None, "warmup"):  # what the owner has not saved is not asked for
        with pytest.raises(UserError, match=re.escape(who)):
            Run(config, "mine", after)
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


# --- what the machine refuses ---------------------------------------------------------------------


def test_a_folder_that_cannot_be_flushed_is_no_reason_to_lose_a_save(tmp_path, monkeypatch):
    """Some mounted file systems answer EINVAL to it, others have no such call."""

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "mine.part").mkdir()
    (tmp_path / "mine.part" / "state.pt").write_bytes(b"1")
    before = len(os.listdir("/dev/fd"))
    saves.put(tmp_path / "mine.part", tmp_path / "mine")
    assert saves.find(tmp_path, "mine") and len(os.listdir("/dev/fd")) == before

    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        saves.flush(tmp_path / "mine" / "state.pt")


@pytest.mark.parametrize(
    "error, full",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error: I/O error: File too large (os error 27)"), False),
        (OSError(errno.EINVAL, "Invalid argument"), False),
        (RuntimeError("unexpected pos 64 vs 0"), False),
    ],
)
def test_disk_is_to_be_freed_only_where_there_is_no_more_of_it(
    config, tmp_path, monkeypatch, error, full
):
    """A save said "Free some disk ... 78.67 GB free" when two processes wrote it at once."""
    monkeypatch.chdir(tmp_path)
    config.save_minutes = 999.0
    run = Run(config, "mine", successes=[])
    run.end_iteration(1, False, successes=[])

    def put(*_):
        raise error

    monkeypatch.setattr(saves, "put", put)
    with pytest.raises(UserError) as stop:
        run.save()
    cause = re.escape(str(error))
    assert re.fullmatch(
        rf".*mine could not be saved \({cause}\); the last save stays.*", str(stop.value)
    )
    assert ("free some disk" in str(stop.value)) == full and not Path(f"{run.folder}.part").exists()


def test_what_stopped_the_writing_of_tensors_is_named(tmp_path):
    """torch.save says "unexpected pos 576 vs 534", whatever it was."""
    saves.write_tensors({"a": torch.ones(3)}, tmp_path / "good.pt")
    assert torch.load(tmp_path / "good.pt", mmap=True, weights_only=True)["a"].sum() == 3
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            saves.write_tensors({"a": torch.ones(100_000)}, tmp_path / "bad.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(OSError, match="No such file"):
        saves.write_tensors({}, tmp_path / "nowhere" / "x.pt")


def ended(main, capsys) -> tuple:
    """What run_script does with a main -> (exit code, its one line)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    return stop.value.code, line


@pytest.mark.parametrize(
    "ask", [lambda: torch.empty(10**15), lambda: np.empty(10**15), lambda: bytearray(10**16)]
)
def test_no_memory_on_a_machine_without_a_card_is_one_line(ask, capsys):
    code, line = ended(ask, capsys)
    assert code == 2 and line.startswith("error: out of memory (")
    assert line.endswith(
        "lower --micro_tokens (update) or --generation_rows (rollout); --dry_run explains"
    )


def test_no_memory_for_a_model_is_not_a_wrong_model(config, monkeypatch):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(torch.OutOfMemoryError):
        load_policy("tiny-household", config, "cpu")


def test_a_mistake_of_the_code_keeps_its_traceback():
    def main():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        run_script(main)


@pytest.mark.parametrize("name", ["runs", "runs/tiny-household"])
def test_a_file_where_a_folder_should_be_is_to_be_moved(
    config, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()
    code, line = ended(lambda: Run(config, "mine"), capsys)
    words = "'runs/tiny-household'; a file is where a folder should be: move it away"
    assert code == 2 and line.endswith(words)


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval-valid_seen-init-T0.4-s0-n2.json", "lock"])
def test_a_folder_where_a_file_should_be_is_to_be_moved(evaluated, config, capsys, name):
    Path("runs/t", name).mkdir()
    config.run = "t"
    code, line = ended(evaluated if "eval" in name else lambda: Run(config, "mine"), capsys)
    assert code == 2 and name in line
    assert line.endswith("; a folder is where a file should be: move it away")


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, words", [("closed pipe", "word"), ("/dev/full", "word' * 9999 + '")]
)
def test_an_output_that_takes_no_more_is_one_line(target, words):
    script = f"import runtime.run as run\nrun.run_script(lambda: print('{words}'))"
    if target == "closed pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(target, os.O_WRONLY)
    options = {"cwd": ROOT, "stdout": write, "stderr": subprocess.PIPE, "text": True}
    options["env"] = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", script], **options)
    os.close(write)
    assert done.returncode == 2 and done.stderr.startswith("error: [Errno "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


# --- flags and files that no run could use --------------------------------------------------------

FLOATS = [f.name for f in dataclasses.fields(Config) if f.type is float]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_a_number_is_finite(monkeypatch, name, value):
    monkeypatch.setattr(sys, "argv", ["warmup.py", f"--{name}={value}"])
    with pytest.raises(UserError, match=f"--{name} .*: must be "):
        parse_config("warmup", "doc")


@pytest.mark.parametrize(
    "tool, flags",
    [
        (report, "--run ../x"),
        (report, "--run r --control /tmp/x"),
        (effects, "--run a/b"),
        (study, "run --name ../x"),
        (study, "run --name runs/../x"),
    ],
)
def test_a_tool_stays_in_the_folder_of_runs(tmp_path, monkeypatch, capsys, tool, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tool", *flags.split()])
    code, line = ended(tool.main, capsys)
    assert code == 2 and re.match("error: --(run|control|name) '.*': use letters", line), line
    assert not list(tmp_path.iterdir())


def test_flags_of_a_study_that_are_no_words_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study", "run", "--name", "x", "--flags", "it's"])
    code, line = ended(study.main, capsys)
    assert code == 2 and line == "error: --flags it's: No closing quotation"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{}", "[]", '"x"', "{"])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "episodes.jsonl", "mine/skills.jsonl", "eval-test-mine-T0.4-s0.json"]
)
def test_a_file_of_a_run_that_is_none_is_named(tmp_path, monkeypatch, capsys, name, content):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs" / "r"
    root.mkdir(parents=True)
    good = {"phase": "mine", "iteration": 1, "episodes_so_far": 8, "success_plain": 0.5}
    write_atomically(root / "metrics.jsonl", json.dumps(good))
    write_atomically(root / name, content)
    monkeypatch.setattr(sys, "argv", ["report", "--run", "r"])
    code, line = ended(report.main, capsys)
    assert code == 2 and line.startswith(f"error: runs/r/{name}")


@pytest.fixture
def evaluated(games, tmp_path, monkeypatch):
    """Evaluates two items of the initial policy with more flags -> the file of the result."""
    monkeypatch.chdir(tmp_path)
    Path("runs/t").mkdir(parents=True)

    def evaluated(flags=""):
        words = f"--preset tiny-household --run t --data {games} --checkpoint init --eval_items 2"
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.split(), *flags.split()])
        evaluate.main()
        return Path("runs/t/eval-valid_seen-init-T0.4-s0-n2.json")

    return evaluated


def play(*_, **__):
    raise AssertionError("played, and only then refused")


@pytest.mark.parametrize(
    "out, why",
    [
        (".", "error: .: is a directory"),
        ("runs/t/metrics.jsonl", "error: runs/t/metrics.jsonl: not readable as JSON"),
        ("runs/t/notes.json", "error: runs/t/notes.json: no JSON object with results"),
        (
            "runs/t/notes.json/x.json",
            "error: [Errno 17] File exists: 'runs/t/notes.json'; a file is where",
        ),
        ("/proc/x.json", "error: [Errno 2] No such file"),  # nobody can write there
        (f"runs/t/{'x' * 300}.json", "error: [Errno 36] File name too long"),
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_the_first_episode(
    evaluated, monkeypatch, capsys, out, why
):
    Path("runs/t/notes.json").write_text("[1]")
    Path("runs/t/metrics.jsonl").write_text("{}\n{}\n")
    monkeypatch.setattr(evaluate, "rollout", play)
    code, line = ended(lambda: evaluated(f"--out {out}"), capsys)
    assert code == 2 and line.startswith(why), line
    assert Path("runs/t/metrics.jsonl").read_text() == "{}\n{}\n"


def test_the_result_of_another_evaluation_is_not_replaced(evaluated, monkeypatch, capsys):
    path = evaluated("--max_steps 2")
    record = path.read_text()
    evaluated("--max_steps 2")  # the same again, as after more training
    assert path.read_text() == record
    monkeypatch.setattr(evaluate, "rollout", play)
    out = f"--max_steps 2 --out {path}"
    for flags, what in {
        "--max_steps 3": "max_steps 2, not 3",
        "--max_steps 2 --max_response_tokens 9": "max_response_tokens 64, not 9",
        f"{out} --eval_seed 1": "seed 0, not 1",
        f"{out} --eval_split train": "split valid_seen, not train",
        f"{out} --model tiny-alfworld": "checkpoint tiny-household, not tiny-alfworld",
    }.items():
        code, line = ended(lambda flags=flags: evaluated(flags), capsys)
        assert code == 2 and f"{path} is of another evaluation ({what}); delete it" in line, line
    assert path.read_text() == record
