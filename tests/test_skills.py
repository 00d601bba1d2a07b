"""The life of a skill, retrieval, what the bank takes in, Delta_g. Names tell the bug guarded."""

import json
import math
import time
from dataclasses import asdict, replace

import pytest

import common
from common import Episode, Step
from config import Config, UserError
from skills import Skill, SkillBank, group_deltas, parse_skill, plain_successes
from tests.faults import hostile
from worlds import alfworld


def bank_of(*skills, **flags):
    bank = SkillBank(Config(**flags))
    bank.skills = list(skills)
    return bank


# --- life -----------------------------------------------------------------------------------------


def test_skill_life_cycle():
    good, bad, flat = (Skill("c", f"s{i}", "pick") for i in range(3))
    bank = bank_of(good, bad, flat)
    for _ in range(3):
        bank.update(good, 0.5)
    assert good.status == "candidate"  # n_eval = 4 evaluations come first
    bank.update(good, 0.5)
    assert good.status == "active" and good.utility == pytest.approx(0.5 * (1 - 0.7**4))
    for _ in range(4):
        bank.update(bad, -0.25)
    assert bad.status == "candidate"  # below zero once
    bank.update(bad, -0.25)
    assert bad.status == "retired"  # twice running
    for _ in range(9):
        bank.update(flat, 0.0)
    assert flat.status == "candidate"
    for _ in range(20):
        bank.update(good, -0.5)
    assert good.status == "retired"  # an active skill can fall, and a retired one never returns
    bank.update(good, 1.0)
    assert good.status == "retired" and len(good.deltas) == 25
    assert bank.retrieve("task", "pick") == [flat]


def test_one_evaluation_is_the_moving_average_of_eq_9():
    skill = Skill("c", "s", "pick", utility=0.2)
    bank_of(skill, ema=0.25).update(skill, 0.6)
    assert skill.utility == pytest.approx(0.75 * 0.2 + 0.25 * 0.6)
    assert skill.n == 1 and skill.deltas == [0.6]


def test_a_candidate_needs_more_than_the_threshold():
    at, above = Skill("c", "at", "pick"), Skill("c", "above", "pick")
    bank = bank_of(at, above, ema=1.0, n_eval=1, active_above=0.25)
    bank.update(at, 0.25)
    bank.update(above, 0.375)
    assert (at.status, above.status) == ("candidate", "active")


def test_one_good_evaluation_between_two_bad_ones_saves_a_skill():
    skill = Skill("c", "s", "pick", status="active")
    bank = bank_of(skill, ema=1.0, n_eval=1)
    for delta in (-0.5, 0.5, -0.5):
        bank.update(skill, delta)
    assert skill.status == "active" and skill.below == 1
    bank.update(skill, -0.5)
    assert skill.status == "retired"


def test_a_skill_is_not_retired_before_n_eval_evaluations():
    skill = Skill("c", "s", "pick")
    bank = bank_of(skill, ema=1.0, n_eval=4)
    for _ in range(4):
        bank.update(skill, -1.0)
    assert skill.status == "candidate"  # the fourth is the first that counts
    bank.update(skill, -1.0)
    assert skill.status == "retired"


def test_every_skill_of_a_group_is_credited_once_with_that_groups_delta():
    one, two, other = (Skill("c", f"s{i}", "pick") for i in range(3))
    bank = bank_of(one, two, other, ema=1.0)
    episodes = [Episode("i", "g", (one, two)), Episode("i", "g", (one, two)), Episode("i", "g")]
    episodes += [Episode("i", "h", (other,)), Episode("i", "h")]
    bank.evaluate(episodes, {"g": 0.5, "h": -0.25})
    assert [s.deltas for s in bank.skills] == [[0.5], [0.5], [-0.25]]


def test_without_validation_a_skill_is_active_at_once_and_stays(tmp_path):
    bank = bank_of(validate=False, ema=1.0, n_eval=1)
    bank.add("it is dark", "use the lamp", "look")
    (skill,) = bank.skills
    assert skill.status == "active"
    for _ in range(5):
        bank.update(skill, -1.0)
    assert skill.status == "active" and skill.utility == -1.0


