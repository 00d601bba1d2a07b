"""What mining and distillation do in an iteration: whom they ask, what they keep, their rows."""

import dataclasses
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, tiny_config

import common
import distill
import envs
import mine
import warmup
from common import episode_advantages, rl_rows
from config import read_jsonl
from envs import build_mining_prompt
from runtime import saves
from runtime.metrics import rollout_metrics
from runtime.policy import load_policy
from runtime.run import Run, load_state
from skills import Skill, SkillBank, group_deltas, plain_successes
from worlds import alfworld


def test_lambda_rises_to_its_largest_value(config):
    config.lambda_iterations, config.lambda_max = 4, 0.2
    lambdas = [distill.lambda_at(k, config) for k in (1, 2, 4, 5, 9)]
    assert lambdas == pytest.approx([0.05, 0.1, 0.2, 0.2, 0.2])
    config.without = ["internalization"]
    assert [distill.lambda_at(k, config) for k in (1, 9)] == [0, 0]


def mining_phase(iterations, flags, episodes, monkeypatch, successes=()) -> tuple:
    """Iterations of mining that play these episodes -> (those that mined, the last buffer)."""
    mined, saved = [], []
    run = types.SimpleNamespace(
        resumed=False,
        last=99,
        policy=None,
        state={"successes": list(successes)},
        iterations=lambda: iterations,
        draw_tasks=lambda k: [],
        seed=lambda k: 0,
        log=lambda *args: None,
        end_iteration=lambda *args, successes: saved.append(successes),
        finish=lambda **more: None,
    )
    monkeypatch.setattr(mine, "Run", lambda *args, **first: run)
    monkeypatch.setattr(mine, "mine", lambda *args: mined.append(args[4]) or {})
    monkeypatch.setattr(mine, "rollout", lambda *args: episodes)
    monkeypatch.setattr(mine, "update", lambda *args: {})
    call(mine, flags)
    return mined, saved[-1]


def test_a_round_of_mining_comes_every_so_many_iterations(paired_episodes, monkeypatch):
    mined, _ = mining_phase(range(1, 8), "--mine_every 3", paired_episodes, monkeypatch)
    assert mined == [1, 4, 7]


def test_mining_remembers_the_newest_successes(paired_episodes, monkeypatch):
    monkeypatch.setattr(mine, "MEMORY", 3)
    for episode in paired_episodes:
        episode.success = episode is paired_episodes[-1]  # of the plain half
    _, kept = mining_phase([9], "", paired_episodes, monkeypatch, "abcd")
    assert kept[:2] == ["c", "d"] and kept[2]["iteration"] == 9 and len(kept) == 3


# --- mining ---------------------------------------------------------------------------------------


def test_unparsable_summaries_are_counted(policy, config):
    solved = [{"task": "t", "task_type": "pick", "iteration": 1, "steps": [["saw", "look"]]}] * 3
    bank = SkillBank(config)
    config.max_response_tokens = 3  # too short for any JSON
    outcome = mine.mine(policy, config, bank, solved, 1, seed=0)
    assert outcome == {"unparsable": 3} and not bank.skills
    assert mine.mine(policy, config, bank, [], 1, seed=0) == {}


