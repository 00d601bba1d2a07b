"""The scripts as a user runs them: from end to end, resumed, and with wrong input."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import common
import distill
import evaluate
import mine
from tools import plot
import tiny_shop
import warmup
from common import Row, UserError

SMALL = """--run t --tasks 4 --group_size 4 --max_steps 12 --n_req 9999 --warmup_iterations 2
--mine_iterations 3 --mine_every 1 --mine_episodes 24 --n_eval 1 --active_above -1
--distill_iterations 2 --save_every 1 --minibatch_rows 64"""


def call(monkeypatch, script, flags):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
    script.main()


def test_all_phases_end_to_end_then_evaluation_and_plot(games, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"{SMALL} --data {games}"
    for script in (warmup, mine, distill):
        call(monkeypatch, script, flags)
    run = tmp_path / "runs" / "t"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["phase"] for r in records] == ["warmup"] * 2 + ["mine"] * 3 + ["distill"] * 2
    assert all(r["logprob_gap"] < 1e-3 for r in records if r["rows"])
    ramp = common.PRESETS["tiny"]["lambda_iterations"]
    assert records[-1]["lambda"] == pytest.approx(0.1 * 2 / ramp)
    skills = [json.loads(line) for line in (run / "mine" / "skills.jsonl").read_text().splitlines()]
    assert skills and any(s["n"] for s in skills)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(run / "distill" / "model")  # HF format

    # every evaluation item exactly once, with the plain prompt and with skills
    for extra in ("--checkpoint distill", "--checkpoint mine --skills", "--checkpoint init"):
        call(monkeypatch, evaluate, f"--run t {extra}")
    record = json.loads((run / "eval-valid_seen-distill.json").read_text())
    assert sorted(record["items"]) == sorted(
        str(p) for p in (games / "json_2.1.1" / "valid_seen").rglob("*.tw-pddl")
    )
    assert (
        record["results"]["all"]["n"]
        == 12
        == sum(r["n"] for name, r in record["results"].items() if name != "all")
    )
    plot.draw(run, run / "plot.png")
    assert (run / "plot.png").stat().st_size > 20_000
    episode = json.loads((run / "episodes.jsonl").read_text().splitlines()[-1])
    assert {"saw", "said", "did", "reward"} <= set(episode["steps"][0])
    said = capsys.readouterr().out
    assert (
        "python mine.py --run t" in said
        and "python distill.py --run t" in said
        and "python evaluate.py --run t" in said
    )


def test_all_phases_end_to_end_in_the_embedded_shop(tmp_path, monkeypatch, capsys):
    """`--env webshop` alone selects the catalogue, the policy and the run's name."""
    monkeypatch.chdir(tmp_path)
    flags = SMALL.replace("--run t ", "").replace("--max_steps 12", "--max_steps 6")
    for script in (warmup, mine, distill):
        call(monkeypatch, script, f"--env webshop {flags}")
    run = tmp_path / "runs" / "tiny-webshop"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 7 and all(r["logprob_gap"] < 1e-3 for r in records if r["rows"])
    skills = [json.loads(line) for line in (run / "mine" / "skills.jsonl").read_text().splitlines()]
    assert {s["bucket"] for s in skills} <= set(tiny_shop.CATEGORIES)
    call(monkeypatch, evaluate, "--run tiny-webshop --eval_items 8")
    record = json.loads((run / "eval-test-distill.json").read_text())
    assert len(record["items"]) == 8 and record["results"]["all"]["score"] >= 0
    assert "WebShop" not in capsys.readouterr().err


