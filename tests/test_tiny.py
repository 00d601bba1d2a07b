"""The embedded default: demonstrations, tokenizer and the imitation that makes the tiny policy."""

import itertools
import json
import random
import re
import sys
import types

import pytest
import torch
from conftest import ROOT

import envs
from config import UserError
from runtime.policy import SHIPPED
from skills import parse_skill
from tiny import imitate, lessons_shop
from tiny.imitate import Lessons, train_policy
from tiny.lessons_household import (
    APPLIANCE_FOR,
    demonstrate,
    follow,
    games_of,
    kind_of,
    lessons,
    strategy_text,
    usual_places,
)
from tiny.scratch import train_tokenizer
from worlds import alfworld
from worlds.household import make_game
from worlds.shop import make_catalogue


def solved(kind_wanted, plan, count=24):
    """How many of `count` games of one kind a demonstrator with this plan solves."""
    task_type = next(t for t, short in alfworld.TASK_TYPES.items() if short == kind_wanted)
    rng = random.Random(0)
    wins = 0
    for number in range(count):
        folder, data, _ = make_game(task_type, rng, number)
        game = alfworld.parse_game(data, f"{folder}/game.tw-pddl")
        wins += demonstrate(alfworld.AlfWorld(game), plan, rng)[1]
    return wins


def plan(appliance=None, complete=False, search=""):
    return {"appliance": appliance, "complete": complete, "search": search}


@pytest.mark.parametrize(
    "kind, right, wrong",
    [
        ("clean", plan("sinkbasin"), plan("fridge")),
        ("cool", plan("fridge"), plan("microwave")),
        ("look", plan(complete=True), plan()),
        ("pick2", plan(complete=True), plan()),
    ],
)
def test_right_skills_solve_tasks_and_wrong_ones_do_not(kind, right, wrong):
    assert solved(kind, right) > 16 and solved(kind, wrong) < 8


def test_a_skill_overrides_the_habit():
    habit = plan("microwave", True)
    advice = strategy_text("clean", "sinkbasin", search="shelf")
    assert follow([advice], habit, ["shelf", "bed"]) == plan("sinkbasin", False, "shelf")
    second = strategy_text("pick2", complete=True)
    assert follow([second], plan(), [])["complete"]


@pytest.mark.parametrize("teach, count", [(lessons, 600), (lessons_shop.lessons, 400)])
def test_lessons_hold_plain_steps_steps_under_skills_and_parsable_summaries(teach, count):
    pairs = teach(count, seed=3)
    summaries = [answer for _, answer in pairs if answer.startswith("{")]
    with_skills = [prompt for prompt, _ in pairs if "Experience that may help" in prompt]
    assert len(pairs) == count and summaries and 0.25 * count < len(with_skills) < 0.75 * count
    assert all(parse_skill(text) for text in summaries)
    assert all(envs.parse_action(answer)[1] for _, answer in pairs if answer not in summaries)
    assert pairs == teach(count, seed=3) != teach(count, seed=4)


def test_lessons_of_a_data_folder_show_its_training_games_only(games):
    """A lesson from the other split would leak the evaluation."""
    train = envs.list_items("alfworld", "train", games)
    first = {envs.make_env("alfworld", item).reset().text for item in train}
    prompts = [prompt for prompt, _ in lessons(600, seed=3, data=games)]
    shown = [p for p in prompts if "You observe: " in p]
    shown = {p.split("You observe: ")[1].split("\nAdmissible actions")[0] for p in shown}
    assert len(shown) > 6 and shown <= first

    drawn = games_of(games, random.Random(0))
    drawn = [next(drawn) for _ in range(12)]
    assert {game.path for game in drawn} == set(train)
    assert len({game.task_type for game in drawn[:6]}) == 6  # the task types in turns


def test_a_demonstrator_who_knows_solves_the_games_of_a_data_folder(games):
    drawn = games_of(games, random.Random(0))
    usual = usual_places([next(drawn) for _ in range(12)])
    rng = random.Random(0)
    wins = 0
    for game in itertools.islice(drawn, 24):
        right = plan(APPLIANCE_FOR.get(game.goal[0]), complete=True)
        wins += demonstrate(alfworld.AlfWorld(game), right, rng, 50, usual)[1]
    assert wins > 20


def test_receptacles_that_share_a_place_are_searched_and_filled():
    """In real rooms one cannot go to what stands where one is; the demonstrator only looked."""
    rng = random.Random(0)
    wins = 0
    for number in range(24):
        folder, data, _ = make_game("pick_and_place_simple", rng, number)
        data["pddl_problem"] = re.sub(
            r"loc_bar_([1-9]\d*)_bar_\d_bar_\d_bar_60",
            lambda spot: f"loc_bar_{(int(spot[1]) + 1) // 2}_bar_9_bar_9_bar_60",
            data["pddl_problem"],
        )
        game = alfworld.parse_game(data, f"{folder}/game.tw-pddl")
        assert max(len(receptacles) for receptacles in game.at.values()) == 2
        wins += demonstrate(alfworld.AlfWorld(game), plan(), rng, 50, slips=0.0)[1]
    assert wins > 20


