"""Runs and their flags: what may change at resume, forks, extensions, what a value must be."""

import json
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import mine
import warmup
from config import UserError
from runtime import run as runs
from runtime import saves
from runtime.flags import parse_config
from runtime.policy import make_optimizer

SMALL = "--preset tiny-household --tasks 2 --group_size 2 --max_steps 3 --n_req 9999"
SMALL += " --minibatch_rows 64"


def call(monkeypatch, script, flags):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
    script.main()


@pytest.fixture
def begun(games, tmp_path, monkeypatch):
    """A finished warm-up of one iteration in runs/t -> its flags."""
    monkeypatch.chdir(tmp_path)
    flags = f"--run t {SMALL} --data {games}"
    call(monkeypatch, warmup, f"{flags} --warmup_iterations 1")
    return flags


def logged(run="t"):
    lines = (Path("runs") / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_flags_that_a_message_tells_the_user_to_lower_may_change_at_resume(begun, monkeypatch):
    lower = "--micro_tokens 512 --generation_rows 1 --gradient_checkpointing true --offload true"
    call(monkeypatch, warmup, f"{begun} --warmup_iterations 2 {lower} --max_prompt_tokens 900")
    assert [x["iteration"] for x in logged()] == [1, 2]


@pytest.mark.parametrize("flag", ["--lr 0.5", "--gamma 0.5", "--lambda_iterations 7", "--seed 3"])
def test_flags_that_change_the_result_are_refused_at_resume_by_name(begun, monkeypatch, flag):
    with pytest.raises(UserError, match=f"made with {flag.split()[0]} "):
        call(monkeypatch, warmup, f"{begun} --warmup_iterations 2 {flag}")


def test_a_finished_phase_is_extended_by_its_iterations_and_not_repeated(begun, monkeypatch):
    call(monkeypatch, warmup, f"{begun} --warmup_iterations 1")
    assert len(logged()) == 1
    call(monkeypatch, warmup, f"{begun} --warmup_iterations 3")
    assert [x["iteration"] for x in logged()] == [1, 2, 3]
    assert [x["episodes_so_far"] for x in logged()] == [4, 8, 12]


def test_a_warm_up_ends_with_enough_successes_and_is_not_begun_again(begun, monkeypatch):
    flags = begun.replace("--run t", "--run u").replace("--n_req 9999", "--n_req 2")
    flags = flags.replace("--max_steps 3", "--max_steps 14") + " --warmup_iterations 9"
    call(monkeypatch, warmup, flags)
    state = torch.load("runs/u/warmup/state.pt", weights_only=True)
    assert state["finished"] and len(state["successes"]) >= 2
    ended = len(logged("u"))
    assert ended < 9
    call(monkeypatch, warmup, flags)  # it has what it was for, with iterations to spare
    assert len(logged("u")) == ended
    more = len(state["successes"]) + 1
    call(monkeypatch, warmup, flags.replace("--n_req 2", f"--n_req {more}"))
    assert len(logged("u")) > ended


def test_a_save_is_due_by_the_clock_too(begun, monkeypatch):
    saved = []
    original = runs.Run.save

    def count(self):
        saved.append(self.boundary["state"]["iteration"])
        original(self)

    monkeypatch.setattr(runs.Run, "save", count)
    flags = begun.replace("--run t", "--run u")
    call(monkeypatch, warmup, f"{flags} --warmup_iterations 3 --save_minutes 0")
    assert saved == [1, 2, 3]
    saved.clear()
    flags = flags.replace("--run u", "--run v")
    call(monkeypatch, warmup, f"{flags} --warmup_iterations 3 --save_minutes 60")
    assert saved == [3]


def test_a_fork_leaves_out_what_its_source_did_in_the_phase_it_is_for(begun, monkeypatch):
    call(monkeypatch, mine, f"{begun} --mine_iterations 1")
    call(monkeypatch, mine, "--run u --fork t --mine_iterations 2")
    assert [(x["phase"], x["iteration"]) for x in logged("u")] == [
        ("warmup", 1),
        ("mine", 1),
        ("mine", 2),
    ]
    assert [x["episodes_so_far"] for x in logged("u")] == [4, 8, 12]


def test_a_fork_goes_on_from_another_runs_warm_up_and_counts_its_episodes(begun, monkeypatch):
    call(monkeypatch, mine, "--run control --fork t --without skills --mine_iterations 1")
    phases = [(x["phase"], x["episodes_so_far"]) for x in logged("control")]
    assert phases == [("warmup", 4), ("mine", 8)]
    saved = json.loads(Path("runs/control/mine/config.json").read_text())
    assert saved["without"] == ["skills"] and saved["run"] == "control" and saved["max_steps"] == 3
    assert not Path("runs/t/mine").exists()


def test_a_fork_does_not_silently_go_on_from_the_runs_own_phase(begun, monkeypatch):
    """A control could be no control: the run had a warm-up of its own."""
    call(monkeypatch, warmup, f"{begun} --warmup_iterations 1".replace("--run t", "--run u"))
    with pytest.raises(UserError, match="--fork t: u has its own warmup; use another --run"):
        call(monkeypatch, mine, "--run u --fork t --mine_iterations 1")


def test_a_saved_state_is_read_on_any_device_and_runs_no_code(begun, monkeypatch):
    seen = {}
    load = torch.load

    def spy(path, **options):
        seen.update(options)
        return load(path, **options)

    monkeypatch.setattr(torch, "load", spy)
    runs.load_state(Path("runs/t/warmup"))
    assert seen["map_location"] == "cpu" and seen["weights_only"] is True


def test_optimizer_follows_the_flags_and_the_device_of_now_not_those_of_the_save():
    model = torch.nn.Linear(3, 2)
    old = make_optimizer(model, 1e-3, beta2=0.9)
    model.weight.grad = torch.ones(2, 3)
    model.bias.grad = torch.ones(2)
    old.step()
    state = old.state_dict()
    for group in state["param_groups"]:
        group["triton"] = True  # as saved on a GPU
    new = make_optimizer(model, 1e-4, beta2=0.99, weight_decay=0.5, saved=state)
    for group in new.param_groups:
        assert (group["lr"], group["beta2"], group["weight_decay"]) == (1e-4, 0.99, 0.5)
        assert not group["triton"] and int(group["step"]) == 1
    new.step()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("-lr 1", "unknown flag -lr: did you mean --lr?"),
        ("--lambda_iterations 0", "--lambda_iterations 0: must be at least 1"),
        ("--lambda_max 0", "--lambda_max 0.0: must be above 0"),
        ("--minibatch_rows 0", "--minibatch_rows 0: must be at least 1"),
        ("--max_steps 0", "--max_steps 0: must be at least 1"),
        ("--advantage_clip -1", "--advantage_clip -1.0: must be at least 0"),  # L_int turned round
        ("--kl_coef nan", "--kl_coef nan: must be at least 0"),
        ("--clip 0", "--clip 0.0: must be above 0"),
        ("--history -1", "--history -1: must be at least 0"),
        ("--seed -1", "--seed -1: must be at least 0 and below 4294967296"),
        ("--engine foo", "--engine foo: must be fast or textworld"),
        ("--temperature 0", "--temperature 0.0: must be above 0"),
        ("--show all", "--show all: must be skill or nothing or neutral or other"),
        ("--optimizer_offload true", "unknown flag --optimizer_offload: --offload"),
        ("--baseline rows", "--baseline rows: must be steps or episodes"),
        ("--tasks many", "invalid int value: 'many'; see --help"),
    ],
)
def test_a_value_that_no_run_could_have_is_one_line_at_the_start(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["warmup.py", *flags.split()])
    with pytest.raises(UserError) as error:
        parse_config("warmup", "doc")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def rewrite(path, **flags):
    """Write flags into the config.json of a save, and its manifest anew."""
    (path / "config.json").write_text(json.dumps(flags))
    (path / "manifest.json").write_text(json.dumps(saves.files_of(path)))