def test_given_skills_are_active_and_carry_no_record(tmp_path):
    old = bank_of(Skill("c", "s", "look", utility=-0.5, status="retired", n=9))
    old.save(tmp_path / "skills.jsonl")
    (skill,) = SkillBank.given(Config(given_skills=str(tmp_path / "skills.jsonl"))).skills
    assert (skill.condition, skill.strategy, skill.bucket) == ("c", "s", "look")
    assert (skill.status, skill.n, skill.utility) == ("active", 0, 0.0)
    assert SkillBank.given(Config()).skills == []


# --- Delta_g and the stored successes -------------------------------------------------------------


def outcome(group, skills, success):
    steps = [Step("saw", [1], [2], "", [3], [0.0], "look", True, 0.0)]
    return Episode("i", group, skills, "t", "pick", steps, success)


def test_delta_is_the_difference_of_the_halves_and_needs_both():
    skill = (Skill("c", "s", "pick"),)
    episodes = [outcome("g", skill, True), outcome("g", skill, True), outcome("g", (), True)]
    episodes += [outcome("g", (), False), outcome("h", (), True), outcome("h", (), True)]
    assert group_deltas(episodes) == {"g": 0.5}
    worse = [outcome("g", skill, False), outcome("g", (), True), outcome("h", skill, True)]
    assert group_deltas(worse) == {"g": -1.0}  # harm is negative; "h" has no plain half


def test_mining_learns_from_plain_successes_only():
    """What the skill arm solved says nothing new: its skill is known already."""
    skill = (Skill("c", "s", "pick"),)
    episodes = [outcome("a", skill, True), outcome("b", (), True), outcome("c", (), False)]
    (stored,) = plain_successes(episodes, 7)
    assert stored == {"task": "t", "task_type": "pick", "iteration": 7, "steps": [["saw", "look"]]}


# --- retrieval ------------------------------------------------------------------------------------


def test_retrieval_stays_in_the_bucket_with_one_candidate_at_most():
    bank = bank_of(
        Skill("a", "1", "heat"), Skill("b", "2", "heat"), Skill("c", "3", "cool", status="active")
    )
    bank.skills += [Skill(f"d{i}", f"{i}", "heat", status="active") for i in range(4)]
    bank.config.candidate_alone = False
    found = bank.retrieve("heat some egg", "heat")
    assert len(found) == 3 and sum(s.status == "candidate" for s in found) == 1
    assert {s.bucket for s in found} == {"heat"}
    again = bank.retrieve("heat some egg", "heat")
    assert found[0] is not again[0]  # the other candidate gets its turn
    only = bank.retrieve("heat some egg", "heat", statuses=("active",))
    assert len(only) == 3 and all(s.status == "active" for s in only)


def test_a_candidate_is_alone_in_the_prompt_so_that_delta_is_its_own():
    candidate = Skill("a", "1", "heat")
    active = [Skill(f"d{i}", f"{i}", "heat", status="active", utility=0.5) for i in range(4)]
    bank = bank_of(candidate, *active, n_eval=4)
    for _ in range(4):
        assert bank.retrieve("heat some egg", "heat") == [candidate]
    turns = []
    for _ in range(20):  # then both kinds get their turns, never together
        found = bank.retrieve("heat some egg", "heat")
        assert found == [candidate] or all(s.status == "active" for s in found)
        assert len(found) <= 3
        turns.append(found == [candidate])
    assert any(turns) and not all(turns)
    candidate.retrieved = 9
    active[0].retrieved = 10
    active[0].utility = 0.9  # the best of the active ones is the measure, and no other
    assert bank.retrieve("heat some egg", "heat") == [candidate]
    assert bank.retrieve("heat some egg", "heat")[0] is active[0]


def test_retired_skills_and_those_of_other_task_types_never_return():
    bank = bank_of(
        Skill("a", "1", "heat", status="retired"), Skill("b", "2", "cool", status="active")
    )
    assert bank.retrieve("heat some egg", "heat") == []