def test_summaries_are_sampled_at_temperature_1_whatever_rollouts_have(policy, config, monkeypatch):
    asked = []
    sample = common.generate
    monkeypatch.setattr(
        common, "generate", lambda *args, **how: asked.append(how) or sample(*args, **how)
    )
    config = dataclasses.replace(config, temperature=0.5, max_response_tokens=5, generation_rows=3)
    texts = mine.write_summaries(["one", "two"], policy, config, 7)
    assert asked == [{"temperature": 1.0, "seed": 7, "max_new_tokens": 5, "rows": 3}]
    how = asked[0] | {"temperature": 1.0}
    drawn = sample(policy.model, policy.tokenizer, ["one", "two"], **how)
    assert texts == [text for _, _, text in drawn]


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
    steps = [["saw this and that", "did that"]]
    episode = {"task": "find the lamp", "task_type": "look", "steps": steps}
    config.mine_obs_chars = 8
    for config.env in ("alfworld", "webshop"):
        request = build_mining_prompt("find the lamp", "look", steps, ["it is dark"], 8, config.env)
        assert mine.summary_prompt(episode, bank, config) == request


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
    second = internalized(paired_episodes, policy, config, first=-0.5, second=0.5)
    assert len(second) == sum(len(e.steps) for e in paired_episodes[4:6]) > 0
    plain = [dataclasses.replace(e, skills=[]) for e in paired_episodes]
    assert not internalized(plain, policy, config, first=1.0, second=1.0)
    advantages = [np.ones(len(e.steps)) for e in paired_episodes]
    unpaired = distill.internalization_rows(
        paired_episodes, advantages, {}, policy.tokenizer, config
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
    config.without = ["internalization"]
    for episode in paired_episodes:
        for step in episode.steps:
            step.distilled = {}
    assert not internalized(paired_episodes, policy, config)
    assert not any(step.distilled for e in paired_episodes for step in e.steps)


# --- an iteration, really run ---------------------------------------------------------------------


class Watched:
    """One iteration of a phase: what it drew, played and trained, and what it left behind."""

    def __init__(self, script, flags, monkeypatch):
        self.tasks, self.prompts, self.statuses = [], [], []
        real = {name: getattr(script, name) for name in ("open_groups", "rollout", "update")}

        def open_groups(items, config):
            self.tasks = items
            self.config = config
            return real["open_groups"](items, config)

        def play(policy, config, groups, seed):
            self.rollout_seed = seed
            self.episodes = real["rollout"](policy, config, groups, seed)
            for group in groups:  # so that there is something to learn: one member has solved it
                group[0].success = True
                group[0].steps[-1].reward = 10.0
            return self.episodes

        def train(policy, rows, config, seed, **options):
            self.rows = [dataclasses.replace(row) for row in rows]  # as they were given
            self.update_seed, self.options, self.policy = seed, options, policy
            return real["update"](policy, rows, config, seed, **options)

        with monkeypatch.context() as patch:
            patch.setattr(script, "open_groups", open_groups)
            patch.setattr(script, "rollout", play)
            patch.setattr(script, "update", train)
            if hasattr(script, "put_skills"):
                put = script.put_skills
                patch.setattr(
                    script, "put_skills", lambda *a: self.statuses.append(a[2]) or put(*a)
                )
            call(script, flags)
        self.phase = script.__name__
        self.line = read_jsonl("runs/t/metrics.jsonl")[-1]
        self.folder = Path("runs/t", self.phase)
        self.state = load_state(self.folder)

    def start(self, phase) -> str:
        """The first line of a phase's output."""
        data = envs.data_root("alfworld", self.config.data)
        panel = envs.digest("alfworld", envs.list_items("alfworld", "train", data))[:12]
        where = f"{phase}: 12 tasks of train in {data} ({panel})"
        return f"{where}, 707,200 parameters on cpu\n"

    def end(self, phase, more, after) -> list[str]:
        """The last lines of a phase's output, by its log."""
        log = [x for x in read_jsonl("runs/t/metrics.jsonl") if x["phase"] == phase]
        tokens = sum(x["sampled_tokens"] for x in log)
        steps = zip(self.episodes, self.advantages(), strict=True)
        lost = [s for e, own in steps for s, a in zip(e.steps, own, strict=True) if a == 0]
        lost = sum(len(s.response_ids) for s in lost)  # of the last iteration
        assert self.line["taught_nothing"] == pytest.approx(lost / self.line["sampled_tokens"])
        share = sum(x["taught_nothing"] * x["sampled_tokens"] for x in log) / tokens
        lines = [f"phase: {phase}", f"iteration: {len(log)}"]
        lines += [f"success: {self.line['success']:.3f}"]
        lines += [f"{x}: {self.line[x]}" for x in ("episodes_so_far", "sampled_tokens_so_far")]
        lines += [f"taught_nothing: {share:.3f}", more, f"model: runs/t/{phase}/model"]
        return [*lines, f"next: python {after}.py --run t"]

    def advantages(self):
        return episode_advantages(self.episodes, self.config)

    def bank(self):
        return SkillBank.load(self.folder, self.config)

    def check(self, k):
        """What holds of every phase: the plan of the iteration, its rows, its line in the log."""
        run = Run(self.config, self.phase, after=None)
        assert self.tasks == run.draw_tasks(k)
        assert self.rollout_seed == self.update_seed == run.seed(k)
        rl = [row for row in self.rows if row.gate is None]
        assert rl == rl_rows(self.episodes, self.advantages()) and rl
        expected = rollout_metrics(self.episodes, self.advantages(), self.config)
        assert expected.items() <= self.line.items()
        assert (self.line["phase"], self.line["iteration"]) == (self.phase, k)
        assert self.line["rows"] == len(rl) and self.line["optimizer_steps"] > 0
        assert self.state["iteration"] == k
        saved = load_policy(self.folder / "model", self.config, "cpu", trainable=False)[0]
        for now, then in zip(self.policy.model.parameters(), saved.parameters(), strict=True):
            assert torch.equal(now, then)


@pytest.fixture
def begun(games, tmp_path, monkeypatch):
    """A run with a warm-up and a mining phase that have ended, made without training."""
    monkeypatch.chdir(tmp_path)
    small = {"run": "t", "kl_coef": 0.0, "minibatch_rows": 64, "group_size": 3, "max_steps": 3}
    small |= {
        "tasks": 2,
        "mine_iterations": 1,
        "distill_iterations": 2,
        "warmup_iterations": 2,
        "n_req": 3,
    }
    config = tiny_config(games, **small, n_eval=0, active_above=0.9, ema=1.0, mine_episodes=2)
    solved = {"task": "t", "task_type": "pick", "iteration": 1, "steps": [["saw", "look"]]}
    Run(config, "warmup").end_iteration(1, True, successes=[solved, solved])
    bank = SkillBank(config)
    for kind in alfworld.TASK_TYPES.values():
        bank.skills.append(Skill("it is dark", f"use the lamp of {kind}", kind, status="active"))
    Run(config, "mine").end_iteration(1, True, bank, successes=[solved])
    return f"--run t --preset tiny-household --data {games} " + " ".join(
        f"--{name} {value}" for name, value in small.items() if name != "run"
    )


def test_an_iteration_of_the_warm_up_keeps_its_successes_and_ends_with_enough(
    begun, monkeypatch, capsys
):
    for folder in Path("runs/t").iterdir():
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    seen = Watched(warmup, begun.replace("--n_req 3", "--n_req 4"), monkeypatch)
    seen.check(2)  # two tasks, one success each: the second iteration is the last
    lines = read_jsonl("runs/t/metrics.jsonl")
    assert [line["n_succ"] for line in lines] == [2, 4] and seen.state["finished"]
    assert len(seen.state["successes"]) == 4
    assert seen.state["successes"][2:] == plain_successes(seen.episodes, 2)
    assert seen.options == {} and all(not e.skills for e in seen.episodes)
    said = capsys.readouterr().out
    assert said.startswith(seen.start("warmup"))
    assert "iterations left: 1, about 1 min\n" in said
    assert "N_succ 4/4  steps 3.0  invalid 0.00" in said
    assert "\n".join(seen.end("warmup", "n_succ: 4", "mine")) + "\n" in said
    enough = begun.replace("--n_req 3", "--n_req 2")
    shutil.rmtree("runs/t")
    Watched(warmup, enough, monkeypatch)
    assert len(read_jsonl("runs/t/metrics.jsonl")) == 1


def test_an_iteration_of_mining_pairs_trains_and_judges(begun, monkeypatch, capsys):
    shutil.rmtree("runs/t/mine")
    written = '{"condition": "it is early", "strategy": "look around"}'
    monkeypatch.setattr(mine, "write_summaries", lambda prompts, *_: [written] * len(prompts))
    seen = Watched(mine, "--run t --mine_episodes 0", monkeypatch)  # which tasks will it draw?
    kinds = sorted({episode.task_type for episode in seen.episodes})
    shutil.rmtree("runs/t/mine")
    save = Path("runs/t/warmup")
    state = load_state(save)
    state["successes"] = [dict(state["successes"][0], task_type=kind) for kind in kinds]
    torch.save(state, save / "state.pt")
    saves.seal(save, "warmup")
    before = capsys.readouterr().out
    seen = Watched(mine, "--run t", monkeypatch)
    seen.check(1)
    assert seen.statuses == [("candidate", "active")] and seen.options == {}
    quiet = [line for line in before.splitlines() if line.startswith("mine   1")]
    assert len(quiet) == 1 and quiet[0].endswith("skills 0 active 0 candidate 0 retired")
    assert not [row for row in seen.rows if row.gate is not None]
    assert [bool(e.skills) for e in seen.episodes] == [True, True, False] * 2
    assert seen.line["mined_added"] == len(kinds) and seen.line["delta"] == 0.5
    assert seen.line["paired_groups"] == 2 and seen.line["candidate"] == len(kinds)
    assert all(set(skill.deltas) == {0.5} and skill.born == 1 for skill in seen.bank().skills)
    assert len(seen.state["successes"]) == len(kinds) and seen.state["finished"]  # no plain one
    said = capsys.readouterr().out
    assert said.startswith(seen.start("mine") + "mine: 2 successes to learn from, 0 skills\n")
    assert f"mined {{'added': {len(kinds)}" in said and "skills 0 active" in said
    assert "no skill became active: distill.py will train plain GiGPO" in said
    assert seen.bank().table() in said
    skills = f"skills: {seen.bank().summary()}"
    assert "\n".join(seen.end("mine", skills, "distill")) + "\n" in said
    again = Watched(mine, "--run t --mine_iterations 2", monkeypatch)  # goes on with its bank
    again.check(2)
    assert (
        f"mine: {len(kinds)} successes to learn from, {len(kinds)} skills"
        in capsys.readouterr().out
    )
    assert [skill.strategy for skill in again.bank().skills] == ["look around"] * len(kinds)
    assert sum(len(skill.deltas) for skill in again.bank().skills) >= 2


def test_an_iteration_of_distillation_adds_what_the_skills_did_better(begun, monkeypatch, capsys):
    seen = Watched(distill, "--run t --distill_iterations 1", monkeypatch)
    seen.check(1)
    deltas = group_deltas(seen.episodes)
    assert set(deltas.values()) == {0.5} and seen.statuses == [("active",)]
    tokenizer = seen.policy.tokenizer
    rows = distill.internalization_rows(
        seen.episodes, seen.advantages(), deltas, tokenizer, seen.config
    )
    assert [row for row in seen.rows if row.gate is not None] == rows
    assert len(rows) == 12 and seen.options == {"lambda_": distill.lambda_at(1, seen.config)}
    gated = sum(sum(row.gate) for row in rows)
    tokens = sum(len(row.response_ids) for row in rows)
    assert seen.line["gated_tokens"] == gated > 0
    assert seen.line["gated_share"] == pytest.approx(gated / tokens) and gated < tokens
    assert seen.line["lambda"] == seen.options["lambda_"] > 0 and seen.line["delta"] == 0.5
    assert seen.line["internalization_rows"] == 12 and seen.line["active"] == 6
    tried = [skill for skill in seen.bank().skills if skill.deltas]
    assert tried and all(set(skill.deltas) == {0.5} for skill in tried) and seen.state["finished"]
    steps = [s for line in read_jsonl("runs/t/episodes.jsonl") for s in line["steps"]]
    assert sum("distilled" in step for step in steps) == 3  # of one of the two members shown
    said = capsys.readouterr().out
    skills = "distill: skills 6 active 0 candidate 0 retired, lambda up to 0.025\n"
    assert said.startswith(seen.start("distill") + skills)
    assert f"lambda 0.025  gated {gated} tokens  skills 6 active" in said
    assert "plain GiGPO" not in said
    skills = "skills: 6 active 0 candidate 0 retired; the model needs none"
    assert "\n".join(seen.end("distill", skills, "evaluate")) + "\n" in said


def test_without_skills_both_phases_are_gigpo(begun, monkeypatch, capsys):
    for folder in Path("runs/t").glob("mine*"):
        shutil.rmtree(folder)
    seen = Watched(mine, "--run t --without skills", monkeypatch)
    seen.check(1)
    assert not seen.statuses and not seen.bank().skills and not any(e.skills for e in seen.episodes)
    assert not any(name.startswith("mined") for name in seen.line) and seen.line["delta"] is None
    seen = Watched(distill, "--run t --distill_iterations 1 --without skills", monkeypatch)
    seen.check(1)
    assert not seen.statuses and seen.line["gated_tokens"] == seen.line["gated_share"] == 0
    assert seen.line["internalization_rows"] == seen.line["paired_groups"] == 0
    assert "no active skill: this phase trains plain GiGPO" in capsys.readouterr().out
