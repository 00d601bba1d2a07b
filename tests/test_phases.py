"""The scripts as a user runs them: from end to end, resumed, and with wrong input."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call
from transformers import AutoModelForCausalLM

import distill
import evaluate
import mine
import warmup
from config import PRESETS, UserError, read_jsonl
from runtime.run import Run
from worlds import shop

pytestmark = pytest.mark.slow


SMALL = """--tasks 2 --group_size 4 --max_steps 8 --n_req 9999 --warmup_iterations 2
--mine_iterations 1 --mine_every 1 --mine_episodes 12 --n_eval 1 --active_above -1
--distill_iterations 2 --minibatch_rows 64"""
HOUSEHOLD = f"--preset tiny-household {SMALL}"


def run_phases(folder, flags) -> str:
    """Warm-up, mining and distillation in `folder` -> what they printed."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        for script in (warmup, mine, distill):
            call(script, flags)
    return said.getvalue()


@pytest.fixture(scope="module")
def household(games, tmp_path_factory):
    """The three phases in the household, once for all tests -> (their folder, what they said)."""
    folder = tmp_path_factory.mktemp("household")
    return folder, run_phases(folder, f"--run t {HOUSEHOLD} --data {games}")


@pytest.fixture
def finished(household, tmp_path, monkeypatch):
    """A copy of that run, to go on with; the working folder is its parent."""
    shutil.copytree(household[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "t"


def logged(run):
    return read_jsonl(run / "metrics.jsonl")


# --- end to end -----------------------------------------------------------------------------------


def test_all_phases_end_to_end_and_their_files(household):
    folder, said = household
    run = folder / "runs" / "t"
    records = logged(run)
    assert [r["phase"] for r in records] == ["warmup"] * 2 + ["mine"] + ["distill"] * 2
    assert all(r["logprob_gap"] < 1e-3 for r in records if r["rows"])
    ramp = PRESETS["tiny-household"]["lambda_iterations"]
    assert [r.get("lambda") for r in records[-2:]] == pytest.approx([0.1 / ramp, 0.1 * 2 / ramp])
    skills = read_jsonl(run / "mine" / "skills.jsonl")
    assert skills and any(s["n"] for s in skills)
    AutoModelForCausalLM.from_pretrained(run / "distill" / "model")  # HF format
    episode = read_jsonl(run / "episodes.jsonl")[-1]
    assert {"saw", "said", "did", "reward"} <= set(episode["steps"][0])
    for script in ("mine", "distill", "evaluate"):
        assert f"python {script}.py --run t" in said


def test_all_phases_end_to_end_in_the_embedded_shop_with_internalization(
    tmp_path, monkeypatch, capsys
):
    """The bare scripts are the shop; here with one option a task."""
    flags = SMALL.replace("--max_steps 8", "--max_steps 5").replace("--tasks 2", "--tasks 4")
    once = "--warmup_iterations 1 --distill_iterations 1 --kl_coef 0"
    run_phases(tmp_path, f"--data runs/tiny-shop-1 --seed 2 {flags} {once}")
    run = tmp_path / "runs" / "tiny"
    records = logged(run)
    assert len(records) == 3 and all(r["logprob_gap"] < 1e-3 for r in records if r["rows"])
    skills = read_jsonl(run / "mine" / "skills.jsonl")
    assert skills and {s["bucket"] for s in skills} <= set(shop.CATEGORIES)
    # what phase 2 is for did happen: some skill helped, and its actions went into the loss
    *earlier, last = records
    assert last["internalization_rows"] > 0 and last["gated_tokens"] > 0
    assert last["internalization"] > 0
    assert last["gated_share"] < 0.7  # thoughts are not internalized
    assert not any(r["internalization_rows"] for r in earlier)
    monkeypatch.chdir(tmp_path)
    call(evaluate, "--eval_items 8")
    (path,) = run.glob("eval-test-distill*.json")
    record = json.loads(path.read_text())
    assert len(record["items"]) == 8 and record["results"]["all"]["score"] >= 0
    assert "WebShop" not in capsys.readouterr().err


def forget(run, phase):
    """Delete the saves of a phase."""
    for folder in run.glob(f"{phase}*"):
        shutil.rmtree(folder)


# --- what a phase does with skills ----------------------------------------------------------------


def test_without_skills_is_the_control_where_nothing_is_mined_or_paired(finished):
    call(mine, "--run control --fork t --without skills --distill_iterations 1")
    call(distill, "--run control")  # it takes the flags of the run's first phase
    for record in logged(finished.parent / "control")[-2:]:
        assert record["paired_groups"] == 0 and record["success_skill"] is None
        assert not any(name.startswith("mined") for name in record)
    assert not read_jsonl(finished.parent / "control" / "mine" / "skills.jsonl")


def test_without_warmup_phase_1_begins_with_the_initial_policy(games, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(mine, f"--run t {HOUSEHOLD} --data {games} --without warmup")
    assert [(x["phase"], x["episodes_so_far"]) for x in logged(Path("runs/t"))] == [("mine", 8)]
    call(distill, "--run t --distill_iterations 1")
    assert json.loads(Path("runs/t/distill/config.json").read_text())["without"] == ["warmup"]


# --- interruptions and configs --------------------------------------------------------------------


def test_an_interrupted_phase_goes_on_from_its_last_save(finished, games, monkeypatch):
    straight = torch.load(finished / "warmup" / "state.pt", weights_only=False)
    other = f"--run u {HOUSEHOLD} --save_minutes 0.0001 --data {games}"
    original = Run.log
    calls = []

    def stop_in_the_second_iteration(*args):
        calls.append(1)
        original(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", stop_in_the_second_iteration)
    with pytest.raises(KeyboardInterrupt):
        call(warmup, other)
    with pytest.raises(UserError, match="not finished"):
        call(mine, "--run u")
    monkeypatch.setattr(Run, "log", original)
    call(warmup, other)
    resumed = torch.load("runs/u/warmup/state.pt", weights_only=False)
    moments = [state.pop("optimizer")["state"] for state in (straight, resumed)]
    assert resumed == straight  # iteration, successes, finished
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    assert [line["iteration"] for line in logged(Path("runs/u"))] == [1, 2]


def test_phases_in_the_wrong_order_name_the_script_to_run(games, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--run t {HOUSEHOLD} --data {games}"
    with pytest.raises(UserError, match="python warmup.py --run t"):
        call(mine, flags)
    with pytest.raises(UserError, match="python mine.py --run t"):
        call(distill, flags)
    with pytest.raises(UserError, match="--checkpoint init"):
        call(evaluate, f"--run t --preset tiny-household --data {games}")


def test_a_run_folder_keeps_its_config(finished, games):
    with pytest.raises(UserError, match="made with --lr"):
        call(warmup, f"--run t {HOUSEHOLD} --data {games} --lr 0.5")
    with pytest.raises(UserError, match="made with --dtype"):
        call(mine, "--run t --dtype bfloat16")
