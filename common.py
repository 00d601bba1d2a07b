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

import math
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

import envs
from config import UserError
from runtime import guard, parallel
from runtime.batches import Row, collate, make_batches, micro_batches
from runtime.generation import Cache, encode_prompts, generate
from runtime.logprobs import expected_logprobs, token_logprobs
from skills import shown_in_prompt

# --------------------------------------------------------------------------------------------------
# Credit: which step of which episode was better than its peers
# --------------------------------------------------------------------------------------------------


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
) -> list:
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
    scores = []  # S of every row: what its episode earned in all, less the row's own penalty
    step_returns = []  # G_t = sum_{u >= t} gamma^(u - t) r_u, less the row's own penalty
    for episode_rewards, penalty in zip(rewards, penalties, strict=True):
        penalty = np.asarray(penalty, float)
        scores.append(sum(episode_rewards) - penalty)
        tail = 0.0
        backwards = []
        for reward in reversed(episode_rewards):
            tail = reward + gamma * tail
            backwards.append(tail)
        step_returns.append(np.array(backwards[::-1]) - penalty)

    # A_E: how good the episode was among those of the same task
    samples = defaultdict(list)
    for group, episode_rewards, score in zip(groups, rewards, scores, strict=True):
        samples[group] += list(score) if baseline == "steps" else [float(sum(episode_rewards))]
    stats = {group: mean_std(values, lone_mean=0.0) for group, values in samples.items()}
    advantages = [
        relative(score, stats[group], normalize_std)
        for group, score in zip(groups, scores, strict=True)
    ]

    # A_S: how good the step was among those from the same state of the same task
    samples = defaultdict(list)
    for group, states, returns in zip(groups, anchors, step_returns, strict=True):
        for state, value in zip(states, returns, strict=True):
            samples[group, state].append(value)
    stats = {key: mean_std(values, lone_mean=values[0]) for key, values in samples.items()}
    for group, states, returns, advantage in zip(
        groups, anchors, step_returns, advantages, strict=True
    ):
        for t, state in enumerate(states):
            step_advantage = relative(returns[t], stats[group, state], normalize_std)
            advantage[t] += step_weight * step_advantage  # A = A_E + w A_S
    return advantages


def mean_std(values, lone_mean) -> tuple:
    """(mean, unbiased std); of a single value (`lone_mean`, 1), as in verl-agent."""
    return (np.mean(values), np.std(values, ddof=1)) if len(values) > 1 else (lone_mean, 1.0)


def relative(value, stats, normalize_std):
    """(value - mean) / (std + 1e-6), or without the division."""
    mean, std = stats
    return (value - mean) / (std + 1e-6) if normalize_std else value - mean


# --------------------------------------------------------------------------------------------------
# Losses: pure functions of token tensors
# --------------------------------------------------------------------------------------------------
# Each is a sum over its tokens, divided by `tokens`: how many there are in the whole mini-batch, of
# which the tensors hold a part. So the gradient does not depend on how the rows are cut. Without
# `tokens` the tensors are the whole.


def token_mean(values, mask, tokens=None):
    """Sum over the True positions of `mask` / `tokens`; 0 when there are none."""
    return (values * mask).sum() / (tokens or mask.sum().clamp(min=1))


def clipped_policy_loss(
    logprobs, old_logprobs, advantages, mask, *, clip=0.2, dual_clip=3.0, tokens=None
):
    """PPO's clipped surrogate with dual clip, token-mean (method Eq. 5). All [B, L] -> scalar.

    max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = exp(logprob - old); for A < 0 at most
    -A dual_clip.
    """
    ratio = (logprobs - old_logprobs).exp()  # [B, L]
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return token_mean(loss, mask, tokens)


def k3_kl(logprobs, ref_logprobs, mask, *, tokens=None):
    """Token-mean k3 estimate of KL(policy || reference) (method Eq. 6). All [B, L] -> scalar.

    exp(d) - d - 1 with d = ref - logprob (http://joschu.net/blog/kl-approx.html), clamped to
    [-10, 10] as in verl-agent.
    """
    d = (ref_logprobs - logprobs).clamp(-20, 20)  # [B, L]
    return token_mean((d.exp() - d - 1).clamp(-10, 10), mask, tokens)


