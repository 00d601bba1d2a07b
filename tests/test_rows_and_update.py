"""Steps become rows, rows become an optimizer step. Each test names the bug it guards against."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import as_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import envs
from common import (
    Row,
    backward,
    collate,
    fill_logprobs,
    find_action_tokens,
    make_batches,
    micro_batches,
    open_groups,
    rl_rows,
    rollout,
    token_logprobs,
    update,
)
from runtime.memory import LOGITS
from runtime.policy import Policy, load_policy, load_reference, make_optimizer

# --- RL rows --------------------------------------------------------------------------------------


def test_an_rl_row_is_a_step_under_the_prompt_that_the_policy_saw(paired_episodes):
    advantages = [np.arange(1, 1 + len(e.steps)) for e in paired_episodes]
    rows = rl_rows(paired_episodes, advantages)
    steps = [step for e in paired_episodes for step in e.steps]
    assert len(rows) == len(steps)
    for row, step, advantage in zip(rows, steps, np.concatenate(advantages), strict=True):
        assert row.prompt_ids == step.prompt_ids and row.response_ids == step.response_ids
        assert row.rollout_logprobs == step.logprobs
        assert row.advantage == advantage and row.gate is None
    assert all(step.prompt_ids != step.plain_ids for step in skill_steps(paired_episodes))


def test_rows_without_advantage_are_left_out(episodes):
    advantages = [np.zeros(len(e.steps)) for e in episodes]
    advantages[1][0] = -0.5
    assert [row.advantage for row in rl_rows(episodes, advantages)] == [-0.5]


# --- masks and log-probs --------------------------------------------------------------------------


def test_eos_is_inside_the_loss_mask_and_the_prompt_is_not(episodes, policy):
    tokenizer = policy.tokenizer
    rows = [row for row in as_rows(episodes) if row.response_ids[-1] == tokenizer.eos_token_id]
    assert rows, "the policy never ended a response"
    batch = collate(rows, tokenizer.pad_token_id, "cpu")
    for i, row in enumerate(rows):
        on = batch["response_mask"][i]
        assert batch["ids"][i, len(row) - 1] == tokenizer.eos_token_id and on[len(row) - 1]
        assert on.sum() == len(row.response_ids)
        assert batch["ids"][i, on].tolist() == row.response_ids


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_token_is_predicted_by_the_prefix_that_ends_before_it(policy, temperature):
    """In a padded batch, at each row's own response, tempered; the last row has no response."""
    rows = [Row([5] * 9, [6, 7]), Row([8], [9, 5, 6, 7, 8]), Row([5, 6, 7], [])]
    batch = collate(rows, 0, "cpu")
    mask = batch["response_mask"]
    values, entropies = token_logprobs(policy.model, batch["ids"], mask, temperature)
    for i, row in enumerate(rows):
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        for t in range(len(row.prompt_ids), len(row)):
            log_p = (policy.model(ids[:, :t]).logits[0, -1] / temperature).log_softmax(-1).double()
            near = {"abs": 1e-5, "rel": 1e-6}
            assert values[i, t].item() == pytest.approx(log_p[ids[0, t]].item(), **near)
            spread = -(log_p.exp() * log_p).sum().item()
            assert entropies[i, t].item() == pytest.approx(spread, **near)
    assert mask.sum() == 7 and (values[~mask] == 0).all() and (entropies[~mask] == 0).all()


def test_logits_made_chunk_by_chunk_give_the_same_values_and_gradients(
    episodes, policy, monkeypatch
):
    batch = collate(as_rows(episodes)[:5], 0, "cpu")
    results = []
    for held_at_once in (LOGITS, 7 * policy.model.config.vocab_size):
        monkeypatch.setattr("common.LOGITS", held_at_once)
        policy.model.zero_grad()
        values = token_logprobs(policy.model, batch["ids"], batch["response_mask"], 0.8)
        (values[0].sum() + 2 * values[1].sum()).backward()
        results.append((*values, flat([p.grad for p in policy.model.parameters()])))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollout_logprobs_equal_training_logprobs_on_right_padded_rows(
    policy, config, games, temperature
):
    config.temperature = temperature
    items = envs.list_items("alfworld", "train", games)[:2]
    rows = as_rows(rollout(policy, config, open_groups(items, config, members=2), seed=0))
    for row, trained in zip(rows, trainers_logprobs(policy, rows, config), strict=True):
        torch.testing.assert_close(trained, torch.tensor(row.rollout_logprobs), atol=1e-4, rtol=0)


