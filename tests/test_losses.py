"""The terms of the objective, and the whole of it written out by hand."""

import dataclasses
import math

import pytest
import torch
from conftest import as_rows

from common import (
    Episode,
    Row,
    Step,
    backward,
    clipped_policy_loss,
    find_action_tokens,
    internalization_loss,
    k3_kl,
    token_mean,
)
from distill import internalization_rows
from skills import Skill

DUAL_CLIP = 3.0

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
    loss = clipped_policy_loss(
        torch.tensor([[math.log(ratio)]]),
        torch.zeros(1, 1),
        torch.tensor([[advantage]]),
        torch.ones(1, 1, dtype=torch.bool),
    )
    assert loss.item() == pytest.approx(expected)


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    mask = torch.tensor([[True, True, False]])
    assert k3_kl(torch.zeros(1, 3), torch.zeros(1, 3), mask) == 0
    value = k3_kl(torch.tensor([[-1.0, -1.0, 5.0]]), torch.tensor([[-2.0, -2.0, 0.0]]), mask)
    assert value == pytest.approx(math.exp(-1.0) + 1 - 1)  # d = -1; the masked token does not count


def test_k3_is_large_where_the_reference_expects_what_the_policy_avoids():
    one = torch.ones(1, 1, dtype=torch.bool)
    high = k3_kl(torch.tensor([[-3.0]]), torch.tensor([[-1.0]]), one)
    assert high == pytest.approx(math.exp(2) - 2 - 1)  # d = +2, not the milder d = -2
    assert k3_kl(torch.tensor([[-9.0]]), torch.tensor([[-1.0]]), one) == 10  # clamped


def test_a_mean_over_a_part_divides_by_the_tokens_of_the_whole():
    values = torch.tensor([[1.0, 2.0, 50.0]])
    mask = torch.tensor([[True, True, False]])
    assert token_mean(values, mask) == 1.5
    assert token_mean(values, mask, tokens=6) == 0.5
    assert token_mean(values, torch.zeros_like(mask)) == 0


def test_internalization_is_the_mean_of_eq_12_over_the_gated_tokens():
    logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, 0.0, -5.0]], requires_grad=True)
    gate = torch.tensor([[False, True, True], [True, False, False]])
    loss = internalization_loss(logprobs, torch.tensor([0.5, 0.0]), gate)
    loss.backward()
    # a gated row without weight counts in the denominator: three tokens
    assert loss.item() == pytest.approx(0.5 * (2 + 4) / 3)
    assert torch.allclose(logprobs.grad, torch.tensor([[0.0, -0.5, -0.5], [0.0, 0.0, 0.0]]) / 3)
    parts = internalization_loss(logprobs, torch.tensor([0.5, 0.0]), gate, tokens=12)
    assert parts.item() == pytest.approx(0.5 * (2 + 4) / 12)
    closed = torch.zeros_like(gate)
    assert internalization_loss(logprobs, torch.tensor([1.0, 1.0]), closed) == 0


@pytest.mark.parametrize(
    "without, changes, weights",
    [
        ("", {}, {0.0, 0.5}),  # the thought has none
        ("", {"advantage": -0.5}, {0.0}),
        ("", {"advantage": 7.0}, {0.0, 2.0}),  # clipped
        ("", {"delta": -0.25}, set()),
        ("", {"delta": 0.0}, set()),
        ("", {"uses_skill": False}, set()),
        ("", {"said": "<action>go"}, {0.0}),
        ("weight", {"advantage": -7.0}, {0.0, 1.0}),
        ("weight", {"delta": 0.0}, set()),
        ("gate", {"delta": -0.25}, {0.0, 0.5}),
        ("gate", {"uses_skill": False}, set()),
        ("action_mask", {}, {0.5}),
    ],
)
def test_each_factor_of_the_internalization_gate_alone_switches_a_token_off(
    without, changes, weights, policy, config
):
    """An episode of one step -> the weights of its tokens; set(): no row at all."""
    case = {"advantage": 0.5, "delta": 0.25, "uses_skill": True, "said": "<action>go</action>"}
    case |= changes
    config = dataclasses.replace(config, without=[without], advantage_clip=2.0)
    ids = policy.tokenizer(f"<think>a</think>{case['said']}")["input_ids"]
    step = Step("saw", [1], [2], "", ids, [0.0] * len(ids), "go", True)
    skills = [Skill("c", "s", "pick")] if case["uses_skill"] else []
    rows = internalization_rows(
        [Episode("i", "g", skills, steps=[step])],
        [[case["advantage"]]],
        {"g": case["delta"]},
        policy.tokenizer,
        config,
    )
    assert {on * row.weight for row in rows for on in row.gate} == weights


