"""What the three phases share: config, policy, rollout, GiGPO advantages, losses, update, run
folder. Skills are in `skills.py`, sampling is in `generation.py`, the worlds are in `envs.py`, and
what several GPUs need is in `parallel.py`.

Read it in this order: `rollout` (episodes), `gigpo_advantages` (credit), `clipped_policy_loss`,
`k3_kl` and `internalization_loss` (the three terms of the objective), `update` (one optimizer
pass). Nothing here knows which phase calls it. Shapes: B rows, L tokens of the padded row, V
vocabulary. A row is one step of an episode: its prompt and its response, an independent training
example (there is no multi-turn concatenation).

Every row is padded on the right and passed without an attention mask: causal attention never looks
at the padding, so the logits of the real tokens are exact and the fast attention path is kept.
"""

import difflib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import optimi
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerFast
from transformers import Qwen2Config
from transformers import logging as transformers_logging

import envs
import parallel
from envs import UserError, read_jsonl, write_atomically
from generation import FAMILIES, Cache, encode_prompts, generate
from skills import Skill, SkillBank, evaluate_skills, group_deltas  # noqa: F401
from skills import parse_skill, skill_line, skill_table  # noqa: F401

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# --------------------------------------------------------------------------------------------------
# Configuration: every field is a flag, `--help` is the documentation
# --------------------------------------------------------------------------------------------------


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Defaults are the 7B numbers of the GiGPO paper and code; a preset, then a flag, overrides."""

    preset: str = flag("tiny", "defaults to start from: tiny, {alfworld,webshop}-{7b,1.5b}")
    run: str = flag("tiny", "name of the run; everything is written under runs/<run>/")
    seed: int = flag(0, "seed of tasks, sampling and shuffling")
    # the world
    env: str = flag("alfworld", "the world: alfworld or webshop")
    engine: str = flag("fast", "fast: plain Python; textworld: the stock package (50 ms a step)")
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
    # rollout
    tasks: int = flag(16, "tasks (groups) per iteration")
    group_size: int = flag(8, "episodes per task; in phases 1 and 2 half of them carry the skills")
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
    ref_offload: bool = flag(False, "keep the reference on the CPU between its passes")
    skip_zero_rows: bool = flag(True, "leave out rows with advantage 0, which only carry KL")
    # phase 0
    n_req: int = flag(512, "N_req: successful plain episodes to collect before mining starts")
    warmup_iterations: int = flag(40, "phase 0 ends after this many iterations even below n_req")
    # phase 1
    mine_iterations: int = flag(40, "iterations of phase 1")
    mine_every: int = flag(5, "I_mine: iterations between two rounds of mining")
    mine_episodes: int = flag(12, "successful episodes summarized in one round")
    mine_obs_chars: int = flag(200, "observations in the summary prompt are cut to this length")
    top_k: int = flag(3, "skills in a prompt, at most; at most one of them a candidate")
    ema: float = flag(0.3, "alpha of u <- (1 - alpha) u + alpha Delta_g")
    n_eval: int = flag(4, "N_eval: evaluations before a skill is promoted or retired")
    active_above: float = flag(0.05, "a candidate with a utility above this becomes active")
    # phase 2
    distill_iterations: int = flag(85, "iterations of phase 2")
    lambda_max: float = flag(0.1, "largest weight of the internalization loss; 0 switches it off")
    lambda_iterations: int = flag(10, "iterations over which lambda rises linearly to lambda_max")
    advantage_clip: float = flag(1.0, "c: internalization weights are clipped to [0, c]")
    # housekeeping
    save_every: int = flag(5, "iterations between saves; a stopped phase goes on from the last")
    dry_run: bool = flag(False, "print the memory that the run needs, part by part, and stop")
    samples: int = flag(2, "episodes written out readably in each iteration")


SMALL = "Qwen/Qwen2.5-1.5B-Instruct"
WEBSHOP = dict(  # the numbers of GiGPO's WebShop script where they differ (method 3.5)
    env="webshop", max_steps=15, max_prompt_tokens=6144, minibatch_rows=64, normalize_std=False
)
TINY = dict(
    dtype="float32", gradient_checkpointing=False, tasks=16, generation_rows=128,
    max_prompt_tokens=1024, max_response_tokens=64, lr=3e-4, kl_coef=0.003, minibatch_rows=256,
    micro_tokens=2048, recompute_old=False, beta2=0.999, ema=0.2, n_req=220, warmup_iterations=8,
    mine_iterations=4, mine_every=2, mine_episodes=6, mine_obs_chars=60,
    distill_iterations=26, lambda_iterations=4,
)  # fmt: skip
PRESETS = {
    "alfworld-7b": {"run": "alfworld-7b"},
    "alfworld-1.5b": {"run": "alfworld-1.5b", "model": SMALL},
    "webshop-7b": {"run": "webshop-7b", **WEBSHOP},
    "webshop-1.5b": {"run": "webshop-1.5b", "model": SMALL, **WEBSHOP},
    # the embedded default (tiny.py, tiny_shop.py): 0.7M parameters, minutes on 2 cores
    "tiny": dict(data="runs/tiny-games", model="tiny", max_steps=14, **TINY),
    "tiny-webshop": dict(  # also what `--preset tiny --env webshop` means
        env="webshop", run="tiny-webshop", data="runs/tiny-shop", model="tiny-webshop",
        max_steps=8, history=1,
        # shopping is learned so fast that warm-up alone would leave nothing to the other phases
        **TINY | dict(lr=1e-4, n_req=80, mine_iterations=3),
    ),
}  # fmt: skip
SAME = (  # in all phases of a run
    "preset", "env", "engine", "data", "human_goals", "split_rule", "model", "seed", "history",
)  # fmt: skip


def parse_config(phase: str, doc: str, extra=None):
    """Flags -> Config, or (Config, extra dataclass).

    Precedence: flag, the run's config.json (for the phases after warmup), preset, default.
    UserError for an unknown flag or preset, or a value of SAME that the run was not made with.
    """
    parser = HfArgumentParser([Config, extra] if extra else [Config], description=doc)
    known = {name for action in parser._actions for name in action.option_strings}
    for word in sys.argv[1:]:
        name = word.split("=")[0]
        if name.startswith("--") and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            raise UserError(f"unknown flag {name}: {hint}")
    first, _ = parser.parse_known_args()
    if first.preset not in PRESETS:
        raise UserError(f"--preset {first.preset}: choose one of {', '.join(PRESETS)}")
    shop = (first.preset, first.env) == ("tiny", "webshop")
    parser.set_defaults(**PRESETS["tiny-webshop" if shop else first.preset])
    run = Path("runs") / parser.parse_known_args()[0].run
    saved = {}
    if phase != "warmup" and (run / "config.json").exists():
        saved = json.loads((run / "config.json").read_text())
        parser.set_defaults(**saved)
    config, *rest = parser.parse_args_into_dataclasses()
    for name in SAME if saved else ():
        if saved[name] != getattr(config, name):
            raise other_config(run, name, saved[name], getattr(config, name))
    return (config, *rest) if extra else config


def other_config(folder, name, old, new) -> UserError:
    remedy = "repeat that value, choose another --run, or delete the folder"
    return UserError(f"{folder} was made with --{name} {old}, not {new}; {remedy}")


def set_up(config: Config):
    """Seed everything, make the embedded games or products where they are meant -> the device."""
    if config.dry_run:
        import memory

        if os.environ.get("RANK", "0") == "0":
            print(memory.table(config))
        sys.exit()
    dtype_of(config)  # a wrong one ends here, before anything is made
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no CUDA device; use --device cpu")
    device = parallel.start(device)
    if parallel.world() > config.tasks:
        raise UserError(
            f"{parallel.world()} processes share --tasks {config.tasks}: start fewer, or raise it"
        )
    if config.ref_offload and parallel.world() > 1:
        raise UserError("--ref_offload is for one GPU; several split the reference among them")
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    if parallel.rank() == 0 and config.data == PRESETS["tiny"]["data"]:
        import tiny  # the embedded default knows the worlds; nothing else here knows it

        tiny.write_games(Path(config.data))
    elif parallel.rank() == 0 and config.data == PRESETS["tiny-webshop"]["data"]:
        import tiny_shop

        tiny_shop.write_catalogue(Path(config.data))
    parallel.wait()
    return device


def run_script(main):
    """Run a script's main; a UserError becomes one line and exit code 2, Ctrl-C one and 130."""
    try:
        main()
        parallel.stop()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        remedy = "lower --micro_tokens (update) or --generation_rows (rollout); --dry_run explains"
        print(f"error: out of memory ({str(error).splitlines()[0]}); {remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last save", file=sys.stderr)
        sys.exit(130)