def test_micro_batches_hold_every_row_once_within_their_limit():
    rows = [Row([1] * n, [2]) for n in (9, 4, 30, 5, 5, 9)]
    batches = micro_batches(rows, 20)
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, rows))
    assert all(len(b) == 1 or len(b) * max(map(len, b)) <= 20 for b in batches)
    assert len(batches) == 3  # 5 + 6 + 6, 10 + 10, and the long row alone


def test_mini_batches_are_shuffled_anew_by_the_seed_and_near_their_size():
    rows = [Row([1], [n]) for n in range(40)]

    def order(seed):
        return [row.response_ids[0] for batch in make_batches(rows, 15, seed) for row in batch]

    assert order(0) != list(range(40)) and sorted(order(0)) == list(range(40))
    assert order(0) == order(0) != order(1)
    # 40 / 15 is nearer to three than to two
    assert [len(batch) for batch in make_batches(rows, 15, 0)] == [13, 13, 14]


# --- action tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, covered",
    [
        ("<think>take it</think><action>go to desk 1</action>", "go to desk 1</action>"),
        ("<think>a <action> b", ""),
        ("", ""),
        # a character of several tokens shows up with its first; the others add no text
        ("<think>a</think><action>buy café 😀 now</action>", "buy café 😀 now</action>"),
        ("<think>é</think><action>😀</action> é", "😀</action>"),
    ],
)
def test_action_tokens_are_the_action_and_its_closing_tag_only(policy, text, covered):
    tokenizer = policy.tokenizer
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    mask = find_action_tokens(tokenizer, ids)
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == covered


