"""Skills: their life from candidate to active to retired, and the bank that a run keeps them in.

A skill is a condition and a strategy that the policy wrote about an episode it solved. It proves
itself: half of a group of rollouts has it in the prompt, half does not, and the difference in
success, Delta_g, moves its utility u_s (docs/method.md, section 3). The bank serves training only;
what `distill.py` makes needs no skill.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from rapidfuzz import fuzz
from rapidfuzz.utils import default_process

from config import UserError, write_atomically
from envs import SKILL_FORM

# A number that names an instance ("drawer 3", "take mug 1 from shelf 2"), not a quantity ("2
# objects", "under 30 dollars"): it has a noun before it and no noun after it. Or an ASIN.
NO_NOUN_BEFORE = (
    "a|about|above|all|at|below|both|buy|exactly|find|for|is|least|most|need|of|only|over|price|"
    "put|take|than|the|these|to|under|with"
)
NO_NOUN_AFTER = (
    "after|and|are|as|at|before|by|for|from|if|in|into|is|it|near|of|on|or|so|that|the|then|there|"
    "to|until|was|when|where|which|with|without"
)
INSTANCE = re.compile(
    rf"\b(?!(?:{NO_NOUN_BEFORE})\b)[a-z]+ \d+\b(?!\s+(?!(?:{NO_NOUN_AFTER})\b)[a-z])"
    r"|\bB0[A-Z0-9]{8}\b",
    re.I,
)


STATUSES = ("candidate", "active", "retired")


@dataclass(eq=False)
class Skill:
    """A condition-strategy pair and its record."""

    condition: str
    strategy: str
    bucket: str  # task type
    utility: float = 0.0  # u_s: moving average of Delta_g
    n: int = 0  # evaluations
    status: str = "candidate"  # candidate -> active -> retired
    retrieved: int = 0  # groups that carried it
    below: int = 0  # consecutive evaluations, from the n_eval-th on, that left u < 0
    born: int = 0  # iteration
    deltas: list = field(default_factory=list)  # every Delta_g: its life


PLACEBO = "go on as you think best and take the time that you need for it".split()


def shown_in_prompt(skill, config) -> tuple:
    """(condition, strategy) as the prompt shows them: the skill, or with --placebo its condition
    and as many neutral words as its strategy has, so that length and place alone are left.
    """
    if not config.placebo:
        return skill.condition, skill.strategy
    count = len(skill.strategy.split())
    words = PLACEBO * (1 + count // len(PLACEBO))
    return skill.condition, " ".join(words[:count])


class SkillBank:
    """The skills of a run, for phases 1 and 2 only; inference needs none."""

    MAX_WORDS = 80  # in a skill
    MAX_CHARACTERS = 640  # eight a word, blanks included; English needs six, so more is no prose
    DUPLICATE = 90  # percent of similarity from which two strategies count as one
    PER_BUCKET = 20  # candidate and active skills; one more retires the least valued

    def __init__(self, config):
        self.config = config
        self.skills = []

    def add(self, condition, strategy, bucket, iteration=0) -> str:
        """Add a candidate -> "added", or why not: "unprintable" (a control character, a line break,
        half a surrogate pair), "words", "characters", "instance", "duplicate".
        """
        text = f"{condition}: {strategy}"
        if not (text + bucket).isprintable():
            return "unprintable"
        if len(text.split()) > self.MAX_WORDS:
            return "words"
        if len(text) > self.MAX_CHARACTERS:
            return "characters"
        if INSTANCE.search(text):
            return "instance"
        peers = [s for s in self.skills if s.bucket == bucket]
        for s in peers:
            alike = fuzz.token_sort_ratio(strategy, s.strategy, processor=default_process)
            if alike >= self.DUPLICATE:
                return "duplicate"
        living = [s for s in peers if s.status != "retired"]
        if len(living) >= self.PER_BUCKET:
            min(living, key=self.value).status = "retired"
        status = "candidate" if self.config.validate else "active"
        self.skills.append(Skill(condition, strategy, bucket, status=status, born=iteration))
        return "added"

    def value(self, skill) -> float:
        """Utility with an upper-confidence bonus for the little-tried."""
        total = sum(s.retrieved for s in self.skills if s.bucket == skill.bucket)
        return skill.utility + 0.1 * math.sqrt(math.log(1 + total) / (1 + skill.retrieved))

    def retrieve(self, task, bucket, k=3, statuses=("candidate", "active"), training=True) -> list:
        """The skills of a group, once for all its steps.

        The best k active ones by 0.5 lexical match of task and condition + utility + UCB; or the
        least tried candidate, alone, so that Delta_g is its own: beside a good skill any candidate
        looks good. A candidate goes first until `n_eval` groups have carried it, then whenever
        fewer have than the best active skill. Only `training` counts as a try.
        With --candidate_alone false the candidate stands beside the active ones.
        """

        def score(skill):
            return 0.5 * fuzz.token_set_ratio(task, skill.condition) / 100 + self.value(skill)

        found = [s for s in self.skills if s.bucket == bucket and s.status in statuses]
        found = sorted(found, key=score, reverse=True)
        active = [s for s in found if s.status == "active"]
        candidates = [s for s in found if s.status == "candidate"]
        candidates.sort(key=lambda s: s.retrieved)
        chosen = (candidates[:1] + active)[:k]
        if candidates and self.config.candidate_alone:
            tries = max(self.config.n_eval, active[0].retrieved) if active else math.inf
            chosen = candidates[:1] if candidates[0].retrieved < tries else active[:k]
        if training:
            for skill in chosen:
                skill.retrieved += 1
        return chosen

    def update(self, skill, delta):
        """One evaluation: u_s <- (1 - alpha) u_s + alpha Delta_g (method Eq. 9), and a verdict."""
        skill.utility += self.config.ema * (delta - skill.utility)
        skill.n += 1
        skill.deltas.append(round(delta, 4))
        unproven = skill.n < self.config.n_eval
        if unproven or skill.status == "retired" or not self.config.validate:
            return
        skill.below = skill.below + 1 if skill.utility < 0 else 0
        if skill.below >= 2:
            skill.status = "retired"
        elif skill.status == "candidate" and skill.utility > self.config.active_above:
            skill.status = "active"

    def evaluate(self, episodes, deltas):
        """Credit every skill of a paired group with the group's Delta_g, once."""
        skills = {e.group: e.skills for e in episodes if e.skills}
        for group, delta in deltas.items():
            for skill in skills[group]:
                self.update(skill, delta)

    def count(self) -> dict:
        statuses = [s.status for s in self.skills]
        return {status: statuses.count(status) for status in STATUSES}

    def summary(self) -> str:
        return " ".join(f"{n} {status}" for status, n in self.count().items())

    def table(self) -> str:
        """Every skill with its record, the active first, the retired last."""
        order = ("active", "candidate", "retired")
        lines = [f"{'status':<10}{'utility':>8}{'n':>4}  skill"]
        for s in sorted(self.skills, key=lambda s: (order.index(s.status), -s.utility)):
            record = f"{s.status:<10}{s.utility:>+8.2f}{s.n:>4}"
            lines.append(f"{record}  [{s.bucket}] when {s.condition}: {s.strategy}")
        return "\n".join(lines)

    def save(self, path):
        write_atomically(path, "".join(json.dumps(asdict(s)) + "\n" for s in self.skills))

    @classmethod
    def given(cls, config):
        """A new bank: empty, or with the skills of the file --given_skills, all active. A line of
        it is a JSON object with condition, strategy and bucket; a skill's record is ignored.
        """
        bank = cls(config)
        if config.given_skills:
            needed = {"condition", "strategy", "bucket"}
            for line in read_skills(config.given_skills, needed):
                skill = Skill(line["condition"], line["strategy"], line["bucket"], status="active")
                bank.skills.append(skill)
        return bank

    @classmethod
    def load(cls, folder, config):
        """The bank that `save` wrote in the folder of a phase."""
        path = Path(folder) / "skills.jsonl"
        bank = cls(config)
        if not path.exists():
            raise UserError(f"{path}: no such skill file; it is written by mine.py")
        needed = {f.name for f in fields(Skill)}
        bank.skills = [Skill(**line) for line in read_skills(path, needed)]
        return bank


