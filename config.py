"""The flags of a run with their meaning, the presets with their reasons.

    python warmup.py --help                    # this file, as flags
    python warmup.py --preset alfworld-7b      # a preset, which any flag overrides

A flag is one field below: its default, what it means, its limits, and when it may change. Also here
is what every other file may need and that belongs to none: `UserError`, and reading and writing
small files. Nothing of this project is imported here.
"""

import errno
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field, fields
from operator import ge, gt, le, lt
from pathlib import Path

LIMITS = {"at_least": ge, "above": gt, "at_most": le, "below": lt}


def flag(default, help, *, fixed=False, free=False, choices=(), group="", **limits):
    """A field that is a flag. By default a phase may have another value than the phase before, but
    is not resumed with another.

    fixed     alike in all phases of a run
    free      may change at any time: it changes no result, or extends it, or leaves what fitted
    choices   the values it may have; of a list, each of its members
    group     opens a group of --help
    limits    of LIMITS: at_least=1, above=0, ...
    """
    metadata = {"help": help, "fixed": fixed, "free": free, "choices": choices}
    metadata |= {"group": group, "limits": limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


PHASES = ("warmup", "mine", "distill")
ABLATIONS = (  # what --without can take away; `grep without` finds the line of each
    "skills",  # no skill half: GiGPO goes on
    "warmup",  # phase 1 starts from the initial policy
    "validation",  # a skill is active as soon as it is written
    "gate",  # episodes are distilled whatever Delta_g is
    "weight",  # w = 1
    "internalization",  # no L_int
    "action_mask",  # L_int on the whole response
)


@dataclass
class Config:
    """Defaults are the 7B numbers of the GiGPO paper and code; a preset, then a flag, overrides."""

    preset: str = flag(
        "tiny",
        "start from tiny, tiny-{household,alfworld}, smollm2, smollm2-alfworld, "
        "{alfworld,webshop}-{7b,1.5b}",
        fixed=True,
        group="run",
    )
    run: str = flag("tiny", "its name; everything is written under runs/<run>/", free=True)
    seed: int = flag(0, "of tasks, sampling and shuffling", fixed=True, at_least=0, below=2**32)
    fork: str = flag("", "mine.py, distill.py: start from the preceding phase of this other run")
    save_minutes: float = flag(30.0, "between saves; 0: save each iteration", free=True, at_least=0)
    dry_run: bool = flag(False, "print the memory that the run needs, and stop", free=True)

    env: str = flag("alfworld", "alfworld or webshop", fixed=True, group="world")
    engine: str = flag(
        "fast",
        "ALFWorld's: fast, in plain Python; textworld, the stock package, 1,000 times slower; "
        "textworld-trusted, that one for foreign games too, whose code then runs",
        fixed=True,
        choices=("fast", "textworld", "textworld-trusted"),
    )
    data: str = flag(  # free to move: a run knows what is in it
        "", "folder, else $ALFWORLD_DATA (~/.cache/alfworld), $WEBSHOP_DATA", free=True
    )
    split: str = flag("train", "of the tasks; WebShop's also train:human, train:verl", fixed=True)
    max_steps: int = flag(50, "an episode ends, unsolved, after this many steps", at_least=1)
    history: int = flag(2, "past steps that a prompt repeats", fixed=True, at_least=0)

    model: str = flag(  # free to move: a run knows its weights
        "Qwen/Qwen2.5-7B-Instruct", "folder or hub name", free=True, group="policy"
    )
    dtype: str = flag("bfloat16", "of the weights", fixed=True, choices=("float32", "bfloat16"))
    device: str = flag("", "cuda or cpu; empty: cuda when there is one", free=True)
    gradient_checkpointing: bool = flag(True, "recompute activations, to save memory", free=True)
    offload: bool = flag(False, "reference and optimizer state in host memory, one GPU", free=True)

    tasks: int = flag(16, "tasks (groups) per iteration", at_least=1, group="rollout")
    group_size: int = flag(8, "episodes per task", at_least=1)
    temperature: float = flag(1.0, "of the sampling in training rollouts", above=0)
    max_prompt_tokens: int = flag(3072, "history is dropped to fit", free=True, at_least=1)
    max_response_tokens: int = flag(512, "longest response", at_least=1)
    generation_rows: int = flag(128, "rows decoded together", free=True, at_least=1)

    invalid_penalty: float = flag(0.1, "cost of a malformed row", at_least=0, group="credit: GiGPO")
    gamma: float = flag(0.95, "discount of the step returns", at_least=0, at_most=1)
    step_weight: float = flag(1.0, "w_S, weight of the step advantage; 0 is GRPO", at_least=0)
    normalize_std: bool = flag(True, "divide advantages by the standard deviation")
    baseline: str = flag(
        "steps", "mean and std over steps (verl-agent) or episodes", choices=("steps", "episodes")
    )

    clip: float = flag(0.2, "PPO clip range of the ratio", above=0, group="objective")
    kl_coef: float = flag(0.01, "beta of the KL to the initial policy; 0: no KL", at_least=0)
    entropy_coef: float = flag(0.001, "c_H, weight of the entropy bonus", at_least=0)
    lr: float = flag(1e-6, "AdamW learning rate, constant", at_least=0)
    minibatch_rows: int = flag(256, "RL rows per optimizer step, about", at_least=1)
    micro_tokens: int = flag(16384, "tokens per forward-backward", free=True, at_least=1)
    recompute_old: bool = flag(True, "old log-probs by the training forward; false: the sampler's")

    n_req: int = flag(512, "N_req, successes to end at", free=True, at_least=0, group="phase 0")
    warmup_iterations: int = flag(40, "limit of phase 0, even below n_req", free=True, at_least=1)

    mine_iterations: int = flag(40, "of phase 1", free=True, at_least=1, group="phase 1")
    mine_every: int = flag(5, "I_mine, iterations between two rounds of mining", at_least=1)
    mine_episodes: int = flag(12, "successes summarized in one round", at_least=0)
    mine_obs_chars: int = flag(200, "of each observation in the request for a skill", at_least=1)
    miner: str = flag(
        "",
        "empty: the policy writes the skills; else a model, or an API: http://host:8000/v1#model",
        free=True,
    )
    top_k: int = flag(3, "active skills in a prompt, at most", at_least=1)
    ema: float = flag(0.3, "alpha of u <- (1 - alpha) u + alpha Delta_g", at_least=0, at_most=1)
    n_eval: int = flag(4, "N_eval, evaluations of a skill before a verdict", at_least=0)
    active_above: float = flag(0.05, "utility that makes a skill active", at_least=-1, at_most=1)

    distill_iterations: int = flag(85, "of phase 2", free=True, at_least=1, group="phase 2")
    lambda_max: float = flag(0.1, "largest weight of L_int", above=0)
    lambda_iterations: int = flag(10, "K_warm, until lambda is lambda_max", at_least=1)
    advantage_clip: float = flag(1.0, "c, largest weight of a distilled step", at_least=0)

    without: list[str] = flag([], "joined by commas", choices=ABLATIONS, group="ablations")
    show: str = flag(
        "skill",
        "what the skill half's prompt shows: the skill; nothing (self-imitation); neutral words, "
        "as many as the strategy has; other, a skill of another task type",
        choices=("skill", "nothing", "neutral", "other"),
    )


# --- Presets: what differs from the defaults above ------------------------------------------------

SMALL_MODEL = {"model": "Qwen/Qwen2.5-1.5B-Instruct"}  # trained with the 7B's numbers, as in GiGPO
WEBSHOP = {  # GiGPO's WebShop script, where it differs from its ALFWorld script
    "env": "webshop",
    "max_steps": 15,  # search, pages, options, purchase: 5 to 10 actions
    "max_prompt_tokens": 6144,  # 4,096 there; a page of ten products, and room for the skills
    "minibatch_rows": 64,  # short episodes make few rows: 11 to 23 optimizer steps an iteration
    "normalize_std": False,  # the mean alone, so advantages keep the reward's scale of 10
}
TINY = {  # policies of 0.7M parameters: an iteration takes 10 to 20 s on 2 cores
    "dtype": "float32",  # they are small, and exact
    "gradient_checkpointing": False,  # their activations fit anywhere
    "max_prompt_tokens": 1024,  # prompts of the generated worlds have about 230 tokens
    "max_response_tokens": 64,  # a thought of six words, an action; a skill has at most 50 tokens
    "lr": 3e-4,  # a small network moves in large steps; above 5e-4 phase 2 undid phase 1
    "kl_coef": 0.003,  # at 0.01 the success of the plain prompt stopped at 0.6
    "micro_tokens": 2048,  # fits the caches of a CPU
    "recompute_old": False,  # equal in float32, and a quarter of the update
    "ema": 0.2,  # slower than 0.3: with 4 against 4 episodes Delta_g is mostly noise
    "n_req": 220,  # leaves phases 1 and 2 something to learn
    "warmup_iterations": 8,
    "mine_iterations": 4,
    "mine_every": 2,
    "mine_episodes": 6,  # one of each task type
    "mine_obs_chars": 60,  # what its lessons in summarizing showed
    "distill_iterations": 12,  # the skills have done what they can, most are retired by then
    "lambda_iterations": 4,
    "save_minutes": 0.0,  # a save takes a tenth of a second
}
PRESETS = {
    "tiny": TINY  # the run that the README shows: the embedded shop
    | {
        "run": "tiny",
        "env": "webshop",
        "model": "tiny",
        "data": "runs/tiny-shop-3",  # three options in every task; -1 to -5, and none: one or two
        "max_steps": 10,  # search, open, three options, buy, and four to spare
        "history": 1,  # pages are long for a small policy
        "tasks": 8,  # an iteration of 64 episodes in 10 s on 2 cores
        "minibatch_rows": 64,
        "lr": 1e-4,  # shopping is learned so fast that warm-up alone would leave nothing to do
        "kl_coef": 0.0,  # plain success starts at 0: there is little to stay close to
        "n_req": 12,  # as soon as there is something to summarize
        "mine_iterations": 6,  # until skills have had their n_eval evaluations
        "distill_iterations": 6,
    },
    "tiny-household": TINY  # small generated ALFWorld games
    | {
        "run": "tiny-household",
        "model": "tiny-household",
        "data": "runs/tiny-games",
        "max_steps": 14,  # twice the length of a solution
    },
    "tiny-alfworld": TINY  # the same small policy, taught on the real training games, plays those
    | {
        "run": "tiny-alfworld",
        "model": "tiny-alfworld",
        "max_prompt_tokens": 2048,  # rooms have up to 40 receptacles
        "tasks": 8,  # an iteration of 64 episodes
        "lr": 1.5e-4,  # long episodes make two thousand rows, so eight steps an iteration
        "n_req": 40,
        "warmup_iterations": 4,
        "distill_iterations": 4,
    },
    "smollm2": TINY  # a real model in small ALFWorld games, on 2 cores: see results/smollm2.md
    | {
        "run": "smollm2",
        "data": "runs/tiny-games",
        "model": "runs/smollm2-taught",  # make smollm2, then the lessons: tiny/imitate.py
        "dtype": "bfloat16",
        "max_steps": 14,
        "tasks": 4,  # an iteration of 32 episodes, in 3 to 8 minutes
        "minibatch_rows": 64,
        "micro_tokens": 4096,  # their activations take 4 GB
        "lr": 2e-5,  # moves nothing in five iterations; 5e-5 on 32 rows a step lost what it had
        "kl_coef": 0.0,
        "ema": 0.3,
        "n_eval": 1,  # of twelve groups in phase 1 each task type has two
        "n_req": 8,
        "warmup_iterations": 3,
        "mine_iterations": 3,
        "mine_every": 1,
        "distill_iterations": 3,
        "lambda_iterations": 2,
    },
    "alfworld-7b": {"run": "alfworld-7b"},
    "alfworld-1.5b": {"run": "alfworld-1.5b"} | SMALL_MODEL,
    "webshop-7b": {"run": "webshop-7b"} | WEBSHOP,
    "webshop-1.5b": {"run": "webshop-1.5b"} | SMALL_MODEL | WEBSHOP,
}
PRESETS["smollm2-alfworld"] = PRESETS["smollm2"] | {  # the real games on a card of 80 GB
    "run": "smollm2-alfworld",
    "data": "",  # $ALFWORLD_DATA
    "model": "runs/smollm2-alfworld-taught",  # the lessons of the real games
    "max_prompt_tokens": 2048,  # rooms have up to 40 receptacles
    "max_steps": 30,  # of 50: a seed of both variants then takes 13 minutes on an H100
    "tasks": 16,  # an iteration of 128 episodes, in about a minute
    "minibatch_rows": 512,  # of about two thousand rows, so four steps an iteration
    "micro_tokens": 32768,  # a run takes 29 GB, so two share the card
    "lr": 5e-5,  # it learned within 384 episodes
    "n_eval": 2,  # of 32 groups in phase 1 each task type has about five
    "warmup_iterations": 1,  # after the lessons it solves enough to mine from
    "mine_iterations": 2,  # the first with skills of the warm-up, the second with its own too
    "distill_iterations": 1,  # each is a minute
}


def check(flags):
    """UserError for a value that its declaration does not allow."""
    for f in fields(flags):
        value = getattr(flags, f.name)
        choices = f.metadata["choices"]
        if choices and not set(value if isinstance(value, list) else [value]) <= set(choices):
            shown = ",".join(map(str, value)) if isinstance(value, list) else value
            raise UserError(f"--{f.name} {shown}: must be {' or '.join(map(str, choices))}")
        limits = f.metadata["limits"]
        if not all(LIMITS[name](value, limit) for name, limit in limits.items()):
            words = " and ".join(f"{name.replace('_', ' ')} {x}" for name, x in limits.items())
            raise UserError(f"--{f.name} {value}: must be {words}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{f.name} {value}: must be finite")


# --- Errors and small files -----------------------------------------------------------------------


class UserError(ValueError):
    """A mistake the user can fix: scripts print its one line, with the remedy, and exit with 2."""


FREE = "free some disk, then the same command goes on"
MOVE = "a file is where a folder should be: move it away"
REMEDIES = {  # errors of the system: what to do
    errno.ENOSPC: FREE,
    errno.EDQUOT: FREE,
    errno.ENOTDIR: MOVE,
    errno.EEXIST: MOVE,
    errno.EISDIR: "a folder is where a file should be: move it away",
}


def remedy_of(error) -> str:
    """What follows the words of an error of the system, or nothing."""
    known = re.search(r"\(os error (\d+)\)", str(error))  # safetensors' have no errno
    code = int(known[1]) if known else getattr(error, "errno", None)
    return f"; {REMEDIES[code]}" if code in REMEDIES else ""


def read_text(path, errors="strict") -> str:
    """A text file. UserError where it cannot be opened."""
    try:
        return Path(path).read_text(encoding="utf-8", errors=errors)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}{remedy_of(error)}") from None


