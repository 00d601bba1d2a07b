"""Groups, their two halves, and how episodes are played. Each test names the bug it guards."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import envs
import evaluate
from common import Episode, Row, Step
from config import UserError
from runtime.metrics import arms, rollout_metrics
from skills import Skill, SkillBank
from worlds import Observation, alfworld


def test_paired_halves_share_the_game_and_the_initial_observation(policy, config):
    items = envs.list_items("alfworld", "train", config.data)[:3]
    bank = SkillBank(config)
    for item in items:
        kind = alfworld.task_type_of(item)
        bank.skills.append(Skill("any task", "look first", kind, status="active"))
    config.max_steps = 1
    groups = common.plan_groups(
        items, config, members=4, skilled=2, bank=bank, statuses=("active",)
    )
    episodes = common.rollout(policy, config, groups, seed=0)
    for start in range(0, 12, 4):
        group = episodes[start : start + 4]
        assert [bool(e.skills) for e in group] == [True, True, False, False]
        assert len({e.item for e in group}) == len({e.group for e in group}) == 1
        assert len({e.steps[0].obs for e in group}) == 1
        with_skill = group[0].steps[0]
        plain = group[2].steps[0]
        assert with_skill.plain_ids == plain.prompt_ids == plain.plain_ids
        decode = policy.tokenizer.decode
        assert "look first" in decode(with_skill.prompt_ids)  # on the first step too
        assert "look first" not in decode(with_skill.plain_ids)


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
    """The skilled arm's responses come from the prompt with the skill, and no other."""
    steps = [step for e in paired_episodes if e.skills for step in e.steps]
    gaps = {}
    for prompt in ("prompt_ids", "plain_ids"):
        rows = [Row(getattr(s, prompt), s.response_ids, 0.0, s.logprobs) for s in steps]
        common.score_rows(policy.model, rows, "old_logprobs", config, 0)
        both = [(row.old_logprobs, torch.tensor(row.rollout_logprobs)) for row in rows]
        gaps[prompt] = max(float((ours - theirs).abs().max()) for ours, theirs in both)
    assert gaps["prompt_ids"] < 1e-4 < gaps["plain_ids"]


def test_equal_items_drawn_twice_are_two_groups(config):
    groups = common.plan_groups(["a", "a"], config, members=2)
    assert len({e.group for group in groups for e in group}) == 2


def test_the_members_of_a_group_draw_different_responses(plain_play):
    first = [e.steps[0].response_ids for e in plain_play[:4]]
    assert len({tuple(ids) for ids in first}) > 1


def test_a_rollout_is_a_function_of_its_seed(policy, config, games):
    items = envs.list_items("alfworld", "train", games)[:2]
    config.max_steps = 2

    def said(seed):
        groups = common.plan_groups(items, config, members=2)
        episodes = common.rollout(policy, config, groups, seed)
        return [step.response for e in episodes for step in e.steps]

    assert said(1) == said(1) != said(2)


def test_turns_of_an_episode_do_not_reuse_their_random_numbers(policy, config, games, monkeypatch):
    """The same prompt at two turns, or in two iterations, must not give the same response."""
    seeds = []
    original = common.generate

    def look(*args, seed, **options):
        seeds.append(seed)
        return original(*args, seed=seed, **options)

    monkeypatch.setattr(common, "generate", look)
    items = envs.list_items("alfworld", "train", games)[:1]
    for seed in (5, 6):
        common.rollout(policy, config, common.plan_groups(items, config, members=1), seed)
    assert len(set(seeds)) == len(seeds) == 8


def seen_by_generate(monkeypatch) -> list:
    """What every call of `generate` in a rollout is asked for."""
    asked = []
    original = common.generate

    def look(*args, **options):
        asked.append(options)
        return original(*args, **options)

    monkeypatch.setattr(common, "generate", look)
    return asked


