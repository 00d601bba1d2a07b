"""The statistics of tools/study.py, tools/regime.py and tools/effects.py."""

import json

import numpy as np
import pytest

from config import Config, UserError
from skills import Skill, SkillBank
from tools import effects, pool, regime, study, subtasks


def curve(*points):
    """(episodes, solved, of) -> a seed's curve, its first items solved."""
    return [(n, {f"i{k}": k < solved for k in range(of)}) for n, solved, of in points]


def test_the_interval_covers_seeds_and_items():
    alike = np.tile(np.arange(200) % 2, (5, 1)).astype(float)
    low, high = study.interval(alike)
    # the same items in all seeds: five tell no more of the items than one, +-t sqrt(.25 / 200)
    assert high - low == pytest.approx(2 * 2.776 * (0.25 / 199) ** 0.5, rel=1e-3)
    apart = np.repeat([[0.0], [1.0]], 200, axis=1)  # two seeds that disagree in every item
    assert study.interval(apart, lowest=0.0) == (0.0, 1.0)
    one = alike[:1]  # a single seed: its items
    assert np.diff(study.interval(one)) == pytest.approx(2 * 1.96 * (0.25 / 199) ** 0.5)


def test_the_interval_of_five_seeds_holds_the_truth_in_95_of_100_studies():
    """A bootstrap over the seeds holds it in 85."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        seeds = rng.normal(0.0, 0.2, size=(5, 1))
        items = rng.normal(0.0, 0.3, size=(1, 60))
        low, high = study.interval(seeds + items + rng.normal(0.0, 0.3, size=(5, 60)))
        held += low < 0.0 < high
    assert 0.93 < held / 400 < 0.99


def test_a_study_of_other_iterations_needs_another_name(tmp_path, monkeypatch):
    """Or its evaluations would be mixed with those of the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["study.py", "--name", "s", "--mine_iterations", "2"])
    study.remember(study.parse())
    study.remember(study.parse())
    monkeypatch.setattr("sys.argv", ["study.py", "--name", "s", "--mine_iterations", "3"])
    with pytest.raises(UserError, match="--mine_iterations 2, not 3"):
        study.remember(study.parse())


def test_the_curve_mean_weighs_points_by_the_episodes_between():
    curves = {"1": curve((0, 0, 10), (100, 0, 10), (400, 10, 10))}
    assert study.curve_means(curves).mean() == pytest.approx(300 * 0.5 / 400)


def test_episodes_until_a_goal_lie_between_two_evaluations():
    assert regime.episodes_until(curve((100, 0, 10), (200, 10, 10)), 0.8) == 180
    assert regime.episodes_until(curve((100, 9, 10), (200, 10, 10)), 0.8) == 100
    assert regime.episodes_until(curve((100, 0, 10), (200, 5, 10)), 0.8) == 200  # never


def test_a_regime_row_is_the_variant_minus_the_control(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "study-s.json").write_text(json.dumps(two_seeds(2)))
    for seed, success in (("1", 0.1), ("2", 0.3)):
        folder = tmp_path / "runs" / f"s-warmup-s{seed}"
        folder.mkdir(parents=True)
        first = {"success": success, "no_contrast": 0.75}
        later = {"success": 0.9, "no_contrast": 0.0}
        (folder / "metrics.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(later))
    control, ours = regime.summarize("s")
    assert (ours["variant"], ours["seeds"]) == ("siri", 2)
    assert ours["curve_gain"] == pytest.approx(0.1) and ours["end_gain"] == pytest.approx(0.2)
    assert (ours["rare"], ours["contrast"]) == pytest.approx((0.2, 0.25))
    assert (ours["warmup"], ours["end"]) == pytest.approx((0.2, 0.4))
    low, high = ours["end_interval"]
    assert low < 0.2 < high and control["end_gain"] == 0
    (tmp_path / "results" / "study-t.json").write_text(json.dumps({"siri": {}}))
    with pytest.raises(UserError, match="no variant gigpo"):
        regime.summarize("t")


def test_the_quantiles_are_those_of_students_t():
    """Of a printed table; with a single degree of freedom its tail goes on for ever."""
    table = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 19: 2.093, 120: 1.980}
    for freedom, t in table.items():
        assert study.t_quantile(freedom) == pytest.approx(t, abs=6e-4), freedom
    assert study.t_quantile(4, 0.995) == pytest.approx(4.604, abs=6e-4)


