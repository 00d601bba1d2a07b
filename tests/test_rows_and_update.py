"""Steps become rows, rows become an optimizer step. Each test names the bug it guards against."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import as_rows

import common
from common import Row, find_action_tokens, token_logprobs
from config import Config
from runtime import logprobs
from runtime.batches import make_batches, micro_batches
from runtime.policy import Policy, load_policy, load_reference, make_optimizer

# --- RL rows --------------------------------------------------------------------------------------


def test_an_rl_row_is_a_step_under_the_prompt_that_the_policy_saw(paired_episodes, config):
    config.skip_zero_rows = False
    advantages = [np.arange(1, 1 + len(e.steps)) for e in paired_episodes]
    rows = common.rl_rows(paired_episodes, advantages, config)
    steps = [step for e in paired_episodes for step in e.steps]
    assert len(rows) == len(steps)
    for row, step, advantage in zip(rows, steps, np.concatenate(advantages), strict=True):
        assert row.prompt_ids == step.prompt_ids and row.response_ids == step.response_ids
        assert row.rollout_logprobs == step.logprobs
        assert row.advantage == advantage and not row.internalize
    skilled = [step for e in paired_episodes if e.skills for step in e.steps]
    assert all(step.prompt_ids != step.plain_ids for step in skilled)


def test_rows_without_advantage_are_left_out_unless_they_are_wanted(episodes, config):
    advantages = [np.zeros(len(e.steps)) for e in episodes]
    advantages[1][0] = -0.5
    assert [row.advantage for row in common.rl_rows(episodes, advantages, config)] == [-0.5]
    config.skip_zero_rows = False
    assert len(common.rl_rows(episodes, advantages, config)) == sum(map(len, advantages))


# --- masks and log-probs --------------------------------------------------------------------------


def test_eos_is_inside_the_loss_mask_and_the_prompt_is_not(episodes, policy):
    tokenizer = policy.tokenizer
    rows = [row for row in as_rows(episodes) if row.response_ids[-1] == tokenizer.eos_token_id]
    assert rows, "the policy never ended a response"
    batch = common.collate(rows, tokenizer.pad_token_id, "cpu")
    for i, row in enumerate(rows):
        on = batch["response_mask"][i]
        assert batch["ids"][i, len(row) - 1] == tokenizer.eos_token_id and on[len(row) - 1]
        assert on.sum() == len(row.response_ids)
        assert batch["ids"][i, on].tolist() == row.response_ids


@torch.no_grad()
def test_logprobs_are_shifted_by_one(policy):
    ids = torch.tensor([common.encode_prompts(policy.tokenizer, ["go to desk 1 and look"])[0]])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, -4:] = True
    values, _ = token_logprobs(policy.model, ids, mask)
    for t in range(ids.shape[1] - 4, ids.shape[1]):
        # token t is predicted by the prefix that ends before it
        scores = policy.model(ids[:, :t]).logits[0, -1]
        expected = scores.log_softmax(-1)[ids[0, t]].item()
        assert values[0, t].item() == pytest.approx(expected, abs=1e-5)
    assert (values[~mask] == 0).all()


@torch.no_grad()
def test_logprobs_and_entropies_are_those_of_the_tempered_distribution(policy):
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([[False, False, True, True]])
    values, entropies = token_logprobs(policy.model, ids, mask, 0.5)
    expected = (policy.model(ids).logits[0] / 0.5).log_softmax(-1)
    for t in (2, 3):
        p = expected[t - 1].double().exp()
        assert values[0, t].item() == pytest.approx(expected[t - 1, ids[0, t]].item(), abs=1e-5)
        assert entropies[0, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)
    assert (entropies[~mask] == 0).all()


@torch.no_grad()
def test_each_row_of_a_ragged_batch_gets_its_own_response_positions(policy):
    """Responses that begin and end at different places, and one row that has none."""
    rows = [Row([5] * 9, [6, 7], 0.0, [0.0] * 2), Row([8], [9, 5, 6, 7, 8], 0.0, [0.0] * 5)]
    batch = common.collate(rows, 0, "cpu")
    batch["ids"] = torch.cat([batch["ids"], batch["ids"][:1]])
    mask = torch.cat([batch["response_mask"], torch.zeros_like(batch["response_mask"][:1])])
    values, _ = token_logprobs(policy.model, batch["ids"], mask)
    for i, row in enumerate(rows):
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        scores = policy.model(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = scores.gather(-1, torch.tensor(row.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(values[i, mask[i]], expected, atol=1e-5, rtol=0)
    assert (values[~mask] == 0).all()


def test_logits_made_chunk_by_chunk_give_the_same_values_and_gradients(
    episodes, policy, monkeypatch
):
    batch = common.collate(as_rows(episodes)[:5], 0, "cpu")
    results = []
    for held_at_once in (logprobs.LOGITS, 7 * policy.model.config.vocab_size):
        monkeypatch.setattr(logprobs, "LOGITS", held_at_once)
        policy.model.zero_grad()
        values = token_logprobs(policy.model, batch["ids"], batch["response_mask"], 0.8)
        (values[0].sum() + 2 * values[1].sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
        results.append((*values, gradient))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollout_logprobs_equal_training_logprobs_on_right_padded_rows(
    policy, config, games, temperature
):
    config.temperature = temperature
    items = common.envs.list_items("alfworld", "train", games)[:2]
    groups = common.plan_groups(items, config, members=2)
    rows = as_rows(common.rollout(policy, config, groups, seed=0))
    common.score_rows(policy.model, rows, "old_logprobs", config, policy.tokenizer.pad_token_id)
    for row in rows:
        sampled = torch.tensor(row.rollout_logprobs)
        torch.testing.assert_close(row.old_logprobs, sampled, atol=1e-4, rtol=0)


@torch.no_grad()
def test_batch_of_one_equals_the_same_row_in_a_padded_batch(episodes, policy):
    rows = sorted(as_rows(episodes), key=len)
    rows = [rows[0], rows[-1]]
    both = common.collate(rows, policy.tokenizer.pad_token_id, "cpu")
    alone = common.collate(rows[:1], policy.tokenizer.pad_token_id, "cpu")
    together, _ = token_logprobs(policy.model, both["ids"], both["response_mask"])
    single, _ = token_logprobs(policy.model, alone["ids"], alone["response_mask"])
    torch.testing.assert_close(together[0, : single.shape[1]], single[0], atol=1e-5, rtol=0)


def test_micro_batches_hold_every_row_once_within_their_limit():
    rows = [Row([1] * n, [2], 0.0, [0.0]) for n in (9, 4, 30, 5, 5, 9)]
    batches = micro_batches(rows, 20)
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, rows))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 20
    assert len(batches) == 3  # 5 + 6 + 6, 10 + 10, and the long row alone


def test_mini_batches_are_shuffled_anew_by_the_seed_and_near_their_size():
    rows = [Row([1], [n], 0.0, [0.0]) for n in range(40)]

    config = Config(minibatch_rows=15)

    def order(seed):
        batches = make_batches(rows, config, seed)
        return [row.response_ids[0] for batch in batches for row in batch]

    assert order(0) != list(range(40)) and sorted(order(0)) == list(range(40))
    assert order(0) == order(0) != order(1)
    sizes = [len(batch) for batch in make_batches(rows, config, 0)]
    assert sizes == [13, 13, 14]  # 40 / 15 is nearer to three than to two


# --- action tokens --------------------------------------------------------------------------------


def masked_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    mask = find_action_tokens(tokenizer, ids)
    return tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on])


def test_action_tokens_are_the_action_and_its_closing_tag_only(policy):
    whole = "<think>take it</think><action>go to desk 1</action>"
    assert masked_text(policy.tokenizer, whole) == "go to desk 1</action>"
    assert masked_text(policy.tokenizer, "<think>a <action> b") == ""
    assert masked_text(policy.tokenizer, "") == ""


def test_every_byte_of_a_character_inside_the_action_is_an_action_token(policy):
    """A character of several tokens shows up with its first; the others add no text."""
    ids = policy.tokenizer("<think>a</think><action>buy café 😀 now</action>")["input_ids"]
    ids.append(policy.tokenizer.eos_token_id)
    mask = common.find_action_tokens(policy.tokenizer, ids)
    covered = policy.tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on])
    assert covered == "buy café 😀 now</action>"


def test_action_tokens_with_a_tokenizer_that_splits_the_tags():
    """A BPE without tag tokens, as Qwen's: a bracket may merge with the letter beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=raw.pre_tokenizer.alphabet()
    )
    raw.train_from_iterator(["<action>go to desk</action>", "n>go", ">go"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    text = "<think>é</think><action>go on</action> end"
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    mask = find_action_tokens(tokenizer, ids)
    on = [i for i, m in enumerate(mask) if m]
    assert on == list(range(on[0], on[-1] + 1))
    covered = tokenizer.decode([ids[i] for i in on])
    assert "go on</action>" in covered and len(covered) < len("action>go on</action> e")
    assert not mask[-1] and not mask[0]


# --- update ---------------------------------------------------------------------------------------


def record_gradients(trainer) -> list:
    """A list that will hold the gradient of every optimizer step, as the optimizer sees it."""
    seen = []

    def keep(*_):
        seen.append(torch.cat([p.grad.flatten().clone() for p in trainer.model.parameters()]))

    trainer.optimizer.register_step_pre_hook(keep)
    return seen


def test_lr_zero_leaves_the_weights_unchanged(episodes, policy, config):
    config.lr = 0.0
    config.kl_coef = 0.0
    trainer = dataclasses.replace(policy, optimizer=make_optimizer(policy.model, config))
    before = [p.clone() for p in policy.model.parameters()]
    metrics = common.update(trainer, as_rows(episodes), config, 0)
    assert metrics["grad_norm"] > 0 and metrics["clipped"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_gradients_do_not_leak_from_one_optimizer_step_into_the_next(episodes, policy, config):
    config.lr = 0.0
    config.kl_coef = 0.0
    config.minibatch_rows = 1
    trainer = dataclasses.replace(policy, optimizer=make_optimizer(policy.model, config))
    gradients = record_gradients(trainer)
    row = as_rows(episodes)[0]
    metrics = common.update(trainer, [row, dataclasses.replace(row)], config, 0)
    again = common.update(trainer, [dataclasses.replace(row)], config, 0)
    # the same row three times, and weights that stay: three times the same gradient
    assert metrics["optimizer_steps"] == 2 and len(gradients) == 3
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])
    assert metrics["grad_norm"] == pytest.approx(again["grad_norm"])


def test_the_gradient_is_clipped_to_its_norm_and_logged_unclipped(episodes, trainer, config):
    gradients = record_gradients(trainer)
    config.grad_clip = 0.01
    metrics = common.update(trainer, as_rows(episodes, advantage=20.0), config, 0)
    assert metrics["grad_norm"] > 1
    assert gradients[0].norm().item() == pytest.approx(0.01, rel=1e-3)


def test_update_moves_the_log_probs_in_the_direction_of_the_advantages(episodes, policy, config):
    config.lr = 1e-3
    config.kl_coef = 0.0
    config.entropy_coef = 0.0
    trainer = dataclasses.replace(policy, optimizer=make_optimizer(policy.model, config))
    rows = as_rows(episodes)[:12]
    for i, row in enumerate(rows):
        row.advantage = 1.0 if i % 2 else -1.0
    common.score_rows(policy.model, rows, "ref_logprobs", config, 0)  # the log-probs before
    common.update(trainer, rows, config, 0)
    common.score_rows(policy.model, rows, "old_logprobs", config, 0)
    change = [float((row.old_logprobs - row.ref_logprobs).sum()) for row in rows]
    assert np.mean(change[1::2]) > np.mean(change[0::2])


def internalization_row(step, tokenizer, advantage=0.5):
    mask = find_action_tokens(tokenizer, step.response_ids)
    row = Row(step.plain_ids, step.response_ids, advantage, step.logprobs)
    return dataclasses.replace(row, internalize=True, delta=0.5, action_mask=mask)


def test_internalization_raises_the_plain_prompts_log_prob_of_the_action(
    paired_episodes, policy, config
):
    config.lr = 1e-3
    config.kl_coef = 0.0
    config.entropy_coef = 0.0
    trainer = dataclasses.replace(policy, optimizer=make_optimizer(policy.model, config))
    steps = [s for e in paired_episodes if e.skills for s in e.steps][:6]
    rows = [internalization_row(step, policy.tokenizer) for step in steps]

    def logprob_of_the_actions():
        common.score_rows(policy.model, rows, "ref_logprobs", config, 0)
        return sum(float(row.ref_logprobs[torch.tensor(row.action_mask)].sum()) for row in rows)

    before = logprob_of_the_actions()
    metrics = common.update(trainer, rows, config, 0, lambda_=1.0)
    assert logprob_of_the_actions() > before + 0.1
    assert metrics["internalization"] > 0 and metrics["policy"] == 0
    assert metrics["rows"] == 0 and metrics["internalization_rows"] == 6


def test_internalization_rows_do_not_change_the_number_of_optimizer_steps(
    paired_episodes, trainer, config
):
    config.minibatch_rows = 4
    rows = as_rows(paired_episodes)[:8]
    steps = [s for e in paired_episodes if e.skills for s in e.steps]
    extra = [internalization_row(step, trainer.tokenizer) for step in steps[:12]]
    assert common.update(trainer, rows, config, 0)["optimizer_steps"] == 2
    gradients = record_gradients(trainer)
    metrics = common.update(trainer, rows + extra, config, 0, lambda_=0.1)
    assert metrics["optimizer_steps"] == 2 == len(gradients)
    assert metrics["rows"] == 8 and metrics["internalization_rows"] == 12


def test_both_kinds_of_rows_act_in_every_step(paired_episodes, trainer, config, monkeypatch):
    config.minibatch_rows = 8
    rl = as_rows(paired_episodes)[:16]
    steps = [s for e in paired_episodes if e.skills for s in e.steps]
    rows = rl + [internalization_row(step, trainer.tokenizer) for step in steps[:8]]
    batches = []
    original = common.backward

    def look(model, batch, *rest):
        batches.append([row.internalize for row in batch])
        return original(model, batch, *rest)

    monkeypatch.setattr(common, "backward", look)
    common.update(trainer, rows, config, 0, lambda_=0.1)
    assert len(batches) == 2 and sum(map(len, batches)) == 24  # every row once
    assert all(any(batch) and not all(batch) for batch in batches)
    # and the RL rows of each step are those of a run without internalization
    for alone, mixed in zip(
        make_batches(rl, config, 0), make_batches(rows, config, 0), strict=True
    ):
        assert list(map(id, alone)) == [id(row) for row in mixed if not row.internalize]


def test_compared_gradients_are_those_of_the_two_parts_and_change_no_step(paired_episodes, config):
    """Norms and cosine of the gradient with and without internalization rows, taken apart."""
    config.kl_coef = 0.0
    rows = as_rows(paired_episodes)[:6]
    steps = [s for e in paired_episodes if e.skills for s in e.steps]
    logs = {}
    for name in ("both", "compared", "rl", "internal"):
        trainer = Policy(*load_policy("tiny", config, "cpu"))
        trainer.optimizer = make_optimizer(trainer.model, config)
        extra = [internalization_row(step, trainer.tokenizer) for step in steps[:6]]
        chosen = {"rl": rows, "internal": extra}.get(name, rows + extra)
        settings = dataclasses.replace(config, compare_gradients=name == "compared")
        logs[name] = common.update(trainer, chosen, settings, 0, lambda_=0.3)
    compared = logs["compared"]
    rl = compared["grad_norm_rl"]
    internal = compared["grad_norm_internalization"]
    assert rl == pytest.approx(logs["rl"]["grad_norm"], rel=1e-4)
    assert internal == pytest.approx(logs["internal"]["grad_norm"], rel=1e-4)
    both = rl**2 + internal**2 + 2 * compared["grad_cosine"] * rl * internal
    assert compared["grad_norm"] == pytest.approx(both**0.5, rel=1e-3)
    for name, value in logs["both"].items():
        if not name.endswith(("per_s", "seconds")):
            assert compared[name] == pytest.approx(value, abs=1e-6, rel=1e-4), name


def test_rows_of_weight_zero_keep_the_denominator_and_cost_no_forward_pass(
    paired_episodes, policy, config
):
    """L_int is a mean over all gated tokens: a worse action than the group's counts as a zero."""
    config.kl_coef = 0.0
    step = next(s for e in paired_episodes if e.skills for s in e.steps)
    good = internalization_row(step, policy.tokenizer)
    bad = internalization_row(step, policy.tokenizer, advantage=-0.5)
    seen = []
    policy.model.model.register_forward_hook(lambda _, __, out: seen.append(len(out[0])))
    alone = common.backward(policy.model, [good], config, 1.0, 0)["internalization"]
    before = sum(seen)
    both = common.backward(policy.model, [good, bad], config, 1.0, 0)["internalization"]
    assert alone > 0 and both == pytest.approx(alone / 2)
    assert sum(seen) == 2 * before


def test_rows_that_weigh_nothing_alone_are_no_update(paired_episodes, policy, config):
    """As an iteration in which no group has a contrast, but a skill arm is internalized."""
    config.kl_coef = 0.0
    trainer = dataclasses.replace(policy, optimizer=make_optimizer(policy.model, config))
    before = [p.clone() for p in policy.model.parameters()]
    step = next(s for e in paired_episodes if e.skills for s in e.steps)
    row = internalization_row(step, policy.tokenizer, advantage=0.0)
    metrics = common.update(trainer, [row], config, 0, lambda_=0.1)
    assert metrics["rows"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_flags_that_save_time_or_memory_do_not_change_the_step(episodes, config):
    """In float32 the sampler's log-probs are the trainer's; a reference on the CPU is the same."""
    logs = []
    for flags in ({"recompute_old": True}, {"recompute_old": False}, {"ref_offload": True}):
        settings = dataclasses.replace(config, **flags)
        model, tokenizer = load_policy("tiny", settings, "cpu")
        reference = load_reference(dataclasses.replace(settings, model="tiny"), "cpu")
        trainer = Policy(model, tokenizer, reference, make_optimizer(model, settings))
        logs.append(common.update(trainer, as_rows(episodes)[:12], settings, 0))
    for log in logs[1:]:
        for name in ("loss", "policy", "kl", "entropy", "grad_norm"):
            assert log[name] == pytest.approx(logs[0][name], abs=1e-5), name
        assert log["logprob_gap"] < 1e-5


def test_the_reference_pulls_the_policy_back(episodes, config):
    """The KL is that of the two models of the update: 0 for twins, positive once they part."""
    model, tokenizer = load_policy("tiny", config, "cpu")
    reference = load_reference(config, "cpu")
    assert not any(p.requires_grad for p in reference.parameters())
    trainer = Policy(model, tokenizer, reference, make_optimizer(model, config))
    rows = as_rows(episodes)[:6]
    assert common.update(trainer, rows, config, 0)["kl"] == pytest.approx(0, abs=1e-6)
    assert common.update(trainer, rows, config, 0)["kl"] > 1e-4
    kept = load_reference(config, "cpu").parameters()
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), kept, strict=True))