def test_an_evaluation_samples_at_its_own_temperature_and_training_at_the_runs(
    policy, config, games, monkeypatch
):
    asked = seen_by_generate(monkeypatch)
    items = envs.list_items("alfworld", "train", games)[:3]
    monkeypatch.setattr(evaluate, "WAVE", 2)
    evaluate.evaluate(policy, config, items, 0.4, 7)
    assert {x["temperature"] for x in asked} == {0.4}
    assert len({x["seed"] for x in asked}) == len(asked) == 8  # of four turns in two waves
    asked.clear()
    config.temperature = 0.9
    common.rollout(policy, config, common.plan_groups(items[:1], config, members=1), 0)
    assert {x["temperature"] for x in asked} == {0.9}
    asked.clear()
    common.rollout(
        policy, config, common.plan_groups(items[:1], config, members=1), 0, temperature=0.0
    )
    assert {x["temperature"] for x in asked} == {0.0}  # greedy, and not the run's


def test_every_process_samples_with_seeds_of_its_own(policy, config, games, monkeypatch):
    asked = seen_by_generate(monkeypatch)
    items = envs.list_items("alfworld", "train", games)[:1]
    groups = common.plan_groups(items, config, members=1)
    for number in (0, 1):
        monkeypatch.setattr(common.parallel, "rank", lambda number=number: number)
        common.play(policy, config, groups[0], 1.0, 5, "")
    seeds = [x["seed"] for x in asked]
    assert len(set(seeds)) == len(seeds) == 8


def test_a_wrong_purchase_ends_an_episode_and_is_no_success(policy, config, games, monkeypatch):
    """In WebShop an episode ends with any purchase, and its score is a share of the wishes."""
    original = envs.make_env

    def make_env(*args):
        game = original(*args)
        step = game.step
        game.step = lambda action: (step(action)[0], 0.0, True, {"success": False, "score": 0.75})
        return game

    monkeypatch.setattr(envs, "make_env", make_env)
    items = envs.list_items("alfworld", "train", games)[:1]
    (episode,) = common.rollout(policy, config, common.plan_groups(items, config, members=1), 0)
    assert (len(episode.steps), episode.success, episode.score) == (1, False, 0.75)


def test_finished_episodes_leave_the_batch_and_only_the_last_step_is_rewarded(config, policy):
    config.max_steps = 20
    items = envs.list_items("alfworld", "train", config.data)
    groups = common.plan_groups(items[:6], config, members=4)
    episodes = common.rollout(policy, config, groups, seed=3)
    assert any(e.success for e in episodes) and not all(e.success for e in episodes)
    for e in episodes:
        rewards = [s.reward for s in e.steps]
        assert rewards == [0.0] * (len(rewards) - 1) + [10.0 * e.success]
        assert e.success or len(e.steps) == 20


def test_the_action_and_its_validity_are_read_from_the_response(plain_play):
    for step in (step for e in plain_play for step in e.steps):
        expected = envs.parse_action(step.response, alfworld.FALLBACK_CHARS)
        assert (step.action, step.valid) == expected
        assert len(step.response_ids) == len(step.logprobs)


def test_a_long_prompt_loses_history_first_then_names_the_game(policy, config):
    episode = Episode("some/game", "g")
    said = Step("You see much. " * 30, [], [], "", [], [], "look", True, 0.0)
    episode.steps = [said, said]
    obs = Observation("You see a desk 1.", "put a mug on desk", "pick", ("look",))
    waiting = [(episode, obs)]
    ((ids, _),) = common.fit_prompts(policy.tokenizer, config, waiting)
    config.max_prompt_tokens = len(ids) - 1
    ((shorter, _),) = common.fit_prompts(policy.tokenizer, config, waiting)
    assert len(shorter) <= config.max_prompt_tokens
    text = policy.tokenizer.decode(shorter)
    assert "Observation 2" in text and "Observation 1" not in text
    config.max_prompt_tokens = 20
    with pytest.raises(UserError, match="some/game.*max_prompt_tokens"):
        common.fit_prompts(policy.tokenizer, config, waiting)


