"""Prompts, the action in a response, the table of worlds. Each test names the bug it guards."""

import time

import pytest

import envs
from config import UserError
from envs import build_mining_prompt, build_prompt, build_prompts, parse_action
from worlds import Observation, alfworld

LAST_30 = "go to the desk and look at it!"


@pytest.mark.parametrize(
    "text, action, valid",
    [
        ("<think>so</think><action>Go to Desk 1</action>", "go to desk 1", True),
        ("<think>so</think><action> look </action><action>go</action>", "look", True),
        ("<action>look</action>", "look", False),  # no thought
        ("<think>so<action>look</action>", "look", False),  # thought not closed
        ("<think>好</think><action>look</action>", "look", False),  # CJK
        # no action: the last 30 characters
        (f"<think>so</think> I will {LAST_30}", LAST_30, False),
        ("", "", False),
        ("<think></think><action></action>", "", True),
        ("</action><action>", "</action><action>", False),
    ],
)
def test_parse_action(text, action, valid):
    assert parse_action(text) == (action, valid)


@pytest.mark.parametrize("piece", ["<action>", "</action>", "<think>", " ", "<", '"', "\n", "好"])
def test_an_action_is_parsed_in_linear_time(piece):
    start = time.perf_counter()
    parse_action(piece * 300_000)
    parse_action(f"<action>{piece * 300_000}</action")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("world", envs.WORLDS)
def test_every_world_says_what_prompts_parsing_and_evaluation_need(world):
    place = envs.world(world)
    assert place.NAME and place.ROLE and place.EVAL_SPLIT and place.LONGEST_PROMPT > 10_000
    assert parse_action("x" * 99, place.FALLBACK_CHARS) == ("x" * place.FALLBACK_CHARS, False)


def test_an_unknown_world_is_a_clear_error():
    with pytest.raises(UserError, match="--env chess: not a world of this project; choose"):
        envs.make_env("chess", "a game")


OBS = Observation("You see a desk 1.", "put a mug in desk", "pick", ("go to desk 1", "look"))


def test_prompt_fields_and_order():
    history = [("alpha", "a"), ("beta", "b"), ("gamma", "c")]
    prompt = build_prompt(OBS, history, [("it is dark", "use the lamp")])
    order = [
        "put a mug in desk",
        "When it is dark: use the lamp",
        "Steps taken so far: 3",
        "Observation 2: 'beta'",
        "Action 3: 'c'",
        "step 4, you observe: You see a desk 1.",
        "'go to desk 1'\n'look'",
        "<think>",
        "<action>",
    ]
    places = [prompt.index(part) for part in order]
    assert places == sorted(places)
    assert "alpha" not in prompt  # only the last two steps are repeated


def test_skills_are_in_the_prompt_of_the_first_step_too_and_change_nothing_else():
    skill = [("it is dark", "use the lamp")]
    for history in ([], [("o", "a")]):
        plain, skilled = build_prompts(OBS, history, skill)
        assert plain == build_prompt(OBS, history)
        added = [line for line in skilled.split("\n") if line not in plain.split("\n")]
        assert added == ["Experience that may help:", "- When it is dark: use the lamp"]
        assert build_prompts(OBS, history) == (plain, plain)


def test_history_is_as_long_as_asked_and_both_prompts_lose_it_together(monkeypatch):
    history = [("alpha", "a"), ("beta", "b")]
    one, _ = build_prompts(OBS, history, keep=1)
    assert "beta" in one and "alpha" not in one
    skill = [("it is dark", "use the lamp")]
    plain, _ = build_prompts(OBS, history, skill)
    monkeypatch.setattr(alfworld, "LONGEST_PROMPT", len(plain))  # the skilled one is longer
    for prompt in build_prompts(OBS, history, skill):
        assert "beta" not in prompt and "Steps taken so far: 2" in prompt


def test_the_request_for_a_skill_shows_the_episode_and_what_is_known():
    steps = [("You see a desk 1." * 9, "go to desk 1"), ("second\nline", "look")]
    prompt = build_mining_prompt("put a mug on the desk", "pick", steps, ["it is dark"], 17)
    assert "of the kind 'pick'" in prompt and "Task: put a mug on the desk." in prompt
    assert "1. saw: You see a desk 1. did: go to desk 1" in prompt
    assert "2. saw: second did: look" in prompt
    assert "do not repeat them: when it is dark" in prompt
    assert "Known skills" not in build_mining_prompt("t", "pick", steps)