def test_ratios_start_at_one_even_where_the_sampler_was_off(episodes, trainer, config):
    """--recompute_old: the training forward's log-probs, and the gap to the sampler's is logged."""
    config.recompute_old = True
    rows = as_rows(episodes)[:6]
    for row in rows:
        row.rollout_logprobs = [logprob - 0.7 for logprob in row.rollout_logprobs]
    metrics = common.update(trainer, rows, config, 0)
    assert metrics["clipped"] == 0 and metrics["log_ratio"] < 1e-4
    assert metrics["logprob_gap"] == pytest.approx(0.7, abs=1e-3)


def test_the_gap_to_the_sampler_is_that_before_anything_moved(episodes, trainer, config):
    config.minibatch_rows = 4
    config.recompute_old = False
    config.lr = 0.05
    trainer.optimizer = make_optimizer(trainer.model, config)
    metrics = common.update(trainer, as_rows(episodes)[:16], config, 0)
    assert metrics["optimizer_steps"] == 4
    assert metrics["logprob_gap"] < 1e-3 < metrics["log_ratio"]


def test_update_without_rows_does_nothing(policy, config):
    assert common.update(policy, [], config, 0)["optimizer_steps"] == 0


def test_gradient_checkpointing_is_on_in_training_and_changes_no_gradient(episodes, config):
    """Transformers recomputes activations in train mode only; in eval mode the flag is silent."""
    rows = as_rows(episodes)[:12]
    config.lr = 1e-3
    results = []
    for on in (False, True):
        config.gradient_checkpointing = on
        model, tokenizer = load_policy("tiny", config, "cpu")
        calls = []
        layer = model.model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer = Policy(model, tokenizer, None, make_optimizer(model, config))
        common.update(trainer, rows, config, 0)
        results.append((len(calls), torch.cat([p.flatten() for p in model.parameters()])))
    assert results[1][0] > results[0][0]  # the layer ran again in the backward pass
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=0)
