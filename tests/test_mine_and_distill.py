"""What mining and distillation do in an iteration: whom they ask, what they keep, their rows."""

import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import distill
import mine
from skills import Skill, SkillBank


def call(script, flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
        script.main()


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