# --- the whole objective, by hand -----------------------------------------------------------------


def objective_by_hand(model, rows, config, lambda_) -> dict:
    """method Eq. 14 row by row and token by token -> the logged terms, each a 0-dim tensor."""
    sums = dict.fromkeys(("policy", "kl", "entropy", "internalization", "clipped", "log_ratio"), 0)
    rl_tokens = sum(len(row.response_ids) for row in rows if row.gate is None)
    gated_tokens = sum(sum(row.gate) for row in rows if row.gate is not None)
    for row in rows:
        ids = row.prompt_ids + row.response_ids
        scores = model(torch.tensor([ids])).logits[0] / config.temperature
        for i, token in enumerate(row.response_ids):
            log_p = torch.log_softmax(scores[len(row.prompt_ids) + i - 1], -1)
            logprob = log_p[token]
            if row.gate is not None:
                if row.gate[i]:
                    sums["internalization"] -= row.weight * logprob / gated_tokens
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
            else:
                term = -a * moving if ratio < DUAL_CLIP else -a * DUAL_CLIP
            d = row.ref_logprobs[i].item() - logprob
            sums["policy"] += term / rl_tokens
            sums["kl"] += (d.exp() - d - 1) / rl_tokens
            sums["entropy"] -= (log_p.exp() * log_p).sum() / rl_tokens
            sums["clipped"] += (abs(ratio - 1) > config.clip) / rl_tokens
            sums["log_ratio"] += abs(logprob.item() - old) / rl_tokens
    sums["loss"] = sums["policy"] + config.kl_coef * sums["kl"]
    sums["loss"] += lambda_ * sums["internalization"] - config.entropy_coef * sums["entropy"]
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
    for weight, step in zip((0.4, 0.8, 0.0, 0.2), steps, strict=False):
        assert step.plain_ids != step.prompt_ids  # steps of the half with the skill
        gate = find_action_tokens(policy.tokenizer, step.response_ids)
        assert any(gate) and not all(gate)
        rows.append(Row(step.plain_ids, step.response_ids, gate=gate, weight=weight))
    return rows


def passed(policy, rows, config, lambda_) -> tuple:
    """The logged terms of a mini-batch, and its gradient."""
    policy.model.zero_grad()
    logged = backward(policy, rows, config, lambda_)
    return logged, flat_gradient(policy.model)


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_objective_and_its_gradient_equal_the_formula_written_out(mixed_rows, policy, config):
    """Every sign, weight, mask, denominator and the temperature, with no coefficient at 0 or 1."""
    flags = {"temperature": 0.7, "kl_coef": 0.3, "entropy_coef": 0.05, "clip": 0.15}
    config = dataclasses.replace(config, **flags)
    policy.model.zero_grad()
    by_hand = objective_by_hand(policy.model, mixed_rows, config, lambda_=0.6)
    by_hand["loss"].backward()
    expected = flat_gradient(policy.model)
    logged, gradient = passed(policy, mixed_rows, config, 0.6)
    for name, value in by_hand.items():
        value = float(torch.as_tensor(value).detach())
        assert logged[name] == pytest.approx(value, abs=1e-5), name
        assert abs(value) > 1e-3, f"{name} would not be missed"
    torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-4)
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("gated", [False, True])
def test_a_mini_batch_of_one_kind_of_row_has_the_terms_of_that_kind(
    mixed_rows, policy, config, gated
):
    rows = [row for row in mixed_rows if (row.gate is not None) == gated]
    logged = backward(policy, rows, config, 0.5)
    rl_terms = [logged[name] for name in ("policy", "kl", "entropy", "clipped", "log_ratio")]
    if gated:
        assert not any(rl_terms)
        assert logged["loss"] == pytest.approx(0.5 * logged["internalization"])
    else:
        assert all(rl_terms) and logged["internalization"] == 0


def test_without_lambda_internalization_rows_change_nothing(mixed_rows, policy, config):
    rl = [row for row in mixed_rows if row.gate is None]
    gradients = [passed(policy, rows, config, 0.0)[1] for rows in (mixed_rows, rl)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_loss_and_gradients_do_not_change_with_the_micro_batch_size(mixed_rows, policy, config):
    config = dataclasses.replace(config, kl_coef=0.1, entropy_coef=0.01)
    config.micro_tokens = 10**9  # all rows together
    whole, big = passed(policy, mixed_rows, config, 0.5)
    config.micro_tokens = 1  # one row at a time
    parts, small = passed(policy, mixed_rows, config, 0.5)
    assert big.abs().max() > 1e-3
    torch.testing.assert_close(big, small, atol=2e-6, rtol=1e-4)
    for name in whole:
        assert whole[name] == pytest.approx(parts[name], abs=1e-5), name
