"""Fixtures: the shipped tiny policy, generated games, played episodes, optional real data."""

import copy
import dataclasses
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import envs
from common import Row, open_groups, rollout
from config import PRESETS, Config
from runtime.policy import Policy, load_policy, make_optimizer
from skills import Skill
from worlds import household

ROOT = Path(__file__).resolve().parent.parent
# real games and reference numbers; their tests are skipped where it is absent
SHARED = ROOT.parent / "shared" / "data"
# the models are so small that two threads mostly wait for each other, and for other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# the same examples on every machine, however slow it is
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


def call(script, flags):
    """Run the main of a script as its command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
        script.main()


@pytest.fixture(scope="session")
def games(tmp_path_factory):
    """A data folder with two generated games of each task type in train and in valid_seen."""
    root = tmp_path_factory.mktemp("games")
    household.make(root, {"train": 12, "valid_seen": 12})
    return root


def tiny_config(games, **changes):
    small = {"data": str(games), "tasks": 2, "group_size": 4, "max_steps": 4}
    return Config(**PRESETS["tiny-household"] | small | changes)


@pytest.fixture
def config(games):
    return tiny_config(games)


@pytest.fixture
def policy(config):
    """A fresh copy of the tiny policy and its tokenizer."""
    return Policy(*load_policy("tiny-household", config, "cpu"))


@pytest.fixture
def trainer(policy, config):
    """The policy with an optimizer, without a reference."""
    config.kl_coef = 0.0
    return dataclasses.replace(policy, optimizer=make_optimizer(policy.model, config.lr))


def play(games, skills):
    """Two groups of four, really played; the first two of each carry `skills`."""
    config = tiny_config(games)
    groups = open_groups(envs.list_items("alfworld", "train", games)[:2], config)
    for group in groups:
        for episode in group[:2]:
            episode.skills = skills
            episode.shown = [(skill.condition, skill.strategy) for skill in skills]
    policy = Policy(*load_policy("tiny-household", config, "cpu"))
    return rollout(policy, config, groups, seed=0, temperature=1.0)


@pytest.fixture(scope="session")
def plain_play(games):
    return play(games, [])


@pytest.fixture(scope="session")
def paired_play(games):
    return play(games, [Skill("the task is to put an object somewhere", "look first", "pick")])


@pytest.fixture
def episodes(plain_play):
    """Two groups of four plain episodes."""
    return copy.deepcopy(plain_play)


@pytest.fixture
def paired_episodes(paired_play):
    """Two groups, each with two episodes whose prompts had a skill, then two plain ones."""
    return copy.deepcopy(paired_play)


def as_rows(episodes, advantage=1.0):
    return [
        Row(s.prompt_ids, s.response_ids, advantage, s.logprobs) for e in episodes for s in e.steps
    ]