def internalization_loss(
    logprobs, advantages, utility, used_skill, action_mask, *, clip=1.0, tokens=None
):
    """L_int: gated, advantage-weighted self-imitation under the plain prompt (method Eq. 10 to 12).

    | argument    | shape       | meaning                                                    |
    |-------------|-------------|------------------------------------------------------------|
    | logprobs    | [B, L]      | of the skill arm's response, given the PLAIN prompt        |
    | advantages  | [B]         | GiGPO advantage of the row, in units of the reward's scale |
    | utility     | [B]         | Delta_g of the row's group                                 |
    | used_skill  | [B] bool    | the episode had skills in its prompt                       |
    | action_mask | [B, L] bool | tokens of the action                                       |

    gate = used_skill and Delta_g > 0 and action token;  w = clamp(advantage, 0, clip), constant;
    returns the scalar - sum(gate * w * logprob) / max(1, sum(gate)).
    """
    gate = action_mask & (used_skill & (utility > 0))[:, None]  # [B, L]
    weight = advantages.detach().clamp(0, clip)[:, None]  # [B, 1]
    return -token_mean(weight * logprobs, gate, tokens)


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
    """A member of a group; `rollout` fills in what was played."""

    item: str
    group: str  # the task instance: the GiGPO group
    skills: tuple = ()  # in its prompt; empty in the plain arm
    task: str = ""
    task_type: str = ""
    steps: list = field(default_factory=list)
    success: bool = False
    score: float = 0.0
    failure: str = ""  # why the world could not go on, if it raised an error


def plan_groups(
    items, config, *, members=None, skilled=None, bank=None, statuses=(), training=True
) -> list:
    """Items -> groups of `members` (config.group_size) unplayed episodes; the first `skilled` of
    each (the share config.skill_share, one at least of either half unless it is 0 or 1) carry the
    skills that `bank` retrieves for it, if it has any of these statuses.

    An item is the same game in the same initial state for all, so that the two halves of a group
    differ in the skill block alone.
    """
    members = config.group_size if members is None else members
    if members < 1 or not items:
        raise UserError("an empty group: --tasks and --group_size must be 1 at least")
    if skilled is None:
        skilled = math.floor(config.skill_share * members + 0.5)
        if 0 < config.skill_share < 1:
            skilled = min(max(skilled, 1), members - 1)
    groups = []
    for number, item in enumerate(items):
        skills = ()
        obs = guard.first_observation(config, item) if bank and skilled else None
        if obs:
            skills = bank.retrieve(obs.task, obs.task_type, config.top_k, statuses, training)
        group = f"{number}:{item}"
        with_skills = [Episode(item, group, tuple(skills)) for _ in range(skilled)]
        plain = [Episode(item, group) for _ in range(members - skilled)]
        groups.append(with_skills + plain)
    return groups


def rollout(policy, config, groups, seed, *, temperature=None, desc="rollout") -> list:
    """Play every episode of the groups to its end -> [Episode], in their order, without the groups
    of which a world raised an error.

    All games run in this process, one step of each at a time; finished ones leave the batch.
    """
    temperature = config.temperature if temperature is None else temperature

    def play_groups(own):
        members = [episode for group in own for episode in group]
        return play(policy, config, members, temperature, seed, desc)

    episodes = parallel.divided(policy.model, groups, play_groups)
    if policy.model.device.type == "cuda":
        torch.cuda.empty_cache()  # the KV cache makes room for the update
    planned = [episode for group in groups for episode in group]
    for played, plan in zip(episodes, planned, strict=True):
        played.skills = plan.skills  # the bank's own objects: other processes return copies
    return guard.without_failures(episodes)


