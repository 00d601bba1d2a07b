"""Two processes on one CPU (gloo) against one process. Each test names the bug it guards."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import common
from common import Row

# "--", or torchrun takes the script's --run for a flag of its own
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 --".split()]


def start(command, folder):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_two_ranks_make_the_steps_of_one_process(episodes, policy, tmp_path):
    """Gradients, weights, log-probs after the step (stale weights!), and a restored optimizer."""
    tokenizer = policy[1]
    steps = [s for e in episodes for s in e.steps][:31]  # odd: the ranks' shares differ
    rows = [
        Row(s.prompt_ids, s.response_ids, (-1.0) ** i * (i % 5), s.logprobs)
        for i, s in enumerate(steps)
    ]
    for row, step in zip(rows[:9:3], steps):
        mask = common.action_mask(tokenizer, step.response_ids)
        rows.append(dataclasses.replace(row, distill=True, utility=0.5, action_mask=mask))
    torch.save(rows, tmp_path / "rows.pt")
    script = [str(ROOT / "tests" / "two_ranks.py"), "rows.pt"]
    for command in ([sys.executable, *script, "one.pt"], [*TORCHRUN, *script, "two.pt"]):
        done = start(command, tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=False) for n in ("one", "two"))
    for key in ("loss", "policy", "kl", "internalize", "grad_norm", "logprob_gap", "rows"):
        assert one[0][key] == pytest.approx(two[0][key], abs=1e-6), key
    later = [torch.load(tmp_path / f"{n}.pt.second", weights_only=False) for n in ("one", "two")]
    for name, gradient in one[1].items():
        assert (gradient - two[1][name]).abs().max() < 1e-6, name
        moves = gradient.abs() > 1e-6  # Adam blows up what is below the rounding of float32
        assert (one[2][name] - two[2][name])[moves].abs().max() < 1e-6, name
        # the next step with the saved optimizer; it is 5e-4 long, without moments 3 times that
        assert (later[0][name] - later[1][name])[moves].abs().mean() < 1e-6, name
    for ours, theirs in zip(one[3], two[3], strict=True):
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)


def test_all_phases_run_on_two_ranks_and_write_one_run(games, tmp_path):
    flags = f"""--data {games} --run t --tasks 4 --group_size 4 --max_steps 8 --n_req 9999
    --warmup_iterations 1 --mine_iterations 2 --mine_every 1 --n_eval 1 --active_above -1
    --distill_iterations 1 --minibatch_rows 64 --device cpu""".split()
    for script in ("warmup", "mine", "distill", "evaluate"):
        done = start([*TORCHRUN, str(ROOT / f"{script}.py"), *flags], tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "t"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["phase"] for r in records] == ["warmup", "mine", "mine", "distill"]
    assert all(r["episodes"] == 16 for r in records)  # of both ranks
    assert all(r["logprob_gap"] < 1e-3 for r in records if r["rows"])
    skills = [json.loads(line) for line in (run / "mine" / "skills.jsonl").read_text().splitlines()]
    assert skills and any(s["n"] for s in skills)  # evaluations reach the bank, not its copies
    assert len(json.loads((run / "eval-valid_seen-distill.json").read_text())["items"]) == 12
    # one process goes on where two have stopped
    command = [sys.executable, str(ROOT / "evaluate.py"), "--run", "t", "--eval_items", "2"]
    done = start(command, tmp_path)
    assert done.returncode == 0 and "distill, plain prompt: 2 items" in done.stdout


def test_more_ranks_than_tasks_is_a_clear_error(tmp_path):
    done = start([*TORCHRUN, str(ROOT / "warmup.py"), "--tasks", "1", "--device", "cpu"], tmp_path)
    assert done.returncode != 0
    assert "error: 2 processes share --tasks 1: start fewer, or raise it" in done.stderr
