"""An evaluation is a function of checkpoint, items, temperature, seed and skills."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import call, tiny_config
from hypothesis import given
from hypothesis import strategies as st

import envs
import evaluate
from common import rollout
from config import PHASES, UserError
from evaluate import Evaluation
from runtime.run import Run, load_state
from skills import Skill, SkillBank
from worlds import alfworld


@pytest.fixture(scope="module")
def trained(games, tmp_path_factory):
    """A folder with saves of all phases, at iterations 1, 2, 3, with other weights and skills."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(games, run="t", kl_coef=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, phase in enumerate(PHASES, 1):
            bank = SkillBank(config)
            for kind in alfworld.TASK_TYPES.values():
                bank.skills.append(Skill("it is dark", f"as in {phase}", kind, status="active"))
                bank.skills.append(Skill("it is dark", "untried", kind))
            run = Run(config, phase)
            run.policy.model.lm_head.weight.data += number / 1000
            run.end_iteration(number, True, bank if phase != "warmup" else None, successes=[])
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of that run, in the working folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "t"


class Watched:
    """What an evaluation loads and plays, while it really does."""

    def __init__(self, monkeypatch):
        self.loaded = []
        self.waves = []  # items, seed, temperature and episodes of each
        self.stop_at = None

        def load(path, config, device, **options):
            self.loaded.append(Path(path))
            assert options == {"trainable": False}
            return load_policy(path, config, device, **options)

        def play(policy, config, groups, seed, **options):
            if len(self.waves) == self.stop_at:
                raise KeyboardInterrupt
            assert [len(group) for group in groups] == [1] * len(groups)  # each item once
            episodes = rollout(policy, config, groups, seed, **options)
            items = [group[0].item for group in groups]
            self.waves.append((items, seed, options["temperature"], episodes))
            return episodes

        load_policy = evaluate.load_policy
        monkeypatch.setattr(evaluate, "load_policy", load)
        monkeypatch.setattr(evaluate, "rollout", play)
        monkeypatch.setattr(evaluate, "WAVE", 2)

    @property
    def episodes(self):
        return [e for *_, episodes in self.waves for e in episodes]

    def evaluate(self, flags) -> dict:
        """A fresh evaluation -> its record."""
        self.loaded, self.waves, self.stop_at = [], [], None
        before = set(Path("runs/t").glob("*.json"))
        call(evaluate, f"--run t --max_steps 2 {flags}")
        (path,) = set(Path("runs/t").glob("*.json")) - before
        return {"path": path} | json.loads(path.read_text())


@pytest.fixture
def watched(run, monkeypatch):
    return Watched(monkeypatch)


# --- what is evaluated ----------------------------------------------------------------------------


def test_the_checkpoint_that_is_named_is_the_one_that_is_loaded(run, watched, games):
    for number, phase in enumerate(("warmup", "mine", "distill"), 1):
        record = watched.evaluate(f"--checkpoint {phase} --eval_items 1")
        assert watched.loaded == [Path("runs/t", phase, "model")]
        assert record["checkpoint"] == f"runs/t/{phase}/model" and record["iteration"] == number
        assert load_state(run / phase)["iteration"] == number
    assert watched.evaluate("--eval_items 2")["checkpoint"] == "runs/t/distill/model"
    record = watched.evaluate("--checkpoint init --eval_items 1")
    assert record["checkpoint"] == "tiny-household" and record["iteration"] is None
    shutil.copytree(run / "mine" / "model", run.parent / "a" / "b")
    record = watched.evaluate("--checkpoint runs/a/b/ --eval_items 1")
    assert watched.loaded == [Path("runs/a/b")] and record["iteration"] is None
    assert record["path"].name == "eval-valid_seen-runs-a-b-T0.4-s0-n1.json"


def test_a_checkpoint_that_is_not_there_names_the_command_that_makes_it(run):
    for folder in run.glob("mine*"):
        shutil.rmtree(folder)
    remedy = "runs/t/mine/model is missing: run `python mine.py --run t`, or use --checkpoint init"
    with pytest.raises(UserError, match=remedy):
        call(evaluate, "--run t --checkpoint mine")
    with pytest.raises(UserError, match="skills.jsonl: no such skill file"):
        call(evaluate, "--run t --checkpoint warmup --skills")