def test_the_skill_that_fits_the_task_and_the_more_useful_one_come_first():
    lamp = Skill("a lamp is near", "1", "look", status="active")
    shelf = Skill("a shelf is near", "2", "look", status="active")
    bank = bank_of(lamp, shelf)
    assert bank.retrieve("find the shelf", "look", k=1) == [shelf]
    lamp.utility = 0.9
    assert bank.retrieve("find the shelf", "look", k=1) == [lamp]
    assert bank.retrieve("find the shelf", "look", k=2) == [lamp, shelf]


def test_a_skills_score_is_match_utility_and_bonus_of_its_bucket():
    """0.5 of the lexical match, u, and 0.1 of the bonus for the little-tried."""
    skill = Skill("a", "1", "look", status="active", utility=0.3, retrieved=3)
    other = Skill("a", "2", "look", status="active", retrieved=4)
    bank = bank_of(skill, other, Skill("a", "3", "pick", retrieved=900))
    assert bank.value(skill) == pytest.approx(0.3 + 0.1 * (math.log(8) / 4) ** 0.5)
    fits = Skill("find the shelf", "1", "look", status="active")
    useful = Skill("x", "2", "look", status="active", utility=0.4)
    bank = bank_of(fits, useful)
    assert bank.retrieve("find the shelf", "look", k=1, training=False) == [fits]  # 0.5 > 0.4
    useful.utility = 0.55
    assert bank.retrieve("find the shelf", "look", k=1, training=False) == [useful]


def test_the_little_tried_get_a_bonus():
    tried, new = (Skill("a", str(i), "look", status="active") for i in range(2))
    tried.retrieved = 50
    bank = bank_of(tried, new)
    assert bank.value(new) > bank.value(tried)
    assert bank.retrieve("task", "look", k=1) == [new]


def test_only_retrieval_for_training_counts_as_a_try():
    skill = Skill("a", "1", "look", status="active")
    bank = bank_of(skill)
    bank.retrieve("task", "look", training=False)
    assert skill.retrieved == 0
    bank.retrieve("task", "look")
    assert skill.retrieved == 1


# --- the bank -------------------------------------------------------------------------------------


def test_bank_refuses_instances_essays_and_repetitions():
    bank = bank_of()

    def add(condition, strategy):
        return bank.add(condition, strategy, "clean")

    first = "take it to the sinkbasin and clean it"
    assert add("the task asks for a clean object", first) == "added"
    again = "Take it to the sinkbasin, and clean it"
    assert add("an object must be clean", again) == "duplicate"
    assert add("an object must be clean", "take it to the fridge and cool it") == "added"
    assert bank.add("an object must be clean", first, "cool") == "added"  # another task type
    assert add("you need a mug", "open drawer 3") == "instance"
    assert add("you shop", "buy B09ABCDEF1") == "instance"
    assert add("you need a mug", "word " * 81) == "words"
    assert [s.status for s in bank.skills] == ["candidate"] * 3


@pytest.mark.parametrize("sign", ["\ud800", "\x1b[31m", "\0", "\n", "\t", "\x85", "\u202e"])
def test_bank_refuses_what_ends_a_run_or_paints_the_terminal(sign):
    """Half a character makes the tokenizer raise, in every later run from the same seed."""
    bank = bank_of()
    for texts in ((f"it is {sign}dark", "go"), ("it is dark", f"go{sign}"), ("dark", "go", sign)):
        assert bank.add(*texts, *["pick"][len(texts) - 2 :]) == "unprintable"
    assert bank.table().count("\n") == 0
    assert bank.add("c'est la fin, 好", "é ß 한", "pick") == "added"


def test_bank_refuses_a_word_of_thousands_of_letters_but_no_prose():
    bank = bank_of()
    assert bank.add("it is dark", "a" * 5000, "pick") == "characters"
    long_words = "carefully examine containers " * 25  # 75 words of nine letters: no prose
    assert bank.add("it is dark", long_words, "pick") == "characters"
    prose = "take the hot object to the receptacle that the task names " * 7  # 77 words
    assert bank.add("it is dark", prose.strip(), "pick") == "added"


