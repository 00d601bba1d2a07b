"""Small runs of the three phases in child processes: to hurt them, and to compare what they left.

A child is forked from this process, which has everything imported: a phase takes a few seconds.
"""

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import torch

import distill
import mine
import warmup
from config import read_jsonl
from runtime.run import run_script
from skills import Skill, SkillBank
from tiny.lessons_shop import strategy_text
from worlds import shop
from worlds.shop import CATEGORIES

SCRIPTS = {"warmup": warmup, "mine": mine, "distill": distill}
FLAGS = (
    "--run r --tasks 2 --group_size 4 --max_steps 4 --n_req 9999 --warmup_iterations 2 "
    "--mine_iterations 2 --distill_iterations 2 --mine_every 1 --n_eval 1 --minibatch_rows 16 "
    "--seed 2"
)
TIMES = (  # logged, and never twice the same
    "seconds",
    "save_seconds",
    "score_seconds",
    "update_seconds",
    "update_tokens_per_s",
    "peak_memory",
)


class GivenBank(SkillBank):
    """A new bank has an active skill for each category, so that short runs distill something."""

    def __init__(self, config, skills=None):
        if skills is None:
            skills = [
                Skill(f"shopping for {name}", strategy_text(options[:1]), name, status="active")
                for name, (_, options) in CATEGORIES.items()
            ]
        super().__init__(config, skills)


def prepare(folder: Path) -> Path:
    """A working folder with forty products -> `folder`."""
    shop.make_catalogue(folder / "shop", products=40, seed=0, difficulty=1)
    return folder


def fork(folder, work) -> int:
    """Fork a child that calls `work` in `folder`, its output in out.txt -> its process id."""
    torch.set_num_threads(1)  # before a fork there must be no pool of threads
    import_module("transformers.models.qwen2.modeling_qwen2")  # else every child takes seconds
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    out = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(phase, folder, die_at=None, flags="", count_to=None) -> int:
    """Fork a child that runs a phase in `folder` -> its process id.

    die_at     the child kills itself at this file operation, counted from 1
    count_to   a file for how many file operations there were
    """

    def work():
        sys.argv = [f"{phase}.py", *f"{FLAGS} --data shop {flags}".split()]
        mine.SkillBank = GivenBank
        operations = count_operations(folder / "runs", die_at)
        try:
            run_script(SCRIPTS[phase].main)
        finally:
            if count_to:
                Path(count_to).write_text(str(operations[0]))

    return fork(folder, work)


def count_operations(folder, die_at) -> list:
    """Count in [0] every open, rename, removal and new folder below `folder`, from now on."""
    count = [0]
    wanted = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

    def hook(event, arguments):
        if event in wanted and "runs" in str(arguments[0]):
            count[0] += 1
            if count[0] == die_at:
                os._exit(137)

    sys.addaudithook(hook)
    return count


def wait(child, limit=300) -> int:
    """The child's exit code; -N where signal N killed it. It is killed after `limit` seconds."""
    end = time.time() + limit
    while time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a phase did not end in {limit} s")


def run(phase, folder, **options) -> int:
    return wait(start(phase, folder, **options))


def said(folder) -> str:
    """What the last child printed."""
    return (folder / "out.txt").read_text(errors="replace")


def log(folder, phase) -> list[dict]:
    """The lines of metrics.jsonl of one phase."""
    lines = read_jsonl(folder / "runs" / "r" / "metrics.jsonl")
    return [line for line in lines if line["phase"] == phase]


def digest(folder, phase, logs=True) -> str:
    """Of everything a phase left: weights, skills, and with `logs` transcripts and metrics without
    times.
    """
    root = folder / "runs" / "r"
    parts = [(root / phase / "model" / "model.safetensors").read_bytes()]
    state = torch.load(root / phase / "state.pt", weights_only=True)
    parts.append(repr(sorted(state["optimizer"]["state"].items())).encode())
    parts.append(json.dumps(state.get("successes")).encode())
    if (root / phase / "skills.jsonl").exists():
        parts.append((root / phase / "skills.jsonl").read_bytes())
    parts.append((root / "episodes.jsonl").read_bytes() if logs else b"")
    for record in read_jsonl(root / "metrics.jsonl") if logs else []:
        timeless = {name: value for name, value in record.items() if name not in TIMES}
        parts.append(json.dumps(timeless).encode())
    return hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]