# --------------------------------------------------------------------------------------------------
# The policy
# --------------------------------------------------------------------------------------------------


SHAPES = {  # Qwen2.5 with random weights, to measure without a download
    "qwen2.5-7b-shape": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ),
    "qwen2.5-1.5b-shape": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    ),
}  # fmt: skip


def local_path(path) -> Path | str:
    """"tiny" and "tiny-webshop" are folders of this project; anything else stays as it is."""
    shipped = {"tiny": "tiny_policy", "tiny-webshop": "tiny_policy_webshop"}
    folder = Path(__file__).resolve().parent
    return folder / shipped[str(path)] if str(path) in shipped else path


def dtype_of(config) -> torch.dtype:
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    except KeyError:
        raise UserError(f"--dtype {config.dtype}: choose float32 or bfloat16") from None


def load_policy(path, config: Config, device, trainable=True):
    """Hub name, folder or name of `SHAPES` -> (model, tokenizer)."""
    path = local_path(path)
    known = Path(path).exists() or path in SHAPES
    if not known and (str(path).count("/") != 1 or str(path).startswith((".", "/", "runs/"))):
        raise UserError(
            f"{path}: no such model folder; give --model a folder in HF format or a hub name"
        )
    dtype = dtype_of(config)
    try:
        # tokenizer.json as it is: AutoTokenizer would put Qwen2's own pre-tokenizer in its place
        words = local_path("tiny") if path in SHAPES else path
        tokenizer = PreTrainedTokenizerFast.from_pretrained(words)
        if path in SHAPES:
            shape = Qwen2Config(**SHAPES[path], eos_token_id=tokenizer.eos_token_id)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--model {path}: cannot be loaded ({reason}); give a local folder or a hub name"
        ) from None
    if (family := model.config.model_type) not in FAMILIES:
        raise UserError(f"--model {path} is a {family}; generation.py reads {', '.join(FAMILIES)}")
    model.requires_grad_(trainable)
    if trainable and config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.23
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    parallel.shard(model)
    return model.eval(), tokenizer  # no dropout in training either: ratios start at exactly 1


