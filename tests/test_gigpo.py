"""Credit: `gigpo_advantages` and what `episode_advantages` feeds it. Names tell the bug guarded."""

import doctest
import inspect
import itertools
import json
import random
from statistics import fmean, stdev

import numpy as np
import pytest
from conftest import SHARED

from common import Episode, Step, clipped_policy_loss, episode_advantages, gigpo_advantages
from config import Config


def by_definition(groups, rewards, anchors, gamma, step_weight, normalize_std, baseline, penalties):
    """GiGPO Eq. 3 to 8 row by row, an independent second writing of them."""
    rows = [(e, t) for e, episode in enumerate(rewards) for t in range(len(episode))]
    score = {}
    tail = {}
    for e, t in rows:
        score[e, t] = sum(rewards[e]) - penalties[e][t]
        tail[e, t] = sum(gamma**n * r for n, r in enumerate(rewards[e][t:])) - penalties[e][t]

    def compared(value, peers, alone):
        mean = fmean(peers) if len(peers) > 1 else alone
        std = stdev(peers) if len(peers) > 1 else 1.0
        return (value - mean) / (std + 1e-6 if normalize_std else 1.0)

    result = [[0.0] * len(episode) for episode in rewards]
    for e, t in rows:
        peers = [score[f, u] for f, u in rows if groups[f] == groups[e]]
        if baseline == "episodes":
            peers = [sum(r) for g, r in zip(groups, rewards, strict=True) if g == groups[e]]
        same = [
            tail[f, u] for f, u in rows if groups[f] == groups[e] and anchors[f][u] == anchors[e][t]
        ]
        among_episodes = compared(score[e, t], peers, alone=0.0)
        among_steps = compared(tail[e, t], same, alone=tail[e, t])
        result[e][t] = among_episodes + step_weight * among_steps
    return result


@pytest.mark.parametrize("baseline", ["steps", "episodes"])
@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("step_weight", [0.0, 0.7])
def test_advantages_equal_a_second_writing_of_the_definition(baseline, normalize_std, step_weight):
    options = {"normalize_std": normalize_std, "baseline": baseline, "step_weight": step_weight}
    for seed, gamma, penalty in itertools.product(range(12), (0.5, 0.95), (0.0, 0.3)):
        rng = random.Random(seed)
        groups = ["g", "g", "g", "h", "h", "alone"]  # "alone" is a group of one episode
        lengths = [rng.randint(1, 5) for _ in groups]
        rewards = [[rng.choice([0.0, 0.0, 1.0, 10.0]) for _ in range(n)] for n in lengths]
        # few states, so that some repeat, within an episode too, and some occur once
        anchors = [[rng.choice("abcdef") for _ in range(n)] for n in lengths]
        penalties = [[penalty * rng.randint(0, 1) for _ in range(n)] for n in lengths]
        case = (groups, rewards, anchors)
        ours = gigpo_advantages(*case, gamma=gamma, penalties=penalties, **options)
        theirs = by_definition(*case, gamma=gamma, penalties=penalties, **options)
        for computed, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(computed, expected, rtol=1e-9, atol=1e-7)


def test_worked_example_in_the_docstring_is_what_the_code_computes():
    names = {"gigpo_advantages": gigpo_advantages}
    (example,) = doctest.DocTestFinder().find(gigpo_advantages, "gigpo", globs=names)
    results = doctest.DocTestRunner().run(example)
    assert results.attempted == 1 and results.failed == 0


