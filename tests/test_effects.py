"""The true effect of a skill, and whether a verdict agrees with it."""

from types import SimpleNamespace

import pytest

import evaluate
from common import Episode
from config import Config, UserError
from skills import Skill, SkillBank
from tools import effects

LINE = "verdicts right: 3 of 5\ngroups whose Delta_g had the sign of the effect: 1 of 7"


def game(env, item, engine):
    task_type = "b" if len(item) == 1 else "other"
    return SimpleNamespace(reset=lambda: SimpleNamespace(task_type=task_type))


def test_an_effect_is_success_with_the_skill_minus_without(monkeypatch, tmp_path):
    """Played here by a policy that solves whatever it has a good skill for."""
    config = Config(n_eval=1, show="other")  # of the run: here each skill itself is shown
    skills = [
        Skill("c", "good", "b", status="active", n=2, deltas=[0.5, -0.5]),
        Skill("c", "good", "b", status="retired", n=1, deltas=[0.0]),  # wrongly
        Skill("c", "bad", "b", status="active", n=1, deltas=[0.5]),  # wrongly
        Skill("c", "bad", "b", status="retired", n=1, deltas=[-0.5]),
        Skill("c", "good", "b", status="active", n=1, deltas=[0.0]),
        Skill("c", "good", "b", status="candidate", n=1, deltas=[0.0]),  # no verdict
        Skill("c", "untried", "b", n=0),
    ]
    monkeypatch.setattr(SkillBank, "load", lambda *args: SkillBank(config, skills))
    monkeypatch.setattr(effects, "set_up", lambda config: "cpu")
    monkeypatch.setattr(effects, "load_policy", lambda *args, **options: (None, None))
    monkeypatch.setattr(effects, "list_items", lambda *args: ["i", "of another type", "j"])
    monkeypatch.setattr(effects.envs, "make_env", game)

    def rollout(policy, config, groups, seed, **options):
        for (episode,) in groups:
            guided = episode.shown == [("c", "good")]
            episode.success = guided or episode.item == "i"
        return [episode for group in groups for episode in group]

    def open_groups(items, config, members):
        return [[Episode(item, item, task="t", task_type="b")] for item in items]

    monkeypatch.setattr(evaluate, "rollout", rollout)
    monkeypatch.setattr(evaluate, "open_groups", open_groups)
    text = effects.measure(config, tmp_path, 2)
    assert "| active | +0.00 | 2 | +0.50 +- 0.50 | 0.50 | when c: good |" in text
    assert "| active | +0.00 | 1 | +0.00 +- 0.00 | 0.00 | when c: bad |" in text
    assert "untried" not in text and LINE in text


def test_one_episode_has_no_standard_error(monkeypatch):
    monkeypatch.setattr("sys.argv", ["effects.py", "--episodes", "1"])
    with pytest.raises(UserError, match="--episodes 1: must be 2 at least"):
        effects.main()