def play(policy, config, episodes, temperature, seed, desc) -> list:
    """The same episodes, played: per turn the prompts, the responses, a step of each game."""
    model = policy.model
    games, observations = guard.open_games(episodes, config)
    running = [i for i, episode in enumerate(episodes) if not episode.failure]
    rows = min(config.generation_rows, len(episodes))
    cache = Cache(model, rows, config.max_prompt_tokens + config.max_response_tokens)
    fallback_chars = envs.world(config.env).FALLBACK_CHARS
    tokens = 0
    start = time.time()
    quiet = parallel.rank() > 0
    with tqdm(total=len(episodes), desc=desc, unit="episode", leave=False, disable=quiet) as bar:
        for t in range(config.max_steps):
            if not running:
                break
            waiting = [(episodes[i], observations[i]) for i in running]
            prompts = fit_prompts(policy.tokenizer, config, waiting)
            answers = generate(
                model,
                policy.tokenizer,
                [prompt_ids for _, prompt_ids in prompts],
                temperature=temperature,
                max_new_tokens=config.max_response_tokens,
                rows=rows,
                cache=cache,
                seed=parallel.own_seed(1000 * seed + t),
            )
            still_running = []
            for i, (plain_ids, prompt_ids), answer in zip(running, prompts, answers, strict=True):
                response_ids, logprobs, response = answer
                action, valid = envs.parse_action(response, fallback_chars)
                seen = observations[i].text
                outcome = guard.attempt(episodes[i], games[i].step, action)
                if outcome is None:
                    continue
                observations[i], reward, done, info = outcome
                step = Step(
                    obs=seen,
                    plain_ids=plain_ids,
                    prompt_ids=prompt_ids,
                    response=response,
                    response_ids=response_ids,
                    logprobs=logprobs,
                    action=action,
                    valid=valid,
                    reward=reward * config.success_reward,
                )
                episodes[i].steps.append(step)
                episodes[i].success = info["success"]
                episodes[i].score = info["score"]
                tokens += len(response_ids)
                if not done:
                    still_running.append(i)
            bar.update(len(running) - len(still_running))
            running = still_running
            success = np.mean([e.success for e in episodes])
            speed = tokens / (time.time() - start)
            bar.set_postfix_str(f"step {t + 1}, success {success:.2f}, {speed:.0f} tokens/s")
    return episodes


def sample_texts(policy, config, prompts, seed) -> list:
    """One response for each user message -> [text], at temperature 1."""

    def write(own):
        return generate(
            policy.model,
            policy.tokenizer,
            own,
            max_new_tokens=config.max_response_tokens,
            temperature=1.0,
            rows=config.generation_rows,
            seed=parallel.own_seed(seed),
        )

    return [text for _, _, text in parallel.divided(policy.model, prompts, write)]


def fit_prompts(tokenizer, config, waiting) -> list:
    """[(episode, observation)] -> [(ids of the plain prompt x_t, ids of the prompt to use)].

    A prompt longer than `max_prompt_tokens` loses history, oldest first, and its plain twin too;
    UserError if that is not enough.
    """

    def encode(keep, chosen):  # both prompts of each, with `keep` steps of history
        texts = []
        for episode, obs in chosen:
            past = [(step.obs, step.action) for step in episode.steps]
            skills = [shown_in_prompt(skill, config) for skill in episode.skills]
            texts += envs.build_prompts(obs, past, skills, keep)
        ids = encode_prompts(tokenizer, texts)
        return list(zip(ids[::2], ids[1::2], strict=True))

    fitted = encode(config.history, waiting)
    for i, pair in enumerate(waiting):
        for keep in reversed(range(config.history)):
            if max(map(len, fitted[i])) > config.max_prompt_tokens:
                fitted[i] = encode(keep, [pair])[0]
        longest = max(map(len, fitted[i]))
        if longest > config.max_prompt_tokens:
            episode = pair[0]
            raise UserError(
                f"{episode.item}: the prompt of step {len(episode.steps) + 1} without history has "
                f"{longest} tokens; raise --max_prompt_tokens ({config.max_prompt_tokens} now)"
            )
    return fitted


def episode_advantages(episodes, config) -> list:
    """GiGPO advantages; both arms of a task are one group, the anchor is the bare observation."""
    groups = [e.group for e in episodes]
    if config.arm_baselines:
        groups = [(e.group, bool(e.skills)) for e in episodes]
    return gigpo_advantages(
        groups,
        [[s.reward for s in e.steps] for e in episodes],
        [[s.obs for s in e.steps] for e in episodes],
        gamma=config.gamma,
        step_weight=config.step_weight,
        normalize_std=config.normalize_std,
        baseline=config.baseline,
        penalties=[[config.invalid_penalty * (not s.valid) for s in e.steps] for e in episodes],
    )


# --------------------------------------------------------------------------------------------------
# Training rows
# --------------------------------------------------------------------------------------------------


def rl_rows(episodes, advantages, config) -> list:
    """Every step under its own prompt; without the steps that have nothing to teach."""
    rows = [
        Row(step.prompt_ids, step.response_ids, float(advantage), step.logprobs)
        for episode, step_advantages in zip(episodes, advantages, strict=True)
        for step, advantage in zip(episode.steps, step_advantages, strict=True)
    ]
    return [row for row in rows if abs(row.advantage) > 1e-8] if config.skip_zero_rows else rows


