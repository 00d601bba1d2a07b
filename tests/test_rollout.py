"""Groups, their two halves, and how episodes are played. Each test names the bug it guards."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
from common import (
    Episode,
    Row,
    Step,
    episode_advantages,
    fill_logprobs,
    fit_prompts,
    open_groups,
    play,
    put_skills,
    rollout,
)
from config import Config, UserError, check
from evaluate import evaluate
from runtime import parallel
from runtime.generation import generate
from runtime.metrics import halves, rollout_metrics
from skills import Skill, SkillBank, group_deltas
from worlds import Observation, alfworld


@pytest.fixture
def items(games):
    return envs.list_items("alfworld", "train", games)


@pytest.mark.parametrize("show", ["skill", "nothing"])
def test_paired_halves_share_the_game_and_the_initial_observation(policy, config, items, show):
    """With --show nothing the halves differ in name alone: self-imitation."""
    config = dataclasses.replace(config, max_steps=1, show=show)
    kinds = {alfworld.task_type_of(item) for item in items[:3]}
    bank = SkillBank(config, [Skill("any task", "look first", k, status="active") for k in kinds])
    groups = open_groups(items[:3], config)
    put_skills(groups, bank, ("active",))
    episodes = rollout(policy, config, groups, seed=0)
    for start in range(0, 12, 4):
        group = episodes[start : start + 4]
        assert [e.skills for e in group] == [group[0].skills] * 2 + [[], []] and group[0].skills
        assert len({e.item for e in group}) == len({e.group for e in group}) == 1
        assert len({e.steps[0].obs for e in group}) == 1
        with_skill = group[0].steps[0]
        plain = group[2].steps[0]
        assert with_skill.plain_ids == plain.prompt_ids == plain.plain_ids
        assert (with_skill.prompt_ids == plain.prompt_ids) == (show == "nothing")
        decode = policy.tokenizer.decode
        # on the first step too
        assert ("look first" in decode(with_skill.prompt_ids)) == (show == "skill")
        assert "look first" not in decode(with_skill.plain_ids)


@pytest.mark.parametrize("members, carry", [(2, 1), (3, 2), (4, 2), (5, 3), (8, 4)])
def test_half_of_a_group_carries_skills_and_each_half_has_a_member(config, members, carry):
    bank = SkillBank(config, [Skill("a", "b", "pick", status="active")])
    group = [Episode("i", "g", task_type="pick") for _ in range(members)]
    put_skills([group], bank, ("active",))
    assert [bool(e.skills) for e in group] == [True] * carry + [False] * (members - carry)
    assert bank.skills[0].retrieved == 1  # a group is one try


def test_both_prompts_of_every_step_tell_the_same_history(paired_episodes, policy):
    for episode in paired_episodes:
        for t, step in enumerate(episode.steps):
            plain = policy.tokenizer.decode(step.plain_ids)
            seen = policy.tokenizer.decode(step.prompt_ids)
            assert step.obs in plain and step.obs in seen
            assert ("look first" in seen) == bool(episode.skills)
            lines = [line for line in seen.split("\n") if line not in plain]
            assert len(lines) == (2 if episode.skills else 0)  # the skill block alone
            if t:
                assert f"Steps taken so far: {t}." in plain
                assert f"Action {t}: '{episode.steps[t - 1].action}'" in plain


def test_responses_are_sampled_from_the_prompt_that_is_trained(paired_episodes, policy, config):
    """The skill half's responses come from the prompt with the skill, and no other."""
    steps = [step for e in paired_episodes if e.skills for step in e.steps]
    config.recompute_old = True
    gaps = {}
    for prompt in ("prompt_ids", "plain_ids"):
        rows = [Row(getattr(s, prompt), s.response_ids, 0.0, s.logprobs) for s in steps]
        fill_logprobs(policy, rows, config)
        both = [(row.old_logprobs, torch.tensor(row.rollout_logprobs)) for row in rows]
        gaps[prompt] = max(float((ours - theirs).abs().max()) for ours, theirs in both)
    assert gaps["prompt_ids"] < 1e-4 < gaps["plain_ids"]