def test_skills_are_the_active_ones_of_mining_but_for_the_result_of_distillation(watched):
    """And they are not counted as tried: the bank is as training left it."""
    before = {
        phase: Path(f"runs/t/{phase}/skills.jsonl").read_text() for phase in ("mine", "distill")
    }
    for checkpoint, phase in (("mine", "mine"), ("warmup", "mine"), ("distill", "distill")):
        record = watched.evaluate(f"--checkpoint {checkpoint} --skills --eval_items 3")
        assert record["skills"] is True and "-skills-" in record["path"].name
        for episode in watched.episodes:
            assert episode.shown == [("it is dark", f"as in {phase}")]
            assert all(step.plain_ids != step.prompt_ids for step in episode.steps)
    for phase, text in before.items():
        assert Path(f"runs/t/{phase}/skills.jsonl").read_text() == text
    record = watched.evaluate("--skills --show neutral --eval_items 3")  # beside that with skills
    assert "-distill-neutral-T" in record["path"].name
    record = watched.evaluate("--eval_items 3")
    assert record["skills"] is False and "skills" not in record["path"].name
    assert all(step.plain_ids == step.prompt_ids for e in watched.episodes for step in e.steps)


def test_seed_temperature_and_split_are_those_of_the_command_line(watched, games, capsys):
    """--eval_seed and --eval_temperature were once ignored without a test that noticed."""
    record = watched.evaluate("--eval_seed 7 --eval_temperature 0.9 --eval_split train")
    items = envs.list_items("alfworld", "train", games)
    assert [(wave, seed, t) for wave, seed, t, _ in watched.waves] == [
        (items[start : start + 2], 7 + start, 0.9) for start in range(0, 12, 2)
    ]
    about = {"seed": 7, "temperature": 0.9, "split": "train", "skills": False}
    assert about.items() <= record.items() and list(record["items"]) == items
    assert record["path"].name == "eval-train-distill-T0.9-s7.json"
    said = capsys.readouterr().out
    first = f"distill, plain prompt: 12 items of train ({record['digest']}), T=0.9, seed 7\n"
    assert first + evaluate.table(record["results"]) in said
    assert said.endswith(f"written to {record['path']}\n")
    record = watched.evaluate("--eval_items 1")
    assert (record["seed"], record["temperature"], record["split"]) == (0, 0.4, "valid_seen")
    assert watched.waves[0][0] == envs.list_items("alfworld", "valid_seen", games)[:1]


def test_webshop_is_evaluated_on_the_split_of_the_same_rule(watched, monkeypatch):
    seen = []

    def stop(config, split, count):
        seen.append(split)
        raise UserError("enough")

    monkeypatch.setattr(evaluate, "choose_items", stop)
    for flags in ("", "--split train:human", "--split train:verl", "--eval_split test:human"):
        with pytest.raises(UserError, match="enough"):
            call(evaluate, f"--preset tiny --checkpoint init {flags}")
    assert seen == ["test", "test:human", "test:verl", "test:human"]


def test_the_same_evaluation_samples_the_same_and_another_seed_other_tokens(watched):
    def sampled(flags):
        watched.evaluate(f"--eval_items 4 {flags}")["path"].unlink()
        return [step.response_ids for e in watched.episodes for step in e.steps]

    base = sampled("--eval_temperature 1 --eval_seed 1")
    assert base == sampled("--eval_temperature 1 --eval_seed 1 --generation_rows 2")
    assert base != sampled("--eval_temperature 1 --eval_seed 22")
    greedy = sampled("--eval_temperature 0")
    assert greedy == sampled("--eval_temperature 0 --eval_seed 3") and greedy != base


# --- the panel ------------------------------------------------------------------------------------