def load_reference(config: Config, device):
    """The frozen policy before phase 0, or None when its KL has no weight."""
    device = "cpu" if config.ref_offload else device
    return load_policy(config.model, config, device, trainable=False)[0] if config.kl_coef else None


def make_optimizer(model, config: Config, state=None):
    """AdamW; it goes on from `state`, through the phases too.

    A bfloat16 weight has 8 significant bits: at lr 1e-6 plain AdamW moves 2% of the weights, the
    rest of its steps is rounded away. optimi's AdamW keeps what each weight lost in a buffer (Kahan
    summation) and adds it once it counts. Float32 weights need and get no buffer.
    """
    decay = config.weight_decay
    optimizer = optimi.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, config.beta2), eps=1e-8, weight_decay=decay
    )
    if state:
        parameters = list(model.parameters())
        parts = {
            i: {name: parallel.split_like(x, parameters[i]) for name, x in part.items()}
            for i, part in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": parts})
        for group in optimizer.param_groups:  # but with the flags of this phase
            group.update(lr=config.lr, weight_decay=decay)
    return optimizer


# --------------------------------------------------------------------------------------------------
# Rollout
# --------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One step of an episode: one training row. Both prompts are kept for phase 2."""

    obs: str  # the raw observation: GiGPO's anchor state
    plain_ids: list  # token ids of the plain prompt x_t
    prompt_ids: list  # token ids of the prompt the policy saw: x_t, or xs_t with the skill block
    response: str
    response_ids: list
    logprobs: list  # of the response tokens, at sampling time
    action: str
    valid: bool  # the response was well-formed
    reward: float


@dataclass
class Episode:
    item: str
    group: str  # the task instance: the GiGPO group
    task: str
    task_type: str
    skills: tuple = ()  # the skills in its prompt; empty in the plain arm
    steps: list = field(default_factory=list)
    success: bool = False
    score: float = 0.0


def plan_rollouts(
    items, config, bank=None, statuses=("candidate", "active"), members=None, skilled=None
) -> list:
    """Items -> [(item, group, skills)]: `members` of each, by default half of them with skills.

    A group whose bucket has no skill is all plain. An item is the same game in the same initial
    state for all, so the two halves differ in the skill block alone (method 5.4).
    """
    members = config.group_size if members is None else members
    skilled = members // 2 if skilled is None else skilled
    if members < 1 or not items:
        raise UserError("an empty group: --tasks and --group_size must be 1 at least")
    plan = []
    for number, item in enumerate(items):
        skills = ()
        if bank:
            obs = envs.make_env(config.env, item, config.engine).reset()
            skills = tuple(bank.retrieve(obs.task, obs.task_type, config.top_k, statuses))
        for member in range(members):
            plan.append((item, f"{number}:{item}", skills if member < skilled else ()))
    return plan


def rollout(model, tokenizer, config, plan, *, temperature, seed, desc="rollout") -> list:
    """Play every (item, group, skills) of `plan` to its end -> [Episode].

    All games run in this process, one step of each at a time; finished ones leave the batch. Of
    several processes each plays its own groups; all return all episodes, in the order of `plan`.
    """
    groups = set(parallel.share(list(dict.fromkeys(group for _, group, _ in plan))))
    own = [member for member in plan if member[1] in groups]
    with parallel.whole(model):
        episodes = play(model, tokenizer, config, own, temperature, seed, desc) if own else []
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # the KV cache makes room for the update
    episodes = parallel.gather(episodes)
    for episode, (_, _, skills) in zip(episodes, plan, strict=True):
        episode.skills = skills  # the bank's own objects again: what is gathered are copies
    return episodes


def play(model, tokenizer, config, plan, temperature, seed, desc) -> list:
    """The episodes of this process."""
    games = [envs.make_env(config.env, item, config.engine) for item, _, _ in plan]
    states = [game.reset() for game in games]
    episodes = [Episode(*p[:2], o.task, o.task_type, p[2]) for p, o in zip(plan, states)]
    running, tokens, start = list(range(len(plan))), 0, time.time()
    rows, quiet = min(config.generation_rows, len(plan)), parallel.rank() > 0
    cache = Cache(model, rows, config.max_prompt_tokens + config.max_response_tokens)
    with tqdm(total=len(plan), desc=desc, unit="episode", leave=False, disable=quiet) as bar:
        for t in range(config.max_steps):
            prompts = fit_prompts(tokenizer, config, [(episodes[i], states[i]) for i in running])
            answers = generate(
                model, tokenizer, [used for _, used in prompts], temperature=temperature,
                max_new_tokens=config.max_response_tokens, rows=rows, cache=cache,
                seed=1000 * seed + 100 * parallel.rank() + t,
            )  # fmt: skip
            still = []
            for i, (plain, used), (ids, logprobs, text) in zip(running, prompts, answers):
                episode, obs = episodes[i], states[i].text
                action, valid = envs.parse_action(text, envs.FALLBACK_CHARS[config.env])
                states[i], reward, done, info = games[i].step(action)
                reward *= config.success_reward
                step = Step(obs, plain, used, text, ids, logprobs, action, valid, reward)
                episode.steps.append(step)
                episode.success, episode.score = info["success"], info["score"]
                tokens += len(ids)
                if not done:
                    still.append(i)
            bar.update(len(running) - len(still))
            running = still
            invalid = np.mean([not s.valid for e in episodes for s in e.steps])
            bar.set_postfix_str(
                f"step {t + 1}, success {np.mean([e.success for e in episodes]):.2f}, "
                f"invalid {invalid:.2f}, {tokens / (time.time() - start):.0f} tokens/s"
            )
            if not running:
                break
    return episodes


def fit_prompts(tokenizer, config, pairs) -> list:
    """[(episode, observation)] -> [(ids of the plain prompt, ids of the prompt to use)].

    A prompt longer than `max_prompt_tokens` loses history, oldest first; UserError if that is not
    enough.
    """

    def encode(keep, chosen):  # plain and used prompt of each pair, with `keep` steps of history
        prompts = []
        for episode, obs in chosen:
            past = [(step.obs, step.action) for step in episode.steps]
            skills = [(skill.condition, skill.strategy) for skill in episode.skills]
            prompts += [envs.build_prompt(obs, past, s, keep) for s in ((), skills)]
        ids = encode_prompts(tokenizer, prompts)
        return list(zip(ids[::2], ids[1::2]))

    fitted = encode(config.history, pairs)
    for i, pair in enumerate(pairs):
        for keep in reversed(range(config.history)):
            if max(map(len, fitted[i])) > config.max_prompt_tokens:
                (fitted[i],) = encode(keep, [pair])
        if (longest := max(map(len, fitted[i]))) > config.max_prompt_tokens:
            raise UserError(
                f"{pair[0].item}: the prompt of step {len(pair[0].steps) + 1} without history has "
                f"{longest} tokens; raise --max_prompt_tokens ({config.max_prompt_tokens} now)"
            )
    return fitted


# --------------------------------------------------------------------------------------------------
# GiGPO advantages
# --------------------------------------------------------------------------------------------------


def gigpo_advantages(
    groups, rewards, anchors, *, gamma=0.95, step_weight=1.0, normalize_std=True,
    baseline="steps", penalties=None,
) -> list:  # fmt: skip
    """Group-in-group advantages A = A_E + w A_S (GiGPO, arXiv 2505.10978, Eq. 3-8).

    | argument  | per          | meaning                                                          |
    |-----------|--------------|------------------------------------------------------------------|
    | groups    | episode      | hashable: the task instance                                      |
    | rewards   | episode, [T] | raw environment reward of each step                              |
    | anchors   | episode, [T] | hashable anchor state (raw observation) of each step             |
    | penalties | episode, [T] | >= 0, off that row's episode score and step return, no further   |
    | baseline  |              | "steps": mean and std over a group's rows, so long episodes weigh |
    |           |              | more (verl-agent's code); "episodes": over its episodes (Eq. 3)  |

    Returns one array [T] per episode, in verl-agent's arithmetic: unbiased std, eps 1e-6; a group
    of one row has mean 0 and std 1, an anchor group of one row advantage 0. step_weight=0 is GRPO.

    Two episodes of one task, the first solved (10) in two steps, the second not (0), both from the
    state "hall":

    >>> gigpo_advantages(["g", "g"], [[0, 10], [0]], [["hall", "desk"], ["hall"]],
    ...                  gamma=0.5, normalize_std=False)
    [array([5.83333333, 3.33333333]), array([-9.16666667])]

    Rows score 10, 10, 0, mean 6.67: A_E = 3.33, 3.33, -6.67. Step returns are 5, 10 and 0. The
    state "hall" was met twice (returns 5 and 0, mean 2.5: A_S = 2.5, -2.5), "desk" once (A_S = 0).
    """
    penalties = penalties or [np.zeros(len(r)) for r in rewards]
    scores = [sum(r) - np.asarray(p, float) for r, p in zip(rewards, penalties)]  # S of every row
    step_returns = []  # G_t = sum_{u >= t} gamma^(u - t) r_u  (Eq. 6)
    for r, p in zip(rewards, penalties):
        tail, backwards = 0.0, []
        for reward in reversed(r):
            tail = reward + gamma * tail
            backwards.append(tail)
        step_returns.append(np.array(backwards[::-1]) - np.asarray(p, float))

    def mean_std(x):
        return np.mean(x), np.std(x, ddof=1)

    def scale(deviation, std):
        return deviation / (std + 1e-6) if normalize_std else deviation

    # A_E: how good the episode was among those of the same task (Eq. 3)
    samples = defaultdict(list)
    for group, r, score in zip(groups, rewards, scores):
        samples[group] += list(score) if baseline == "steps" else [float(sum(r))]
    stats = {g: mean_std(x) if len(x) > 1 else (0.0, 1.0) for g, x in samples.items()}
    advantages = [scale(score - stats[g][0], stats[g][1]) for g, score in zip(groups, scores)]

    # A_S: how good the step was among those from the same state of the same task (Eq. 7)
    samples = defaultdict(list)
    for group, states, step_return in zip(groups, anchors, step_returns):
        for state, value in zip(states, step_return):
            samples[group, state].append(value)
    stats = {key: mean_std(x) if len(x) > 1 else (x[0], 1.0) for key, x in samples.items()}
    for i, (group, states) in enumerate(zip(groups, anchors)):
        for t, state in enumerate(states):
            mean, std = stats[group, state]
            advantages[i][t] += step_weight * scale(step_returns[i][t] - mean, std)  # Eq. 8
    return advantages


def episode_advantages(episodes, config) -> list:
    """GiGPO advantages; both arms of a task are one group, the anchor is the bare observation."""
    return gigpo_advantages(
        [e.group for e in episodes],
        [[s.reward for s in e.steps] for e in episodes],
        [[s.obs for s in e.steps] for e in episodes],
        gamma=config.gamma,
        step_weight=config.step_weight,
        normalize_std=config.normalize_std,
        baseline=config.baseline,
        penalties=[[config.invalid_penalty * (not s.valid) for s in e.steps] for e in episodes],
    )


# --------------------------------------------------------------------------------------------------
# Losses: pure functions of token tensors
# --------------------------------------------------------------------------------------------------


def masked_mean(values, mask):
    """Mean over the True positions of `mask`; 0 when there are none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, *, clip=0.2, dual_clip=3.0):
    """PPO's clipped surrogate with dual clip, token-mean (method 3.4). All [B, L] -> scalar.

    max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = exp(logprob - old); for A < 0 at most
    -A dual_clip.
    """
    ratio = (logprobs - old_logprobs).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return masked_mean(loss, mask)


def k3_kl(logprobs, ref_logprobs, mask):
    """Token-mean k3 estimate of KL(policy || reference). All [B, L] -> scalar.

    exp(d) - d - 1 with d = ref - logprob (http://joschu.net/blog/kl-approx.html), clamped to
    [-10, 10] as in verl-agent.
    """
    d = (ref_logprobs - logprobs).clamp(-20, 20)
    return masked_mean((d.exp() - d - 1).clamp(-10, 10), mask)


def internalization_loss(logprobs, advantages, utility, used_skill, action_mask, *, clip=1.0):
    """Gated, advantage-weighted self-imitation under the plain prompt (SIRI, method 6.1-6.2).

    | argument    | shape       | meaning                                                    |
    |-------------|-------------|------------------------------------------------------------|
    | logprobs    | [B, L]      | of the skill arm's response, given the PLAIN prompt        |
    | advantages  | [B]         | GiGPO advantage of the row, in units of the reward's scale |
    | utility     | [B]         | Delta_g of the row's group                                 |
    | used_skill  | [B] bool    | the episode had skills in its prompt                       |
    | action_mask | [B, L] bool | tokens of the action                                       |

    gate = used_skill and utility > 0 and action token;  w = clamp(advantage, 0, clip), constant;
    returns the scalar - sum(gate * w * logprob) / max(1, sum(gate)).
    """
    gate = action_mask & (used_skill & (utility > 0))[:, None]  # [B, L]
    weight = advantages.detach().clamp(0, clip)[:, None]  # [B, 1]
    return -(gate * weight * logprobs).sum() / gate.sum().clamp(min=1)


# --------------------------------------------------------------------------------------------------
# Update
# --------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A training row. An RL row trains its response; a distillation row its gated action tokens."""

    prompt_ids: list
    response_ids: list
    advantage: float
    rollout_logprobs: list
    distill: bool = False  # prompt_ids is the plain prompt of a skill-arm step; only L_int applies
    utility: float = 0.0
    action_mask: list = field(default_factory=list)  # per response token
    rank: int = 0  # of the process that trains it
    old_logprobs: torch.Tensor | None = None  # filled by `update`, per response token
    ref_logprobs: torch.Tensor | None = None

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)


def rl_rows(episodes, advantages, config) -> list:
    """Every step under its own prompt; without the steps that have nothing to teach."""
    rows = [
        Row(step.prompt_ids, step.response_ids, float(a), step.logprobs)
        for episode, row in zip(episodes, advantages)
        for step, a in zip(episode.steps, row)
    ]
    return [row for row in rows if abs(row.advantage) > 1e-8] if config.skip_zero_rows else rows


def action_mask(tokenizer, response_ids) -> list:
    """True for tokens that overlap the text inside <action>...</action> or the closing tag (6.1).

    Offsets come from decoding the sampled tokens, one prefix after the other, since a sampled
    response need not be tokenized as the tokenizer would. No parsable action: all False. Thoughts
    and EOS are never included.
    """
    prefixes = [response_ids[:i] for i in range(1, len(response_ids) + 1)]
    texts = tokenizer.batch_decode(prefixes, skip_special_tokens=True) or [""]
    match = re.search(r"<action>(.*?</action>)", texts[-1], re.S | re.I)
    if not match:
        return [False] * len(response_ids)
    start, stop = match.span(1)
    ends = list(map(len, texts))
    return [begin < stop and end > max(start, begin) for begin, end in zip([0, *ends], ends)]


def collate(rows, pad_id, device) -> dict:
    """Rows -> right-padded tensors [B, L] and per-row tensors [B]."""
    shape = (len(rows), max(map(len, rows)))
    batch = {"ids": torch.full(shape, pad_id)}
    for name in ("response_mask", "action_mask", "old_logprobs", "ref_logprobs"):
        batch[name] = torch.zeros(shape, dtype=torch.bool if "mask" in name else torch.float32)
    for i, row in enumerate(rows):
        span = slice(len(row.prompt_ids), len(row))
        batch["ids"][i, : len(row)] = torch.tensor(row.prompt_ids + row.response_ids)
        batch["response_mask"][i, span] = True  # EOS included: the policy must learn to stop
        if row.distill:
            batch["action_mask"][i, span] = torch.tensor(row.action_mask)
        for name in ("old_logprobs", "ref_logprobs"):
            if getattr(row, name) is not None:
                batch[name][i, span] = getattr(row, name)
    for name, key in (("advantages", "advantage"), ("utility", "utility"), ("distill", "distill")):
        batch[name] = torch.tensor([getattr(row, key) for row in rows])
    return {name: value.to(device) for name, value in batch.items()}


def token_logprobs(model, ids, response_mask, temperature=1.0):
    """Log-probs of the response tokens, and entropies there -> two [B, L], 0 outside the mask.

    logits[:, t] predict ids[:, t + 1], so the log-prob of token t comes from position t - 1. Only
    positions that some row needs get logits: [B, K, V] with K much smaller than L.
    """
    at = response_mask.any(0).nonzero()[:, 0]  # [K] positions of response tokens
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=at - 1).logits  # [B, K, V]
    log_p = (logits.float() / temperature).log_softmax(-1)
    picked = log_p.gather(-1, ids[:, at, None])[..., 0]  # [B, K]
    entropy = -(log_p.exp() * log_p).sum(-1)  # [B, K]
    logprobs, entropies = log_p.new_zeros(ids.shape), log_p.new_zeros(ids.shape)  # [B, L]
    logprobs[:, at], entropies[:, at] = picked, entropy
    return logprobs * response_mask, entropies * response_mask


