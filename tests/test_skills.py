"""The life of a skill, retrieval, what the bank takes in, Delta_g. Names tell the bug guarded."""

import math
import time

import pytest

import envs
from common import Episode, Step, open_groups, put_skills
from config import Config, UserError
from skills import Skill, SkillBank, group_deltas, parse_skill, plain_successes
from tests.faults import hostile
from worlds import alfworld


def bank_of(*skills, **flags):
    return SkillBank(Config(**flags), skills)


def active(condition="c", strategy="s", bucket="pick", **record):
    return Skill(condition, strategy, bucket, status="active", **record)


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
    bank_of(skill, ema=0.25).update(skill, 2 / 3)
    assert skill.utility == pytest.approx(0.75 * 0.2 + 0.25 * 2 / 3)
    assert skill.n == 1 and skill.deltas == [0.6667]


def test_a_candidate_needs_more_than_the_threshold():
    at, above = Skill("c", "at", "pick"), Skill("c", "above", "pick")
    bank = bank_of(at, above, ema=1.0, n_eval=1, active_above=0.25)
    bank.update(at, 0.25)
    bank.update(above, 0.375)
    assert (at.status, above.status) == ("candidate", "active")


@pytest.mark.parametrize(
    "n_eval, deltas, below",
    [
        (1, (-0.5, 0.5, -0.5), 1),  # one good evaluation between two bad ones saves it
        (4, (-1.0,) * 4, 1),  # of n_eval evaluations the last is the first that counts
    ],
)
def test_a_skill_is_retired_by_two_bad_evaluations_that_count_and_no_less(n_eval, deltas, below):
    skill = Skill("c", "s", "pick")
    bank = bank_of(skill, ema=1.0, n_eval=n_eval)
    for delta in deltas:
        bank.update(skill, delta)
    assert skill.status != "retired" and skill.below == below
    bank.update(skill, -0.5)
    assert skill.status == "retired"


def test_every_skill_of_a_group_is_credited_once_with_that_groups_delta():
    one, two, other = (Skill("c", f"s{i}", "pick") for i in range(3))
    bank = bank_of(one, two, other, ema=1.0)
    episodes = [Episode("i", "g", [one, two]), Episode("i", "g", [one, two]), Episode("i", "g")]
    episodes += [Episode("i", "h", [other]), Episode("i", "h")]
    bank.evaluate(episodes, {"g": 0.5, "h": -0.25})
    assert [s.deltas for s in bank.skills] == [[0.5], [0.5], [-0.25]]


def test_without_validation_a_skill_is_active_at_once_and_stays():
    bank = bank_of(without=["validation"], ema=1.0, n_eval=1)
    bank.add("it is dark", "use the lamp", "look")
    (skill,) = bank.skills
    assert skill.status == "active"
    for _ in range(5):
        bank.update(skill, -1.0)
    assert skill.status == "active" and skill.utility == -1.0


# --- Delta_g and the stored successes -------------------------------------------------------------


def outcome(group, uses_skill, success):
    steps = [Step("saw", [1], [2], "", [3], [0.0], "look", True)]
    skills = [Skill("c", "s", "pick")] if uses_skill else []
    return Episode("i", group, skills, [], "t", "pick", steps, success=success)


def test_delta_is_the_difference_of_the_halves_and_needs_both():
    episodes = [outcome("g", True, True), outcome("g", True, True), outcome("g", False, True)]
    episodes += [outcome("g", False, False), outcome("h", False, True), outcome("h", False, True)]
    assert group_deltas(episodes) == {"g": 0.5}
    worse = [outcome("g", True, False), outcome("g", False, True), outcome("h", True, True)]
    assert group_deltas(worse) == {"g": -1.0}  # harm is negative; "h" has no plain half


def test_mining_learns_from_plain_successes_only():
    """What the skill half solved says nothing new: its skill is known already."""
    episodes = [outcome("a", True, True), outcome("b", False, True), outcome("c", False, False)]
    (stored,) = plain_successes(episodes, 7)
    assert stored == {"task": "t", "task_type": "pick", "iteration": 7, "steps": [["saw", "look"]]}


# --- retrieval ------------------------------------------------------------------------------------