def test_an_interrupted_phase_goes_on_from_its_last_save(games, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"{SMALL} --data {games}"
    call(monkeypatch, warmup, flags)
    straight = torch.load("runs/t/warmup/state.pt", weights_only=False)

    other = flags.replace("--run t", "--run u")
    original, calls = common.Run.log, []

    def stop_in_the_second_iteration(*args):
        calls.append(1)
        original(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "log", stop_in_the_second_iteration)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, warmup, other)
    with pytest.raises(UserError, match="not finished"):
        call(monkeypatch, mine, "--run u")
    monkeypatch.setattr(common.Run, "log", original)
    call(monkeypatch, warmup, other)
    resumed = torch.load("runs/u/warmup/state.pt", weights_only=False)
    moments = [state.pop("optimizer")["state"] for state in (straight, resumed)]
    assert resumed == straight  # iteration, successes, finished
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    lines = [json.loads(line) for line in Path("runs/u/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]


def test_phases_in_the_wrong_order_name_the_script_to_run(games, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="python warmup.py --run t"):
        call(monkeypatch, mine, f"{SMALL} --data {games}")
    with pytest.raises(UserError, match="python mine.py --run t"):
        call(monkeypatch, distill, f"{SMALL} --data {games}")
    with pytest.raises(UserError, match="--checkpoint init"):
        call(monkeypatch, evaluate, f"--run t --data {games}")


def test_a_run_folder_keeps_its_config(games, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, warmup, f"{SMALL} --data {games} --warmup_iterations 1")
    with pytest.raises(UserError, match="made with --lr"):
        call(monkeypatch, warmup, f"{SMALL} --data {games} --warmup_iterations 1 --lr 0.5")
    with pytest.raises(UserError, match="made with --model"):
        call(monkeypatch, mine, "--run t --model other/model")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--learning_rate 1", "unknown flag --learning_rate"),
        ("--lambda_maxx 1", "did you mean --lambda_max"),
        ("--preset huge", "--preset huge: choose one of"),
        ("--model ./nowhere", "./nowhere: no such model folder"),
        ("--dtype int8", "--dtype int8: choose float32"),
        ("--data /nowhere", "run alfworld-download, or set ALFWORLD_DATA or --data"),
        ("--device cuda", "no CUDA device"),
        ("--max_prompt_tokens 50", "raise --max_prompt_tokens (50 now)"),
    ],
)
def test_wrong_input_ends_with_one_line_and_no_traceback(
    flags, message, games, tmp_path, monkeypatch, capsys
):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["warmup.py", "--data", str(games), *flags.split()])
    with pytest.raises(SystemExit) as exit:
        common.run_script(warmup.main)
    printed = capsys.readouterr().err.strip().split("\r")[-1].strip().split("\n")
    assert exit.value.code == 2 and message in printed[-1] and printed[-1].startswith("error: ")
    assert "Traceback" not in "".join(printed)


def test_help_is_the_documentation():
    out = subprocess.run(
        [sys.executable, ROOT / "warmup.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for field in dataclasses.fields(common.Config):
        assert f"--{field.name}" in out and field.metadata["help"]


def test_unparsable_summaries_are_counted(policy, config):
    model, tokenizer = policy
    solved = [{"task": "t", "task_type": "pick", "iteration": 1, "steps": [["saw", "look"]]}] * 3
    bank = common.SkillBank(config)
    config.max_response_tokens = 3  # too short for any JSON
    outcome = mine.mine(model, tokenizer, config, bank, solved, 1, seed=0)
    assert outcome == {"unparsable": 3} and not bank.skills
    assert mine.mine(model, tokenizer, config, bank, [], 1, seed=0) == {}


def test_distillation_rows_pair_the_plain_prompt_with_the_skilled_response(
    episodes, policy, config
):
    tokenizer, skill = policy[1], common.Skill("c", "s", "pick")
    episodes[0].skills = episodes[4].skills = (skill,)
    advantages = [[0.5] * len(e.steps) for e in episodes]
    advantages[0][0] = -1.0
    rows = distill.distillation_rows(
        episodes, advantages, {episodes[0].group: 0.5, episodes[4].group: -0.5}, tokenizer, config
    )
    assert (
        len(rows) == len(episodes[0].steps) - 1
    )  # neither the plain arm, nor a harmful group, nor a bad step
    assert all(isinstance(r, Row) and r.distill and r.utility == 0.5 for r in rows)
    assert (
        rows[0].prompt_ids == episodes[0].steps[1].plain_ids
        and rows[0].response_ids == episodes[0].steps[1].response_ids
    )


def test_no_active_skill_means_plain_gigpo(games, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"{SMALL} --data {games} --mine_episodes 0"
    for script in (warmup, mine, distill):
        call(monkeypatch, script, flags)
    assert "no active skill: this phase trains plain GiGPO" in capsys.readouterr().out
    last = json.loads((Path("runs/t/metrics.jsonl")).read_text().splitlines()[-1])
    assert last["distill_rows"] == 0 and last["paired_groups"] == 0


def test_out_of_memory_is_one_line_that_names_the_flags_to_lower(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore lines")

    with pytest.raises(SystemExit) as stop:
        common.run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "lower --micro_tokens (update) or --generation_rows" in line
