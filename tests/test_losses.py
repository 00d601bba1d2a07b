"""The terms of the objective, and the whole of it written out by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import as_rows

import common
from common import find_action_tokens, internalization_loss

# --- each term ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, expected",
    [
        (1.5, 1.0, -1.2),  # a good action gains nothing beyond 1 + clip
        (0.5, 1.0, -0.5),
        (0.5, -1.0, 0.8),
        (2.0, -1.0, 2.0),
        (9.0, -1.0, 3.0),  # dual clip
        (9.0, 1.0, -1.2),
    ],
)
def test_policy_loss_clips_from_the_right_side_and_dual_clips(ratio, advantage, expected):
    loss = common.clipped_policy_loss(
        torch.tensor([[math.log(ratio)]]),
        torch.zeros(1, 1),
        torch.tensor([[advantage]]),
        torch.ones(1, 1, dtype=torch.bool),
    )
    assert loss.item() == pytest.approx(expected)


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    mask = torch.tensor([[True, True, False]])
    assert common.k3_kl(torch.zeros(1, 3), torch.zeros(1, 3), mask) == 0
    value = common.k3_kl(torch.tensor([[-1.0, -1.0, 5.0]]), torch.tensor([[-2.0, -2.0, 0.0]]), mask)
    assert value == pytest.approx(np.exp(-1.0) + 1 - 1)  # d = -1; the masked token does not count


def test_k3_is_large_where_the_reference_expects_what_the_policy_avoids():
    one = torch.ones(1, 1, dtype=torch.bool)
    high = common.k3_kl(torch.tensor([[-3.0]]), torch.tensor([[-1.0]]), one)
    assert high == pytest.approx(math.exp(2) - 2 - 1)  # d = +2, not the milder d = -2
    assert common.k3_kl(torch.tensor([[-9.0]]), torch.tensor([[-1.0]]), one) == 10  # clamped


def test_a_mean_over_a_part_divides_by_the_tokens_of_the_whole():
    values = torch.tensor([[1.0, 2.0, 50.0]])
    mask = torch.tensor([[True, True, False]])
    assert common.token_mean(values, mask) == 1.5
    assert common.token_mean(values, mask, tokens=6) == 0.5
    assert common.token_mean(values, torch.zeros_like(mask)) == 0


GATE = {"advantages": 0.5, "utility": 0.25, "used_skill": True, "action": True}


@pytest.mark.parametrize(
    "closed", [{"advantages": -0.5}, {"utility": -0.25}, {"used_skill": False}, {"action": False}]
)
def test_each_factor_of_the_internalization_gate_alone_switches_a_token_off(closed):
    def gradient(advantages, utility, used_skill, action):
        logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        internalization_loss(
            logprobs,
            torch.tensor([advantages]),
            torch.tensor([utility]),
            torch.tensor([used_skill]),
            torch.tensor([[False, action]]),
        ).backward()
        return logprobs.grad[0].tolist()

    assert gradient(**GATE) == [0, -0.5]
    assert gradient(**GATE | closed) == [0, 0]


def test_a_group_that_gains_nothing_from_its_skill_is_not_internalized():
    arguments = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([True])
    assert internalization_loss(torch.tensor([[-3.0]]), *arguments, torch.tensor([[True]])) == 0


def test_internalization_weight_is_clipped_and_carries_no_gradient():
    advantages = torch.tensor([7.0], requires_grad=True)
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    on = torch.tensor([[True]])
    internalization_loss(
        logprobs, advantages, torch.tensor([1.0]), torch.tensor([True]), on, clip=2.0
    ).backward()
    assert logprobs.grad.item() == -2.0 and advantages.grad is None


def test_a_gated_row_without_advantage_counts_in_the_denominator():
    logprobs = torch.tensor([[-1.0], [-4.0]])
    loss = internalization_loss(
        logprobs,
        torch.tensor([0.5, -0.5]),
        torch.tensor([1.0, 1.0]),
        torch.tensor([True, True]),
        torch.tensor([[True], [True]]),
    )
    assert loss == pytest.approx(0.5 * 1.0 / 2)


# --- the whole objective, by hand -----------------------------------------------------------------


def objective_by_hand(model, rows, config, lambda_) -> dict:
    """method Eq. 14 row by row and token by token -> the logged terms, each a 0-dim tensor."""
    sums = dict.fromkeys(("policy", "kl", "entropy", "internalization", "clipped", "log_ratio"), 0)
    rl_tokens = sum(len(row.response_ids) for row in rows if not row.internalize)
    gated_tokens = sum(sum(row.action_mask) for row in rows if row.internalize)
    for row in rows:
        ids = row.prompt_ids + row.response_ids
        scores = model(torch.tensor([ids])).logits[0] / config.temperature
        for i, token in enumerate(row.response_ids):
            log_p = torch.log_softmax(scores[len(row.prompt_ids) + i - 1], -1)
            logprob = log_p[token]
            if row.internalize:
                weight = min(max(row.advantage, 0.0), config.advantage_clip)
                if row.action_mask[i]:
                    sums["internalization"] -= weight * logprob / gated_tokens
                continue
            old = row.old_logprobs[i].item()
            ratio = math.exp(logprob.item() - old)
            moving = (logprob - old).exp()  # the ratio, with a gradient
            a = row.advantage
            # where a bound is reached the term is a constant
            if a >= 0:
                term = -a * moving if ratio < 1 + config.clip else -a * (1 + config.clip)
            elif ratio < 1 - config.clip:
                term = -a * (1 - config.clip)
            elif ratio > config.dual_clip:
                term = -a * config.dual_clip
            else:
                term = -a * moving
            d = row.ref_logprobs[i].item() - logprob
            sums["policy"] += term / rl_tokens
            sums["kl"] += (d.exp() - d - 1) / rl_tokens
            sums["entropy"] -= (log_p.exp() * log_p).sum() / rl_tokens
            sums["clipped"] += (abs(ratio - 1) > config.clip) / rl_tokens
            sums["log_ratio"] += abs(logprob.item() - old) / rl_tokens
    sums["loss"] = (
        sums["policy"]
        + config.kl_coef * sums["kl"]
        - config.entropy_coef * sums["entropy"]
        + lambda_ * sums["internalization"]
    )
    return sums


@pytest.fixture
def mixed_rows(paired_episodes, policy):
    """A mini-batch of RL rows in every case of the clipping, and internalization rows."""
    steps = [s for e in paired_episodes for s in e.steps]
    noise = torch.Generator().manual_seed(0)
    rows = as_rows(paired_episodes)[:8]
    for i, row in enumerate(rows):
        own = torch.tensor(row.rollout_logprobs)
        row.advantage = (1.3, -0.7, 0.0, -2.0)[i % 4]
        # the sampler's, as if the policy had moved since: ratios from e^-1 to e^2
        row.old_logprobs = own + torch.rand(len(own), generator=noise) * 3 - 2
        row.ref_logprobs = own + 0.4 * torch.randn(len(own), generator=noise)
    for advantage, delta, step in zip(
        (0.4, 3.0, -0.6, 0.2), (0.5, 1.0, 0.5, 0.25), steps, strict=True
    ):
        assert step.plain_ids != step.prompt_ids  # steps of the arm with the skill
        row = common.Row(step.plain_ids, step.response_ids, advantage, step.logprobs)
        row.internalize = True
        row.delta = delta
        row.action_mask = find_action_tokens(policy.tokenizer, step.response_ids)
        assert any(row.action_mask) and not all(row.action_mask)
        rows.append(row)
    return rows


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_objective_and_its_gradient_equal_the_formula_written_out(mixed_rows, policy, config):
    """Every sign, weight, mask, denominator and the temperature, with no coefficient at 0 or 1."""
    config.temperature = 0.7
    config.kl_coef = 0.3
    config.entropy_coef = 0.05
    config.advantage_clip = 0.8
    config.clip = 0.15
    config.dual_clip = 2.0
    model = policy.model
    model.zero_grad()
    by_hand = objective_by_hand(model, mixed_rows, config, lambda_=0.6)
    by_hand["loss"].backward()
    expected = flat_gradient(model)
    model.zero_grad()
    logged = common.backward(model, mixed_rows, config, 0.6, policy.tokenizer.pad_token_id)
    for name, value in by_hand.items():
        value = float(torch.as_tensor(value).detach())
        assert logged[name] == pytest.approx(value, abs=1e-5), name
        assert abs(value) > 1e-3, f"{name} would not be missed"
    torch.testing.assert_close(flat_gradient(model), expected, atol=2e-6, rtol=1e-4)
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("kept", ["RL rows", "internalization rows"])
def test_a_mini_batch_of_one_kind_of_row_has_the_terms_of_that_kind(
    mixed_rows, policy, config, kept
):
    rows = [row for row in mixed_rows if row.internalize == (kept == "internalization rows")]
    logged = common.backward(policy.model, rows, config, 0.5, policy.tokenizer.pad_token_id)
    rl_terms = [logged[name] for name in ("policy", "kl", "entropy", "clipped", "log_ratio")]
    if kept == "RL rows":
        assert all(rl_terms) and logged["internalization"] == 0
    else:
        assert not any(rl_terms)
        assert logged["loss"] == pytest.approx(0.5 * logged["internalization"])


def test_without_lambda_internalization_rows_change_nothing(mixed_rows, policy, config):
    gradients = []
    for rows in (mixed_rows, [row for row in mixed_rows if not row.internalize]):
        policy.model.zero_grad()
        common.backward(policy.model, rows, config, 0.0, policy.tokenizer.pad_token_id)
        gradients.append(flat_gradient(policy.model))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_loss_and_gradients_do_not_change_with_the_micro_batch_size(mixed_rows, policy, config):
    config.kl_coef = 0.1
    config.entropy_coef = 0.01
    results = []
    for micro_tokens in (10**9, 1):  # all rows together, one row at a time
        config.micro_tokens = micro_tokens
        policy.model.zero_grad()
        terms = common.backward(policy.model, mixed_rows, config, 0.5, 0)
        results.append((terms, flat_gradient(policy.model)))
    (whole, big), (parts, small) = results
    assert big.abs().max() > 1e-3
    torch.testing.assert_close(big, small, atol=2e-6, rtol=1e-4)
    for name in whole:
        assert whole[name] == pytest.approx(parts[name], abs=1e-5), name


# --- ablations of the objective -------------------------------------------------------------------


def test_hand_off_gives_the_policy_loss_what_internalization_leaves(mixed_rows, policy, config):
    pad_id = policy.tokenizer.pad_token_id
    whole = common.backward(policy.model, mixed_rows, config, 0.25, pad_id)
    config.hand_off = True
    shared = common.backward(policy.model, mixed_rows, config, 0.25, pad_id)
    assert abs(whole["policy"]) > 1e-3
    assert shared["loss"] == pytest.approx(whole["loss"] - 0.25 * whole["policy"])
    alone = common.backward(policy.model, mixed_rows, config, 0.0, pad_id)
    config.hand_off = False
    assert alone == common.backward(policy.model, mixed_rows, config, 0.0, pad_id)


def test_kl_internalization_has_the_gradient_of_the_divergence_from_the_skill_prompt(
    mixed_rows, paired_episodes, policy, config
):
    """KL(pi(. | xs_t, y_<) || pi(. | x_t, y_<)) at the gated tokens, the first one held fixed."""
    rows = [row for row in mixed_rows if row.internalize]
    steps = [s for e in paired_episodes for s in e.steps]
    config.internalize_loss = "kl"
    config.temperature = 0.7
    model = policy.model

    def divergences(row):  # at each response token
        distributions = []
        for prompt in (row.skill_ids, row.prompt_ids):
            logits = model(torch.tensor([prompt + row.response_ids])).logits[0, :-1]
            log_p = (logits / config.temperature).log_softmax(-1)
            distributions.append(log_p[len(prompt) - 1 :])
        teacher, student = distributions
        return (teacher.detach().exp() * (teacher.detach() - student)).sum(-1)

    for row, step in zip(
        rows, steps, strict=True
    ):  # one token of each is gated: where the skill says most
        row.skill_ids = step.prompt_ids
        most = int(divergences(row).argmax())
        row.action_mask = [i == most for i in range(len(row.response_ids))]
    model.zero_grad()
    common.backward(model, rows, config, 0.5, policy.tokenizer.pad_token_id)
    measured = flat_gradient(model)

    model.zero_grad()
    weights = [0.5 * min(max(row.advantage, 0), config.advantage_clip) / len(rows) for row in rows]
    loss = sum(weight * divergences(row).max() for weight, row in zip(weights, rows, strict=True))
    loss.backward()
    torch.testing.assert_close(measured, flat_gradient(model), atol=2e-6, rtol=1e-3)
    assert measured.abs().max() > 1e-5