def test_the_search_leaves_out_what_never_holds_the_object(games):
    game = alfworld.load_game(envs.list_items("alfworld", "train", games)[0])
    target = game.goal[1].removesuffix("type")
    (place,) = {r for r, things in game.inside.items() for o in things if target in game.name[o]}
    usual = {target: {kind_of(game.name[place])}}
    steps, _ = demonstrate(
        alfworld.AlfWorld(game), plan(complete=True), random.Random(0), 3, usual, slips=0.0
    )
    assert kind_of(steps[0][2].removeprefix("go to ")) in usual[target]


def test_short_tokens_spell_the_same_text():
    texts = [prompt + answer for prompt, answer in lessons(300, seed=3)]
    long, short = train_tokenizer(texts), train_tokenizer(texts, short=True)
    ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (long, short)]
    assert [short.decode(row) for row in ids[1]] == texts
    assert sum(map(len, ids[1])) < 0.8 * sum(map(len, ids[0]))


# --- imitation ------------------------------------------------------------------------------------


def course(out, **changes):
    """A short imitation."""
    small = {"seed": 1, "count": 96, "hidden": 32, "layers": 1, "held_out": 64}
    return Lessons(out=str(out), **small | changes)


def same_weights(folder, *names) -> bool:
    return len({(folder / name / "model.safetensors").read_bytes() for name in names}) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--out: name the folder"),
        ("--out x --world shop", "--world shop: must be alfworld or webshop"),
        ("--out x --difficulties 2", "--world webshop without --data"),
        ("--out x --world webshop --data y --difficulties 2", "--world webshop without --data"),
        ("--out x --world webshop --difficulties 2,9", "--difficulties 2,9: must be 1 or 2 or 3"),
        ("--out x --start y --model z", "not both"),
        ("--out x --modle y", "did you mean --model"),
        ("--out x --count 0", "--count 0: must be at least 1"),
        ("--out x --hidden 20", "--hidden 20: must be a multiple of 8"),
        ("--out x --held_out 0", "--held_out 0: must be at least 1"),
        ("--out x --steps 0", "must be at least 0.25 and at most 1"),
    ],
)
def test_flags_that_do_not_fit_are_a_clear_error(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["imitate.py", *flags.split()])
    with pytest.raises(UserError, match=message):
        imitate.main()


@pytest.mark.slow
def test_a_short_version_of_the_training_command_learns_and_is_reproducible(tmp_path):
    long = train_policy(course(tmp_path / "a", count=400))
    short, again = (train_policy(course(tmp_path / name)) for name in "bc")
    assert long["loss"] < short["loss"] - 0.5 and short == again
    assert same_weights(tmp_path, "b", "c")


def test_fewer_steps_leave_as_many_lessons_and_every_summary():
    """Of 1,200 lessons 60 were summaries: too few for a skill to name the step that mattered."""
    drawn = imitate.draw(Lessons(steps=0.4), 400, seed=3)
    everything = lessons(1000, seed=3)
    wanted = [pair for pair in everything if imitate.is_summary(pair[1])]
    assert [pair for pair in drawn if imitate.is_summary(pair[1])] == wanted
    assert len(set(drawn)) == len(drawn) == 400 and set(drawn) <= set(everything)
    assert imitate.draw(Lessons(), 400, seed=3) == everything[:400]