@pytest.mark.skipif(not (SHARED / "gigpo_cases.json").exists(), reason="../shared/data is not here")
def test_advantages_equal_verl_agents_code():
    for case in json.loads((SHARED / "gigpo_cases.json").read_text()):
        expected = case.pop("advantages")
        computed = gigpo_advantages(
            case.pop("groups"), case.pop("rewards"), case.pop("anchors"), **case
        )
        for ours, theirs in zip(computed, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_episode_baseline_runs_over_episodes_not_over_steps():
    # one solved episode of 1 step, one failed of 3: the mean over episodes is 5, over steps 2.5
    args = (["g", "g"], [[10], [0, 0, 0]], [["a"], ["b", "c", "d"]])
    over_steps = gigpo_advantages(*args, step_weight=0, normalize_std=False)
    over_episodes = gigpo_advantages(*args, step_weight=0, normalize_std=False, baseline="episodes")
    assert over_steps[0][0] == 7.5
    assert over_episodes[0][0] == 5
    assert over_episodes[1][2] == -5


def test_penalty_stays_on_its_row_and_is_not_propagated():
    args = (["g", "h"], [[0, 10], [0]], [["a", "b"], ["a"]])
    clean = gigpo_advantages(*args, normalize_std=False)
    penal = gigpo_advantages(*args, normalize_std=False, penalties=[[0, 1], [0]])
    assert penal[0][0] - clean[0][0] == pytest.approx(0.5)  # only through the group's mean score
    assert penal[0][1] - clean[0][1] == pytest.approx(-0.5)


@pytest.mark.parametrize("reward", [0, 10])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_group_without_contrast_gives_zero_and_no_nan(reward, normalize_std):
    result = gigpo_advantages(["g"] * 4, [[reward]] * 4, [["a"]] * 4, normalize_std=normalize_std)
    assert all((a == 0).all() for a in result)


def test_empty_inputs_do_not_crash():
    assert gigpo_advantages([], [], []) == []
    assert [len(a) for a in gigpo_advantages(["g", "g"], [[], [1]], [[], ["a"]])] == [0, 1]


def test_groups_with_equal_observations_do_not_mix():
    apart = gigpo_advantages(["g", "h"], [[10], [0]], [["a"], ["a"]], normalize_std=False)
    # groups of a single row: mean 0, std 1, and no step advantage
    assert apart[0][0] == 10 and apart[1][0] == 0


# --- what the episodes are turned into ------------------------------------------------------------


def episode(group, *steps, skills=()):
    """Steps are (observation, valid, reward)."""
    played = Episode("item", group, list(skills))
    for obs, valid, reward in steps:
        played.steps.append(Step(obs, [1], [2], "", [3], [0.0], "look", valid, reward))
    return played


def test_the_penalty_is_taken_off_malformed_responses_alone():
    config = Config(normalize_std=False, step_weight=0.0, invalid_penalty=0.5)
    episodes = [episode("g", ("a", True, 0.0), ("b", False, 0.0)), episode("g", ("c", True, 0.0))]
    first, second = episode_advantages(episodes, config)
    # scores 0, -0.5 and 0: the mean is -1/6
    np.testing.assert_allclose(first, [1 / 6, -1 / 3])
    np.testing.assert_allclose(second, [1 / 6])


def test_the_anchor_is_the_bare_observation_so_that_both_halves_of_a_task_compare():
    config = Config(normalize_std=False, gamma=0.5)
    solved = episode("g", ("hall", True, 0.0), ("desk", True, 10.0), skills=("a skill",))
    failed = episode("g", ("hall", True, 0.0))
    first, second = episode_advantages([solved, failed], config)
    # as in the docstring of `gigpo_advantages`: "hall" is one state, met with and without a skill
    np.testing.assert_allclose(first, [35 / 6, 10 / 3])
    np.testing.assert_allclose(second, [-55 / 6])


def test_every_flag_of_credit_reaches_the_formula():
    changed = {"gamma": 0.3, "step_weight": 0.25, "normalize_std": False, "baseline": "episodes"}
    episodes = [
        episode("g", ("a", True, 0.0), ("b", False, 0.0), ("a", True, 10.0)),
        episode("g", ("a", True, 0.0), ("b", True, 0.0)),
    ]
    rewards, anchors = [[0.0, 0.0, 10.0], [0.0, 0.0]], [["a", "b", "a"], ["a", "b"]]
    for flags in ({}, *({name: value} for name, value in changed.items()), changed):
        for penalty in (0.1, 2.0):
            config = Config(invalid_penalty=penalty, **flags)
            used = {name: getattr(config, name) for name in changed}
            penalties = [[0.0, penalty, 0.0], [0.0, 0.0]]
            expected = by_definition(["g", "g"], rewards, anchors, penalties=penalties, **used)
            for ours, theirs in zip(episode_advantages(episodes, config), expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_a_formula_has_the_defaults_of_the_flags():
    """Or a call in a notebook would compute something else than a run."""
    names = {"gamma", "step_weight", "normalize_std", "baseline", "clip"}
    for formula in (gigpo_advantages, clipped_policy_loss):
        for name, parameter in inspect.signature(formula).parameters.items():
            if name in names:
                assert parameter.default == getattr(Config(), name)
                names.remove(name)
    assert not names