def test_the_plain_twin_loses_the_history_that_the_skilled_prompt_has_no_room_for(policy, config):
    """Else phase 2 would train on a prompt with more to go by than the response had."""
    episode = Episode("some/game", "g", (Skill("it is dark " * 5, "use the lamp", "pick"),))
    episode.steps = [Step("You see much. ", [], [], "", [], [], "look", True, 0.0)] * 2
    obs = Observation("You see a desk 1.", "put a mug on desk", "pick", ("look",))
    ((plain, skilled),) = common.fit_prompts(policy.tokenizer, config, [(episode, obs)])
    config.max_prompt_tokens = len(skilled) - 1
    assert len(plain) < config.max_prompt_tokens
    ((plain, skilled),) = common.fit_prompts(policy.tokenizer, config, [(episode, obs)])
    for ids in (plain, skilled):
        text = policy.tokenizer.decode(ids)
        assert "Observation 2" in text and "Observation 1" not in text


@pytest.mark.parametrize("items, members", [(["x"], 0), ([], 4)])
def test_empty_group_is_a_clear_error(config, items, members):
    with pytest.raises(UserError, match="--group_size"):
        common.plan_groups(items, config, members=members)


def test_metrics_tell_the_arms_apart(paired_episodes, config):
    for episode in paired_episodes:
        episode.success = bool(episode.skills)
    advantages = common.episode_advantages(paired_episodes, config)
    deltas = common.group_deltas(paired_episodes)
    metrics = rollout_metrics(paired_episodes, advantages, config, deltas)
    assert (metrics["success_plain"], metrics["success_skill"], metrics["success"]) == (0, 1, 0.5)
    assert metrics["delta"] == 1 and metrics["paired_groups"] == 2 and metrics["episodes"] == 8
    assert arms(metrics) == "success plain 0.00 skill 1.00  delta 1.00 in 2 groups"
    plain = [dataclasses.replace(e, skills=()) for e in paired_episodes]
    metrics = rollout_metrics(plain, advantages, config, {})
    assert metrics["success_skill"] is None and metrics["delta"] is None
    assert "skill   -  " in arms(metrics)


def test_every_logged_share_is_of_what_its_name_says(config):
    config.max_response_tokens = 3

    def episode(group, success, *steps):
        made = [Step("", [1], [1] * 4, "", [5] * n, [], "", valid, 0.0) for n, valid in steps]
        return Episode("i", group, task_type="pick", steps=made, success=success)

    played = [
        episode("a", True, (3, True)),
        episode("a", True, (1, True), (3, True), (2, False)),
        episode("a", True, (2, True)),
        episode("b", True, (2, True)),
        episode("b", False, (2, True)),
        episode("c", False, (2, True)),
    ]
    advantages = [
        np.full(len(e.steps), value) for e, value in zip(played, (-9, 1, 1, 1, 1, 1), strict=True)
    ]
    metrics = rollout_metrics(played, advantages, config)
    assert metrics["no_contrast"] == pytest.approx(2 / 3)  # "a" and "c"
    assert metrics["invalid"] == pytest.approx(1 / 8)
    assert metrics["cut"] == pytest.approx(2 / 8)
    assert metrics["prompt_tokens"] == 4 and metrics["response_tokens"] == pytest.approx(17 / 8)
    assert metrics["sampled_tokens"] == 17
    assert 1 < metrics["advantage_p95"] < 9  # between the largest and the next, by size


def test_an_item_is_never_changed_by_playing_it(games):
    path = Path(envs.list_items("alfworld", "train", games)[0])
    before = path.read_text()
    first = envs.make_env("alfworld", str(path)).reset()
    game = envs.make_env("alfworld", str(path))
    for action in game.reset().admissible:
        game.step(action)
    assert envs.make_env("alfworld", str(path)).reset() == first and path.read_text() == before