@given(total=st.integers(1, 200), count=st.integers(0, 250))
def test_the_items_are_spread_over_the_split_each_once(total, count):
    """One of each equal part, in the split's order: a split is sorted by task type."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "list_items", lambda config, split: [f"i{k}" for k in range(total)])
        config = tiny_config("nowhere", split="same")
        chosen = [int(item[1:]) for item in evaluate.choose_items(config, "same", count)]
    n = min(count or total, total)
    assert len(chosen) == n
    for part, item in enumerate(chosen):
        assert part * total / n - 1 < item <= part * total / n


def test_items_that_were_trained_on_are_refused(config, monkeypatch, capsys):
    config.split = "train"
    items = evaluate.choose_items(config, "valid_seen", 0)
    assert items == envs.list_items("alfworld", "valid_seen", config.data)
    assert evaluate.choose_items(config, "train", 0)  # on purpose: what was learned of them
    game = alfworld.identity(items[5], "valid_seen")
    trained = envs.list_items("alfworld", "train", config.data)
    monkeypatch.setattr(
        alfworld, "identity", lambda item, split: game if item in trained else (item, split)
    )
    assert evaluate.choose_items(config, "valid_seen", 3)
    monkeypatch.setattr(
        alfworld, "identity", lambda item, split: game if item in [*trained, items[5]] else item
    )
    with pytest.raises(UserError, match="1 items are in train and valid_seen both"):
        evaluate.choose_items(config, "valid_seen", 3)
    config.split = "elsewhere"
    assert evaluate.choose_items(config, "valid_seen", 0) == items
    said = capsys.readouterr().out
    assert said.startswith("elsewhere and valid_seen were not checked for common items: ")


def test_what_is_in_the_items_is_part_of_the_panel(watched, games):
    """It went on with the waves of other content, and said that both were the same panel."""
    shutil.copytree(games, "data")
    (item,) = evaluate.choose_items(tiny_config("data"), "valid_seen", 1)
    first = watched.evaluate("--data data --eval_items 4")
    first.pop("path").unlink()
    watched.waves, watched.stop_at = [], 1
    with pytest.raises(KeyboardInterrupt):
        call(evaluate, "--run t --max_steps 2 --data data --eval_items 4")
    Path(item).write_text(Path(item).read_text() + " ")
    second = watched.evaluate("--data data --eval_items 4")
    assert len(watched.waves) == 2 and second["digest"] != first["digest"]
    assert len(second["digest"]) == 12 and second["items"].keys() == first["items"].keys()


# --- interrupted evaluations ----------------------------------------------------------------------


OUTCOMES = [{"item": f"i{k}", "task_type": "pick", "success": k > 2} for k in range(6)]


@given(cut=st.integers(0, 400), torn=st.sampled_from(["", '{"item', "null"]))
def test_whole_waves_are_kept_wherever_it_was_interrupted(tmp_path_factory, cut, torn):
    done = tmp_path_factory.mktemp("evaluation") / "waves"
    lines = [json.dumps(outcome) + "\n" for outcome in OUTCOMES]
    left = "".join(lines)[:cut] + torn
    done.write_text(left)
    whole = left.count("\n") // 2 * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "WAVE", 2)
        assert evaluate.read_outcomes(done, [o["item"] for o in OUTCOMES]) == OUTCOMES[:whole]
    assert done.read_text() == "".join(lines[:whole])  # the next wave begins a line


@pytest.mark.parametrize(
    "wrong",
    [
        lambda lines: lines[::-1],  # other items, or another order
        lambda lines: ["[]\n"] * 4,
        lambda lines: ["{}\n"] * 4,
        lambda lines: ["no JSON\n"] * 4,
    ],
)
def test_waves_that_are_not_of_these_items_are_played_again(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(evaluate, "WAVE", 2)
    items = [outcome["item"] for outcome in OUTCOMES]
    done = tmp_path / "waves"
    done.write_text("".join(wrong([json.dumps(outcome) + "\n" for outcome in OUTCOMES])))
    assert evaluate.read_outcomes(done, items) == [] and done.read_text() == ""
    assert evaluate.read_outcomes(tmp_path / "none", items) == []
    assert evaluate.read_outcomes(None, items) == []


def test_it_goes_on_with_its_own_waves_and_with_no_others(watched):
    def interrupt(flags):
        watched.waves, watched.stop_at = [], 1
        with pytest.raises(KeyboardInterrupt):
            call(evaluate, f"--run t --max_steps 2 --eval_items 4 {flags}")

    straight = watched.evaluate("--eval_items 4")
    straight.pop("path").unlink()
    interrupt("")
    again = watched.evaluate("--eval_items 4")
    assert again.pop("path") and again == straight and len(watched.waves) == 1  # one was kept
    assert not list(Path("runs/t").glob("*.waves"))
    interrupt("--out runs/t/x.json")
    for other in ("--eval_temperature 0.5", "--checkpoint mine", "--skills"):
        interrupt(f"--out runs/t/x.json {other}")
        assert len(watched.waves) == 1


def test_an_evaluation_is_told_apart_by_everything_that_it_depends_on(run, config):
    choice = Evaluation()
    bank = SkillBank(config, [Skill("c", "s", "pick")])

    def of(config=config, choice=choice, panel="a", path="runs/t/mine/model", bank=None):
        return evaluate.identity_of(config, choice, panel, path, bank)

    base = of()
    assert of() == base and len(base) == 12
    for same in ({"run": "other"}, {"device": "cuda"}):
        assert of(config=dataclasses.replace(config, **same)) == base
    found = [base, of(panel="b"), of(bank=bank)]
    found += [of(path="runs/t/distill/model"), of(path="hub/name"), of(path="other/name")]
    found += [of(config=dataclasses.replace(config, max_steps=9))]
    for flags in ({"eval_temperature": 0.5}, {"eval_seed": 1}):
        found.append(of(choice=dataclasses.replace(choice, **flags)))
    bank.skills[0].utility = 0.5
    found.append(of(bank=bank))
    model = Path("plain")  # a folder that is no save
    shutil.copytree("runs/t/mine/model", model)
    found.append(of(path=str(model)))
    (model / "generation_config.json").write_text("{}")
    found.append(of(path=str(model)))
    assert len(set(found)) == len(found)


def test_an_item_that_cannot_be_played_is_not_left_out(policy, config):
    items = envs.list_items("alfworld", "train", config.data)[:3]
    with pytest.raises(UserError, match="some items cannot be played"):
        evaluate.evaluate(policy, config, [*items, str(Path(items[0]).parent)], 0.4, 0)


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    "solved, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_those_of_the_published_table(solved, n, low, high):
    assert evaluate.wilson(solved, n) == pytest.approx((low, high), abs=6e-5)
    assert evaluate.wilson(n - solved, n) == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_no_interval_leaves_what_a_rate_can_be():
    assert evaluate.wilson(0, 0) == (0.0, 1.0)
    assert evaluate.wilson(0, 3)[0] == 0.0 and evaluate.wilson(3, 3)[1] == 1.0


def test_an_outcome_is_what_the_episode_did(policy, config, monkeypatch):
    items = envs.list_items("alfworld", "train", config.data)[:3]
    kinds = [alfworld.open_item(item).reset().task_type for item in items]
    played = []

    def play(*args, **options):
        first, second, third = rollout(*args, **options)
        second.steps.pop()
        third.success, third.score = True, 0.25
        played.extend((first, second, third))
        return [first, second, third]

    monkeypatch.setattr(evaluate, "rollout", play)
    bank = SkillBank(config, [Skill("it is dark", "use a lamp", kinds[0], status="active")])
    outcomes = evaluate.evaluate(policy, config, items, 0.4, 0, bank)
    assert any(s.plain_ids != s.prompt_ids for e in played for s in e.steps)  # a skill was shown
    tokens = [outcome.pop("tokens") for outcome in outcomes]
    found = [tuple(outcome.values()) for outcome in outcomes]
    did = [(False, 0.0, 4), (False, 0.0, 3), (True, 0.25, 4)]
    assert found == [
        (item, kind, *values) for item, kind, values in zip(items, kinds, did, strict=True)
    ]
    assert tokens == [
        sum(len(step.prompt_ids + step.response_ids) for step in episode.steps)
        for episode in played
    ]


def test_the_table_counts_each_episode_in_its_type_and_in_all():
    outcomes = [
        {"task_type": "ba"[n % 2], "success": n % 4 == 0, "score": n / 8, "steps": n + 0.5}
        | {"tokens": 7 * n}
        for n in range(8)
    ]
    results = evaluate.summarize(outcomes)
    assert list(results) == ["a", "b", "all"]
    low, high = evaluate.wilson(2, 4)
    mean = {
        "n": 4,
        "solved": 2,
        "success": 0.5,
        "low": low,
        "high": high,
        "score": 0.375,
        "steps": 3.5,
        "tokens": 21,
    }
    assert results["b"] == mean
    assert results["a"]["solved"] == 0 and results["all"]["n"] == 8
    assert (
        evaluate.table(results)
        == """\
task type       solved  success     95% interval  score  steps  tokens
a                  0/4    0.000   0.000 to 0.490  0.500    4.5      28
b                  2/4    0.500   0.150 to 0.850  0.375    3.5      21
all                2/8    0.250   0.071 to 0.591  0.438    4.0      24"""
    )