def read_json(path, needed=()):
    """The content of a JSON file. UserError where there is none, it is not JSON, or no object with
    the names that are `needed`.
    """
    remedy = "delete it or download the data again"
    try:
        data = json.loads(read_text(path))
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {remedy}") from None
    if needed and not has(data, needed):
        raise UserError(f"{path}: no JSON object with {', '.join(needed)}; delete it")
    return data


def has(record, names) -> bool:
    return isinstance(record, dict) and record.keys() >= set(names)


def read_jsonl(path, needed=()) -> list[dict]:
    """The records of a file with a JSON object on each line. UserError for a line that is none, or
    has not the names that are `needed`.
    """
    records = []
    for number, line in enumerate(read_text(path, errors="replace").split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not has(record, needed):
                what = "not a JSON object" + f" with {', '.join(needed)}" * bool(needed)
                raise UserError(f"{path}, line {number}: {what}; fix or delete that line")
            records.append(record)
    return records


def sha256(path) -> str:
    """Of a file's content: a second a gigabyte."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(path) -> bool:
    """Whether a JSON file that this project wrote is there up to its last bracket: a machine that
    loses its power may leave an empty file, or zeros at the end.
    """
    return path.is_file() and path.read_bytes()[-1:] in (b"]", b"}")


def write_atomically(path, text):
    """Write a text file whole, or leave it as it was; several processes may at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