def test_a_retired_text_does_not_come_back_and_takes_no_room():
    gone = [Skill("c", f"{i}", "pick", status="retired", utility=9) for i in range(30)]
    gone[0].strategy = "take the object to the fridge"
    live = Skill("c", "open every drawer", "pick", utility=-0.5)
    bank = bank_of(*gone, live)
    assert bank.add("it is hot", "take the object to the fridge", "pick") == "duplicate"
    assert bank.add("it is hot", "look under the bed", "pick") == "added"
    assert live.status == "candidate"  # of 20 places two are taken


def test_a_full_bucket_retires_its_least_valued_skill():
    bank = bank_of(*(Skill("c", str(i), "pick", utility=i) for i in range(SkillBank.PER_BUCKET)))
    assert bank.add("a condition", "a strategy unlike the others", "pick") == "added"
    assert [s.utility for s in bank.skills if s.status == "retired"] == [0]


NO_SKILL = [
    "",
    "no json",
    "[1]",
    '"x"',
    '{"condition": "a"}',
    '{"condition": 1, "strategy": 2}',
    "{",
    '{"condition": "", "strategy": "x"}',
    'Sure! {"condition": "a", "strategy": "b"}',
    # written by SmolLM2-135M-Instruct before its lessons
    '{"condition": "when it applies", "strategy": "what to do"}',
    '{"condition": "When it applies", "strategy": "open the fridge"}',  # half of it
    '{"condition": "it is hot", "strategy": "What to do."}',
    '"When it applies, a strategy of using a microwave to heat the apple 1 with a microwave."',
    '{\n  "packaging": "marines*punantrıcbatı"\n}',
    '{\n  "context": ,"story": "/dream/car/pleantowards/made/a place to eat"\n}',
    '{\n  "type": "task",\n  "description": "pick2",\n  "action": "pick2",\n  "actionId": "12345",',
    '"When it applies: when it applies: when it applies: when it applies: when it applies: when',
    '["fruit 1", "pillow 1", "vagrant 2"]',
]


@pytest.mark.parametrize("text", NO_SKILL)
def test_a_summary_that_is_no_skill_is_none_and_never_crashes(text):
    assert parse_skill(text) is None


def test_a_summary_is_parsed():
    text = '{"condition": "When it is hot", "strategy": "cool it."}'
    assert parse_skill(text) == ("it is hot", "cool it")
    for opening in ("```json\n", "```\n", "```json", "```"):
        assert parse_skill(opening + '{"condition": "c", "strategy": "s"}\n```') == ("c", "s")


def test_a_summary_is_parsed_in_linear_time():
    """Blanks before a fence cost their number squared: two seconds at 32,000."""
    start = time.perf_counter()
    assert parse_skill("{" + " " * 60_000 + "x") is None
    assert time.perf_counter() - start < 1


def test_hostile_strings_raise_nothing_and_take_no_second():
    result = hostile.run(300, seed=1, longest=10_000)
    assert result["strings"] > 400 and not result["crashes"]
    assert result["slowest"][0] < hostile.SLOW, result["slowest"]


def test_bank_survives_its_file(config, tmp_path):
    bank = SkillBank(config)
    bank.add("c", "s", "pick", iteration=3)
    bank.update(bank.skills[0], 0.5)
    bank.save(tmp_path / "skills.jsonl")
    loaded = SkillBank.load(tmp_path, config)
    assert vars(loaded.skills[0]) == vars(bank.skills[0])
    with pytest.raises(UserError, match="mine.py"):
        SkillBank.load(tmp_path / "nowhere", config)


BROKEN_LINES = {
    "no JSON": "{",
    "no object": "[1]",
    "a missing field": {"strategy": None},
    "an unknown field": {"x": 1},
    "a text that is a number": {"condition": 5},
    "an empty text": {"strategy": " "},
    "a control character": {"condition": "it is \x1b[31m"},
    "half a character": {"bucket": "\ud800"},
    "a number that is a text": {"utility": "x"},
    "not a number": {"utility": float("nan")},
    "an endless number": {"utility": 10**400},
    "a truth value": {"n": True},
    "a negative count": {"n": -1},
    "no list": {"deltas": 5},
    "a list of texts": {"deltas": ["x"]},
    "an unknown status": {"status": "lost"},
}