def test_equal_items_drawn_twice_are_two_groups(config, items):
    groups = open_groups([items[0]] * 2, config, members=2)
    assert len({e.group for group in groups for e in group}) == 2


def test_the_members_of_a_group_draw_different_responses(plain_play):
    first = [e.steps[0].response_ids for e in plain_play[:4]]
    assert len({tuple(ids) for ids in first}) > 1


def test_a_rollout_is_a_function_of_its_seed(policy, config, items):
    config.max_steps = 2

    def said(seed):
        episodes = rollout(policy, config, open_groups(items[:2], config, members=2), seed)
        return [step.response for e in episodes for step in e.steps]

    assert said(1) == said(1) != said(2)


@pytest.fixture
def asked(monkeypatch) -> list:
    """What every call of `generate` in a rollout is asked for."""
    calls = []
    monkeypatch.setattr(
        "common.generate", lambda *args, **how: calls.append(how) or generate(*args, **how)
    )
    return calls


def test_turns_ranks_and_iterations_do_not_reuse_their_random_numbers(
    policy, config, items, asked, monkeypatch
):
    """The same prompt at two turns, or elsewhere, must not give the same response."""
    for seed in (5, 6):
        rollout(policy, config, open_groups(items[:1], config, members=1), seed)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    play(policy, config, open_groups(items[:1], config, members=1)[0], 1.0, 5, "")
    seeds = [x["seed"] for x in asked]
    assert len(set(seeds)) == len(seeds) == 12


def test_an_evaluation_samples_at_its_own_temperature_and_training_at_the_runs(
    policy, config, items, asked, monkeypatch
):
    monkeypatch.setattr("evaluate.WAVE", 2)
    evaluate(policy, config, items[:3], 0.4, 7)
    assert {x["temperature"] for x in asked} == {0.4}
    assert len({x["seed"] for x in asked}) == len(asked) == 8  # of four turns in two waves
    config.temperature = 0.9
    for given, expected in ((None, 0.9), (0.0, 0.0)):  # 0 is greedy, and not the run's
        asked.clear()
        rollout(policy, config, open_groups(items[:1], config, 1), 0, temperature=given)
        assert {x["temperature"] for x in asked} == {expected}


def test_a_wrong_purchase_ends_an_episode_and_is_no_success(policy, config, items):
    """In WebShop an episode ends with any purchase, and its score is a share of the wishes."""
    (group,) = open_groups(items[:1], config, members=1)
    step = group[0].game.step
    lost = {"success": False, "score": 0.75}
    group[0].game.step = lambda action: (step(action)[0], 0.0, True, lost)
    (episode,) = rollout(policy, config, [group], 0)
    assert (len(episode.steps), episode.success, episode.score) == (1, False, 0.75)


def test_finished_episodes_leave_the_batch_and_only_the_last_step_is_rewarded(
    config, policy, items
):
    config.max_steps = 20
    episodes = rollout(policy, config, open_groups(items[:6], config), seed=3)
    assert any(e.success for e in episodes) and not all(e.success for e in episodes)
    for e in episodes:
        rewards = [s.reward for s in e.steps]
        assert rewards == [0.0] * (len(rewards) - 1) + [10.0 * e.success]
        assert e.success or len(e.steps) == 20
        assert e.game is None  # a played episode can be sent to the other processes


def test_the_action_and_its_validity_are_read_from_the_response(plain_play):
    for step in (step for e in plain_play for step in e.steps):
        expected = envs.parse_action(step.response, alfworld.FALLBACK_CHARS)
        assert (step.action, step.valid) == expected
        assert len(step.response_ids) == len(step.logprobs)


def waiting(policy, config, shown=()):
    """An episode before its third step -> the function that fits its two prompts, as texts."""
    said = Step("You see much. " * 30, [], [], "", [], [], "look", True)
    obs = Observation("You see a desk 1.", "put a mug on desk", "pick", ("look",))
    episode = Episode("some/game", "g", shown=list(shown), steps=[said, said], obs=obs)
    return lambda: fit_prompts(policy.tokenizer, config, [episode])[0]


