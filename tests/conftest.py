"""Fixtures: the shipped tiny policy, generated games, the optional real data beside the project."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = (
    ROOT.parent / "shared" / "data"
)  # real games and reference numbers; their tests are skipped where it is absent

import common
import envs
import tiny


@pytest.fixture(scope="session")
def games(tmp_path_factory):
    """A data folder with two generated games of each task type in train and in valid_seen."""
    root = tmp_path_factory.mktemp("games")
    tiny.write_games(root, {"train": 12, "valid_seen": 12})
    return root


@pytest.fixture
def config(games):
    return common.Config(
        **common.PRESETS["tiny"] | {"data": str(games), "tasks": 2, "group_size": 4, "max_steps": 4}
    )


@pytest.fixture
def policy(config):
    """A fresh copy of the tiny policy and its tokenizer."""
    return common.load_policy("tiny", config, "cpu")


@pytest.fixture
def episodes(policy, config):
    model, tokenizer = policy
    plan = common.plan_rollouts(envs.list_items("alfworld", "train", config.data)[:2], config)
    return common.rollout(model, tokenizer, config, plan, temperature=1.0, seed=0)
