"""Two processes on one CPU (gloo) against one process. Each test names the bug it guards."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, as_rows

from common import Row, find_action_tokens
from config import read_jsonl
from runtime import parallel

# "--", or torchrun takes the script's --run for a flag of its own
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 --".split()]


def start(command, folder):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one_process(paired_episodes, policy, tmp_path):
    """Gradients, weights, log-probs after the step (stale weights!), and a restored optimizer."""
    rows = as_rows(paired_episodes)[:31]  # odd: the ranks' parts differ
    for i, row in enumerate(rows):
        row.advantage = (-1.0) ** i * (i % 5)
    for step in [s for e in paired_episodes if e.skills for s in e.steps][:3]:
        gate = find_action_tokens(policy.tokenizer, step.response_ids)
        rows.append(Row(step.plain_ids, step.response_ids, gate=gate, weight=0.5))
    torch.save(rows, tmp_path / "rows.pt")
    script = [str(ROOT / "tests" / "two_ranks.py"), "rows.pt"]
    for command in ([sys.executable, *script, "one.pt"], [*TORCHRUN, *script, "two.pt"]):
        done = start(command, tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=False) for n in ("one", "two"))
    for key in ("loss", "policy", "kl", "internalization", "grad_norm", "logprob_gap", "rows"):
        assert one[0][key] == pytest.approx(two[0][key], abs=1e-6, rel=5e-5), key
    assert one[0]["internalization"] > 0
    assert one[0]["reference"] == two[0]["reference"]  # one process goes on where two stopped
    later = [torch.load(tmp_path / f"{n}.pt.second", weights_only=False) for n in ("one", "two")]
    for name, gradient in one[1].items():
        assert (gradient - two[1][name]).abs().max() < 2e-6, name
        moves = gradient.abs() > 1e-4  # Adam blows up what is near the rounding of float32
        assert moves.any(), name
        assert (one[2][name] - two[2][name])[moves].abs().max() < 1e-6, name
        # the next step with the saved optimizer; it is 3e-4 long, without moments 3 times that
        assert (later[0][name] - later[1][name])[moves].abs().mean() < 1e-6, name
    for ours, theirs in zip(one[3], two[3], strict=True):
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)


@pytest.mark.slow
def test_all_phases_run_on_two_ranks_and_write_one_run(games, tmp_path):
    flags = f"""--preset tiny-household --data {games} --run t --tasks 2 --group_size 4
    --max_steps 6 --n_req 9999 --warmup_iterations 1 --mine_iterations 2 --mine_every 1 --n_eval 1
    --active_above -1 --distill_iterations 1 --minibatch_rows 64 --device cpu""".split()
    done = start([*TORCHRUN, str(ROOT / "tests" / "two_ranks_phases.py"), *flags], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "t"
    records = read_jsonl(run / "metrics.jsonl")
    assert [r["phase"] for r in records] == ["warmup", "mine", "mine", "distill"]
    assert all(r["episodes"] == 8 for r in records)  # of both ranks
    assert all(r["logprob_gap"] < 1e-3 for r in records if r["rows"])
    skills = read_jsonl(run / "mine" / "skills.jsonl")
    assert skills and any(s["n"] for s in skills)  # evaluations reach the bank, not its copies
    (result,) = run.glob("eval-valid_seen-distill*.json")
    assert len(json.loads(result.read_text())["items"]) == 6
    # one process goes on where two have stopped
    command = [sys.executable, str(ROOT / "evaluate.py"), "--run", "t", "--eval_items", "2"]
    done = start(command, tmp_path)
    assert done.returncode == 0 and "distill, plain prompt: 2 items" in done.stdout


@pytest.mark.slow
def test_more_ranks_than_tasks_is_a_clear_error(tmp_path):
    done = start([*TORCHRUN, str(ROOT / "warmup.py"), "--tasks", "1", "--device", "cpu"], tmp_path)
    assert done.returncode != 0
    assert "error: 2 processes share --tasks 1: start fewer, or raise it" in done.stderr


def test_the_parts_of_all_ranks_are_the_whole_in_its_order(monkeypatch):
    values = list(range(7))
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(parallel.scatter(values))
    assert sum(parts, []) == values and all(len(part) in (2, 3) for part in parts)
    assert parallel.own_seed(5) != 5  # on the last rank: ranks must not sample alike