NOTHING = Row([0], [0], 0.0, [0.0], distill=True, action_mask=[False])  # a row without any weight


def micro_batches(rows, max_tokens) -> list:
    """This process's rows sorted by length and cut so that rows x longest row <= `max_tokens`, or
    one row.

    All processes get equally many, since they pass the model together; NOTHING fills up.
    """
    lists = [[] for _ in range(parallel.world())]
    for row in sorted(rows, key=len):
        batches = lists[row.rank]
        if not batches or (len(batches[-1]) + 1) * len(row) > max_tokens:
            batches.append([])
        batches[-1].append(row)
    own, most = lists[parallel.rank()], max(map(len, lists))
    return own + [[NOTHING]] * (most - len(own))


@torch.no_grad()
def score_rows(model, rows, name, config, pad_id):
    """Set row.<name> of this process's rows to the log-probs of the response under `model`, by the
    training forward.
    """
    for batch in micro_batches(rows, 2 * config.micro_tokens):
        t = collate(batch, pad_id, model.device)
        logprobs, _ = token_logprobs(model, t["ids"], t["response_mask"], config.temperature)
        for row, values in zip(batch, logprobs.cpu()):
            setattr(row, name, values[len(row.prompt_ids) : len(row)].clone())


def backward(model, rows, config, lambda_, pad_id) -> dict:
    """Accumulate the gradient of the objective over one mini-batch of rows -> terms of the loss.

        L = L_GiGPO + beta L_KL - c_H H + lambda L_int                     (SIRI, method 3.4, 6.3)

    Each term is a mean over its tokens in the whole mini-batch: a micro-batch counts by its share
    of them, so the gradient does not depend on how the rows are cut.
    """
    # `rows` are those of all processes, so the counts need no talk between them
    rl_tokens = sum(len(row.response_ids) for row in rows if not row.distill)
    gate_tokens = sum(sum(row.action_mask) for row in rows if row.distill and row.utility > 0)
    totals = defaultdict(float)
    for batch in micro_batches(rows, config.micro_tokens):
        t = collate(batch, pad_id, model.device)
        ids, responses = t["ids"], t["response_mask"]
        logprobs, entropies = token_logprobs(model, ids, responses, config.temperature)
        old, mask = t["old_logprobs"], responses & ~t["distill"][:, None]  # [B, L]
        gate = t["action_mask"] & (t["utility"] > 0)[:, None]  # [B, L]
        share, gate_share = mask.sum() / max(1, rl_tokens), gate.sum() / max(1, gate_tokens)

        policy = share * clipped_policy_loss(
            logprobs, old, t["advantages"][:, None], mask,
            clip=config.clip, dual_clip=config.dual_clip,
        )  # fmt: skip
        kl = share * k3_kl(logprobs, t["ref_logprobs"], mask) if config.kl_coef else 0 * share
        entropy = share * masked_mean(entropies, mask)
        internalize = gate_share * internalization_loss(
            logprobs, t["advantages"], t["utility"], t["distill"], t["action_mask"],
            clip=config.advantage_clip,
        )  # fmt: skip
        loss = policy + config.kl_coef * kl - config.entropy_coef * entropy + lambda_ * internalize
        (loss * parallel.world()).backward()  # FSDP takes the mean over processes, we the sum

        with torch.no_grad():
            log_ratio = logprobs - old
            clipped = share * masked_mean((log_ratio.exp() - 1).abs() > config.clip, mask)
            log_ratio = share * masked_mean(log_ratio.abs(), mask)
        names = ("loss", "policy", "kl", "entropy", "internalize", "clipped", "log_ratio")
        values = torch.stack([loss, policy, kl, entropy, internalize, clipped, log_ratio]).tolist()
        for name, value in zip(names, values):
            totals[name] += value
    return parallel.total(totals)


