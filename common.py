"""What the three phases share, the mathematics first: credit, losses, then rollout, rows, update.

Read it in this order: `gigpo_advantages` (which step deserves credit), `clipped_policy_loss`,
`k3_kl` and `internalization_loss` (the terms of the objective), then how episodes are played
(`rollout`), become training rows and make an optimizer step (`update`). Nothing here knows which
phase calls it. "method Eq. 9" is an equation of docs/method.md, "GiGPO Eq. 3" of arXiv 2505.10978.

Shapes: B rows, L tokens of the padded row, V vocabulary. A row is one step of an episode: its
prompt and its response, an independent training example (no multi-turn concatenation). Rows are
padded on the right and passed without an attention mask: causal attention never looks at the
padding, so the logits of the real tokens are exact and the fast attention path is kept.
"""

import random
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import envs
from config import UserError
from runtime import guard, parallel
from runtime.generation import Cache, encode_prompts, generate, opening
from runtime.memory import LOGITS
from runtime.metrics import NO_ADVANTAGE
from skills import Skill
from worlds import Observation

SUCCESS_REWARD = 10.0  # of the step that solves the task; every other step gets 0
GRAD_CLIP = 1.0  # largest norm of the gradient

# --- Credit: which step of which episode was better than its peers --------------------------------