def test_a_study_counts_episodes_to_the_end_of_an_iteration_and_explains_phases_1_and_2(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "n-siri-s1"
    folder.mkdir(parents=True)
    lines = [("warmup", 1, 64, 0), ("mine", 1, 128, 0), ("mine", 2, 192, 1), ("distill", 1, 256, 3)]
    records = [
        {"phase": phase, "iteration": k, "episodes_so_far": n, "active": active, "no_contrast": 0.5}
        | ({"no_contrast": 1.0} if phase == "warmup" else {})
        for phase, k, n, active in lines
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert study.episodes_at(records, "mine", 1) == 128
    assert study.episodes_at(records, "mine", 2) == 192
    assert study.episodes_at(records, "warmup", 10**9) == 64
    args = type("Args", (), {"name": "n", "seeds": ["1"]})
    explained = study.diagnostics(args, "siri")
    assert explained["no_contrast"] == 0.5
    assert explained["iterations with an active skill"] == pytest.approx(2 / 3)


def test_a_studys_table_compares_with_gigpo(monkeypatch):
    monkeypatch.setattr(study, "diagnostics", lambda *args: {"x": None})
    args = type("Args", (), {"variants": ["gigpo", "siri"]})
    lines = study.table(args, two_seeds(2)).splitlines()
    gigpo, siri = (next(x for x in lines if x.startswith(f"| {name} | 1")) for name in two_seeds(2))
    assert "+0.200" in siri and "+0.100" in siri and "+0" not in gigpo


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

    monkeypatch.setattr(effects.common, "rollout", rollout)
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


def test_variants_that_mine_alike_share_the_run_of_phase_1():
    args = type("Args", (), {"name": "n"})
    assert study.mined_by(args, "response-strong", "1") == study.mined_by(args, "siri", "1")
    assert study.mined_by(args, "gigpo", "1") != study.mined_by(args, "siri", "1")
    assert study.mined_by(args, "placebo", "1") != study.mined_by(args, "siri", "1")


def test_subtasks_pools_evaluation_seeds_within_a_run_and_compares_one_panel(tmp_path):
    """Two runs with two evaluation seeds each are two runs, not four."""
    tasks = ("pick_two_obj_and_place-A", "look_at_obj_in_light-B")
    games = [f"x/{task}-{n}/game.tw-pddl" for task in tasks for n in range(2)]
    solved = {"a": [[1, 0, 0, 0], [1, 1, 0, 0]], "b": [[1, 0, 1, 0], [1, 0, 1, 0]]}
    for run, evaluations in solved.items():
        (tmp_path / run).mkdir()
        for seed, values in enumerate(evaluations):
            record = {"split": "s", "iteration": 4, "temperature": 0.4, "skills": False}
            record |= {
                "checkpoint": "distill",
                "items": dict(zip(games, map(bool, values), strict=True)),
            }
            (tmp_path / run / f"eval-{seed}.json").write_text(json.dumps(record))
    panel = subtasks.read_panel(f"{tmp_path}/*/eval-*.json")
    assert panel[1].shape == (2, 4) and panel[2] == 4
    lines = subtasks.table({"x": panel}).splitlines()
    assert lines[2].startswith("| look | 2 | 2 of 8, 0.250 |")
    assert lines[3].startswith("| pick2 | 2 | 5 of 8, 0.625 |")
    assert lines[4].startswith("| all | 4 | 7 of 16, 0.438 |")
    with pytest.raises(UserError, match="no such file"):
        subtasks.read_panel("nowhere/*.json")
    better = subtasks.table({"x": panel, "y": (panel[0], panel[1] + 0.25, 4)}).splitlines()
    assert better[-1] == "y - x: +0.250 (0.250 to 0.250)"

    file = tmp_path / "b" / "eval-1.json"
    other = {"items": {"other": True}, "temperature": 1.0, "skills": True}
    for name, message in (("items", "different panels"), ("temperature", "more than the seed")):
        file.write_text(json.dumps(record | {name: other[name]}))
        with pytest.raises(UserError, match=message):
            subtasks.read_panel(f"{tmp_path}/*/eval-*.json")
    file.unlink()
    with pytest.raises(UserError, match="more evaluations"):
        subtasks.read_panel(f"{tmp_path}/*/eval-*.json")


def two_seeds(gain):
    """A study of two seeds in which one variant solves `gain` items of ten more at the end."""
    control = {seed: curve((0, n, 10), (100, n, 10)) for seed, n in (("1", 0), ("2", 4))}
    ours = {seed: curve((0, n, 10), (100, n + gain, 10)) for seed, n in (("1", 0), ("2", 4))}
    return {"gigpo": control, "siri": ours}


def test_pooled_studies_count_each_seed_once():
    rows = pool.differences(two_seeds(2), "siri", "gigpo")
    rows += pool.differences(two_seeds(4), "siri", "gigpo")
    assert [row["warmup"] for row in rows] == pytest.approx([0.0, 0.4, 0.0, 0.4])
    assert [row["end"] for row in rows] == pytest.approx([0.2, 0.2, 0.4, 0.4])
    pooled = pool.summarize(rows, looks=1)
    assert pooled["curve"] == pytest.approx(0.15) and pooled["end_ahead"] == 4
    half = 3.182 * np.std([0.2, 0.2, 0.4, 0.4], ddof=1) / 2
    assert pooled["end_95"] == pytest.approx([0.3 - half, 0.3 + half], abs=1e-3)


def test_a_third_look_needs_a_wider_interval():
    values = np.arange(20.0)
    once = np.diff(pool.student_interval(values))
    half = np.std(values, ddof=1) / 20**0.5
    assert once == pytest.approx(2 * 2.093 * half, rel=0.001)
    assert np.diff(pool.student_interval(values, looks=3)) == pytest.approx(
        2 * 2.625 * half, rel=0.001
    )


def test_studies_are_pooled_once_each_and_of_one_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()

    def run(name, results, flags=""):
        (tmp_path / "results" / f"study-{name}.json").write_text(json.dumps(results))
        words = ["pool.py", "--studies", f"a,{name}", *flags.split()]
        monkeypatch.setattr("sys.argv", words)
        pool.main()

    (tmp_path / "results" / "study-a.json").write_text(json.dumps(two_seeds(2)))
    with pytest.raises(UserError, match="a seed occurs twice"):
        run("b", two_seeds(2))
    longer = {v: {"3": curve((0, 1, 10), (200, 5, 10))} for v in ("gigpo", "siri")}
    with pytest.raises(UserError, match="not of one plan"):
        run("b", longer)
    with pytest.raises(UserError, match="--looks 0"):
        run("b", longer, "--looks 0")
    equal = {v: {"3": curve((0, 1, 10), (100, 5, 10))} for v in ("gigpo", "siri")}
    run("b", equal, "--looks 3 --out x")
    said = capsys.readouterr().out
    assert "ahead in 2 of 3 seeds" in said  # a tie is not ahead
    pooled = json.loads((tmp_path / "results" / "pool-x.json").read_text())
    low, high = pooled["end_looks"]
    assert f"98.3% {low:+.3f} to {high:+.3f})" in said and pooled["seeds"] == 3
    low, high = pooled["end_95"]
    assert f"+0.133 (95% {low:+.3f} to {high:+.3f};" in said


def test_pooled_variants_have_the_same_seeds():
    study_of_one = two_seeds(2)
    del study_of_one["siri"]["2"]
    with pytest.raises(UserError, match="other seeds or points"):
        pool.differences(study_of_one, "siri", "gigpo")
    with pytest.raises(UserError, match="no variant kl"):
        pool.differences(two_seeds(2), "kl", "gigpo")


def test_a_panel_known_by_its_mean_alone_has_an_interval_over_the_seeds():
    means = np.array([[0.1], [0.3]])
    low, high = study.interval(means, lowest=0.0)
    assert (low, high) == (0.0, 1.0)  # 0.2 +- 12.7 * 0.1
    five = study.interval(np.array([[0.1], [0.3], [0.2], [0.2], [0.2]]))
    assert np.diff(five) == pytest.approx(2 * 2.776 * (0.005 / 5) ** 0.5, rel=1e-3)


def test_the_beginning_of_a_study_outlives_its_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    rows = [{"study": "s", "rare": 0.25, "contrast": 0.5}]
    (tmp_path / "results" / "regime.json").write_text(json.dumps(rows))
    assert regime.beginning("s", ["1", "2"]) == (0.25, 0.5)
    with pytest.raises(UserError, match="gone"):
        regime.beginning("t", ["1"])