def update(model, reference, optimizer, rows, config, *, tokenizer, seed, lambda_=0.0) -> dict:
    """One pass over the rows, an optimizer step per `minibatch_rows` -> metrics.

    RL and distillation rows are shuffled together, so both act in every step (6.4). Old log-probs
    are recomputed with the training forward, so ratios start at 1, or taken from the sampler
    (--recompute_old); how far the two are apart is logged as `logprob_gap`.
    """
    if not rows:
        return {"rows": 0, "distill_rows": 0, "optimizer_steps": 0}
    pad_id, start = tokenizer.pad_token_id or 0, time.time()
    rows = random.Random(seed).sample(rows, len(rows))
    steps = max(1, round(len(rows) / config.minibatch_rows))
    batches = [rows[n * len(rows) // steps : (n + 1) * len(rows) // steps] for n in range(steps)]
    for batch in batches:
        for i, row in enumerate(sorted(batch, key=len)):
            row.rank = i % parallel.world()

    trained = [row for row in rows if not row.distill]
    for row in trained:
        row.old_logprobs = torch.tensor(row.rollout_logprobs)
    if config.recompute_old:
        score_rows(model, trained, "old_logprobs", config, pad_id)
    if reference is not None:
        reference.to(model.device)  # from the CPU with --ref_offload, else it is there
        score_rows(reference, trained, "ref_logprobs", config, pad_id)
        if config.ref_offload:
            reference.to("cpu")

    logs, bar = [], tqdm(
        total=len(rows), desc="update", unit="row", leave=False, disable=parallel.rank() > 0
    )
    model.train()  # gradient checkpointing works in train mode only; these models have no dropout
    for batch in batches:
        log = backward(model, batch, config, lambda_, pad_id)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # no memory for gradients during the next rollout
        logs.append(log | {"grad_norm": float(parallel.join(norm))})
        bar.update(len(batch))
        bar.set_postfix(loss=f"{log['loss']:.3f}")
    model.eval()
    bar.close()
    gap = logs[0]["log_ratio"]  # of the first step, before the policy has moved
    if config.recompute_old:
        own = [row for row in trained if row.rank == parallel.rank()]
        gaps = [(row.old_logprobs - torch.tensor(row.rollout_logprobs)).abs() for row in own]
        gap = torch.cat(gaps).mean().item() if gaps else 0.0
    return {name: float(np.mean([log[name] for log in logs])) for name in logs[0]} | {
        "rows": len(trained),
        "distill_rows": len(rows) - len(trained),
        "optimizer_steps": steps,
        "logprob_gap": gap,
        "update_tokens_per_s": sum(map(len, rows)) / (time.time() - start),
    }


# --------------------------------------------------------------------------------------------------
# The run folder
# --------------------------------------------------------------------------------------------------


def load_state(folder) -> dict:
    """state.pt of a phase; the optimizer's part stays in the file until it is used."""
    return torch.load(folder / "state.pt", weights_only=False, mmap=True)


class Run:
    """runs/<name>/: config.json, metrics.jsonl, episodes.jsonl; per phase model/ and state.pt."""

    def __init__(self, config, phase):
        self.config, self.phase, self.root = config, phase, Path("runs") / config.run
        self.clock = time.time()  # of the last line of the log
        self.folder = self.root / phase
        if phase == "warmup" and not self.folder.exists() and parallel.rank() == 0:
            write_atomically(self.root / "config.json", json.dumps(asdict(config), indent=2))

    def resume_or_start(self, after) -> tuple:
        """(folder to load from, state): this phase's last save, else the end of phase `after`.

        UserError unless `after` has finished.
        """
        folder, command = self.root / after, f"`python {after}.py --run {self.config.run}`"
        if not (folder / "model").exists():
            raise UserError(f"{folder}/model is missing: run {command} first")
        before = load_state(folder)
        if not before["finished"]:
            raise UserError(f"{folder} is not finished: {command} goes on with it")
        state = self.resume()
        return (self.folder, state) if state else (folder, {**before, "iteration": 0})

    def save(self, model, tokenizer, optimizer, bank=None, **state):
        """Save the phase as one folder, swapped in whole: interrupted, the last good one stays."""
        weights, moments = parallel.join(model.state_dict()), parallel.join(optimizer.state_dict())
        if parallel.rank() > 0:
            return
        part, old = (self.root / f"{self.phase}.{suffix}" for suffix in ("part", "old"))
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part / "model", state_dict=weights)
        tokenizer.save_pretrained(part / "model")
        torch.save({"optimizer": moments, **state}, part / "state.pt")
        write_atomically(part / "config.json", json.dumps(asdict(self.config), indent=2))
        if bank:
            bank.save(part / "skills.jsonl")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        part.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def resume(self):
        """The saved state of this phase, or None. Drops what was logged after that save.

        UserError if the phase was begun with another config.
        """
        old, state = self.root / f"{self.phase}.old", None
        # stopped between the two renames of `save`
        if parallel.rank() == 0 and old.exists() and not self.folder.exists():
            old.rename(self.folder)
        parallel.wait()
        if self.folder.exists():
            saved, now = json.loads((self.folder / "config.json").read_text()), asdict(self.config)
            for name in now:
                if saved.get(name) != now[name]:
                    raise other_config(self.folder, name, saved.get(name), now[name])
            state = load_state(self.folder)
        if parallel.rank() > 0:
            return state
        kept = state["iteration"] if state else 0
        for path in (self.root / "metrics.jsonl", self.root / "episodes.jsonl"):
            lines = read_jsonl(path) if path.exists() else []
            lines = [x for x in lines if x["phase"] != self.phase or x["iteration"] <= kept]
            write_atomically(path, "".join(json.dumps(x) + "\n" for x in lines))
        return state

    def log(self, iteration, metrics, episodes, line):
        """One line of metrics, a few readable episodes, one line on the screen."""
        if parallel.rank() > 0:
            return
        seconds, self.clock = time.time() - self.clock, time.time()
        where = {"phase": self.phase, "iteration": iteration}
        with open(self.root / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**where, "seconds": round(seconds, 2), **metrics}) + "\n")
        count = min(self.config.samples, len(episodes))
        with open(self.root / "episodes.jsonl", "a") as file:
            for e in random.Random(iteration).sample(episodes, count):
                readable = {
                    **where, "item": e.item, "task": e.task, "success": e.success,
                    "skills": [f"when {s.condition}: {s.strategy}" for s in e.skills],
                    "steps": [
                        {"saw": s.obs, "said": s.response, "did": s.action, "reward": s.reward}
                        for s in e.steps
                    ],
                }  # fmt: skip
                file.write(json.dumps(readable) + "\n")
        tqdm.write(f"{self.phase} {iteration:>3}  {line}")


