"""Every number of a run: the flags with their meaning, the presets with their reasons.

    python warmup.py --help                    # this file, as flags
    python warmup.py --preset alfworld-7b      # a preset, which any flag overrides

Also what every other file may need and that belongs to none: `UserError` and reading and writing
small files. Nothing of this project is imported here.
"""

import difflib
import json
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Defaults are the 7B numbers of the GiGPO paper and code; a preset, then a flag, overrides."""

    preset: str = flag("tiny", "start from: tiny[-alfworld], smollm2, {alfworld,webshop}-{7b,1.5b}")
    run: str = flag("tiny", "name of the run; everything is written under runs/<run>/")
    seed: int = flag(0, "seed of tasks, sampling and shuffling")
    # the world
    env: str = flag("alfworld", "the world: alfworld or webshop")
    engine: str = flag("fast", "fast: plain Python; textworld: the stock package (50 ms a step)")
    trust_games: bool = flag(
        False, "with --engine textworld: play games with a foreign grammar, whose code then runs"
    )
    data: str = flag("", "data folder; empty: $ALFWORLD_DATA (~/.cache/alfworld) or $WEBSHOP_DATA")
    split: str = flag("train", "split the tasks are drawn from")
    human_goals: bool = flag(False, "WebShop: goals written by people instead of synthetic ones")
    split_rule: str = flag("product", "WebShop: product (none in both splits) or verl (first 500)")
    max_steps: int = flag(50, "an episode ends, unsolved, after this many steps")
    history: int = flag(2, "how many past (observation, action) pairs the prompt repeats")
    # the policy
    model: str = flag("Qwen/Qwen2.5-7B-Instruct", "initial policy: a folder or a hub name")
    dtype: str = flag("bfloat16", "dtype of the weights: float32 or bfloat16")
    device: str = flag("", "cuda or cpu; empty: cuda when there is one")
    gradient_checkpointing: bool = flag(True, "recompute activations in backward to save memory")
    compile: bool = flag(
        False, "compile the layers of the update: faster, needs a C++ compiler on a CPU"
    )
    fork: str = flag("", "mine.py, distill.py: start from this other run's phase before")
    # rollout
    tasks: int = flag(16, "tasks (groups) per iteration")
    group_size: int = flag(8, "episodes per task")
    temperature: float = flag(1.0, "sampling temperature of training rollouts")
    max_prompt_tokens: int = flag(3072, "longest prompt; history is dropped to fit, then an error")
    max_response_tokens: int = flag(512, "longest response")
    generation_rows: int = flag(128, "rows decoded together")
    # credit: GiGPO
    success_reward: float = flag(10.0, "reward of the step that solves the task; others get 0")
    invalid_penalty: float = flag(0.1, "taken off the row of a malformed response")
    gamma: float = flag(0.95, "discount of the step returns")
    step_weight: float = flag(1.0, "weight of the step advantage; 0 is GRPO")
    normalize_std: bool = flag(True, "divide advantages by the standard deviation")
    baseline: str = flag("steps", "mean and std over steps (verl-agent) or episodes (GiGPO Eq. 3)")
    # objective and optimizer
    clip: float = flag(0.2, "PPO clip range of the ratio")
    dual_clip: float = flag(3.0, "bound of the loss where the advantage is negative")
    kl_coef: float = flag(0.01, "beta of the k3 KL to the initial policy; 0: it is never loaded")
    entropy_coef: float = flag(0.001, "weight of the entropy bonus")
    lr: float = flag(1e-6, "AdamW learning rate, constant")
    beta2: float = flag(0.95, "AdamW's second decay; bfloat16 moments get stuck above 0.99")
    weight_decay: float = flag(0.01, "AdamW weight decay")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    minibatch_rows: int = flag(256, "rows per optimizer step")
    micro_tokens: int = flag(16384, "tokens per forward-backward; lower it when memory runs out")
    recompute_old: bool = flag(
        True, "old log-probs by the training forward; false: the sampler's, the same in float32"
    )
    ref_offload: bool = flag(False, "keep the reference in host memory between its passes")
    optimizer_offload: bool = flag(
        False, "keep the optimizer's state in host memory, on the card one parameter at a time"
    )
    skip_zero_rows: bool = flag(True, "leave out rows with advantage 0, which only carry KL")
    # phase 0
    n_req: int = flag(512, "N_req: successful plain episodes to collect before mining starts")
    warmup_iterations: int = flag(40, "phase 0 ends after this many iterations even below n_req")
    # phases 1 and 2
    skill_share: float = flag(
        0.5, "share of each group that carries skills; 0: GiGPO goes on from the same warm-up"
    )
    # phase 1
    mine_iterations: int = flag(40, "iterations of phase 1")
    mine_every: int = flag(5, "I_mine: iterations between two rounds of mining")
    mine_episodes: int = flag(12, "successful episodes summarized in one round")
    mine_obs_chars: int = flag(200, "observations in the summary prompt are cut to this length")
    miner: str = flag(
        "",
        "who writes the skills; empty: the policy; a model folder or hub name; or the URL of an "
        "OpenAI-compatible endpoint, http://host:8000/v1",
    )
    miner_model: str = flag("", "name of the model that the endpoint is asked for")
    miner_timeout: float = flag(60.0, "seconds to wait for an answer of the endpoint")
    top_k: int = flag(3, "skills in a prompt, at most; at most one of them a candidate")
    candidate_alone: bool = flag(
        True, "a candidate has the prompt to itself, so Delta_g is its own; false: beside others"
    )
    ema: float = flag(0.3, "alpha of u <- (1 - alpha) u + alpha Delta_g")
    n_eval: int = flag(4, "N_eval: evaluations before a skill is promoted or retired")
    active_above: float = flag(0.05, "a candidate with a utility above this becomes active")
    # phase 2
    distill_iterations: int = flag(85, "iterations of phase 2")
    lambda_max: float = flag(0.1, "largest weight of the internalization loss; 0 switches it off")
    lambda_iterations: int = flag(10, "iterations over which lambda rises linearly to lambda_max")
    advantage_clip: float = flag(1.0, "c: internalization weights are clipped to [0, c]")
    # ablations of phases 1 and 2
    arm_baselines: bool = flag(False, "each arm of a group is a GiGPO group of its own")
    validate: bool = flag(True, "false: every skill is active as soon as it is written")
    given_skills: str = flag("", "skills.jsonl with skills to begin with, all active (mine.py)")
    placebo: bool = flag(False, "prompts show neutral words, as many as the skill's strategy has")
    internalize_loss: str = flag(
        "nll",
        "nll: of the response given under the skill; kl: from the policy's distribution under it",
    )
    internalize_tokens: str = flag("action", "tokens of L_int: action, or response (thoughts too)")
    internalize_gate: str = flag("delta", "delta: where Delta_g > 0; none: every skilled episode")
    internalize_weight: str = flag("advantage", "advantage: w = clip(A, 0, c); one: w = 1")
    hand_off: bool = flag(
        False, "lambda falls from 1 to 0 over lambda_iterations, and L_GiGPO weighs 1 - lambda"
    )
    # housekeeping
    save_every: int = flag(5, "iterations between saves; a stopped phase goes on from the last")
    save_minutes: float = flag(30.0, "minutes after which the end of an iteration is saved anyway")
    dry_run: bool = flag(False, "print the memory that the run needs, part by part, and stop")
    samples: int = flag(2, "episodes written out readably in each iteration")
    compare_gradients: bool = flag(
        False, "log norms and cosine of the gradients of L_int and of the rest, once an iteration"
    )

    @property
    def played_by(self) -> str:
        """The engine as `envs.make_env` takes it."""
        return "textworld-trusted" if self.trust_games else self.engine


# --------------------------------------------------------------------------------------------------
# Presets: what differs from the defaults above
# --------------------------------------------------------------------------------------------------

SMALL_MODEL = {"model": "Qwen/Qwen2.5-1.5B-Instruct"}  # trained with the 7B's numbers, as in GiGPO
WEBSHOP = {  # GiGPO's WebShop script, where it differs from its ALFWorld script
    "env": "webshop",
    "max_steps": 15,  # search, pages, options, purchase: 5 to 10 actions
    "max_prompt_tokens": 6144,  # 4,096 there; a page of ten products, and room for the skills
    "minibatch_rows": 64,  # short episodes make few rows: 11 to 23 optimizer steps an iteration
    "normalize_std": False,  # the mean alone, so advantages keep the reward's scale of 10
}
TINY = {  # the embedded default: 0.7M parameters, an iteration of 128 episodes in 18 s on 2 cores
    "dtype": "float32",  # it is small, and exact
    "gradient_checkpointing": False,  # its activations fit anywhere
    "max_prompt_tokens": 1024,  # prompts of the generated worlds have about 230 tokens
    "max_response_tokens": 64,  # a thought of six words, an action; a skill has at most 50 tokens
    "lr": 3e-4,  # a small network moves in large steps; above 5e-4 phase 2 undid phase 1
    "kl_coef": 0.003,  # at 0.01 the success of the plain prompt stopped at 0.6
    "micro_tokens": 2048,  # fits the caches of a CPU
    "recompute_old": False,  # equal in float32, and a quarter of the update
    "beta2": 0.999,  # float32 moments do not get stuck
    "ema": 0.2,  # slower than 0.3: with 4 against 4 episodes Delta_g is mostly noise
    "n_req": 220,  # leaves phases 1 and 2 something to learn
    "warmup_iterations": 8,
    "mine_iterations": 4,
    "mine_every": 2,
    "mine_episodes": 6,  # one of each task type
    "mine_obs_chars": 60,  # what its lessons in summarizing showed
    "distill_iterations": 12,  # the skills have done what they can, most are retired by then
    "lambda_iterations": 4,
}
BUILT = {  # models that a command writes; each script knows them by these names
    "smollm2": "runs/smollm2-base"  # make smollm2
}
PRESETS = {
    "alfworld-7b": {"run": "alfworld-7b"},
    "alfworld-1.5b": {"run": "alfworld-1.5b"} | SMALL_MODEL,
    "webshop-7b": {"run": "webshop-7b"} | WEBSHOP,
    "webshop-1.5b": {"run": "webshop-1.5b"} | SMALL_MODEL | WEBSHOP,
    "tiny": TINY
    | {
        "model": "tiny",
        "data": "runs/tiny-games",
        "max_steps": 14,  # twice the length of a solution
    },
    "tiny-webshop": TINY  # also what `--preset tiny --env webshop` means
    | {
        "run": "tiny-webshop",
        "env": "webshop",
        "model": "tiny-webshop",
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
    "tiny-alfworld": TINY  # the same small policy, taught on the real training games, plays those
    | {
        "run": "tiny-alfworld",
        "model": "tiny-alfworld",
        "max_steps": 50,
        "max_prompt_tokens": 2048,  # rooms have up to 40 receptacles
        "tasks": 8,  # an iteration of 64 episodes
        "lr": 1.5e-4,  # long episodes make two thousand rows, so eight steps an iteration
        "n_req": 40,
        "warmup_iterations": 4,
        "mine_iterations": 4,
        "distill_iterations": 4,
    },
    "smollm2": {  # a real model in small ALFWorld games, on 2 cores: see results/smollm2.md
        "run": "smollm2",
        "data": "runs/tiny-games",
        "model": "runs/smollm2-taught",  # make smollm2, then the lessons: tiny/imitate.py
        "gradient_checkpointing": False,  # 4,096 tokens of activations take 4 GB
        "max_steps": 14,
        "tasks": 4,  # an iteration of 32 episodes
        "max_prompt_tokens": 1024,  # 320 on the average
        "max_response_tokens": 64,
        "minibatch_rows": 64,
        "micro_tokens": 4096,
        "lr": 2e-5,  # moves nothing in five iterations; 5e-5 on 32 rows a step lost what it had
        "kl_coef": 0.0,
        "recompute_old": False,  # saves a forward pass; apart by 0.001 to 0.003
        "n_eval": 1,  # of twelve groups in phase 1 each task type has two
        "n_req": 8,
        "warmup_iterations": 3,
        "mine_iterations": 3,
        "mine_every": 1,
        "mine_episodes": 6,  # one of each task type
        "mine_obs_chars": 60,  # as its lessons in summarizing
        "distill_iterations": 3,
        "lambda_iterations": 2,
        "save_every": 1,  # iterations of 3 to 8 minutes, saves of seconds
    },
}
SAME = (  # must be alike in all phases of a run
    "preset",
    "env",
    "engine",
    "trust_games",
    "data",
    "human_goals",
    "split_rule",
    "model",
    "dtype",
    "seed",
    "history",
)
FREE = (  # may change when a phase is resumed: they change no result, extend it, or, like
    # max_prompt_tokens, leave what fitted as it was
    "run",
    "device",
    "micro_tokens",
    "generation_rows",
    "gradient_checkpointing",
    "compile",
    "ref_offload",
    "optimizer_offload",
    "max_prompt_tokens",
    "miner",
    "miner_model",
    "miner_timeout",
    "save_every",
    "save_minutes",
    "samples",
    "compare_gradients",
    "dry_run",
    "n_req",
    "warmup_iterations",
    "mine_iterations",
    "distill_iterations",
)
AT_LEAST_ONE = (
    "max_steps",
    "tasks",
    "group_size",
    "max_prompt_tokens",
    "max_response_tokens",
    "generation_rows",
    "minibatch_rows",
    "micro_tokens",
    "warmup_iterations",
    "mine_iterations",
    "mine_every",
    "top_k",
    "distill_iterations",
    "lambda_iterations",
    "save_every",
)
NOT_NEGATIVE = (
    "history",
    "invalid_penalty",
    "step_weight",
    "kl_coef",
    "entropy_coef",
    "lr",
    "weight_decay",
    "n_req",
    "mine_episodes",
    "n_eval",
    "lambda_max",
    "advantage_clip",
    "samples",
)


PHASES = ("warmup", "mine", "distill")
CHOICES = {
    "engine": ("fast", "textworld"),
    "baseline": ("steps", "episodes"),
    "internalize_tokens": ("action", "response"),
    "internalize_gate": ("delta", "none"),
    "internalize_weight": ("advantage", "one"),
    "internalize_loss": ("nll", "kl"),
}


class UserError(ValueError):
    """A mistake the user can mend: scripts print its one line, with the remedy, and exit with 2."""


def parse_config(phase: str, doc: str, extra=None):
    """Flags -> Config, or (Config, extra dataclass).

    Precedence: flag, the run's config.json (for the phases after warmup; that of --fork where the
    run has none yet), preset, default. UserError for an unknown flag, preset or value, or a value
    of SAME that the run was not made with.
    """
    from transformers import HfArgumentParser  # here: the worlds read this file without it

    parts = [Config, extra] if extra else [Config]
    parser = HfArgumentParser(parts, description=doc.split("\n")[0])
    parser.error = refuse
    refuse_unknown_flags(parser)
    first, _ = parser.parse_known_args()
    if first.preset not in PRESETS:
        raise UserError(f"--preset {first.preset}: choose one of {', '.join(PRESETS)}")
    shop = (first.preset, first.env) == ("tiny", "webshop")
    parser.set_defaults(**PRESETS["tiny-webshop" if shop else first.preset])
    first, _ = parser.parse_known_args()
    check_name("run", first.run)
    if first.fork:
        check_name("fork", first.fork)
    if first.fork and (phase == "warmup" or first.run == first.fork):
        raise UserError(f"--fork {first.fork}: for mine.py and distill.py, with another --run")
    folder = Path("runs") / first.run
    if first.fork and not (folder / "config.json").exists():
        folder = Path("runs") / first.fork
    saved = {} if phase == "warmup" else saved_flags(folder)
    parser.set_defaults(**saved | {"run": first.run})
    config, *rest = parser.parse_args_into_dataclasses()
    for name in SAME:
        if name in saved and saved[name] != getattr(config, name):
            raise other_config(folder, name, saved[name], getattr(config, name))
    check(config)
    return (config, *rest) if extra else config


def check_name(flag_name, run):
    """UserError for a name that would write outside runs/, or over the embedded data there."""
    data = ("tiny-games", "tiny-shop", "webshop-cache", "smollm2-base", "smollm2-taught")
    plain = re.fullmatch(r"[\w.-]+", run, re.ASCII) and run.strip(".")
    if not plain or re.fullmatch(rf"({'|'.join(data)})(-\d)?", run):
        taken = ", ".join(data)
        raise UserError(f"--{flag_name} {run!r}: use letters, digits, . _ and -, and not {taken}")


def copies_of_flags(folder) -> list:
    """The config.json of each save of a run, the first phase first."""
    saves = [folder / f"{phase}{end}" for phase in PHASES for end in ("", ".old")]
    return [save / "config.json" for save in saves if (save / "config.json").exists()]


def saved_flags(folder) -> dict:
    """The flags of a run: its config.json, or where that is lost the copy in its first save.

    {} for a run that has not begun. UserError where the two differ, or a flag is unknown or of
    another type: one of them was damaged, or is of another version.
    """
    path = folder / "config.json"
    copies = copies_of_flags(folder)
    try:
        flags = read_json(path)
    except UserError as error:
        if not copies and path.exists():
            raise
        if not copies:
            return {}
        print(f"{error}; the copy {copies[0]} is used")
        path = copies[0]
        flags = read_json(path)
    known = {field.name: field.type for field in fields(Config)}
    for name, value in flags.items() if isinstance(flags, dict) else ():
        allowed = (float, int) if known.get(name) is float else known.get(name, ())
        if not isinstance(value, allowed):
            raise UserError(f"{path}: no flag {name!r}, or not {value!r}; mend or delete it there")
    theirs = read_json(copies[0]) if copies else flags
    for name in SAME:
        if not isinstance(flags, dict) or flags.get(name) != theirs.get(name):
            copy = copies[0] if copies else "a config.json"
            raise UserError(f"{path} and {copy} differ in {name}: copy the right one over it")
    return flags


def refuse(message):
    """What argparse found wrong, as one line."""
    raise UserError(f"{message}; see --help")


def refuse_unknown_flags(parser):
    known = {name for action in parser._actions for name in action.option_strings}
    for word in sys.argv[1:]:
        name = word.split("=")[0]
        number = name[1:2].isdigit() or name[1:2] == "."
        if name.startswith("-") and name not in known and not number:
            close = difflib.get_close_matches("--" + name.lstrip("-"), known, 1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            raise UserError(f"unknown flag {name}: {hint}")


def check(config):
    """UserError for a value that no run could have."""
    limits = [
        ("seed", 0 <= config.seed < 2**32, "0 to 4294967295"),
        ("temperature", config.temperature > 0, "above 0 in training, or all members are alike"),
        ("success_reward", config.success_reward > 0, "above 0"),
        ("clip", config.clip > 0, "above 0"),
        ("dual_clip", config.dual_clip > 1, "above 1"),
        ("grad_clip", config.grad_clip > 0, "above 0"),
        ("skill_share", 0 <= config.skill_share <= 1, "0 to 1"),
        (
            "group_size",
            config.group_size > 1 or config.skill_share in (0, 1),
            "2 at least, a plain and a skilled member, unless --skill_share is 0 or 1",
        ),
        ("active_above", -1 <= config.active_above <= 1, "-1 to 1, as Delta_g"),
        ("gamma", 0 <= config.gamma <= 1, "0 to 1"),
        ("ema", 0 <= config.ema <= 1, "0 to 1"),
        ("beta2", 0 <= config.beta2 < 1, "0 to below 1"),
    ]
    if config.trust_games and config.engine != "textworld":
        raise UserError("--trust_games is for --engine textworld; the fast engine runs no code")
    limits += [(name, getattr(config, name) >= 1, "1 at least") for name in AT_LEAST_ONE]
    limits += [(name, getattr(config, name) >= 0, "0 or more") for name in NOT_NEGATIVE]
    for name, words in CHOICES.items():
        limits.append((name, getattr(config, name) in words, " or ".join(words)))
    for name, is_right, limit in limits:
        if not is_right:
            raise UserError(f"--{name} {getattr(config, name)}: must be {limit}")


def other_config(folder, name, old, new) -> UserError:
    remedy = "repeat that value, choose another --run, or delete the folder (and its .old)"
    return UserError(f"{folder} was made with --{name} {old}, not {new}; {remedy}")


# --------------------------------------------------------------------------------------------------
# Small files
# --------------------------------------------------------------------------------------------------


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # also bytes that are no text
        remedy = "delete it or download the data again"
        raise UserError(f"{path}: not readable as JSON ({error}); {remedy}") from None


def read_jsonl(path) -> list:
    """The records of a file with a JSON object on each line. UserError for a line that is none."""
    records = []
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            remedy = "mend or delete that line"
            raise UserError(f"{path}, line {number}: not a JSON object; {remedy}")
        records.append(record)
    return records


def write_atomically(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
