"""Prompts, the action in a response, the table of worlds. Each test names the bug it guards."""

import shutil
import time
from pathlib import Path

import pytest

import envs
from config import UserError
from envs import build_mining_prompt, build_prompt, build_prompts, parse_action
from worlds import Observation, alfworld, shop

LAST_30 = "go to the desk and look at it!"


@pytest.mark.parametrize(
    "text, action, valid",
    [
        ("<think>so</think><action>Go to Desk 1</action>", "go to desk 1", True),
        ("<think>so</think><action> look </action><action>go</action>", "look", True),
        ("<think>so</think><ACTION>look</Action>", "look", True),
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


def test_the_digest_of_games_knows_their_names_and_contents_and_not_their_folder(games, tmp_path):
    there = Path(shutil.copytree(games, tmp_path / "there"))

    def of(root, chosen=lambda items: items):
        return envs.digest("alfworld", chosen(envs.list_items("alfworld", "train", root)))

    known = of(games)
    assert of(there) == known and len(known) == 64
    assert of(there, lambda items: items[1:]) != known != of(there, lambda items: items[::-1])
    first, second = (Path(p) for p in envs.list_items("alfworld", "train", there)[:2])
    a, b = first.read_bytes(), second.read_bytes()
    for changed in ((b, a), (a[:-1] + b" ", b), (a, b + b" ")):
        first.write_bytes(changed[0])
        second.write_bytes(changed[1])
        assert of(there) != known
    first.write_bytes(a)
    second.write_bytes(b)
    assert of(there) == known
    first.unlink()
    assert of(there) != known


def test_the_digest_of_goals_knows_the_whole_catalogue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop.make_catalogue(tmp_path / "shop", products=20, seed=0)

    def of(folder, rule=""):
        return envs.digest("webshop", envs.list_items("webshop", f"train{rule}", folder))

    known = of("shop")
    there = Path(shutil.copytree("shop", "there"))
    (there / "items_shuffle.json").rename(there / "items_shuffle_1000.json")
    assert of("there") == known and of("shop", ":verl") != known
    for name in ("items_shuffle_1000.json", "items_ins_v2.json"):  # a page is more than its goals
        whole = (there / name).read_text()
        (there / name).write_text(whole + " ")
        assert of("there") != known
        (there / name).write_text(whole)
    assert of("there") == known
    (there / "items_human_ins.json").write_text("{}")
    assert of("there") != known


OBS = Observation("You see a desk 1.", "put a mug in desk", "pick", ("go to desk 1", "look"))


SKILLS = [("it is dark", "use the lamp"), ("it is late", "hurry")]
ACT = (
    "Reason first, inside <think> </think>. Then choose one of the admissible actions and give it "
    "inside <action> </action>."
)


def test_prompts_of_the_household_are_these():
    """Trained policies know this form."""
    first = f"""\
You are an agent in a household, playing the text game ALFWorld.
You observe: You see a desk 1.
Admissible actions: ['go to desk 1'
'look']
{ACT}"""
    assert build_prompt(OBS) == first
    history = [("alpha", "a"), ("beta", "b"), ("gamma", "c")]
    assert (
        build_prompt(OBS, history, SKILLS)
        == f"""\
You are an agent in a household, playing the text game ALFWorld. Your task is to: put a mug in desk.
Experience that may help:
- When it is dark: use the lamp
- When it is late: hurry
Steps taken so far: 3. The latest observations and your actions:
[Observation 2: 'beta', Action 2: 'b']
[Observation 3: 'gamma', Action 3: 'c']
Now at step 4, you observe: You see a desk 1.
Admissible actions: ['go to desk 1'
'look']
{ACT}"""
    )


def test_prompts_of_the_shop_are_these():
    page = "WebShop [SEP] Instruction: [SEP] buy a mug [SEP] Search"
    obs = Observation(page, "buy a mug", "mugs", ("search[<query>]",), "webshop")
    assert (
        build_prompt(obs)
        == f"""\
You are an agent shopping in the online store WebShop. Your task is to: buy a mug.
You observe: 'Search'
Admissible actions: ['search[<query>]']
{ACT}"""
    )
    later = build_prompt(obs, [(page.replace("Search", "Old"), "click[x]"), ("Done", "y")])
    assert "[Observation 1: ''Old'', Action 1: 'click[x]']\n[Observation 2: 'Done'" in later


def test_skills_are_in_the_prompt_of_the_first_step_too_and_change_nothing_else():
    for history in ([], [("o", "a")]):
        plain, skilled = build_prompts(OBS, history, SKILLS)
        assert plain == build_prompt(OBS, history) and skilled != plain
        assert skilled == build_prompt(OBS, history, SKILLS)
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
    known = ["it is dark", "it is late"]
    request = """\
You solved a task of the kind 'pick' in the text game ALFWorld. Extract one reusable skill from it.
Task: put a mug on the desk.
What you saw and did:
1. saw: You see a desk 1. did: go to desk 1
2. saw: second did: look
Known skills, do not repeat them: when it is dark; when it is late
Write a general rule without object numbers, in at most two sentences. Answer with JSON only: \
{"condition": "when it applies", "strategy": "what to do"}"""
    about = ("put a mug on the desk", "pick", steps)
    assert build_mining_prompt(*about, known, 17, "alfworld") == request
    without = "".join(line for line in request.splitlines(True) if not line.startswith("Known"))
    assert build_mining_prompt(*about, (), 17, "alfworld") == without
    shop = build_mining_prompt("t", "mugs", [("a [SEP] t [SEP] b", "c")], (), 9, "webshop")
    assert "of the kind 'mugs' in the online store WebShop." in shop
    assert "1. saw: 'b' did: c\n" in shop