def goal_rules(config) -> dict:
    return {"human_goals": config.human_goals, "split_rule": config.split_rule}


def list_items(config, split) -> list:
    """Every item of a split of the config's world."""
    return envs.list_items(config.env, split, config.data, **goal_rules(config))


def draw_items(items, config, phase, iteration) -> list:
    """The tasks of one iteration, without repetition; a function of seed, phase and iteration."""
    rng = random.Random(f"{config.seed} {phase} {iteration}")
    return rng.sample(items, min(config.tasks, len(items)))


def sampling_seed(config, phase, iteration) -> int:
    return random.Random(f"{config.seed} {phase} {iteration} sampling").randrange(2**31)


def plain_successes(episodes, iteration) -> list:
    """What mining needs of the solved episodes without skills (method 4: the buffer D_succ)."""
    solved = [e for e in episodes if e.success and not e.skills]
    return [
        {
            "task": e.task, "task_type": e.task_type, "iteration": iteration,
            "steps": [[s.obs, s.action] for s in e.steps],
        }
        for e in solved
    ]  # fmt: skip


def rollout_metrics(episodes, deltas=None) -> dict:
    """What every phase logs of its episodes; success_plain and success_skill are the two arms."""

    def rate(chosen):
        return float(np.mean([e.success for e in chosen])) if chosen else None

    steps = [s for e in episodes for s in e.steps]
    metrics = {
        "episodes": len(episodes),
        "success": rate(episodes),
        "success_plain": rate([e for e in episodes if not e.skills]),
        "success_skill": rate([e for e in episodes if e.skills]),
        "steps": float(np.mean([len(e.steps) for e in episodes])),
        "invalid": float(np.mean([not s.valid for s in steps])),
        "prompt_tokens": float(np.mean([len(s.prompt_ids) for s in steps])),
        "response_tokens": float(np.mean([len(s.response_ids) for s in steps])),
    }
    if deltas is not None:
        metrics["delta"] = float(np.mean(list(deltas.values()))) if deltas else None
        metrics["paired_groups"] = len(deltas)
    return metrics


def arms(metrics) -> str:
    """The success of both arms and their mean difference, for the summary line."""
    values = (metrics[name] for name in ("success_plain", "success_skill", "delta"))
    plain, skill, delta = ("  - " if x is None else f"{x:.2f}" for x in values)
    groups = metrics["paired_groups"]
    return f"success plain {plain} skill {skill}  delta {delta} in {groups} groups"


def wilson(successes: int, n: int) -> tuple:
    """95% Wilson score interval of a rate."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, successes / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)