def test_action_tokens_with_a_tokenizer_that_splits_the_tags():
    """A BPE without tag tokens, as Qwen's: a bracket may merge with the letter next to it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = raw.pre_tokenizer.alphabet()
    options = {"vocab_size": 300, "special_tokens": ["<eos>"], "initial_alphabet": alphabet}
    texts = ["<action>go to desk</action>", "n>go", ">go"] * 9
    raw.train_from_iterator(texts, trainers.BpeTrainer(**options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    ids = tokenizer("<think>é</think><action>go on</action> end")["input_ids"]
    mask = find_action_tokens(tokenizer, [*ids, tokenizer.eos_token_id])
    on = [i for i, m in enumerate(mask) if m]
    assert on == list(range(on[0], on[-1] + 1))
    covered = tokenizer.decode([ids[i] for i in on])
    assert "go on</action>" in covered and len(covered) < len("action>go on</action> e")
    assert not mask[-1] and not mask[0]


# --- update ---------------------------------------------------------------------------------------


def flat(tensors):
    return torch.cat([tensor.detach().flatten().clone() for tensor in tensors])


def weights_of(policy):
    return flat(policy.model.parameters())


def trainers_logprobs(policy, rows, config) -> list:
    """The log-probs of each response by the training forward, whatever kind of row it is."""
    rows = [replace(row, gate=None, rollout_logprobs=[0.0] * len(row.response_ids)) for row in rows]
    fill_logprobs(policy, rows, replace(config, recompute_old=True))
    return [row.old_logprobs for row in rows]


def new_trainer(config, **flags) -> tuple:
    """A fresh policy with its optimizer, and its reference where there is a KL term -> (policy,
    config with these flags).
    """
    config = replace(config, **flags)
    model, tokenizer = load_policy(config.model, config, "cpu")
    reference = load_reference(config, "cpu")
    return Policy(model, tokenizer, reference, make_optimizer(model, config.lr)), config


def record_gradients(trainer) -> list:
    """A list that will hold the gradient of every optimizer step, as the optimizer sees it."""
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(flat([p.grad for p in trainer.model.parameters()]))
    )
    return seen


def skill_steps(episodes):
    return [step for e in episodes if e.skills for step in e.steps]


def internalization_row(step, tokenizer, weight=0.5):
    gate = find_action_tokens(tokenizer, step.response_ids)
    return Row(step.plain_ids, step.response_ids, gate=gate, weight=weight)


def test_gradients_do_not_leak_from_one_step_into_the_next_and_lr_zero_moves_nothing(
    episodes, config
):
    trainer, config = new_trainer(config, lr=0.0, kl_coef=0.0, minibatch_rows=1)
    gradients = record_gradients(trainer)
    before = weights_of(trainer)
    row = as_rows(episodes)[0]
    metrics = update(trainer, [row, replace(row)], config, 0)
    again = update(trainer, [replace(row)], config, 0)
    assert torch.equal(before, weights_of(trainer)) and metrics["clipped"] == 0
    # the same row three times, and weights that stay: three times the same gradient
    assert metrics["optimizer_steps"] == 2 and trainer.steps == len(gradients) == 3
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])
    assert 0 < metrics["grad_norm"] == pytest.approx(again["grad_norm"])


def test_the_gradient_is_clipped_to_its_norm_and_logged_unclipped(
    episodes, trainer, config, monkeypatch
):
    gradients = record_gradients(trainer)
    monkeypatch.setattr("common.GRAD_CLIP", 0.01)
    metrics = update(trainer, as_rows(episodes, advantage=20.0), config, 0)
    assert metrics["grad_norm"] > 1
    assert gradients[0].norm().item() == pytest.approx(0.01, rel=1e-3)
    monkeypatch.undo()
    update(trainer, as_rows(episodes, advantage=200.0), config, 0)
    assert gradients[1].norm().item() == pytest.approx(1.0, rel=1e-3)


def test_update_moves_the_log_probs_in_the_direction_of_the_advantages(episodes, config):
    trainer, config = new_trainer(config, lr=1e-3, kl_coef=0.0, entropy_coef=0.0)
    rows = as_rows(episodes)[:12]
    for i, row in enumerate(rows):
        row.advantage = 1.0 if i % 2 else -1.0
    before = trainers_logprobs(trainer, rows, config)
    update(trainer, rows, config, 0)
    after = trainers_logprobs(trainer, rows, config)
    change = [float((new - old).sum()) for new, old in zip(after, before, strict=True)]
    assert np.mean(change[1::2]) > np.mean(change[0::2])


def test_internalization_raises_the_plain_prompts_log_prob_of_the_action(paired_episodes, config):
    trainer, config = new_trainer(config, lr=1e-3, kl_coef=0.0, entropy_coef=0.0)
    steps = skill_steps(paired_episodes)[:6]
    rows = [internalization_row(step, trainer.tokenizer) for step in steps]

    def logprob_of_the_actions():
        values = torch.cat(trainers_logprobs(trainer, rows, config))
        return float(values[torch.tensor(sum((row.gate for row in rows), []))].sum())

    before = logprob_of_the_actions()
    metrics = update(trainer, rows, config, 0, lambda_=1.0)
    assert logprob_of_the_actions() > before + 0.1
    assert metrics["internalization"] > 0 and metrics["policy"] == 0
    assert metrics["rows"] == 0 and metrics["internalization_rows"] == 6


def test_internalization_rows_join_the_steps_of_the_rl_rows_and_make_none(
    paired_episodes, trainer, config, monkeypatch
):
    """As many optimizer steps with them as without; both kinds of rows act in every step."""
    config.minibatch_rows = 8
    rl = as_rows(paired_episodes)[:16]
    steps = skill_steps(paired_episodes)[:12]
    rows = rl + [internalization_row(step, trainer.tokenizer) for step in steps]
    assert update(trainer, rl, config, 0)["optimizer_steps"] == 2
    gradients = record_gradients(trainer)
    batches = []
    monkeypatch.setattr("common.backward", lambda *args: batches.append(args[1]) or backward(*args))
    metrics = update(trainer, rows, config, 0, lambda_=0.1)
    assert metrics["optimizer_steps"] == len(gradients) == len(batches) == 2
    assert metrics["rows"] == 16 and metrics["internalization_rows"] == 12
    assert sum(map(len, batches)) == 28  # every row once
    # and the RL rows of each step are those of a run without internalization
    for alone, mixed in zip(make_batches(rl, 8, 0), batches, strict=True):
        assert list(map(id, alone)) == [id(row) for row in mixed if row.gate is None]
        assert 0 < len(alone) < len(mixed)


def test_rows_of_weight_zero_keep_the_denominator_and_cost_no_forward_pass(
    paired_episodes, trainer, config
):
    """L_int is a mean over all gated tokens: a worse action than the group's counts as a zero."""
    step = skill_steps(paired_episodes)[0]
    good, bad = (internalization_row(step, trainer.tokenizer, weight) for weight in (0.5, 0.0))
    seen = []
    trainer.model.model.register_forward_hook(lambda _, __, out: seen.append(len(out[0])))
    alone = backward(trainer, [good], config, 1.0)["internalization"]
    before = sum(seen)
    both = backward(trainer, [good, bad], config, 1.0)["internalization"]
    assert alone > 0 and both == pytest.approx(alone / 2)
    assert sum(seen) == 2 * before