def test_a_run_of_another_version_says_what_its_flags_are_called_now(begun, monkeypatch):
    folder = Path("runs/t/warmup")
    flags = json.loads((folder / "config.json").read_text())
    rewrite(folder, **flags, skill_share=0.5)
    with pytest.raises(UserError, match="config.json: --skill_share is --without skills; it is of"):
        call(monkeypatch, mine, "--run t")
    del flags["tasks"]
    rewrite(folder, **flags)
    with pytest.raises(UserError, match="config.json: no --tasks; it is of another version"):
        call(monkeypatch, mine, "--run t")


def test_flags_that_are_not_as_they_were_written_are_not_used(begun, monkeypatch):
    """The later phases took over what a damaged config.json said."""
    path = Path("runs/t/warmup/config.json")
    path.write_text(path.read_text().replace('"gamma": 0.95', '"gamma": 0.59'))
    with pytest.raises(UserError, match="config.json is not what was written"):
        call(monkeypatch, mine, "--run t")


def test_a_line_of_the_log_without_its_counts_is_dropped_as_damaged(begun, monkeypatch, capsys):
    path = Path("runs/t/metrics.jsonl")
    path.write_text(path.read_text() + '{"phase": "warmup", "iteration": 1}\n')
    call(monkeypatch, warmup, f"{begun} --warmup_iterations 2")
    assert "lines [2] were damaged" in capsys.readouterr().out
    assert [x["episodes_so_far"] for x in logged()] == [4, 8]
    path.write_text(path.read_text() + "[1, 2]\n")
    with pytest.raises(UserError, match="metrics.jsonl, line 3: not a JSON object"):
        call(monkeypatch, mine, "--run u --fork t --mine_iterations 1")


@pytest.mark.parametrize("flags", ["--eval_items -5", "--eval_temperature nan", "--eval_seed -1"])
def test_an_evaluation_that_cannot_be_is_one_line(begun, monkeypatch, flags):
    with pytest.raises(UserError, match=f"{flags.split()[0]} .*: must be at least 0"):
        call(monkeypatch, evaluate, f"--run t --checkpoint warmup {flags}")


@pytest.mark.parametrize(
    "name", ["../../x", "/x", "", ".", "..", "a/b", "a b", "tiny-games", "tiny-shop-3", "x\n"]
)
def test_a_run_is_named_so_that_it_stays_in_its_folder(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["warmup.py", "--run", name])
    with pytest.raises(UserError, match="--run"):
        parse_config("warmup", "doc")