@pytest.mark.parametrize("name", BROKEN_LINES)
@pytest.mark.parametrize("given", [False, True])
def test_a_broken_line_of_a_skill_file_is_named_by_file_and_number(name, given, tmp_path):
    """A hand-written or damaged file ended in a traceback, or later in the table."""
    whole = asdict(Skill("c", "s", "pick"))
    line = BROKEN_LINES[name]
    if isinstance(line, dict):
        line = json.dumps({k: v for k, v in (whole | line).items() if v is not None})
    path = tmp_path / "skills.jsonl"
    path.write_text(json.dumps(whole) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match="skills.jsonl, line 3: no skill") as error:
        if given:
            SkillBank.given(Config(given_skills=str(path)))
        else:
            SkillBank.load(tmp_path, Config())
    assert str(error.value).isprintable()


def test_a_given_skill_needs_three_fields_and_a_saved_one_all(tmp_path):
    path = tmp_path / "skills.jsonl"
    path.write_text('{"condition": "c", "strategy": "s", "bucket": "pick"}\n')
    assert len(SkillBank.given(Config(given_skills=str(path))).skills) == 1
    with pytest.raises(UserError, match="missing fields .*'utility'"):
        SkillBank.load(tmp_path, Config())
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not readable as text"):
        SkillBank.load(tmp_path, Config())
    with pytest.raises(UserError, match="no such file"):
        SkillBank.given(Config(given_skills=str(tmp_path / "nothing")))


def test_counts_and_the_table_tell_the_statuses_apart():
    bank = bank_of(
        Skill("c", "gone", "pick", status="retired"), Skill("c", "new", "pick", utility=0.25)
    )
    assert bank.count() == {"candidate": 1, "active": 0, "retired": 1}
    assert bank.summary() == "1 candidate 0 active 1 retired"
    lines = bank.table().split("\n")
    assert "new" in lines[1] and "+0.25" in lines[1] and "gone" in lines[2]


# --- retrieval in a phase -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "share, skilled", [(0, 0), (0.01, 1), (0.25, 1), (0.5, 2), (0.9, 3), (1, 4)]
)
def test_skill_share_is_the_share_of_a_group_that_carries_skills(share, skilled, config, games):
    """A small share is one member: none would mine skills and never try them. A large one leaves a
    plain member, or no skill ever had a Delta_g.
    """
    item = common.envs.list_items("alfworld", "train", games)[0]
    settings = replace(config, skill_share=share, group_size=4)
    bank = bank_of(Skill("b", "2", alfworld.task_type_of(item), status="active"))
    (group,) = common.plan_groups([item], settings, bank=bank, statuses=("active",))
    assert [bool(e.skills) for e in group] == [True] * skilled + [False] * (4 - skilled)


def test_a_skill_is_chosen_for_the_task_and_not_for_its_type(config, games):
    item = common.envs.list_items("alfworld", "train", games)[0]
    task = common.envs.make_env("alfworld", item).reset().task
    kind = alfworld.task_type_of(item)
    fits = Skill(task, "1", kind, status="active")
    typical = Skill(kind, "2", kind, status="active", utility=0.1)
    config.top_k = 1
    bank = bank_of(typical, fits)
    (group,) = common.plan_groups([item], config, bank=bank, statuses=("active",))
    assert group[0].skills == (fits,)


def test_a_phase_gets_the_skills_of_the_statuses_it_names(config, games):
    items = common.envs.list_items("alfworld", "train", games)
    item = next(i for i in items if "pick_and_place" in i)
    candidate = Skill("a", "1", "pick")
    active = Skill("b", "2", "pick", status="active")
    bank = bank_of(candidate, active)
    options = {"members": 4, "skilled": 2, "bank": bank}
    (group,) = common.plan_groups([item], config, statuses=("active",), **options)
    assert [e.skills for e in group] == [(active,), (active,), (), ()]
    assert candidate.retrieved == 0 and active.retrieved == 1  # a group is one try
    (group,) = common.plan_groups([item], config, statuses=("candidate", "active"), **options)
    assert [e.skills for e in group] == [(candidate,), (candidate,), (), ()]