def find_action_tokens(tokenizer, response_ids) -> list:
    """True for tokens that overlap the text inside <action>...</action> or the closing tag.

    Token ends come from decoding: a sampled response need not be tokenized as the tokenizer would.
    No parsable action: all False. Thoughts and EOS are never included.
    """

    def end(i):  # of token i, in characters
        return len(tokenizer.decode(response_ids[: i + 1], skip_special_tokens=True))

    span = envs.action_span(tokenizer.decode(response_ids, skip_special_tokens=True))
    if span is None:
        return [False] * len(response_ids)
    tokens = range(len(response_ids))
    first = bisect_right(tokens, span[0], key=end)  # the first that ends behind <action>
    last = bisect_left(tokens, span[1] + len("</action>"), key=end)
    return [first <= i <= last for i in tokens]


# --------------------------------------------------------------------------------------------------
# Update
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_rows(model, rows, name, config, pad_id):
    """Set row.<name> of this process's rows to the log-probs of the response under `model`, by the
    training forward.
    """
    for batch in micro_batches(rows, config.micro_tokens):
        t = collate(batch, pad_id, model.device)
        logprobs, _ = token_logprobs(
            model, t["ids"], t["response_mask"], config.temperature, entropy=False
        )
        for row, values in zip(batch, logprobs.cpu(), strict=True):
            setattr(row, name, values[len(row.prompt_ids) : len(row)].clone())
    parallel.split(model)  # no backward pass does it here


def objective(t, logprobs, entropies, rl_tokens, gated_tokens, config, lambda_) -> dict:
    """The terms of L = L_GiGPO + beta L_KL - c_H H + lambda L_int (method Eq. 14) -> name:
    (weight, term). Another term is another line.

    t             a micro-batch from `collate`; an RL row and an internalization row share no term;
                  t["internalized"] are the log-probs that L_int raises
    rl_tokens     response tokens of the RL rows of the whole mini-batch
    gated_tokens  gated tokens of its internalization rows
    """
    rl_mask = t["response_mask"] & ~t["internalize"][:, None]  # [B, L]
    policy = clipped_policy_loss(
        logprobs,
        t["old_logprobs"],
        t["advantages"][:, None],
        rl_mask,
        clip=config.clip,
        dual_clip=config.dual_clip,
        tokens=rl_tokens,
    )
    internalization = internalization_loss(
        t["internalized"],
        t["advantages"],
        t["delta"],
        t["internalize"],
        t["action_mask"],
        clip=config.advantage_clip,
        tokens=gated_tokens,
    )
    entropy = token_mean(entropies, rl_mask, rl_tokens)
    terms = {
        "policy": (1 - lambda_ if config.hand_off else 1.0, policy),
        "entropy": (-config.entropy_coef, entropy),
        "internalization": (lambda_, internalization),
    }
    if config.kl_coef:
        kl = k3_kl(logprobs, t["ref_logprobs"], rl_mask, tokens=rl_tokens)
        terms["kl"] = (config.kl_coef, kl)
    return terms


def backward(model, rows, config, lambda_, pad_id) -> dict:
    """Accumulate the gradient of the objective over one mini-batch of rows -> terms of the loss.

    Internalization rows of weight 0 count among the gated tokens, but need no forward pass.
    """
    rl_tokens = sum(len(row.response_ids) for row in rows if not row.internalize)
    gated_tokens = sum(sum(row.action_mask) for row in rows if row.internalize and row.delta > 0)
    weighted = [row for row in rows if not row.internalize or lambda_ * row.advantage > 0]
    logged = Counter()
    for batch in micro_batches(weighted, config.micro_tokens):
        t = collate(batch, pad_id, model.device)
        responses = t["response_mask"]
        logprobs, entropies = token_logprobs(model, t["ids"], responses, config.temperature)
        t["internalized"] = logprobs  # [B, L]
        if config.internalize_loss == "kl" and lambda_:
            t["internalized"] = expected_logprobs(model, batch, t, config.temperature, pad_id)
        terms = objective(t, logprobs, entropies, rl_tokens, gated_tokens, config, lambda_)
        loss = sum(weight * term for weight, term in terms.values())
        parallel.backward(loss)

        with torch.no_grad():
            values = {name: term for name, (_, term) in terms.items()} | {"loss": loss}
            rl_mask = responses & ~t["internalize"][:, None]  # [B, L]
            log_ratio = logprobs - t["old_logprobs"]  # [B, L]
            outside = (log_ratio.exp() - 1).abs() > config.clip
            values["clipped"] = token_mean(outside, rl_mask, rl_tokens)
            values["log_ratio"] = token_mean(log_ratio.abs(), rl_mask, rl_tokens)
            logged.update({name: float(value) for name, value in values.items()})
    return parallel.total(logged)


