"""The true effect of a skill, and whether a verdict agrees with it."""

from config import Config
from skills import Skill, SkillBank
from tools import effects


def test_an_effect_is_success_with_the_skill_minus_without(monkeypatch, tmp_path):
    """Played here by a policy that solves whatever it has a skill for."""
    config = Config(n_eval=1)
    bank = SkillBank(config)
    bank.skills = [
        Skill("c", "good", "b", status="active", n=2, deltas=[0.5, -0.5]),
        Skill("c", "untried", "b", n=0),
    ]
    monkeypatch.setattr(SkillBank, "load", lambda *args: bank)
    monkeypatch.setattr(effects, "set_up", lambda config: "cpu")
    monkeypatch.setattr(effects, "load_policy", lambda *args, **options: (None, None))
    monkeypatch.setattr(effects, "items_of_buckets", lambda *args: {"b": ["i", "j"]})

    def rollout(policy, config, groups, **options):
        for (episode,) in groups:
            episode.success = bool(episode.skills) or episode.item == "i"
        return [episode for group in groups for episode in group]

    monkeypatch.setattr(effects, "rollout", rollout)
    text = effects.measure(config, tmp_path, 2)
    assert "| active | +0.00 | 2 | +0.50 +- 0.50 | 0.50 | when c: good |" in text
    assert "untried" not in text
    assert "verdicts right: 1 of 1; groups whose Delta_g had the sign of the effect: 1 of 2" in text


def test_a_verdict_is_right_when_the_effect_agrees_with_it():
    config = Config()
    active = Skill("c", "s", "b", status="active")
    retired = Skill("c", "s", "b", status="retired")
    assert effects.verdict_is_right(active, 0.2, config)
    assert not effects.verdict_is_right(active, 0.0, config)
    assert effects.verdict_is_right(retired, -0.2, config)
    assert not effects.verdict_is_right(retired, 0.2, config)
    assert effects.verdict_is_right(Skill("c", "s", "b"), 0.2, config) is None
