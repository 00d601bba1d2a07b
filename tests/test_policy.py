"""Loading and the optimizer. Each test names the bug it guards against."""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import as_rows

from common import update
from config import UserError
from runtime.policy import (
    SHAPES,
    Policy,
    digest_policy,
    load_policy,
    load_reference,
    make_optimizer,
)


def test_bfloat16_weights_move_at_lr_1e_6_as_float32_weights_do():
    """Plain AdamW on bfloat16 loses 98% of the steps at this learning rate."""
    torch.manual_seed(0)
    start = (torch.randn(20_000) * 0.02).bfloat16()
    direction = torch.randn(20_000)

    def moved(dtype):
        model = torch.nn.ParameterList([torch.nn.Parameter(start.to(dtype, copy=True))])
        optimizer = make_optimizer(model, 1e-6)
        noise = torch.Generator().manual_seed(1)
        for _ in range(100):
            gradient = direction + 0.3 * torch.randn(20_000, generator=noise)
            model[0].grad = (1e-3 * gradient).to(dtype)
            optimizer.step()
        lost = optimizer.state[model[0]]["kahan_comp"]
        end = model[0].detach().double() + (0 if lost is None else lost.double())
        return end - start.double()

    exact = moved(torch.float32)
    kept = moved(torch.bfloat16)
    assert (kept != 0)[exact != 0].double().mean() > 0.98
    assert 0.98 < (kept @ exact) / (exact @ exact) < 1.02


def test_second_moment_of_bfloat16_follows_a_gradient_that_shrinks():
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))])
    optimizer = make_optimizer(model, 1e-6)
    for scale in [1.0] * 200 + [0.1] * 200:
        model[0].grad = torch.full((64,), scale, dtype=torch.bfloat16)
        optimizer.step()
    second_moment = optimizer.state[model[0]]["exp_avg_sq"].float().mean().item()
    assert second_moment == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("offload", [False, True])
def test_an_optimizer_made_from_its_saved_state_goes_on_as_the_old_one(
    episodes, config, tmp_path, offload
):
    """Also with its state in host memory, and with the learning rate of the later phase."""
    rows = as_rows(episodes)[:4]
    config.kl_coef = 0.0

    def two_steps(stop_between):
        model, tokenizer = load_policy("tiny-household", config, "cpu")
        trainer = Policy(model, tokenizer, None, make_optimizer(model, 1e-3))
        update(trainer, [replace(row) for row in rows], config, 0)
        if stop_between:
            torch.save(trainer.optimizer.state_dict(), tmp_path / "moments.pt")
            saved = torch.load(tmp_path / "moments.pt", weights_only=True)
            trainer.optimizer = make_optimizer(model, 2e-3, offload=offload, saved=saved)
        else:
            for group in trainer.optimizer.param_groups:
                group["lr"] = 2e-3
        update(trainer, [replace(row) for row in rows], config, 1)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(two_steps(True), two_steps(False), atol=1e-7, rtol=0)


def test_a_model_of_another_family_is_a_clear_error(policy, config, tmp_path):
    settings = {"vocab_size": 900, "n_embd": 16, "n_layer": 1, "n_head": 2}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="is a gpt2; runtime/generation.py reads qwen2, qwen3, llama"
    ):
        load_policy(tmp_path, config, "cpu")


def test_tokenizer_round_trips_and_survives_its_file(policy, config, tmp_path):
    tokenizer = policy.tokenizer
    text = "<think>a mug</think><action>go to desk 1</action> \n\n{'x': \"y\"} 12 caf\u00e9 \u597d"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    policy.model.save_pretrained(tmp_path)
    _, loaded = load_policy(tmp_path, config, "cpu")
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_no_reference_is_loaded_for_a_kl_without_weight(config):
    assert load_reference(replace(config, kl_coef=0.0), "cpu") is None
    assert load_reference(config, "cpu") is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_digest_is_of_every_bit_of_the_weights_and_of_nothing_else(config, tmp_path, dtype):
    """Not of the folder, nor of how it is written: a hub's files have other names than ours."""
    config.dtype = dtype
    model, tokenizer = load_policy("tiny-household", config, "cpu")
    known = digest_policy(model)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    tokenizer.save_pretrained(tmp_path)
    assert digest_policy(load_policy(tmp_path, config, "cpu", trainable=False)[0]) == known
    for parameter in (*list(model.parameters())[::7], list(model.parameters())[-1]):
        bits = parameter.detach().view(torch.uint8).view(-1)
        bits[-1] ^= 1
        assert digest_policy(model) != known
        bits[-1] ^= 1
    assert digest_policy(model) == known
    for name, value in (("rope_parameters", {"rope_theta": 5e5}), ("rms_norm_eps", 1e-5)):
        before = getattr(model.config, name)
        setattr(model.config, name, value)  # other log-probs by the same weights
        assert digest_policy(model) != known
        setattr(model.config, name, before)
    a, b = (layer.input_layernorm.weight.detach() for layer in model.model.layers[:2])
    a += 1
    changed = digest_policy(model)
    a -= 1
    b += 1
    assert digest_policy(model) not in (known, changed)  # it knows which weight is which


def test_a_shape_has_the_same_weights_each_time(config, monkeypatch):
    """Or it would not be its own reference, and another one when a phase goes on."""
    small = SHAPES["qwen2.5-1.5b-shape"] | {"hidden_size": 24, "intermediate_size": 8}
    small |= {"num_hidden_layers": 1, "vocab_size": 900}
    monkeypatch.setitem(SHAPES, "small", small)
    config.model = "small"
    first = digest_policy(load_policy("small", config, "cpu")[0])
    assert digest_policy(load_reference(config, "cpu")) == first
    config.seed += 1
    assert digest_policy(load_reference(config, "cpu")) != first