def gigpo_advantages(
    groups,
    rewards,
    anchors,
    *,
    gamma=0.95,
    step_weight=1.0,
    normalize_std=True,
    baseline="steps",
    penalties=None,
) -> list[np.ndarray]:
    """Group-in-group advantages A = A_E + w A_S (GiGPO Eq. 3 to 8; method Eq. 1 to 4).

    | argument  | per          | meaning                                                           |
    |-----------|--------------|-------------------------------------------------------------------|
    | groups    | episode      | hashable: the task instance                                       |
    | rewards   | episode, [T] | raw environment reward of each step                               |
    | anchors   | episode, [T] | hashable anchor state (raw observation) of each step              |
    | penalties | episode, [T] | >= 0, off that row's episode score and step return, no further    |
    | baseline  |              | "steps": mean and std over a group's rows, so long episodes weigh |
    |           |              | more (verl-agent's code); "episodes": over its episodes (Eq. 3)   |

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
    scores = []  # S of every row: what its episode earned, less the row's own penalty
    returns = []  # G_t = sum_{u >= t} gamma^(u - t) r_u, less the row's own penalty
    for episode_rewards, penalty in zip(rewards, penalties, strict=True):
        penalty = np.asarray(penalty, float)
        scores.append(sum(episode_rewards) - penalty)
        tail = 0.0
        backwards = []
        for reward in reversed(episode_rewards):
            tail = reward + gamma * tail
            backwards.append(tail)
        returns.append(np.array(backwards[::-1]) - penalty)

    peers = defaultdict(list)  # group -> the scores that its rows are compared with
    siblings = defaultdict(list)  # (group, state) -> the returns of the steps taken from there
    for e, group in enumerate(groups):
        peers[group] += list(scores[e]) if baseline == "steps" else [float(sum(rewards[e]))]
        for state, value in zip(anchors[e], returns[e], strict=True):
            siblings[group, state].append(value)

    advantages = []
    for e, group in enumerate(groups):
        # A_E: how good the episode was among those of the same task
        advantage = relative(scores[e], peers[group], normalize_std)
        # A_S: how good the step was among those from the same state of the same task
        for t, state in enumerate(anchors[e]):
            known = siblings[group, state]
            if len(known) > 1:
                step_advantage = relative(returns[e][t], known, normalize_std)
                advantage[t] += step_weight * step_advantage  # A = A_E + w A_S
        advantages.append(advantage)
    return advantages


def relative(value, peers, normalize_std):
    """(value - mean) / (std + 1e-6), or without the division; of a single peer mean 0, std 1."""
    mean, std = (np.mean(peers), np.std(peers, ddof=1)) if len(peers) > 1 else (0.0, 1.0)
    return (value - mean) / (std + 1e-6) if normalize_std else value - mean


# --- Losses: pure functions of token tensors ------------------------------------------------------
# Each is a sum over its tokens, divided by `tokens`: how many there are in the whole mini-batch, of
# which the tensors hold a part. So the gradient does not depend on how the rows are cut. Without
# `tokens` the tensors are the whole.


def token_mean(values, mask, tokens=None) -> torch.Tensor:
    """Sum over the True positions of `mask` / `tokens`; 0 when there are none."""
    return (values * mask).sum() / (tokens or mask.sum().clamp(min=1))


def clipped_policy_loss(
    logprobs, old_logprobs, advantages, mask, *, clip=0.2, dual_clip=3.0, tokens=None
) -> torch.Tensor:
    """PPO's clipped surrogate with dual clip, token-mean (method Eq. 5). All [B, L] -> scalar.

    max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = exp(logprob - old); for A < 0 at most
    -A dual_clip.
    """
    ratio = (logprobs - old_logprobs).exp()  # [B, L]
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return token_mean(loss, mask, tokens)


def k3_kl(logprobs, ref_logprobs, mask, *, tokens=None) -> torch.Tensor:
    """Token-mean k3 estimate of KL(policy || reference) (method Eq. 6). All [B, L] -> scalar.

    exp(d) - d - 1 with d = ref - logprob (http://joschu.net/blog/kl-approx.html), clamped to
    [-10, 10] as in verl-agent.
    """
    d = (ref_logprobs - logprobs).clamp(-20, 20)  # [B, L]
    return token_mean((d.exp() - d - 1).clamp(-10, 10), mask, tokens)


def internalization_loss(logprobs, weights, gate, *, tokens=None) -> torch.Tensor:
    """L_int: weighted self-imitation under the plain prompt (method Eq. 12) -> scalar.

    | argument | shape       | meaning                                                   |
    |----------|-------------|-----------------------------------------------------------|
    | logprobs | [B, L]      | of a skill half's response, given the PLAIN prompt        |
    | weights  | [B]         | w of the row (Eq. 11), constant                           |
    | gate     | [B, L] bool | the tokens that are distilled (Eq. 10)                    |

    - sum(gate * w * logprob) / max(1, sum(gate))
    """
    return -token_mean(weights[:, None] * logprobs, gate, tokens)


# --- Rollout --------------------------------------------------------------------------------------


@dataclass
class Step:
    """One step of an episode: one training row. Both prompts are kept for phase 2."""

    obs: str  # the raw observation: GiGPO's anchor state
    plain_ids: list[int]  # the plain prompt x_t
    prompt_ids: list[int]  # the prompt the policy saw: x_t, or xs_t with the skill block
    response: str  # with what the template writes of it
    response_ids: list[int]
    logprobs: list[float]  # of the response tokens, at sampling time
    action: str
    valid: bool  # the response was well-formed
    reward: float = 0.0
    distilled: dict = field(default_factory=dict)  # what phase 2 took of it, for its transcript


@dataclass
class Episode:
    """A member of a group, with its game, and the steps that `rollout` plays."""

    item: str
    group: str  # the task instance: the GiGPO group
    skills: list[Skill] = field(default_factory=list)  # of the skill half; empty in the plain half
    shown: list[tuple] = field(default_factory=list)  # (condition, strategy) in its prompt
    task: str = ""
    task_type: str = ""
    steps: list[Step] = field(default_factory=list)
    done: bool = False
    success: bool = False
    score: float = 0.0  # what the world pays
    failure: str = ""  # why the world could not go on, if it raised an error
    game: object = None  # while it is played
    obs: Observation | None = None  # what the policy sees next

    @contextmanager
    def keeping_failure(self):
        """A world can fail in any way, and must not end the run: the episode ends, with why."""
        try:
            yield
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".split("\n")[0]
            self.done = True


def open_groups(items, config, members=None) -> list[list[Episode]]:
    """Items -> groups of `members` (config.group_size) episodes, ready to be played.

    An item is the same game in the same initial state for all, so that the two halves of a group
    differ in the skill block alone.
    """
    groups = []
    for number, item in enumerate(items):
        group = [Episode(item, f"{number}:{item}") for _ in range(members or config.group_size)]
        for episode in group:
            with episode.keeping_failure():
                episode.game = envs.make_env(config.env, item, config.engine)
                episode.obs = episode.game.reset()
                episode.task = episode.obs.task
                episode.task_type = episode.obs.task_type
        groups.append(group)
    return groups


def put_skills(groups, bank, statuses):
    """Give one half of each group the skills that the bank has for its task: the skill half."""
    for group in groups:
        skills = bank.retrieve(group[0].task, group[0].task_type, statuses)
        bank.count_try(skills)
        for episode in group[: (len(group) + 1) // 2]:
            episode.skills = skills
            episode.shown = bank.shown(skills)


def rollout(policy, config, groups, seed, *, temperature=None, desc="rollout") -> list[Episode]:
    """Play every episode of the groups to its end -> the episodes, in their order, without the
    groups of which a world raised an error.

    All games run in this process, one step of each at a time; finished ones leave the batch.
    """
    temperature = config.temperature if temperature is None else temperature

    def play_groups(own):
        episodes = [episode for group in own for episode in group]
        return play(policy, config, episodes, temperature, seed, desc)

    episodes = parallel.map_scattered(policy.model, groups, play_groups)
    if policy.model.device.type == "cuda":
        torch.cuda.empty_cache()  # the KV cache makes room for the update
    planned = [episode for group in groups for episode in group]
    for played, plan in zip(episodes, planned, strict=True):
        played.skills = plan.skills  # the bank's own objects: other processes return copies
    return guard.without_failures(episodes)


def play(policy, config, episodes, temperature, seed, desc) -> list[Episode]:
    """The same episodes, played: per turn the prompts, the responses, a step of each game."""
    rows = min(config.generation_rows, len(episodes))
    cache = Cache(policy.model, rows, config.max_prompt_tokens + config.max_response_tokens)
    sampling = {"temperature": temperature, "max_new_tokens": config.max_response_tokens}
    sampling |= {"rows": rows, "cache": cache}
    fallback_chars = envs.world(config.env).FALLBACK_CHARS
    begun = opening(policy.tokenizer)
    start = time.time()
    tokens = 0
    quiet = parallel.rank() > 0
    with tqdm(total=len(episodes), desc=desc, unit="episode", leave=False, disable=quiet) as bar:
        for t in range(config.max_steps):
            running = [episode for episode in episodes if not episode.done]
            if not running:
                break
            prompts = fit_prompts(policy.tokenizer, config, running)
            own = [prompt_ids for _, prompt_ids in prompts]
            own_seed = parallel.own_seed(1000 * seed + t)
            answers = generate(policy.model, policy.tokenizer, own, seed=own_seed, **sampling)
            for episode, (plain_ids, prompt_ids), (response_ids, logprobs, response) in zip(
                running, prompts, answers, strict=True
            ):
                response = begun + response
                action, valid = envs.parse_action(response, fallback_chars)
                step = Step(
                    obs=episode.obs.text,
                    plain_ids=plain_ids,
                    prompt_ids=prompt_ids,
                    response=response,
                    response_ids=response_ids,
                    logprobs=logprobs,
                    action=action,
                    valid=valid,
                )
                with episode.keeping_failure():
                    episode.obs, reward, episode.done, info = episode.game.step(action)
                    step.reward = reward * SUCCESS_REWARD
                    episode.success = info["success"]
                    episode.score = info["score"]
                    episode.steps.append(step)
                tokens += len(response_ids)
            bar.update(sum(episode.done for episode in running))
            success = np.mean([episode.success for episode in episodes])
            speed = tokens / (time.time() - start)
            bar.set_postfix_str(f"step {t + 1}, success {success:.2f}, {speed:.0f} tokens/s")
    for episode in episodes:
        episode.game = episode.obs = None
    return episodes


def fit_prompts(tokenizer, config, episodes) -> list[tuple]:
    """Episodes -> [(ids of the plain prompt x_t, ids of the prompt to use)] of their next step.

    A prompt longer than `max_prompt_tokens` loses history, oldest first, and its plain twin too;
    UserError if that is not enough.
    """

    def encode(chosen, keep) -> list[tuple]:  # with `keep` steps of history
        plain, shown = [], []
        for episode in chosen:
            past = [(step.obs, step.action) for step in episode.steps]
            x, xs = envs.build_prompts(episode.obs, past, episode.shown, keep)
            plain.append(x)
            shown.append(xs)
        ids = encode_prompts(tokenizer, plain + shown)
        return list(zip(ids[: len(chosen)], ids[len(chosen) :], strict=True))

    fitted = encode(episodes, config.history)
    for i, episode in enumerate(episodes):
        keep = config.history
        while (longest := max(map(len, fitted[i]))) > config.max_prompt_tokens:
            if keep == 0:
                raise UserError(
                    f"{episode.item}: the prompt of step {len(episode.steps) + 1} without history "
                    f"has {longest} tokens; raise --max_prompt_tokens "
                    f"({config.max_prompt_tokens} now)"
                )
            keep -= 1
            fitted[i] = encode([episode], keep)[0]
    return fitted


def sample_texts(policy, config, prompts, seed) -> list[str]:
    """One response for each user message, at temperature 1."""

    limits = {"max_new_tokens": config.max_response_tokens, "rows": config.generation_rows}

    def write(own):
        own_seed = parallel.own_seed(seed)
        return generate(
            policy.model, policy.tokenizer, own, temperature=1.0, seed=own_seed, **limits
        )

    return [text for _, _, text in parallel.map_scattered(policy.model, prompts, write)]


def episode_advantages(episodes, config) -> list[np.ndarray]:
    """GiGPO advantages; both halves of a task are one group, the anchor is the bare observation."""
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


# --- Training rows --------------------------------------------------------------------------------


@dataclass
class Row:
    """A training row. An RL row trains its whole response; a row with a gate those tokens only."""

    prompt_ids: list[int]
    response_ids: list[int]
    advantage: float = 0.0  # A, of an RL row
    rollout_logprobs: list[float] = field(default_factory=list)  # of an RL row
    gate: list[bool] | None = None  # Eq. 10, per response token: an internalization row
    weight: float = 0.0  # w of Eq. 11
    rank: int = 0  # of the process that trains it
    old_logprobs: torch.Tensor | None = None  # filled by `update`, per response token
    ref_logprobs: torch.Tensor | None = None

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)


def rl_rows(episodes, advantages) -> list[Row]:
    """Every step under its own prompt, but for those of advantage 0: they have nothing to teach."""
    return [
        Row(step.prompt_ids, step.response_ids, float(advantage), step.logprobs)
        for episode, step_advantages in zip(episodes, advantages, strict=True)
        for step, advantage in zip(episode.steps, step_advantages, strict=True)
        if abs(advantage) > NO_ADVANTAGE
    ]


def find_action_tokens(tokenizer, response_ids, begun="") -> list[bool]:
    """True for tokens that overlap the text inside <action>...</action> or the closing tag.

    Token ends come from decoding: a sampled response need not be tokenized as the tokenizer would.
    No parsable action: all False. Thoughts and EOS are never included. `begun` is what the template
    wrote of the response.
    """
    text = tokenizer.decode(response_ids, skip_special_tokens=True)
    span = envs.action_span(begun + text)
    if span is None:
        return [False] * len(response_ids)
    first = span[0] - len(begun)  # characters of the text
    last = span[1] + len("</action>") - len(begun)
    mask = [False] * len(response_ids)
    end = len(text)
    for i in reversed(range(len(response_ids))):  # the action stands at the end
        start = len(tokenizer.decode(response_ids[:i], skip_special_tokens=True))
        mask[i] = start < last and end > first
        if start <= first:
            break
        end = start
    return mask


def collate(rows, pad_id, device) -> dict[str, torch.Tensor]:
    """Rows -> right-padded tensors [B, L] and per-row tensors [B]."""
    shape = (len(rows), max(map(len, rows)))
    batch = {
        "ids": torch.full(shape, pad_id),
        "response_mask": torch.zeros(shape, dtype=torch.bool),
        "rl_mask": torch.zeros(shape, dtype=torch.bool),  # responses of the RL rows
        "gate": torch.zeros(shape, dtype=torch.bool),  # of the internalization rows
        "old_logprobs": torch.zeros(shape),
        "ref_logprobs": torch.zeros(shape),
        "advantages": torch.tensor([row.advantage for row in rows]),
        "weights": torch.tensor([row.weight for row in rows]),
    }
    for i, row in enumerate(rows):
        span = slice(len(row.prompt_ids), len(row))
        batch["ids"][i, : len(row)] = torch.tensor(row.prompt_ids + row.response_ids)
        batch["response_mask"][i, span] = True  # EOS included: the policy must learn to stop
        if row.gate is None:
            batch["rl_mask"][i, span] = True
        else:
            batch["gate"][i, span] = torch.tensor(row.gate)
        for name in ("old_logprobs", "ref_logprobs"):
            if getattr(row, name) is not None:
                batch[name][i, span] = getattr(row, name)
    return {name: value.to(device) for name, value in batch.items()}


def make_batches(rows, minibatch_rows, seed) -> list[list[Row]]:
    """Rows -> mini-batches, shuffled: RL and internalization rows together, so both act in every
    step. How many and which RL rows each has follows from the RL rows alone: runs with and without
    internalization take the same steps.
    """
    rl = [row for row in rows if row.gate is None]
    internal = [row for row in rows if row.gate is not None]
    count = max(1, round(len(rl) / minibatch_rows))
    batches = [[] for _ in range(count)]
    for kind in (rl, internal):
        shuffled = random.Random(seed).sample(kind, len(kind))
        for n, batch in enumerate(batches):
            batch += shuffled[n * len(kind) // count : (n + 1) * len(kind) // count]
    for batch in batches:
        for i, row in enumerate(sorted(batch, key=len)):
            row.rank = i % parallel.world_size()
    return batches


NOTHING = Row([0], [0], gate=[False])  # a row that trains nothing


def micro_batches(rows, max_tokens) -> list[list[Row]]:
    """This process's rows sorted by length and cut so that rows x longest row <= `max_tokens`, or
    one row. All processes get equally many, since they pass the model together; NOTHING fills up.
    """
    lists = [[] for _ in range(parallel.world_size())]
    for row in sorted(rows, key=len):
        batches = lists[row.rank]
        if not batches or (len(batches[-1]) + 1) * len(row) > max_tokens:
            batches.append([])
        batches[-1].append(row)
    own = lists[parallel.rank()]
    return own + [[NOTHING]] * (max(map(len, lists)) - len(own))


# --- Update ---------------------------------------------------------------------------------------


def token_logprobs(model, ids, response_mask, temperature=1.0, entropy=True) -> tuple:
    """Log-probs of the response tokens, and entropies there -> two [B, L], 0 outside the mask.

    logits[:, t] predict ids[:, t + 1], so the log-prob of token t comes from position t - 1. Only
    the N positions that predict a response token of their own row get logits: `lm_head.forward` is
    replaced for this pass, inside the model's own forward, where FSDP has the weights together. No
    more than `chunk` rows of V logits are held at once; the backward pass makes them again.
    `entropy` False saves that part (zeros come back).
    """
    targets = ids[response_mask]  # [N]
    predicts = response_mask.roll(-1, 1)  # [B, L] position t - 1 predicts token t
    head = model.lm_head
    chunk = max(1, LOGITS // head.out_features)

    def logprobs_of(hidden, target):  # [n, D], [n] -> [n, 2]: log-prob and entropy
        logits = torch.nn.Linear.forward(head, hidden)  # [n, V]
        log_p = (logits.float() / temperature).log_softmax(-1)  # [n, V]
        picked = log_p.gather(-1, target[:, None])[:, 0]  # [n]
        spread = -(log_p.exp() * log_p).sum(-1) if entropy else torch.zeros_like(picked)  # [n]
        return torch.stack([picked, spread], -1)

    def forward(hidden):  # in the place of lm_head: [B, L, D] -> [N, 2] instead of [B, L, V]
        hidden = hidden[predicts]  # [N, D]
        if len(targets) <= chunk:
            return logprobs_of(hidden, targets)
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([checkpoint(logprobs_of, *part, use_reentrant=False) for part in parts])

    head.forward = forward
    try:
        values = model(input_ids=ids, use_cache=False).logits  # [N, 2]
    finally:
        del head.forward
    filled = values.new_zeros(*ids.shape, 2)  # [B, L, 2]
    filled[response_mask] = values
    return filled.unbind(-1)


def objective(batch, logprobs, entropies, rl_tokens, gated_tokens, config, lambda_) -> dict:
    """The terms of L = L_GiGPO + beta L_KL - c_H H + lambda L_int (method Eq. 14) -> name:
    (weight, term). Another term is another line.

    batch         a micro-batch from `collate`; an RL row and an internalization row share no term
    rl_tokens     response tokens of the RL rows of the whole mini-batch
    gated_tokens  gated tokens of its internalization rows
    """
    rl_mask = batch["rl_mask"]  # [B, L]
    old, advantages = batch["old_logprobs"], batch["advantages"][:, None]  # [B, L], [B, 1]
    policy_loss = clipped_policy_loss(
        logprobs, old, advantages, rl_mask, clip=config.clip, tokens=rl_tokens
    )
    entropy = token_mean(entropies, rl_mask, rl_tokens)
    internal = internalization_loss(logprobs, batch["weights"], batch["gate"], tokens=gated_tokens)
    terms = {
        "policy": (1.0, policy_loss),
        "entropy": (-config.entropy_coef, entropy),
        "internalization": (lambda_, internal),
    }
    if config.kl_coef:
        kl = k3_kl(logprobs, batch["ref_logprobs"], rl_mask, tokens=rl_tokens)
        terms["kl"] = (config.kl_coef, kl)
    return terms


def backward(policy, rows, config, lambda_) -> dict[str, float]:
    """Accumulate the gradient of the objective over one mini-batch of rows -> terms of the loss.

    Internalization rows of weight 0 count among the gated tokens, but need no forward pass.
    """
    model = policy.model
    rl_tokens = sum(len(row.response_ids) for row in rows if row.gate is None)
    gated_tokens = sum(sum(row.gate) for row in rows if row.gate is not None)
    logged = Counter()
    for micro in micro_batches([r for r in rows if teaches(r, lambda_)], config.micro_tokens):
        batch = collate(micro, policy.tokenizer.pad_token_id or 0, model.device)
        logprobs, entropies = token_logprobs(
            model, batch["ids"], batch["response_mask"], config.temperature
        )
        terms = objective(batch, logprobs, entropies, rl_tokens, gated_tokens, config, lambda_)
        loss = sum(weight * term for weight, term in terms.values())
        parallel.backward(loss)

        with torch.no_grad():
            values = {name: term for name, (_, term) in terms.items()} | {"loss": loss}
            log_ratio = logprobs - batch["old_logprobs"]  # [B, L]
            outside = (log_ratio.exp() - 1).abs() > config.clip
            values["clipped"] = token_mean(outside, batch["rl_mask"], rl_tokens)
            values["log_ratio"] = token_mean(log_ratio.abs(), batch["rl_mask"], rl_tokens)
            logged.update({name: float(value) for name, value in values.items()})
    return parallel.all_reduce(logged)


def teaches(row, lambda_) -> bool:
    """Whether a row has a gradient at all."""
    return row.gate is None or lambda_ * row.weight > 0


@torch.no_grad()
def fill_logprobs(policy, rows, config):
    """Old and reference log-probs of the RL rows, before the policy moves."""
    for row in rows:
        row.old_logprobs = torch.tensor(row.rollout_logprobs)
    models = {"old_logprobs": policy.model} if config.recompute_old else {}
    if policy.reference is not None:
        models["ref_logprobs"] = policy.reference.to(policy.model.device)  # --offload: from host
    for name, model in models.items():
        for micro in micro_batches(rows, config.micro_tokens):
            batch = collate(micro, policy.tokenizer.pad_token_id or 0, model.device)
            logprobs, _ = token_logprobs(
                model, batch["ids"], batch["response_mask"], config.temperature, entropy=False
            )
            for row, values in zip(micro, logprobs.cpu(), strict=True):
                setattr(row, name, values[len(row.prompt_ids) : len(row)].clone())
        parallel.reshard(model)  # no backward pass does it here
    if config.offload and policy.reference is not None:
        policy.reference.to("cpu")


def optimizer_step(policy, rows, config, lambda_) -> dict[str, float] | None:
    """One step on a mini-batch -> the terms of its loss; None where it was not finite: no step."""
    log = backward(policy, rows, config, lambda_)
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), GRAD_CLIP)
    log["grad_norm"] = float(parallel.full_tensors(norm))
    finite = guard.is_finite(policy, rows, log, config)
    if finite:
        policy.steps += 1
        policy.optimizer.step()
    policy.optimizer.zero_grad(set_to_none=True)  # no memory for gradients in the next rollout
    return log if finite else None


def update(policy, rows, config, seed, *, lambda_=0.0) -> dict[str, float]:
    """One pass over the rows, an optimizer step per `minibatch_rows` RL rows -> metrics.

    Old log-probs are recomputed with the training forward, so ratios start at 1, or taken from the
    sampler (--recompute_old false); how far the two are apart is logged as `logprob_gap`.
    """
    rl = [row for row in rows if row.gate is None]
    metrics = {"rows": len(rl), "internalization_rows": len(rows) - len(rl), "optimizer_steps": 0}
    if not any(teaches(row, lambda_) for row in rows):
        return metrics
    start = time.time()
    batches = make_batches(rows, config.minibatch_rows, seed)
    fill_logprobs(policy, rl, config)
    metrics["score_seconds"] = time.time() - start

    policy.model.train()  # gradient checkpointing works in train mode only
    logs = []
    quiet = parallel.rank() > 0
    for batch in tqdm(batches, desc="update", unit="step", leave=False, disable=quiet):
        log = optimizer_step(policy, batch, config, lambda_)
        logs += [log] if log else []
    policy.model.eval()

    if logs:
        metrics |= {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
        metrics["logprob_gap"] = logs[0]["log_ratio"]  # of the first step: nothing has moved yet
    own = [row for row in rl if row.rank == parallel.rank()]
    if config.recompute_old and own:
        gaps = [(row.old_logprobs - torch.tensor(row.rollout_logprobs)).abs() for row in own]
        metrics["logprob_gap"] = torch.cat(gaps).mean().item()
    metrics |= {"optimizer_steps": len(logs), "refused_steps": len(batches) - len(logs)}
    metrics["update_seconds"] = time.time() - start
    metrics["update_tokens_per_s"] = sum(map(len, rows)) / metrics["update_seconds"]
    return metrics