def score(policy, rows, config):
    """Fill in old_logprobs and ref_logprobs of the RL rows, before the policy moves."""
    model = policy.model
    pad_id = policy.tokenizer.pad_token_id or 0
    for row in rows:
        row.old_logprobs = torch.tensor(row.rollout_logprobs)
    if config.recompute_old:
        score_rows(model, rows, "old_logprobs", config, pad_id)
    if policy.reference is not None:
        policy.reference.to(model.device)  # from the host with --ref_offload, else it is there
        score_rows(policy.reference, rows, "ref_logprobs", config, pad_id)
        if config.ref_offload:
            policy.reference.to("cpu")


def compare_gradients(model, batch, config, lambda_, pad_id) -> dict:
    """Norms of the gradients of L_GiGPO + beta L_KL - c_H H and of lambda L_int on a mini-batch,
    and their cosine. Leaves no gradient behind.
    """
    gradients = []
    for kind in (False, True):
        backward(model, [row for row in batch if row.internalize == kind], config, lambda_, pad_id)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
    products = {}
    for name, i, j in (("rl", 0, 0), ("internalization", 1, 1), ("both", 0, 1)):
        pairs = zip(gradients[i], gradients[j], strict=True)
        products[name] = sum(float(parallel.join((a.float() * b.float()).sum())) for a, b in pairs)
    norm_rl = products["rl"] ** 0.5
    norm_internalization = products["internalization"] ** 0.5
    cosine = products["both"] / max(1e-20, norm_rl * norm_internalization)
    return {
        "grad_norm_rl": norm_rl,
        "grad_norm_internalization": norm_internalization,
        "grad_cosine": cosine,
    }


def update(policy, rows, config, seed, *, lambda_=0.0) -> dict:
    """One pass over the rows, an optimizer step per `minibatch_rows` RL rows -> metrics.

    Old log-probs are recomputed with the training forward, so ratios start at 1, or taken from the
    sampler (--recompute_old false); how far the two are apart is logged as `logprob_gap`.
    """
    if not any(not row.internalize or lambda_ * row.advantage > 0 for row in rows):
        return {"rows": 0, "internalization_rows": len(rows), "optimizer_steps": 0}
    model = policy.model
    pad_id = policy.tokenizer.pad_token_id or 0
    start = time.time()
    batches = make_batches(rows, config, seed)
    rl = [row for row in rows if not row.internalize]
    score(policy, rl, config)
    extra = {"score_seconds": time.time() - start}

    model.train()  # gradient checkpointing works in train mode only; these models have no dropout
    if config.compare_gradients and lambda_ and len(rl) < len(rows):
        extra |= compare_gradients(model, batches[0], config, lambda_, pad_id)
    logs = []
    bar = tqdm(total=len(rows), desc="update", unit="row", leave=False, disable=parallel.rank() > 0)
    for batch in batches:
        log = backward(model, batch, config, lambda_, pad_id)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        norm = float(parallel.join(norm))
        if guard.is_finite(log, norm):
            policy.moved = True
            policy.refused = 0
            policy.optimizer.step()
            logs.append(log | {"grad_norm": norm})
        else:
            guard.refuse(policy, batch, log, norm, config)
        policy.optimizer.zero_grad(set_to_none=True)  # no memory for gradients in the next rollout
        bar.update(len(batch))
        bar.set_postfix(loss=f"{log['loss']:.3f}")
    model.eval()
    bar.close()
    means = {}
    if logs:
        means = {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
        means["logprob_gap"] = logs[0]["log_ratio"]  # of the first step: nothing has moved yet
    if config.recompute_old:
        own = [row for row in rl if row.rank == parallel.rank()]
        gaps = [(row.old_logprobs - torch.tensor(row.rollout_logprobs)).abs() for row in own]
        means["logprob_gap"] = torch.cat(gaps).mean().item() if gaps else 0.0
    return (
        means
        | extra
        | {
            "rows": len(rl),
            "internalization_rows": len(rows) - len(rl),
            "optimizer_steps": len(logs),
            "refused_steps": len(batches) - len(logs),
            "update_seconds": time.time() - start,
            "update_tokens_per_s": sum(map(len, rows)) / (time.time() - start),
        }
    )