def test_a_long_prompt_loses_history_first_then_names_the_game(policy, config):
    fit = waiting(policy, config)
    config.max_prompt_tokens = len(fit()[0]) - 1
    shorter, _ = fit()
    assert len(shorter) <= config.max_prompt_tokens
    text = policy.tokenizer.decode(shorter)
    assert "Observation 2" in text and "Observation 1" not in text
    config.max_prompt_tokens = 20
    with pytest.raises(UserError, match="some/game.*max_prompt_tokens"):
        fit()


def test_the_plain_twin_loses_the_history_that_the_prompt_with_skills_has_no_room_for(
    policy, config
):
    """Else phase 2 would train on a prompt with more to go by than the response had."""
    fit = waiting(policy, config, [("it is dark " * 5, "use the lamp")])
    plain, shown = fit()
    config.max_prompt_tokens = len(shown) - 1
    assert len(plain) < config.max_prompt_tokens
    for ids in fit():
        text = policy.tokenizer.decode(ids)
        assert "Observation 2" in text and "Observation 1" not in text


@pytest.mark.parametrize("flags", [{"group_size": 0}, {"tasks": 0}])
def test_empty_group_is_a_clear_error(flags):
    with pytest.raises(UserError, match=f"--{next(iter(flags))} 0: must be at least 1"):
        check(Config(**flags))


def test_metrics_tell_the_halves_apart(paired_episodes, config):
    for episode in paired_episodes:
        episode.success = bool(episode.skills)
    advantages = episode_advantages(paired_episodes, config)
    deltas = group_deltas(paired_episodes)
    metrics = rollout_metrics(paired_episodes, advantages, config, deltas)
    assert (metrics["success_plain"], metrics["success_skill"], metrics["success"]) == (0, 1, 0.5)
    assert metrics["delta"] == 1 and metrics["paired_groups"] == 2 and metrics["episodes"] == 8
    assert halves(metrics) == "success plain 0.00 skill 1.00  delta 1.00 in 2 groups"
    plain = [dataclasses.replace(e, skills=[]) for e in paired_episodes]
    metrics = rollout_metrics(plain, advantages, config, {})
    assert metrics["success_skill"] is None and metrics["delta"] is None
    assert "skill   -  " in halves(metrics)


def test_every_logged_share_is_of_what_its_name_says(config):
    config.max_response_tokens = 3
    played = []
    for group, success, *steps in (  # (response tokens, valid) of each step
        ("a", True, (3, True)),
        ("a", True, (1, True), (3, True), (2, False)),
        ("a", True, (2, True)),
        ("b", True, (2, True)),
        ("b", False, (2, True)),
        ("c", False, (2, True)),
    ):
        made = [Step("", [1], [1] * 4, "", [5] * n, [], "", valid) for n, valid in steps]
        kind = "look" if group == "a" else "pick"
        played.append(Episode("i", group, task_type=kind, steps=made, success=success))
    advantages = [np.full(len(e.steps), -9 if e is played[0] else 1) for e in played]
    metrics = rollout_metrics(played, advantages, config)
    assert metrics["success_by_type"] == {"look": 1, "pick": pytest.approx(1 / 3)}
    assert metrics["no_contrast"] == pytest.approx(2 / 3)  # "a" and "c"
    assert metrics["invalid"] == pytest.approx(1 / 8)
    assert metrics["cut"] == pytest.approx(2 / 8)
    assert metrics["prompt_tokens"] == 4 and metrics["response_tokens"] == pytest.approx(17 / 8)
    assert metrics["sampled_tokens"] == 17
    assert 1 < metrics["advantage_p95"] < 9  # between the largest and the next, by size


def test_an_item_is_never_changed_by_playing_it(items):
    before = Path(items[0]).read_text()
    first = envs.make_env("alfworld", items[0]).reset()
    game = envs.make_env("alfworld", items[0])
    for action in game.reset().admissible:
        game.step(action)
    assert envs.make_env("alfworld", items[0]).reset() == first
    assert Path(items[0]).read_text() == before