def test_retrieval_stays_in_the_bucket_and_the_candidates_take_turns():
    candidates = [Skill("a", "1", "heat"), Skill("b", "2", "heat")]
    best = [active(f"d{i}", f"{i}", "heat") for i in range(4)]
    bank = bank_of(*candidates, Skill("a", "9", "heat", status="retired"), active("c"), *best)
    first = bank.retrieve("heat some egg", "heat")
    bank.count_try(first)
    assert first + bank.retrieve("heat some egg", "heat") == candidates
    only = bank.retrieve("heat some egg", "heat", statuses=("active",))
    assert len(only) == 3 and set(map(id, only)) <= set(map(id, best))
    assert bank.retrieve("cool some egg", "cool") == []


def test_a_candidate_is_alone_in_the_prompt_so_that_delta_is_its_own():
    candidate = Skill("a", "1", "heat")
    best = [active(f"d{i}", f"{i}", "heat", utility=0.5) for i in range(4)]
    bank = bank_of(candidate, *best, n_eval=4)

    def carried():
        found = bank.retrieve("heat some egg", "heat")
        bank.count_try(found)
        return found

    assert [carried() for _ in range(4)] == [[candidate]] * 4
    later = [carried() for _ in range(20)]  # then both kinds get their turns, never together
    assert [candidate] in later and any(candidate not in found for found in later)
    for found in later:
        assert found == [candidate] or all(s.status == "active" for s in found) and len(found) == 3
    candidate.retrieved = 9
    best[0].retrieved = 10
    best[0].utility = 0.9  # the best of the active ones is the measure, and no other
    assert carried() == [candidate]
    assert carried()[0] is best[0]


def test_the_skill_that_fits_the_task_and_the_more_useful_one_come_first():
    lamp, shelf = active("a lamp is near", "1"), active("a shelf is near", "2")
    bank = bank_of(lamp, shelf, top_k=1)
    assert bank.retrieve("find the shelf", "pick") == [shelf]
    lamp.utility = 0.9
    assert bank.retrieve("find the shelf", "pick") == [lamp]
    bank.config.top_k = 2
    assert bank.retrieve("find the shelf", "pick") == [lamp, shelf]


def test_a_skills_score_is_match_utility_and_bonus_of_its_bucket():
    """0.5 of the lexical match, u, and 0.1 of the bonus for the little-tried."""
    skill, other = active("a", "1", utility=0.3, retrieved=3), active("a", "2", retrieved=4)
    bank = bank_of(skill, other, Skill("a", "3", "look", retrieved=900))
    assert bank.value(skill) == pytest.approx(0.3 + 0.1 * (math.log(8) / 4) ** 0.5)
    fits, useful = active("find the shelf", "1"), active("x", "2", utility=0.4)
    bank = bank_of(fits, useful, top_k=1)
    assert bank.retrieve("find the shelf", "pick") == [fits]  # 0.5 > 0.4
    useful.utility = 0.55
    assert bank.retrieve("find the shelf", "pick") == [useful]
    fits.retrieved = useful.retrieved = 50
    new = active("x", "3", utility=0.52)
    bank.skills.append(new)
    assert bank.retrieve("find the shelf", "pick") == [new]


def test_only_a_group_that_carries_a_skill_counts_as_a_try():
    bank = bank_of(active(), active("c", "t"))
    found = bank.retrieve("task", "pick")
    assert [s.retrieved for s in found] == [0, 0]
    bank.count_try(found[:1])
    assert [s.retrieved for s in found] == [1, 0]


# --- what the prompt shows of a skill -------------------------------------------------------------


def test_the_prompt_shows_the_skill_or_nothing_or_another_or_as_many_neutral_words():
    skill = active("the task is to heat", "take it to the microwave and heat it", "heat")
    others = [active("a", "use the lamp", "look", utility=u) for u in (0.1, 0.5)]
    gone = Skill("a", "gone", "cool", utility=0.9, status="retired")
    near = active("a", "another of its task type", "heat", utility=0.9)
    bank = bank_of(skill, *others, gone, near)

    def shown(show, *skills):
        bank.config.show = show
        return bank.shown(skills)

    assert shown("skill", skill) == [
        ("the task is to heat", "take it to the microwave and heat it")
    ]
    assert shown("nothing", skill) == [] == shown("skill")
    others[1].strategy = "the best of them"
    assert shown("other", skill) == [("a", "the best of them")]
    assert shown("other", others[0]) == [("a", "another of its task type")]
    assert shown("other", skill, near) == [("a", "the best of them")]  # once
    assert shown("other") == []
    for words in (8, 30):
        skill.strategy = "microwave " * words
        ((condition, neutral),) = shown("neutral", skill)
        assert condition == skill.condition and "microwave" not in neutral
        assert len(neutral.split()) == words
    bank.skills = [skill, near]
    assert shown("other", skill) == []  # no other task type has one


