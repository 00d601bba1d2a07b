"""Runs and their flags: what may change at resume, forks, extensions, what a value must be."""

import dataclasses
import errno
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call
from safetensors.torch import load_file, save_file

import distill
import envs
import evaluate
import mine
import warmup
from config import Config, UserError
from runtime import run as runs
from runtime import saves
from runtime.flags import parse_config
from runtime.policy import make_optimizer
from runtime.run import Run, run_script
from skills import Skill, SkillBank

SMALL = "--preset tiny-household --tasks 2 --group_size 2 --max_steps 3 --n_req 9999"
SMALL += " --minibatch_rows 64"


@pytest.fixture(scope="module")
def warmed(games, tmp_path_factory):
    """A folder with a finished warm-up of one iteration in runs/t, and its flags."""
    folder = tmp_path_factory.mktemp("warmed")
    flags = f"--run t {SMALL} --data {games}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(warmup, f"{flags} --warmup_iterations 1")
    return folder, flags


@pytest.fixture
def begun(warmed, tmp_path, monkeypatch):
    """A copy of it, in the working folder -> its flags."""
    shutil.copytree(warmed[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return warmed[1]


def logged(run="t"):
    lines = (Path("runs") / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_flags_that_a_message_tells_the_user_to_lower_may_change_at_resume(begun, monkeypatch):
    lower = "--micro_tokens 512 --generation_rows 1 --gradient_checkpointing true --offload true"
    call(warmup, f"{begun} --warmup_iterations 2 {lower} --max_prompt_tokens 900")
    assert [x["iteration"] for x in logged()] == [1, 2]


@pytest.mark.parametrize("flag", ["--lr 0.5", "--gamma 0.5", "--lambda_iterations 7", "--seed 3"])
def test_flags_that_change_the_result_are_refused_at_resume_by_name(begun, monkeypatch, flag):
    with pytest.raises(UserError, match=f"made with {flag.split()[0]} "):
        call(warmup, f"{begun} --warmup_iterations 2 {flag}")


def test_a_finished_phase_is_extended_by_its_iterations_and_not_repeated(begun, monkeypatch):
    call(warmup, f"{begun} --warmup_iterations 1")
    assert len(logged()) == 1
    call(warmup, f"{begun} --warmup_iterations 3")
    assert [x["iteration"] for x in logged()] == [1, 2, 3]
    assert [x["episodes_so_far"] for x in logged()] == [4, 8, 12]


@pytest.mark.slow
def test_a_warm_up_ends_with_enough_successes_and_is_not_begun_again(begun, monkeypatch):
    flags = begun.replace("--run t", "--run u").replace("--n_req 9999", "--n_req 2")
    flags = flags.replace("--max_steps 3", "--max_steps 14") + " --warmup_iterations 9"
    call(warmup, flags)
    state = torch.load("runs/u/warmup/state.pt", weights_only=True)
    assert state["finished"] and len(state["successes"]) >= 2
    ended = len(logged("u"))
    assert ended < 9
    call(warmup, flags)  # it has what it was for, with iterations to spare
    assert len(logged("u")) == ended
    more = len(state["successes"]) + 1
    call(warmup, flags.replace("--n_req 2", f"--n_req {more}"))
    assert len(logged("u")) > ended


def test_a_fork_leaves_out_what_its_source_did_in_the_phase_it_is_for(begun, monkeypatch):
    call(mine, f"{begun} --mine_iterations 1")
    with open("runs/t/metrics.jsonl", "a") as log:
        log.write(json.dumps({"phase": "distill", "iteration": 1} | counts(4, 9)) + "\n")
    call(mine, "--run u --fork t --mine_iterations 2")
    assert [(x["phase"], x["iteration"]) for x in logged("u")] == [
        ("warmup", 1),
        ("mine", 1),
        ("mine", 2),
    ]
    assert [x["episodes_so_far"] for x in logged("u")] == [4, 8, 12]


def test_a_fork_goes_on_from_another_runs_warm_up_and_counts_its_episodes(begun, monkeypatch):
    call(mine, "--run control --fork t --without skills --mine_iterations 1")
    phases = [(x["phase"], x["episodes_so_far"]) for x in logged("control")]
    assert phases == [("warmup", 4), ("mine", 8)]
    saved = json.loads(Path("runs/control/mine/config.json").read_text())
    assert saved["without"] == ["skills"] and saved["run"] == "control" and saved["max_steps"] == 3
    assert not Path("runs/t/mine").exists()


def test_a_fork_does_not_silently_go_on_from_the_runs_own_phase(begun, monkeypatch):
    """A control could be no control: the run had a warm-up of its own."""
    call(warmup, f"{begun} --warmup_iterations 1".replace("--run t", "--run u"))
    with pytest.raises(UserError, match="--fork t: u has its own warmup; use another --run"):
        call(mine, "--run u --fork t --mine_iterations 1")
    with pytest.raises(UserError, match="--fork t: u has its own warmup; use another --run"):
        call(distill, "--run u --fork t")  # u's log would be lost
    for flags in ("--run u", "--run w --fork t"):
        with pytest.raises(UserError, match="--without warmup has no use for"):
            call(mine, f"{flags} --without warmup")


def test_a_fork_does_not_go_on_from_what_is_left_of_the_runs_own_phase(begun):
    """Killed between the two renames of a save, a run has only the one before it."""
    shutil.copytree("runs/t", "runs/u")
    Path("runs/u/warmup").rename("runs/u/warmup.old")
    with pytest.raises(UserError, match="--fork t: u has its own warmup; use another --run"):
        call(mine, "--run u --fork t --mine_iterations 1")
    shutil.rmtree("runs/u/warmup.old")
    Path("runs/u/warmup.part").mkdir()  # it was never saved
    call(mine, "--run u --fork t --mine_iterations 1")


def test_a_fork_that_was_refused_leaves_no_line_to_the_next_one(begun):
    call(warmup, f"{begun} --warmup_iterations 2".replace("--run t", "--run v"))
    shutil.copy("runs/v/metrics.jsonl", "runs/t/metrics.jsonl")
    state = Path("runs/t/warmup/state.pt")
    torch.save(torch.load(state) | {"finished": False}, state)
    saves.seal(state.parent, "warmup")
    with pytest.raises(UserError, match="runs/t/warmup is not finished"):
        call(mine, "--run u --fork t --mine_iterations 1")
    call(warmup, f"{begun} --warmup_iterations 1".replace("--run t", "--run w"))
    call(mine, "--run u --fork w --mine_iterations 1")
    assert [(x["phase"], x["iteration"]) for x in logged("u")] == [("warmup", 1), ("mine", 1)]


@pytest.mark.parametrize("script", [mine, evaluate])
def test_a_folder_with_the_save_of_another_phase_is_refused(begun, script):
    """Swapped by hand, `mine/` and `distill/` were taken one for the other."""
    shutil.copytree("runs/t/warmup", "runs/t/mine")
    where = " --checkpoint mine" if script is evaluate else ""
    with pytest.raises(UserError, match="runs/t/mine is a save of warmup: give the folders back"):
        call(script, f"--run t{where}")
    assert Path("runs/t/mine").exists()


def test_a_damaged_save_is_not_evaluated_by_its_path_either(begun):
    path = Path("runs/t/warmup/state.pt")
    shutil.copytree("runs/t/warmup", "best")  # one may keep a copy under any name
    flags = "--run t --eval_items 1 --checkpoint"
    call(evaluate, f"{flags} best/model")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="--checkpoint runs/t/warmup/model: .*state.pt has 0 bytes"):
        call(evaluate, f"{flags} runs/t/warmup/model")


@pytest.mark.parametrize(
    "change", ["a game less", "a game more", "another content", "another name"]
)
def test_tasks_that_changed_since_the_run_began_are_refused(begun, games, monkeypatch, change):
    """They were played without a word, whether in the same folder or in another one."""
    shutil.copytree(games, "data")
    trial = Path(envs.list_items("alfworld", "train", "data")[0]).parent
    if change == "a game less":
        shutil.rmtree(trial)
    elif change == "a game more":
        shutil.copytree(trial, trial.with_name("trial_2"))
    elif change == "another name":
        trial.rename(trial.with_name("trial_2"))
    else:
        game = trial / "game.tw-pddl"
        game.write_text(game.read_text() + " ")
    message = (
        "the tasks in data are not those that runs/t/warmup was made with: bring those back, or"
    )
    resumed = (warmup, f"{begun} --warmup_iterations 2")
    for script, flags in (resumed, (mine, "--run t"), (mine, "--run u --fork t")):
        with pytest.raises(UserError, match=message):
            call(script, f"{flags} --data data")
    monkeypatch.setenv("ALFWORLD_DATA", "data")
    with pytest.raises(UserError, match=message):
        call(mine, "--run t --data=")
    assert len(logged()) == 1 and not Path("runs/t/mine").exists()


def test_tasks_may_move_between_phases(begun, games, monkeypatch):
    shutil.copytree(games, "data")
    call(mine, "--run t --mine_iterations 1 --data data")
    monkeypatch.setenv("ALFWORLD_DATA", "data")
    call(mine, "--run t --mine_iterations 2 --data=")
    call(distill, "--run t --distill_iterations 1")
    assert [x["phase"] for x in logged()] == ["warmup", "mine", "mine", "distill"]


@pytest.fixture
def kept(begun, monkeypatch):
    """A run whose --model is a folder that one may change -> (its flags, the weights)."""
    shutil.copytree(ROOT / "tiny" / "policy_household", "first")
    shutil.rmtree("runs")
    flags = f"{begun} --model first"
    call(warmup, f"{flags} --warmup_iterations 1")
    return flags, Path("first/model.safetensors")


def change(path):
    """Weights a little larger than they were."""
    weights = {name: 1.01 * value for name, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


def test_a_reference_that_changed_since_the_run_began_is_refused(kept):
    """The KL was to whatever lay in --model: 0.00734 instead of 0.00012."""
    flags, path = kept
    call(mine, "--run t --mine_iterations 1")
    change(path)
    message = "the weights of --model first are not those that runs/t/{} was made with: bring those"
    for script, more, source in (
        (warmup, f"{flags} --warmup_iterations 2", "warmup"),
        (mine, "--run t --mine_iterations 2", "mine"),
        (mine, "--run u --fork t", "warmup"),
        (distill, "--run t", "mine"),
    ):
        with pytest.raises(UserError, match=message.format(source)):
            call(script, more)


def test_a_model_folder_may_move_but_not_mean_something_else(kept):
    Path("first").rename("second")
    call(mine, "--run t --mine_iterations 1 --model second")
    settings = Path("second/config.json")
    text = settings.read_text()
    settings.write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 500.0'))
    assert settings.read_text() != text
    with pytest.raises(UserError, match="the weights of --model second are not those that"):
        call(distill, "--run t --distill_iterations 1 --model second")
    settings.write_text(text)
    call(distill, "--run t --distill_iterations 1 --model second")


def test_without_a_kl_no_reference_is_needed_and_what_it_was_stays_known(kept):
    _, path = kept
    path.rename("elsewhere")
    call(mine, "--run t --mine_iterations 1 --kl_coef 0")
    Path("elsewhere").rename(path)
    call(distill, "--run t --distill_iterations 1")
    change(path)
    with pytest.raises(UserError, match="--model first are not those that runs/t/distill was made"):
        call(distill, "--run t --distill_iterations 2")


def test_the_initial_policy_is_the_reference_of_a_later_phase(kept):
    flags, path = kept
    call(warmup, f"{flags.replace('--run t', '--run u')} --warmup_iterations 1 --kl_coef 0")
    call(mine, "--run v --fork u --mine_iterations 1 --kl_coef 0.01")
    change(path)
    with pytest.raises(UserError, match="--model first are not those that runs/u/warmup was made"):
        call(mine, "--run u --mine_iterations 1 --kl_coef 0.01")


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
    assert make_optimizer(model, 1.0).param_groups[0]["beta2"] == 0.999
    half = make_optimizer(model.bfloat16(), 1.0)  # where 0.999 would stick
    assert half.param_groups[0]["beta2"] == 0.95


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
    saves.seal(path, path.name)


def test_a_run_of_another_version_says_what_its_flags_are_called_now(begun, monkeypatch):
    folder = Path("runs/t/warmup")
    flags = json.loads((folder / "config.json").read_text())
    rewrite(folder, **flags, skill_share=0.5)
    with pytest.raises(UserError, match="config.json: --skill_share is --without skills; it is of"):
        call(mine, "--run t")
    del flags["tasks"]
    rewrite(folder, **flags)
    with pytest.raises(UserError, match="config.json: no --tasks; it is of another version"):
        call(mine, "--run t")


def test_flags_that_are_not_as_they_were_written_are_not_used(begun, monkeypatch):
    """The later phases took over what a damaged config.json said."""
    path = Path("runs/t/warmup/config.json")
    path.write_text(path.read_text().replace('"gamma": 0.95', '"gamma": 0.59'))
    with pytest.raises(UserError, match="config.json is not what was written"):
        call(mine, "--run t")


def test_a_line_of_the_log_without_its_counts_is_dropped_as_damaged(begun, monkeypatch, capsys):
    path = Path("runs/t/metrics.jsonl")
    path.write_text(path.read_text() + '{"phase": "warmup", "iteration": 1}\n')
    call(warmup, f"{begun} --warmup_iterations 2")
    assert "lines [2] were damaged" in capsys.readouterr().out
    assert [x["episodes_so_far"] for x in logged()] == [4, 8]
    path.write_text(path.read_text() + "[1, 2]\n")
    with pytest.raises(UserError, match="metrics.jsonl, line 3: not a JSON object"):
        call(mine, "--run u --fork t --mine_iterations 1")


@pytest.mark.parametrize("flags", ["--eval_items -5", "--eval_temperature nan", "--eval_seed -1"])
def test_an_evaluation_that_cannot_be_is_one_line(begun, monkeypatch, flags):
    with pytest.raises(UserError, match=f"{flags.split()[0]} .*: must be at least 0"):
        call(evaluate, f"--run t --checkpoint warmup {flags}")


@pytest.mark.parametrize(
    "name", ["../../x", "/x", "", ".", "..", "a/b", "a b", "tiny-games", "tiny-shop-3", "x\n"]
)
def test_a_run_is_named_so_that_it_stays_in_its_folder(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["warmup.py", "--run", name])
    with pytest.raises(UserError, match="--run"):
        parse_config("warmup", "doc")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--learning_rate 1", "unknown flag --learning_rate"),
        ("--lambda_maxx 1", "did you mean --lambda_max"),
        ("--preset huge", "--preset huge: choose one of"),
        ("--model ./nowhere", "./nowhere: no such model folder"),
        ("--dtype int8", "--dtype int8: must be float32 or bfloat16"),
        ("--data /nowhere", "run alfworld-download, or set ALFWORLD_DATA or --data"),
        ("--device cuda", "no CUDA device"),
        ("--max_prompt_tokens 50", "raise --max_prompt_tokens (50 now)"),
        ("--group_size 0", "--group_size 0: must be at least 1"),
        ("--group_size 1", "--group_size 1: must be at least 2, for two halves, or --without"),
        ("--gamma 2", "--gamma 2.0: must be at least 0 and at most 1"),
        ("--lr nan", "--lr nan: must be at least 0"),
        ("--lr many", "invalid float value: 'many'"),
        ("--without lunch", "--without lunch: must be skills or warmup or"),
        ("--recompute_old maybe", "'maybe' is not true or false"),
        ("--skill_share 0", "unknown flag --skill_share: --without skills"),
        ("tiny", "unknown flag tiny"),
    ],
)
def test_wrong_input_ends_with_one_line_and_no_traceback(
    flags, message, games, tmp_path, monkeypatch, capsys
):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["warmup.py", *SMALL.split(), "--data", str(games), *flags.split()]
    )
    with pytest.raises(SystemExit) as exit:
        run_script(warmup.main)
    printed = capsys.readouterr().err.strip().split("\r")[-1].strip().split("\n")
    assert exit.value.code == 2 and message in printed[-1] and printed[-1].startswith("error: ")
    assert "Traceback" not in "".join(printed)


