"""The statistics of tools/study.py, tools/regime.py and tools/effects.py."""

import numpy as np
import pytest

from skills import Skill
from config import Config
from tools import effects, regime, study


def curve(*points):
    """(episodes, solved, of) -> a seed's curve, its first items solved."""
    return [(n, {f"i{k}": k < solved for k in range(of)}) for n, solved, of in points]


def test_the_interval_covers_seeds_and_items():
    alike = np.tile(np.arange(200) % 2, (5, 1)).astype(float)
    low, high = study.interval(alike)
    # the same items in all seeds: five tell no more of the items than one, +-2 sqrt(.25 / 200)
    assert low < 0.5 < high and 0.11 < high - low < 0.17
    apart = np.repeat([[0.0], [1.0]], 200, axis=1)  # two seeds that disagree in every item
    low, high = study.interval(apart)
    assert (low, high) == (0.0, 1.0)


def test_the_curve_mean_weighs_points_by_the_episodes_between():
    curves = {"1": curve((0, 0, 10), (100, 0, 10), (400, 10, 10))}
    assert study.curve_means(curves).mean() == pytest.approx(300 * 0.5 / 400)


def test_episodes_until_a_goal_lie_between_two_evaluations():
    assert regime.episodes_until(curve((100, 0, 10), (200, 10, 10)), 0.8) == 180
    assert regime.episodes_until(curve((100, 9, 10), (200, 10, 10)), 0.8) == 100
    assert regime.episodes_until(curve((100, 0, 10), (200, 5, 10)), 0.8) == 200  # never


def test_a_verdict_is_right_when_the_effect_agrees_with_it():
    config = Config()
    active = Skill("c", "s", "b", status="active")
    retired = Skill("c", "s", "b", status="retired")
    assert effects.verdict_is_right(active, 0.2, config)
    assert not effects.verdict_is_right(active, 0.0, config)
    assert effects.verdict_is_right(retired, -0.2, config)
    assert not effects.verdict_is_right(retired, 0.2, config)
    assert effects.verdict_is_right(Skill("c", "s", "b"), 0.2, config) is None


def test_variants_that_mine_alike_share_the_run_of_phase_1():
    args = type("Args", (), {"name": "n"})
    assert study.mined_by(args, "response-strong", "1") == study.mined_by(args, "siri", "1")
    assert study.mined_by(args, "gigpo", "1") != study.mined_by(args, "siri", "1")
    assert study.mined_by(args, "placebo", "1") != study.mined_by(args, "siri", "1")