# --- the bank -------------------------------------------------------------------------------------


def test_bank_refuses_instances_essays_and_repetitions():
    bank = bank_of()

    def add(condition, strategy):
        return bank.add(condition, strategy, "clean")

    first = "take it to the sinkbasin and clean it"
    assert add("the task asks for a clean object", first) == "added"
    again = "Take it to the sinkbasin, and clean it"
    assert add("an object must be clean", again) == "duplicate"
    assert add("an object must be clean", f"{first} with soap and water") == "added"
    close = "take it to the sinkbasin and then clean it"
    assert add("an object must be clean", close) == "duplicate"
    assert add("an object must be clean", "take it to the fridge and cool it") == "added"
    assert bank.add("an object must be clean", first, "cool") == "added"  # another task type
    assert add("you need a mug", "open drawer 3") == "instance"
    assert add("you shop", "buy B09ABCDEF1") == "instance"
    assert add("you need a mug", "word " * 81) == "words"
    assert [s.status for s in bank.skills] == ["candidate"] * 4


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
    for number, text in enumerate(["c'est la fin, 好", "open the fridge", "use the lamp"]):
        bank.add("c", text, "pick", iteration=number)
    bank.update(bank.skills[0], 0.5)
    (tmp_path / "skills.jsonl").write_text(bank.dump())
    loaded = SkillBank.load(tmp_path, config)
    assert list(map(vars, loaded.skills)) == list(map(vars, bank.skills))
    with pytest.raises(UserError, match="mine.py"):
        SkillBank.load(tmp_path / "nowhere", config)


@pytest.mark.parametrize(
    "line", ["{", "[1]", "\udcff", "1e9", '{"x": 1}', '{"condition": "c", "strategy": "s"}']
)
def test_a_skill_file_with_a_line_that_is_no_skill_is_named(line, tmp_path):
    """A damaged file ended in a traceback, or later in the table."""
    text = '{"condition": "c", "strategy": "s", "bucket": "pick"}\n\n' + line
    (tmp_path / "skills.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="skills.jsonl(, line 3: not a JSON|: not the skills of)"):
        SkillBank.load(tmp_path, Config())


def test_counts_and_the_table_tell_the_statuses_apart():
    bank = bank_of(
        Skill("c", "gone", "pick", status="retired"), Skill("c", "new", "pick", utility=0.25)
    )
    assert bank.count() == {"active": 0, "candidate": 1, "retired": 1}
    assert bank.summary() == "0 active 1 candidate 1 retired"
    lines = bank.table().split("\n")
    assert "new" in lines[1] and "+0.25" in lines[1] and "gone" in lines[2]


# --- retrieval in a phase -------------------------------------------------------------------------


def test_a_skill_is_chosen_for_the_task_and_not_for_its_type(config, games):
    item = envs.list_items("alfworld", "train", games)[0]
    kind = alfworld.task_type_of(item)
    groups = open_groups([item], config)
    fits, typical = active(groups[0][0].task, "1", kind), active(kind, "2", kind, utility=0.1)
    put_skills(groups, bank_of(typical, fits, top_k=1), ("active",))
    assert groups[0][0].skills == [fits]


def test_a_phase_gets_the_skills_of_the_statuses_it_names():
    candidate, other = Skill("a", "1", "pick"), active("b", "2")
    bank = bank_of(candidate, other)
    for statuses, carried in ((("active",), other), (("candidate", "active"), candidate)):
        group = [Episode("i", "g", task_type="pick") for _ in range(4)]
        put_skills([group], bank, statuses)
        assert [e.skills for e in group] == [[carried], [carried], [], []]
        assert group[0].shown == [(carried.condition, carried.strategy)] and not group[2].shown
        assert (other.retrieved, candidate.retrieved) == (1, carried is candidate)