def read_skills(path, needed) -> list:
    """The skills of a file, a JSON object a line, as dicts with the fields `needed` at least.

    UserError for a file that cannot be read, and for a line that is no skill, by its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of skills") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text ({error})") from None
    skills = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                skills.append(json.loads(line))
                check_skill(skills[-1], needed)
            except (ValueError, RecursionError) as error:
                reason = f"{error!s:.200}"
                remedy = "mend or delete the line"
                raise UserError(f"{path}, line {number}: no skill, {reason}; {remedy}") from None
    return skills


def check_skill(skill, needed):
    """ValueError for what is not a skill as a dict with the fields `needed`, or has other fields
    than a Skill, a value of another type, or an unprintable text.
    """
    if not isinstance(skill, dict):
        raise ValueError("not a JSON object")
    types = {f.name: f.type for f in fields(Skill)}
    missing = sorted(needed - set(skill))
    unknown = sorted(set(skill) - set(types))
    if missing or unknown:
        raise ValueError(f"missing fields {missing}, unknown fields {unknown}")
    for name, value in skill.items():
        if types[name] is str:
            right = isinstance(value, str) and value.strip() and value.isprintable()
        elif types[name] is int:  # true is an int to isinstance
            right = type(value) is int and value >= 0
        elif types[name] is float:
            right = is_difference(value)
        else:
            right = isinstance(value, list) and all(map(is_difference, value))
        if not right:
            raise ValueError(f"{name} is {value!r:.60}")
    if skill.get("status", "active") not in STATUSES:
        raise ValueError(f"status is {skill['status']!r:.60}, not one of {', '.join(STATUSES)}")


def is_difference(value) -> bool:
    """Whether it is a number as Delta_g and its average are, between -1 and 1 up to rounding."""
    return type(value) in (int, float) and abs(value) < 1.001  # false for NaN


def parse_skill(text: str):
    """A summary -> (condition, strategy); None unless it is one JSON object with both and no text
    around it. A small model may copy the form that the prompt shows: no skill either.
    """
    try:
        fenced = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
        data = json.loads(fenced.strip())
        condition, strategy = (data[key].strip().rstrip(".") for key in ("condition", "strategy"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if condition.lower() == SKILL_FORM["condition"] or strategy.lower() == SKILL_FORM["strategy"]:
        return None
    condition = re.sub(r"^when ", "", condition, flags=re.I)
    return (condition, strategy) if condition and strategy else None


def group_deltas(episodes) -> dict:
    """Paired groups -> Delta_g = success of the skill half - of the plain half (method Eq. 8)."""
    halves = defaultdict(lambda: ([], []))
    for e in episodes:
        halves[e.group][bool(e.skills)].append(e.success)
    return {g: float(np.mean(s) - np.mean(p)) for g, (p, s) in halves.items() if s and p}


def plain_successes(episodes, k) -> list:
    """What mining needs of the episodes solved without skills: the buffer D_succ grows by these."""
    return [
        {
            "task": e.task,
            "task_type": e.task_type,
            "iteration": k,
            "steps": [[s.obs, s.action] for s in e.steps],
        }
        for e in episodes
        if e.success and not e.skills
    ]
