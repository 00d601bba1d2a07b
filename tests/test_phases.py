"""The scripts as a user runs them: from end to end, resumed, and with wrong input."""

import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

import distill
import evaluate
import mine
import warmup
from config import PRESETS, Config, UserError, read_jsonl
from runtime import saves
from runtime.run import Run, run_script
from skills import Skill, SkillBank
from worlds import alfworld, shop

SMALL = """--tasks 2 --group_size 4 --max_steps 8 --n_req 9999 --warmup_iterations 2
--mine_iterations 1 --mine_every 1 --mine_episodes 12 --n_eval 1 --active_above -1
--distill_iterations 2 --minibatch_rows 64"""
HOUSEHOLD = f"--preset tiny-household {SMALL}"


def call(script, flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
        script.main()


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


@pytest.mark.parametrize("status, paired", [("candidate", 0), ("active", 2)])
def test_phase_2_pairs_groups_by_active_skills_and_not_by_candidates(finished, status, paired):
    bank = SkillBank(Config())
    for kind in alfworld.TASK_TYPES.values():  # so that there is one for every task
        bank.skills.append(Skill("it is dark", "use the lamp", kind, status=status))
    (finished / "mine" / "skills.jsonl").write_text(bank.dump())
    (finished / "mine" / saves.MANIFEST).write_text(json.dumps(saves.files_of(finished / "mine")))
    forget(finished, "distill")
    call(distill, "--run t --distill_iterations 1")
    last = logged(finished)[-1]
    assert last["phase"] == "distill" and last["paired_groups"] == paired
    assert (last["success_skill"] is None) == (paired == 0)


def test_without_skills_both_phases_train_plain_gigpo(finished, capsys):
    forget(finished, "mine")
    forget(finished, "distill")
    call(mine, "--run t --mine_episodes 0 --mine_iterations 1")
    call(distill, "--run t --distill_iterations 1")
    assert "no active skill: this phase trains plain GiGPO" in capsys.readouterr().out
    for record in logged(finished)[-2:]:
        assert record["internalization_rows"] == 0 and record["paired_groups"] == 0


def test_without_skills_is_the_control_where_nothing_is_mined_or_paired(finished):
    call(mine, "--run control --fork t --without skills --distill_iterations 1")
    call(distill, "--run control")  # it takes the flags of the run's first phase
    for record in logged(finished.parent / "control")[-2:]:
        assert record["paired_groups"] == 0 and record["success_skill"] is None
        assert not any(name.startswith("mined") for name in record)
    assert not read_jsonl(finished.parent / "control" / "mine" / "skills.jsonl")


class FirstIteration:
    """In the place of `Run`: one iteration, of a policy that nobody asks."""

    resumed = False
    source = Path()
    last = 9
    policy = None

    def __init__(self, config, phase, after, **first):
        self.state = {"successes": []}

    def iterations(self):
        return [1]

    def draw_tasks(self, k):
        return ["item"]

    def seed(self, k):
        return 0


def planned(script, flags, monkeypatch) -> dict:
    """What the first iteration of a phase asks the bank for, and whether it mined."""
    asked = {"mined": False, "statuses": None}

    def ask(groups, bank, statuses):
        asked["statuses"] = statuses

    def stop(*args):
        raise InterruptedError

    def note(*args):
        asked["mined"] = True
        return {}

    monkeypatch.setattr(mine, "mine", note)
    monkeypatch.setattr(script, "Run", FirstIteration)
    monkeypatch.setattr(script, "open_groups", lambda *args: [])
    monkeypatch.setattr(script, "put_skills", ask)
    monkeypatch.setattr(script, "rollout", stop)
    Path("skills.jsonl").write_text("")
    with pytest.raises(InterruptedError):
        call(script, f"--group_size 4 {flags}")
    return asked


def test_candidates_are_tried_while_mining_and_never_after(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(planned(mine, "", monkeypatch)["statuses"]) == {"candidate", "active"}
    assert set(planned(distill, "", monkeypatch)["statuses"]) == {"active"}


def test_the_control_asks_for_no_skill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert planned(mine, "--without skills", monkeypatch) == {"mined": False, "statuses": None}
    assert planned(mine, "", monkeypatch)["mined"]
    assert planned(distill, "--without skills", monkeypatch)["statuses"] is None


def trained(script, k, flags, episodes, monkeypatch, successes=()) -> dict:
    """What a phase's iteration k does with these episodes: `lambda_` of its update, whether it
    `mined`, and the `successes` that it saves.
    """
    seen = {"mined": False}

    class Iteration(FirstIteration):
        folder = Path(".")
        policy = types.SimpleNamespace(tokenizer=None)

        def __init__(self, config, phase, after, **first):
            self.state = {"successes": list(successes)}

        def iterations(self):
            return [k]

        def log(self, *args):
            pass

        def end_iteration(self, *args, **state):
            seen.update(state)

    def mined(*args):
        seen["mined"] = True
        return {}

    def update(*args, lambda_=0.0):
        seen["lambda_"] = lambda_
        return {}

    monkeypatch.setattr(script, "Run", Iteration)
    monkeypatch.setattr(mine, "mine", mined)
    monkeypatch.setattr(script, "open_groups", lambda *args: [])
    monkeypatch.setattr(script, "rollout", lambda *args: episodes)
    monkeypatch.setattr(script, "update", update)
    Path("skills.jsonl").write_text("")
    call(script, flags)
    return seen


def test_a_round_of_mining_comes_every_so_many_iterations(paired_episodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rounds = [
        trained(mine, k, "--mine_every 3", paired_episodes, monkeypatch)["mined"]
        for k in range(1, 8)
    ]
    assert rounds == [True, False, False, True, False, False, True]


def test_mining_remembers_the_newest_successes(paired_episodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mine, "MEMORY", 3)
    paired_episodes[-1].success = True  # of the plain half
    for episode in paired_episodes[:-1]:
        episode.success = False
    kept = trained(mine, 9, "", paired_episodes, monkeypatch, "abcd")["successes"]
    assert kept[:2] == ["c", "d"] and kept[2]["iteration"] == 9 and len(kept) == 3


def test_lambda_rises_to_its_largest_value(paired_episodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "internalization_rows", lambda *args: [])

    def lambdas(more=""):
        flags = f"--lambda_iterations 4 --lambda_max 0.2 {more}"
        return [
            trained(distill, k, flags, paired_episodes, monkeypatch)["lambda_"]
            for k in (1, 2, 4, 5, 9)
        ]

    assert lambdas() == pytest.approx([0.05, 0.1, 0.2, 0.2, 0.2])
    assert lambdas("--without internalization") == [0] * 5


# --- mining ---------------------------------------------------------------------------------------


def test_unparsable_summaries_are_counted(policy, config):
    solved = [{"task": "t", "task_type": "pick", "iteration": 1, "steps": [["saw", "look"]]}] * 3
    bank = SkillBank(config)
    config.max_response_tokens = 3  # too short for any JSON
    outcome = mine.mine(policy, config, bank, solved, 1, seed=0)
    assert outcome == {"unparsable": 3} and not bank.skills
    assert mine.mine(policy, config, bank, [], 1, seed=0) == {}


def test_a_mined_skill_is_a_candidate_of_the_episodes_bucket(policy, config, monkeypatch):
    text = '{"condition": "it is dark", "strategy": "use the lamp"}'
    monkeypatch.setattr(mine, "write_summaries", lambda prompts, *_: [text] * len(prompts))
    bank = SkillBank(config)
    solved = [{"task": "t", "task_type": "look", "iteration": 1, "steps": [["saw", "use"]]}] * 2
    outcome = mine.mine(policy, config, bank, solved, 3, seed=0)
    assert outcome == {"added": 1, "duplicate": 1}
    (skill,) = bank.skills
    assert (skill.condition, skill.strategy) == ("it is dark", "use the lamp")
    assert (skill.bucket, skill.status, skill.born) == ("look", "candidate", 3)


def test_the_request_for_a_skill_names_the_active_ones_of_its_bucket(config):
    bank = SkillBank(config)
    bank.skills = [
        Skill("it is dark", "s", "look", status="active"),
        Skill("it is new", "s", "look"),
        Skill("it is hot", "s", "heat", status="active"),
    ]
    episode = {"task": "t", "task_type": "look", "steps": [["saw this", "did that"]]}
    prompt = mine.summary_prompt(episode, bank, config)
    assert "saw: saw this did: did that" in prompt
    assert "when it is dark" in prompt
    assert "it is new" not in prompt and "it is hot" not in prompt


def test_task_types_take_turns_and_the_newest_episodes_are_summarized():
    stored = [{"task_type": "a", "number": i} for i in range(100)]
    stored += [{"task_type": "b", "number": i} for i in range(3)]
    chosen = mine.choose(stored, 8, seed=0)
    assert [e["task_type"] for e in chosen] == ["a", "b"] * 3 + ["a", "a"]
    assert all(e["number"] >= 68 for e in chosen if e["task_type"] == "a")
    assert len({(e["task_type"], e["number"]) for e in chosen}) == 8
    assert mine.choose(stored, 8, seed=0) == chosen != mine.choose(stored, 8, seed=1)
    assert len(mine.choose(stored[-3:], 8, seed=0)) == 3


# --- internalization rows -------------------------------------------------------------------------


def internalized(episodes, policy, config, first=0.5, second=-0.5, advantages=None):
    """Rows of the episodes where Delta_g is `first` and `second` for the two groups."""
    deltas = {episodes[0].group: first, episodes[4].group: second}
    advantages = advantages or [np.full(len(e.steps), 0.5) for e in episodes]
    return distill.internalization_rows(episodes, advantages, deltas, policy.tokenizer, config)


def test_internalization_pairs_the_plain_prompt_with_the_response_under_the_skill(
    paired_episodes, policy, config
):
    rows = internalized(paired_episodes, policy, config)
    steps = [step for e in paired_episodes[:2] for step in e.steps]  # helped by their skill
    assert len(rows) == len(steps) > 0
    for row, step in zip(rows, steps, strict=True):
        assert row.prompt_ids == step.plain_ids != step.prompt_ids
        assert "Experience that may help" not in policy.tokenizer.decode(row.prompt_ids)
        assert row.response_ids == step.response_ids
        action = [i for i, on in zip(row.response_ids, row.gate, strict=True) if on]
        assert policy.tokenizer.decode(action).startswith(step.action)
        assert len(action) < len(row.response_ids)
        assert step.distilled == {"weight": 0.5, "distilled": policy.tokenizer.decode(action)}


def test_neither_the_plain_half_nor_a_useless_skill_is_internalized(
    paired_episodes, policy, config
):
    assert not internalized(paired_episodes, policy, config, first=0.0, second=-0.5)
    plain = [dataclasses.replace(e, skills=[]) for e in paired_episodes]
    assert not internalized(plain, policy, config, first=1.0, second=1.0)
    unpaired = distill.internalization_rows(
        paired_episodes, [np.ones(len(e.steps)) for e in paired_episodes], {}, None, config
    )
    assert not unpaired


def test_steps_without_merit_are_rows_too_and_weigh_nothing(paired_episodes, policy, config):
    """They count in the mean of L_int: every gated step is a row."""
    advantages = [np.full(len(e.steps), 0.5) for e in paired_episodes]
    advantages[0][0] = -1.0
    advantages[0][1] = 0.0
    rows = internalized(paired_episodes, policy, config, advantages=advantages)
    assert len(rows) == sum(len(e.steps) for e in paired_episodes[:2])
    assert [row.weight for row in rows[:3]] == [0.0, 0.0, 0.5]


@pytest.mark.parametrize("normalize_std, sigma", [(True, 1.0), (False, 10.0)])
def test_the_weight_is_the_advantage_in_units_of_its_scale(
    paired_episodes, policy, config, normalize_std, sigma
):
    """Without the division by the std, advantages are as large as the reward and w would be c."""
    config.normalize_std = normalize_std
    rows = internalized(paired_episodes, policy, config)
    assert {row.weight for row in rows} == {0.5 / sigma}


def test_the_weight_is_clipped_at_c(paired_episodes, policy, config):
    config.advantage_clip = 0.3
    assert {row.weight for row in internalized(paired_episodes, policy, config)} == {0.3}


def test_ablations_of_internalization_each_open_one_thing(paired_episodes, policy, config):
    harmful = {"first": -0.5, "second": -0.5}
    config.without = ["gate"]
    rows = internalized(paired_episodes, policy, config, **harmful)
    assert len(rows) == sum(len(e.steps) for e in paired_episodes if e.skills)
    assert not all(all(row.gate) for row in rows) and {row.weight for row in rows} == {0.5}
    config.without = ["action_mask"]
    rows = internalized(paired_episodes, policy, config)
    assert rows and all(all(row.gate) for row in rows)
    assert {row.weight for row in rows} == {0.5}
    config.without = ["action_mask", "weight"]
    assert {row.weight for row in internalized(paired_episodes, policy, config)} == {1.0}
    assert not internalized(paired_episodes, policy, config, **harmful)


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
    with pytest.raises(UserError, match="made with --model"):
        call(mine, "--run t --model other/model")


def test_tasks_and_seeds_are_functions_of_seed_phase_and_iteration(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.tasks = 4

    def drawn(phase, k, **changes):
        run = Run(dataclasses.replace(config, **changes), phase)
        return tuple(run.draw_tasks(k)), run.seed(k)

    base = drawn("mine", 1)
    assert base == drawn("mine", 1) and len(set(base[0])) == 4
    others = [drawn("mine", 2), drawn("distill", 1), drawn("mine", 1, seed=1)]
    assert all(tasks != base[0] and seed != base[1] for tasks, seed in others)


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
        sys,
        "argv",
        ["warmup.py", "--preset", "tiny-household", "--data", str(games), *flags.split()],
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