def test_rows_that_weigh_nothing_alone_and_no_rows_are_no_update(paired_episodes, trainer, config):
    """As an iteration in which no group has a contrast, but a skill half is internalized."""
    before = weights_of(trainer)
    step = skill_steps(paired_episodes)[0]
    for rows in ([internalization_row(step, trainer.tokenizer, weight=0.0)], []):
        metrics = update(trainer, rows, config, 0, lambda_=0.1)
        assert metrics["rows"] == metrics["optimizer_steps"] == trainer.steps == 0
        assert metrics["internalization_rows"] == len(rows)
    assert torch.equal(before, weights_of(trainer))


def test_flags_that_save_time_or_memory_do_not_change_the_step(episodes, config):
    """In float32 the sampler's log-probs are the trainer's; a reference on the CPU is the same."""
    logs = []
    for flags in ({"recompute_old": True}, {"recompute_old": False}, {"offload": True}):
        trainer, settings = new_trainer(config, **flags)
        logs.append(update(trainer, as_rows(episodes)[:12], settings, 0))
    for log in logs[1:]:
        for name in ("loss", "policy", "kl", "entropy", "grad_norm"):
            assert log[name] == pytest.approx(logs[0][name], abs=1e-5), name
        assert log["logprob_gap"] < 1e-5


def test_the_reference_pulls_the_policy_back(episodes, config):
    """The KL is that of the two models of the update: 0 for twins, positive once they part."""
    trainer, config = new_trainer(config)
    assert not any(p.requires_grad for p in trainer.reference.parameters())
    kept = flat(trainer.reference.parameters())
    rows = as_rows(episodes)[:6]
    assert update(trainer, rows, config, 0)["kl"] == pytest.approx(0, abs=1e-6)
    assert update(trainer, rows, config, 0)["kl"] > 1e-4
    assert torch.equal(kept, flat(trainer.reference.parameters()))


def test_ratios_start_at_one_even_where_the_sampler_was_off(episodes, trainer, config):
    """--recompute_old: the training forward's log-probs, and the gap to the sampler's is logged."""
    config.recompute_old = True
    rows = as_rows(episodes)[:6]
    for row in rows:
        row.rollout_logprobs = [logprob - 0.7 for logprob in row.rollout_logprobs]
    metrics = update(trainer, rows, config, 0)
    assert metrics["clipped"] == 0 and metrics["log_ratio"] < 1e-4
    assert metrics["logprob_gap"] == pytest.approx(0.7, abs=1e-3)


def test_the_gap_to_the_sampler_is_that_before_anything_moved(episodes, config):
    trainer, config = new_trainer(
        config, lr=0.05, kl_coef=0.0, minibatch_rows=4, recompute_old=False
    )
    metrics = update(trainer, as_rows(episodes)[:16], config, 0)
    assert metrics["optimizer_steps"] == 4
    assert metrics["logprob_gap"] < 1e-3 < metrics["log_ratio"]


def test_gradient_checkpointing_is_on_in_training_and_changes_no_gradient(episodes, config):
    """Transformers recomputes activations in train mode only; in eval mode the flag is silent."""
    results = []
    for on in (False, True):
        trainer, settings = new_trainer(config, lr=1e-3, kl_coef=0.0, gradient_checkpointing=on)
        calls = []
        layer = trainer.model.model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        update(trainer, as_rows(episodes)[:12], settings, 0)
        results.append((len(calls), weights_of(trainer)))
    assert results[1][0] > results[0][0]  # the layer ran again in the backward pass
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("recompute_old, gap", [(False, 0.25), (True, 0.0)])
def test_an_update_logs_the_means_of_its_steps_and_the_gap_before_the_first(
    episodes, trainer, config, monkeypatch, recompute_old, gap
):
    logs = [{"kl": 1.0, "log_ratio": 0.25}, {"kl": 3.0, "log_ratio": 0.75}, None]
    monkeypatch.setattr("common.optimizer_step", lambda *_: logs.pop(0))
    rows = as_rows(episodes)[:12]
    config = replace(config, recompute_old=recompute_old, minibatch_rows=4)
    metrics = update(trainer, rows, config, 0)
    assert metrics["kl"] == 2.0 and metrics["log_ratio"] == 0.5
    assert metrics["logprob_gap"] == pytest.approx(gap, abs=1e-4)
    assert (metrics["optimizer_steps"], metrics["refused_steps"], metrics["rows"]) == (2, 1, 12)
    assert metrics["update_seconds"] >= metrics["score_seconds"] > 0
    tokens = sum(map(len, rows))
    assert metrics["update_tokens_per_s"] == pytest.approx(tokens / metrics["update_seconds"])