def test_what_was_learned_is_measured_on_the_evaluation_split(tmp_path, monkeypatch):
    """Of the training goals of a small catalogue a policy knows the words by heart."""
    folder = str(make_catalogue(tmp_path / "shop", products=60, seed=1))
    splits = []
    teach = lessons_shop.lessons
    monkeypatch.setattr(
        lessons_shop, "lessons", lambda *n, **how: splits.append(how["split"]) or teach(*n, **how)
    )
    train_policy(course(tmp_path / "out", world="webshop", data=folder, count=16, held_out=2))
    assert splits == ["train", "test"]


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [False, True])
def test_interrupted_imitation_ends_as_the_unbroken_one(pretrained, tmp_path, monkeypatch):
    """Weights, optimizers and the place in the lessons; a new start would train 3 batches twice."""
    how = {"model": str(ROOT / SHIPPED["tiny-household"])} if pretrained else {}
    how |= {"rows": 2, "count": 12, "held_out": 2}
    train_policy(course(tmp_path / "whole", **how))
    broken = course(tmp_path / "broken", save_minutes=0.0, **how)
    real = imitate.learn
    calls = []

    def learn(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(imitate, "learn", learn)
    with pytest.raises(KeyboardInterrupt):
        train_policy(broken)
    train_policy(broken)
    assert len(calls) == 4 + 3  # 6 batches, the fourth begun twice
    assert same_weights(tmp_path, "whole", "broken")
    assert not (tmp_path / "broken" / "state.pt").exists()

    train_policy(broken)  # finished: nothing more is learned
    assert len(calls) == 7
    with pytest.raises(UserError, match="--count 12, not 13"):
        train_policy(course(tmp_path / "broken", **how | {"count": 13}))


def test_a_pretrained_model_learns_its_responses_alone_with_its_own_tokenizer(policy):
    """A pretrained model needs no lesson in the prompt's words; a tiny one learns copying there."""
    rows = imitate.make_rows(policy.tokenizer, lessons(8, seed=0))
    losses = [imitate.imitation_losses(policy.model, rows, 0, kind) for kind in (False, True)]
    assert losses[0][0].item() == pytest.approx(losses[1][0].item(), rel=1e-5)
    assert losses[0][1] == 0 < losses[1][1]
    assert all(row.response_ids[-1] == policy.tokenizer.eos_token_id for row in rows)
    ids = torch.tensor([rows[0].prompt_ids + rows[0].response_ids])
    with torch.no_grad():
        picked = policy.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    start = len(rows[0].prompt_ids) - 1
    own = imitate.imitation_losses(policy.model, rows[:1], 0, True)
    assert own[0].item() == pytest.approx(-picked[start:].sum().item(), rel=1e-4)
    assert own[1].item() == pytest.approx(-picked[:start].sum().item(), rel=1e-4)


def test_prompts_are_lessons_for_a_tiny_policy_only_and_micro_batches_change_no_gradient(policy):
    rows = imitate.make_rows(policy.tokenizer, lessons(8, seed=0))
    assert imitate.learn(policy.model, rows, 0, Lessons(model="any"))[1] == 0
    gradients = []
    for micro_tokens in (300, 100_000):
        policy.model.zero_grad()
        assert imitate.learn(policy.model, rows, 0, Lessons(micro_tokens=micro_tokens))[1] > 0
        gradients.append(policy.model.lm_head.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_measure_counts_what_is_right_and_well_formed(policy, monkeypatch):
    """It plays as its lessons showed, though it cannot know where the demonstrator looks first."""
    pairs = lessons(60, seed=9)
    result = imitate.measure(policy.model, policy.tokenizer, pairs, Lessons())
    summaries = sum(answer.startswith("{") for _, answer in pairs)
    assert result["summaries"] == summaries and result["steps"] == 60 - summaries
    assert result["valid"] == result["steps"] and result["parsable"] == summaries
    assert 0.4 * result["steps"] < result["exact"] < result["steps"]
    shuffled = [(prompt, "<think></think><action>sing</action>") for prompt, _ in pairs]
    assert imitate.measure(policy.model, policy.tokenizer, shuffled, Lessons())["exact"] == 0
    said = "<action>go north</action>"  # the right action, but without a thought
    monkeypatch.setattr(imitate, "generate", lambda *given, **flags: [([1], [0.0], said)])
    wanted = [("a prompt", f"<think>Go.</think>{said}")]
    result = imitate.measure(policy.model, policy.tokenizer, wanted, Lessons())
    assert result["exact"] == result["valid"] == 0 < result["steps"]


def test_the_learning_rate_rises_then_falls_to_nothing():
    rates = [imitate.rate(k, 1000) for k in range(1000)]
    assert rates[0] == pytest.approx(0.04) and max(rates) == rates[30] == 1 and rates[-1] < 1e-5
    assert rates[:31] == sorted(rates[:31]) and rates[30:] == sorted(rates[30:], reverse=True)


@pytest.mark.parametrize("world", ["alfworld", "webshop"])
def test_a_policy_that_acts_without_thinking_is_taught_the_same_actions(world):
    thinking = imitate.draw(Lessons(world=world), 300, seed=4)
    silent = imitate.draw(Lessons(world=world, thoughts=False), 300, seed=4)
    assert [x for x, _ in silent] == [x for x, _ in thinking]
    summaries = 0
    for (_, thought), (_, act) in zip(thinking, silent, strict=True):
        if imitate.is_summary(thought):
            summaries += 1
            assert act == thought
        else:
            assert act == "<think></think>" + thought.split("</think>")[1]
            assert thought != act
    assert 0 < summaries < 100


def test_a_thought_of_several_lines_goes_as_a_whole(monkeypatch):
    pairs = [("p", "<think>a\nb</think><action>c</action>")]
    teacher = types.SimpleNamespace(lessons=lambda count, seed, **chosen: pairs)
    monkeypatch.setitem(imitate.TEACHERS, "alfworld", teacher)
    silent = imitate.draw(Lessons(thoughts=False), 1, seed=4)
    assert silent == [("p", "<think></think><action>c</action>")]


# --- the shipped policies -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_policy_is_small_and_says_how_it_was_made(name):
    folder = ROOT / SHIPPED[name]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    assert "python -m tiny.imitate" in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
