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
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from rapidfuzz import fuzz
from rapidfuzz.utils import default_process

from config import Config, UserError, read_jsonl
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
NEUTRAL = "go on as you think best and take the time that you need for it".split()
STATUSES = ("active", "candidate", "retired")


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
    deltas: list[float] = field(default_factory=list)  # every Delta_g: its life


class SkillBank:
    """The skills of a run, for phases 1 and 2 only; inference needs none."""

    MAX_WORDS = 80  # in a skill
    MAX_CHARACTERS = 640  # eight a word, blanks included; English needs six, so more is no prose
    DUPLICATE = 90  # percent of similarity from which two strategies count as one
    PER_BUCKET = 20  # candidate and active skills; one more retires the least valued

    def __init__(self, config: Config, skills=()):
        self.config = config
        self.skills = list(skills)

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
        status = "active" if "validation" in self.config.without else "candidate"
        self.skills.append(Skill(condition, strategy, bucket, status=status, born=iteration))
        return "added"

    def value(self, skill) -> float:
        """Utility with an upper-confidence bonus for the little-tried."""
        total = sum(s.retrieved for s in self.skills if s.bucket == skill.bucket)
        return skill.utility + 0.1 * math.sqrt(math.log(1 + total) / (1 + skill.retrieved))

    def retrieve(self, task, bucket, statuses=STATUSES[:2]) -> list[Skill]:
        """The skills of a group, once for all its steps.

        The best top_k active ones by 0.5 lexical match of task and condition + utility + UCB; or
        the least tried candidate, alone, so that Delta_g is its own: next to a good skill any
        candidate looks good. A candidate goes first until `n_eval` groups have carried it, then
        whenever fewer have than the best active skill.
        """

        def score(skill):
            return 0.5 * fuzz.token_set_ratio(task, skill.condition) / 100 + self.value(skill)

        found = [s for s in self.skills if s.bucket == bucket and s.status in statuses]
        found.sort(key=score, reverse=True)
        active = [s for s in found if s.status == "active"]
        candidates = [s for s in found if s.status == "candidate"]
        if candidates:
            candidate = min(candidates, key=lambda s: s.retrieved)
            tries = max(self.config.n_eval, active[0].retrieved) if active else math.inf
            if candidate.retrieved < tries:
                return [candidate]
        return active[: self.config.top_k]

    def count_try(self, skills):
        """A group carries these skills."""
        for skill in skills:
            skill.retrieved += 1

    def shown(self, skills) -> list[tuple]:
        """(condition, strategy) of skills as the prompt of the skill half has them (--show)."""
        show = self.config.show
        if show == "nothing" or not skills:
            return []
        if show == "other":  # the most valued skill of another task type; none where there is none
            living = [s for s in self.skills if s.status != "retired"]
            own = {skill.bucket for skill in skills}
            others = [s for s in living if s.bucket not in own]
            skills = [max(others, key=self.value)] if others else []
        if show == "neutral":  # as many words, so that length and place alone are left
            counts = [len(s.strategy.split()) for s in skills]
            words = [" ".join(islice(cycle(NEUTRAL), count)) for count in counts]
            return [(s.condition, text) for s, text in zip(skills, words, strict=True)]
        return [(s.condition, s.strategy) for s in skills]

    def update(self, skill: Skill, delta: float):
        """One evaluation: u_s <- (1 - alpha) u_s + alpha Delta_g (method Eq. 9), and a verdict."""
        skill.utility += self.config.ema * (delta - skill.utility)
        skill.n += 1
        skill.deltas.append(round(delta, 4))
        if skill.n < self.config.n_eval or "validation" in self.config.without:
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

    def count(self) -> dict[str, int]:
        statuses = [s.status for s in self.skills]
        return {status: statuses.count(status) for status in STATUSES}

    def summary(self) -> str:
        return " ".join(f"{n} {status}" for status, n in self.count().items())

    def table(self) -> str:
        """Every skill with its record, the active first, the retired last."""
        lines = [f"{'status':<10}{'utility':>8}{'n':>4}  skill"]
        for s in sorted(self.skills, key=lambda s: (STATUSES.index(s.status), -s.utility)):
            record = f"{s.status:<10}{s.utility:>+8.2f}{s.n:>4}"
            lines.append(f"{record}  [{s.bucket}] when {s.condition}: {s.strategy}")
        return "\n".join(lines)

    def dump(self) -> str:
        """A JSON object for each skill, a line each."""
        return "".join(json.dumps(asdict(s)) + "\n" for s in self.skills)

    @classmethod
    def load(cls, folder, config: Config) -> "SkillBank":
        """The bank in the folder of a phase. UserError where it has none, or of another kind."""
        path = Path(folder) / "skills.jsonl"
        if not path.exists():
            raise UserError(f"{path}: no such skill file; it is written by mine.py")
        try:
            return cls(config, [Skill(**record) for record in read_jsonl(path)])
        except TypeError as error:
            raise UserError(f"{path}: not the skills of this version ({error})") from None


def parse_skill(text: str) -> tuple[str, str] | None:
    """A summary -> (condition, strategy); None unless it is one JSON object with both and no text
    around it but a thought before. A small model may copy the form that the prompt shows: no skill
    either.
    """
    try:
        fenced = (
            text.rpartition("</think>")[2]
            .strip()
            .removeprefix("```json")
            .removeprefix("```")
            .removesuffix("```")
        )
        data = json.loads(fenced.strip())
        condition, strategy = (data[key].strip().rstrip(".") for key in ("condition", "strategy"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if condition.lower() == SKILL_FORM["condition"] or strategy.lower() == SKILL_FORM["strategy"]:
        return None
    condition = re.sub(r"^when ", "", condition, flags=re.I)
    return (condition, strategy) if condition and strategy else None


def group_deltas(episodes) -> dict[str, float]:
    """Group -> Delta_g = success of its skill half - of its plain half (method Eq. 8)."""
    skill_half = defaultdict(list)
    plain_half = defaultdict(list)
    for e in episodes:
        (skill_half if e.skills else plain_half)[e.group].append(e.success)
    return {
        group: float(np.mean(solved) - np.mean(plain_half[group]))
        for group, solved in skill_half.items()
        if group in plain_half
    }


def plain_successes(episodes, k) -> list[dict]:
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