def test_help_is_the_documentation():
    out = subprocess.run(
        [sys.executable, ROOT / "warmup.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in out and field.metadata["help"]


def test_out_of_memory_is_one_line_that_names_the_flags_to_lower(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore lines")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "lower --micro_tokens (update) or --generation_rows" in line


# --- Run ------------------------------------------------------------------------------------------


@pytest.fixture
def run(config, tmp_path, monkeypatch):
    """A phase that begins, without a save."""
    monkeypatch.chdir(tmp_path)
    config.save_minutes = 999.0
    return Run(config, "mine", successes=["first"])


def test_an_iteration_draws_each_task_once(run):
    """With repetition a group of equal tasks would weigh twice."""
    for count in (11, 12, 99):
        run.config.tasks = count
        drawn = [run.draw_tasks(k) for k in (1, 2)]
        assert all(len(set(tasks)) == len(tasks) == min(count, 12) for tasks in drawn)
        assert drawn[0] != drawn[1] and set(drawn[0]) <= set(run.items)


def test_seeds_are_those_that_torch_can_take(run):
    seeds = {run.seed(k) for k in range(200)}
    assert len(seeds) == 200 and min(seeds) >= 0 and 2**29 < max(seeds) < 2**31


def test_tasks_and_seeds_are_functions_of_seed_phase_and_iteration(run):
    """Phases that sampled alike would play the same tasks with the same noise."""

    def drawn(phase="mine", k=1, seed=0):
        run.phase, run.config.seed = phase, seed
        return tuple(run.draw_tasks(k)), run.seed(k)

    run.config.tasks = 6
    assert drawn() == drawn()
    for part in zip(drawn(), drawn(k=2), drawn("distill"), drawn(seed=1), strict=True):
        assert len(set(part)) == 4


def test_a_phase_begins_at_0_with_the_state_it_is_given(run):
    assert run.state == {"successes": ["first"], "iteration": 0, "finished": False}
    assert not run.resumed and run.source is None and run.root == Path("runs/tiny-household")
    assert list(run.iterations()) == [1, 2, 3, 4] and run.last == 4
    assert run.policy.optimizer and run.policy.reference and run.policy.steps == 0
    assert run.phase == "mine" and run.folder == run.root / "mine" and len(run.items) == 12


def test_the_optimizer_has_the_flags_and_the_moments_of_the_save(run, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "make_optimizer", lambda *args, **how: asked.append((args, how)))
    run.policy.optimizer.state_dict = lambda: {"moments": torch.ones(2)}
    run.end_iteration(4, True, successes=[])
    changed = dataclasses.replace(run.config, offload=True)
    again = Run(changed, "mine")
    ((model, lr), how) = asked[0]
    assert model is again.policy.model and lr == run.config.lr and how["offload"] is True
    assert torch.equal(how["saved"]["moments"], torch.ones(2))


def test_what_is_saved_is_the_state_at_the_iterations_end(run):
    """SIGTERM comes in the middle of the next one, when the buffer and the bank have gone on."""
    successes = ["a"]
    bank = SkillBank(run.config, [Skill("c", "s", "pick")])
    run.end_iteration(2, False, bank, successes=successes)
    assert not run.folder.exists()  # not due yet
    successes.append("b")
    bank.skills[0].utility = 0.7
    with pytest.raises(runs.Terminated):
        run.on_sigterm()
    state = runs.load_state(run.folder)
    assert (state["successes"], state["iteration"], state["finished"]) == (["a"], 2, False)
    assert SkillBank.load(run.folder, run.config).skills[0].utility == 0
    assert json.loads((run.folder / "config.json").read_text()) == dataclasses.asdict(run.config)
    assert not saves.problem(run.folder) and run.boundary is None and run.save_seconds > 0
    again = Run(run.config, "mine", after="warmup")
    assert again.resumed and again.source == run.folder and list(again.iterations()) == [3, 4]
    assert again.state["successes"] == ["a"]


def test_sigterm_in_the_first_rollout_ends_at_once_with_nothing_to_save(run):
    with pytest.raises(runs.Terminated):
        run.on_sigterm()
    assert not run.folder.exists()


def test_sigterm_in_an_update_waits_for_the_iterations_end(run, capsys):
    run.end_iteration(1, False)
    run.policy.steps += 1  # a weight has moved
    run.on_sigterm()
    assert run.terminated and not run.folder.exists()
    with pytest.raises(SystemExit) as stop:
        runs.run_script(lambda: run.end_iteration(2, False))
    assert stop.value.code == 143 and runs.load_state(run.folder)["iteration"] == 2
    assert not (run.folder / "skills.jsonl").exists()
    said = capsys.readouterr().err
    assert said == "SIGTERM: saved up to the last finished iteration; the same command goes on\n"


def test_sigterm_in_the_middle_of_a_print_ends_as_at_any_line(run, monkeypatch):
    """A progress bar prints often, and what prints there again is refused as reentrant."""
    run.end_iteration(1, False)
    said = []

    class Terminal(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            said.append(bytes(data).decode())
            if len(said) == 1:
                signal.raise_signal(signal.SIGTERM)
            return len(data)

    terminal = io.TextIOWrapper(io.BufferedWriter(Terminal()), write_through=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(SystemExit) as stop:
        runs.run_script(lambda: print("a bar", file=sys.stderr, flush=True))
    assert stop.value.code == 143 and runs.load_state(run.folder)["iteration"] == 1
    assert "SIGTERM: saved up to the last finished iteration" in said[-1]


def test_sigterm_with_several_processes_waits_for_the_iterations_end(run, monkeypatch):
    """They must save together."""
    run.end_iteration(1, False)
    monkeypatch.setattr(runs.parallel, "world_size", lambda: 2)
    run.on_sigterm()
    assert run.terminated and not run.folder.exists()


def test_sigterm_while_it_saves_is_obeyed_after_the_save(run, monkeypatch):
    written = saves.put

    def put(part, folder):
        run.on_sigterm()
        written(part, folder)

    monkeypatch.setattr(saves, "put", put)
    run.config.save_minutes = 0.0
    with pytest.raises(runs.Terminated):
        run.end_iteration(1, False)
    assert runs.load_state(run.folder)["iteration"] == 1
    monkeypatch.undo()


def test_a_phase_ends_with_a_save_however_late_the_last_was(run):
    run.end_iteration(4, True, successes=[])
    assert runs.load_state(run.folder)["finished"] is True
    run.saved_at -= 999 * 60 - 60  # a minute is left of --save_minutes
    run.end_iteration(5, False)
    assert runs.load_state(run.folder)["iteration"] == 4
    run.saved_at -= 61
    run.end_iteration(5, False)
    assert runs.load_state(run.folder)["iteration"] == 5
    assert time.time() - run.saved_at < 60


def counts(episodes, tokens):
    found = {"episodes": episodes, "sampled_tokens": tokens}
    return found | {"no_contrast": 0.0, "cut": 0.0}  # what a warning may be about


def test_a_line_of_the_log_counts_what_the_run_has_spent(run, episodes, monkeypatch):
    advantages = [[0.0] * len(e.steps) for e in episodes]
    run.clock -= 7
    run.save_seconds = 0.12345
    run.log(1, counts(8, 100) | {"kl": 0.5}, episodes, advantages, "a line")
    run.log(2, counts(4, 50), episodes, advantages, "a line")
    first, second = logged("tiny-household")
    assert (first["phase"], first["iteration"], first["kl"]) == ("mine", 1, 0.5)
    assert 7 <= first["seconds"] < 9 and second["seconds"] < 2
    assert (first["episodes_so_far"], second["episodes_so_far"]) == (8, 12)
    assert (first["sampled_tokens_so_far"], second["sampled_tokens_so_far"]) == (100, 150)
    assert first["save_seconds"] == 0.123 and "save_seconds" not in second
    assert 2**26 < first["peak_memory"] < 2**36  # bytes of this process
    monkeypatch.setattr(runs.parallel, "rank", lambda: 1)
    run.log(3, counts(4, 50), episodes, advantages, "a line")
    assert len(logged("tiny-household")) == 2  # rank 0 speaks for all


def test_iterations_without_contrast_are_counted_in_a_row(run, episodes, capsys):
    advantages = [[0.0] * len(e.steps) for e in episodes]
    said = []
    for k, share in enumerate((0.6, 0.9, 0.5, 0.6, 0.6, 0.6, 0.6), 1):
        run.log(k, counts(8, 100) | {"no_contrast": share}, episodes, advantages, "a line")
        said.append("note: for 3 iterations most groups" in capsys.readouterr().out)
    assert said == [False] * 5 + [True, False]


def test_a_transcript_has_its_own_episodes_advantages(run, paired_episodes):
    for i, episode in enumerate(paired_episodes):
        episode.task = f"task {i}"
        episode.success = i == 0
        episode.steps[0].distilled = {"weight": i}
    advantages = [[i + t / 10 for t in range(len(e.steps))] for i, e in enumerate(paired_episodes)]
    for k in range(1, 6):
        run.log(k, counts(8, 100), paired_episodes, advantages, "a line")
    lines = (run.root / "episodes.jsonl").read_text().splitlines()
    shown = [json.loads(line) for line in lines]
    assert len(shown) == 10 and {line["group"] for line in shown} == {
        e.group for e in paired_episodes
    }
    for line in shown:
        i = int(line["task"].split()[1])
        episode = paired_episodes[i]
        assert (line["item"], line["group"]) == (episode.item, episode.group)
        assert line["success"] == (i == 0) and line["phase"] == "mine"
        assert line["delta"] == (0.5 if i < 4 else 0.0)
        words = ["when the task is to put an object somewhere: look first"]
        assert line["skills"] == (words if episode.skills else [])
        assert [s["advantage"] for s in line["steps"]] == [round(a, 4) for a in advantages[i]]
        for step, known in zip(line["steps"], episode.steps, strict=True):
            assert (step["saw"], step["said"]) == (known.obs, known.response)
            assert (step["did"], step["reward"]) == (known.action, known.reward)
        assert line["steps"][0]["weight"] == i
    for episode in paired_episodes:  # --show nothing: the report still tells the halves apart
        episode.shown = []
        line = runs.readable(episode, [0.0] * len(episode.steps), {})
        assert bool(line["skills"]) == bool(episode.skills)


def test_two_members_of_one_group_are_shown_one_of_each_half(paired_episodes, episodes):
    seen = set()
    for seed in range(30):
        a, b = runs.choose_shown(paired_episodes, seed)
        assert paired_episodes[a].group == paired_episodes[b].group
        assert paired_episodes[a].skills and not paired_episodes[b].skills
        assert (a, b) == tuple(runs.choose_shown(paired_episodes, seed))
        seen |= {a, b}
        a, b = runs.choose_shown(episodes, seed)
        assert a != b and episodes[a].group == episodes[b].group
    assert seen == set(range(8))
    alone = paired_episodes[0].group  # a group without a skill, beside one with both halves
    for episode in paired_episodes:
        episode.skills = [] if episode.group == alone else episode.skills
    for seed in range(9):
        a, b = runs.choose_shown(paired_episodes, seed)
        assert alone not in (paired_episodes[a].group, paired_episodes[b].group)


def test_lines_after_the_save_are_dropped_and_the_rest_counted(run, capsys):
    def line(phase, iteration, **more):
        return json.dumps({"phase": phase, "iteration": iteration} | counts(8, 10) | more) + "\n"

    path = run.root / "metrics.jsonl"
    begun_at_9 = line("warmup", 9) + line("warmup", 10)
    path.write_text(begun_at_9 + line("mine", 1) + line("mine", 2) + line("mine", 3))
    (run.root / "episodes.jsonl").write_text(line("mine", 2) + line("mine", 3) + '{"phase": "mi')
    run.kept = {"warmup": 9, "mine": 2}
    run.drop_lines()
    assert [x["iteration"] for x in logged("tiny-household")] == [9, 1, 2]
    assert run.spent == {"episodes": 24, "sampled_tokens": 30}
    assert (run.root / "episodes.jsonl").read_text() == line("mine", 2)
    assert "episodes.jsonl: lines [3] were damaged and are dropped" in capsys.readouterr().out
    path.write_text(line("mine", 0) + line("lunch", 1) + line("mine", 1, episodes=-1) + "\n[]\n")
    run.drop_lines()
    said = capsys.readouterr().out
    assert "metrics.jsonl: lines [1, 2, 3, 5] were damaged and are dropped" in said
    assert "metrics.jsonl: what was logged up to iteration 2 of mine is lost" in said
    assert path.read_text() == ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    weights = {"good": torch.zeros(2), "bad.weight": torch.tensor([0.0, bad])}
    with pytest.raises(UserError, match="bad.weight is not finite: not saved"):
        runs.require_finite(weights, "runs/t")
    runs.require_finite({"good": torch.zeros(2)}, "runs/t")


@pytest.mark.parametrize(
    "changes, ranks, message",
    [
        ({"device": "tpu"}, 1, "--device tpu: choose cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, 1, "--device cuda:x: choose"),
        ({}, 3, "3 processes share --tasks 2: start fewer, or raise it"),
        ({"offload": True}, 2, "--offload is for one GPU; several shard the state"),
    ],
)
def test_what_no_machine_can_run_is_refused(config, monkeypatch, changes, ranks, message):
    monkeypatch.setattr(runs.parallel, "world_size", lambda: ranks)
    monkeypatch.setattr(runs.parallel, "init", lambda device: device)
    with pytest.raises(UserError, match=message):
        runs.set_up(dataclasses.replace(config, **changes))
    monkeypatch.setattr(runs.parallel, "world_size", lambda: 2)
    assert runs.set_up(dataclasses.replace(config, device="cpu")) == "cpu"
    assert torch.initial_seed() == config.seed == 0
    assert runs.set_up(dataclasses.replace(config, seed=5)) in ("cpu", "cuda")
    assert torch.initial_seed() == 5


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("a word"), 2, "error: a word\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from what is saved\n"),
        (OSError(errno.ENOSPC, "No space"), 2, "free some disk, then the same command goes on\n"),
        (OSError(errno.EDQUOT, "Quota"), 2, "free some disk, then the same command goes on\n"),
        (OSError(errno.EACCES, "Denied"), 2, "error: [Errno 13] Denied\n"),
    ],
)
def test_what_a_user_can_meet_is_one_line_and_an_exit_code(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    said = capsys.readouterr().err
    assert stop.value.code == code and said.endswith(words) and said.count("\n") == 1


def test_a_dry_run_prints_the_table_and_ends(config, capsys, monkeypatch):
    config.dry_run = True
    with pytest.raises(SystemExit) as stop:
        runs.set_up(config)
    assert stop.value.code is None and "card: fits" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        runs.set_up(config)
    assert not capsys.readouterr().out


def test_a_phase_needs_the_one_before_it_finished(run):
    with pytest.raises(UserError, match="warmup/model is missing: run `python warmup.py --run"):
        Run(run.config, "mine", after="warmup")
    with pytest.raises(UserError, match="runs/typo/warmup/model is missing"):
        Run(dataclasses.replace(run.config, run="typo"), "mine", after="warmup")
    with pytest.raises(UserError, match="runs/typo/warmup/model is missing"):
        Run(dataclasses.replace(run.config, run="new", fork="typo"), "mine", after="warmup")
    assert not Path("runs/typo").exists() and not Path("runs/new").exists()  # not even a lock
    run.phase, run.folder = "warmup", run.root / "warmup"
    run.end_iteration(1, False, successes=[])
    run.save()
    with pytest.raises(UserError, match="warmup is not finished: `python warmup.py .* goes on"):
        Run(run.config, "mine", after="warmup")
    run.end_iteration(2, True, successes=["b"])
    counted = {"phase": "warmup"} | counts(8, 10)
    lines = [json.dumps(counted | {"iteration": k}) for k in (1, 2, 3)]  # 3: never saved
    (run.root / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    second = Run(run.config, "mine", after="warmup")
    assert not second.resumed and second.source == run.folder
    assert second.spent == {"episodes": 16, "sampled_tokens": 20}
    assert second.state == {"successes": ["b"], "iteration": 0, "finished": False}
    second.end_iteration(4, False)
    second.save()
    flag = "mine is at iteration 4, unfinished: raise --mine_iterations"
    with pytest.raises(UserError, match=flag):
        Run(run.config, "mine", after="warmup").iterations()
