"""Two processes on one CPU (gloo) against one process. Each test names the bug it guards."""

import json
import os
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, as_rows, call

import evaluate
from common import Row, find_action_tokens, update
from config import PRESETS, Config, UserError, read_jsonl
from runtime import parallel
from runtime.generation import generate
from runtime.policy import Policy, digest_policy, load_policy, load_reference, make_optimizer
from runtime.run import set_up
from tests.faults import runs

# "--", or torchrun takes the script's --run for a flag of its own
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 --".split()]


def in_ranks(count, folder, work):
    """Call `work` in so many processes that know of each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def work_as(rank):
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        work()

    folders = [folder / f"{rank}-of-{count}" for rank in range(count)]
    for own in folders:
        own.mkdir()
    children = [runs.fork(own, partial(work_as, rank)) for rank, own in enumerate(folders)]
    codes = []
    for child in children:  # all, so that a rank whose peer has failed is ended too
        try:
            codes.append(runs.wait(child, limit=100))
        except TimeoutError as error:
            codes.append(error)
    assert codes == [0] * count, "".join(runs.said(own)[-2000:] for own in folders)


def step_and_more(rows, target):
    """An update on fixed rows, and what came of it, written to `target`."""
    flags = {"device": "cpu", "minibatch_rows": 99, "micro_tokens": 600, "kl_coef": 0.01}
    flags |= {"gradient_checkpointing": True, "recompute_old": True}
    config = Config(**PRESETS["tiny-household"] | flags)
    device = set_up(config)
    model, tokenizer = load_policy(config.model, config, device)
    reference = load_reference(config, device)
    policy = Policy(model, tokenizer, reference, make_optimizer(model, config.lr))

    gradients = {}
    policy.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad for n, p in model.named_parameters()})
    )
    metrics = update(policy, rows, config, 1, lambda_=0.1)
    metrics["reference"] = digest_policy(reference)
    gradients = parallel.full_tensors(gradients)
    weights = parallel.full_tensors(model.state_dict())
    # the rollout after the step must see the moved weights
    with parallel.unsharded(model):
        prompts = parallel.scatter([row.prompt_ids for row in rows[:6]])
        answers = generate(model, tokenizer, prompts, max_new_tokens=8, temperature=0, seed=0)
    answers = parallel.all_gather(answers)
    # an optimizer made from the saved state goes on as the old one
    state = parallel.full_tensors(policy.optimizer.state_dict())
    if parallel.rank() == 0:
        torch.save([metrics, gradients, weights, answers, state], target)
    parallel.all_gather([])  # rank 0 has written
    state = torch.load(target, weights_only=False)[-1]
    policy.optimizer = make_optimizer(model, config.lr, saved=state)
    update(policy, rows, config, 1, lambda_=0.1)
    weights = parallel.full_tensors(model.state_dict())
    if parallel.rank() == 0:
        torch.save(weights, f"{target}.second")
    parallel.destroy()


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one_process(paired_episodes, policy, tmp_path):
    """Gradients, weights, log-probs after the step (stale weights!), and a restored optimizer."""
    rows = as_rows(paired_episodes)[:31]  # odd: the ranks' parts differ
    for i, row in enumerate(rows):
        row.advantage = (-1.0) ** i * (i % 5)
    for step in [s for e in paired_episodes if e.skills for s in e.steps][:3]:
        gate = find_action_tokens(policy.tokenizer, step.response_ids)
        rows.append(Row(step.plain_ids, step.response_ids, gate=gate, weight=0.5))
    for ranks, name in ((1, "one.pt"), (2, "two.pt")):
        in_ranks(ranks, tmp_path, partial(step_and_more, rows, tmp_path / name))
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
def test_all_phases_run_on_two_ranks_and_write_one_run(games, tmp_path, monkeypatch, capsys):
    flags = f"""--preset tiny-household --data {games} --run t --tasks 2 --group_size 4
    --max_steps 6 --n_req 9999 --warmup_iterations 1 --mine_iterations 2 --mine_every 1 --n_eval 1
    --active_above -1 --distill_iterations 1 --minibatch_rows 64 --device cpu""".split()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, str(ROOT / "tests" / "two_ranks_phases.py"), *flags]
    how = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **how)
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
    monkeypatch.chdir(tmp_path)
    call(evaluate, "--run t --eval_items 2")
    assert "distill, plain prompt: 2 items" in capsys.readouterr().out


def test_more_ranks_than_tasks_is_a_clear_error(config, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    with pytest.raises(UserError, match="3 processes share --tasks 2: start fewer, or raise it"):
        set_up(config)


def test_the_parts_of_all_ranks_are_the_whole_in_its_order(monkeypatch):
    values = list(range(7))
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(parallel.scatter(values))
    assert sum(parts, []) == values and all(len(part) in (2, 3) for part in parts)
    assert parallel.own_seed(5) != 5  # on the last rank: ranks must not sample alike
