"""Sampling against Hugging Face's own forward and `generate`. Each test names the bug it guards."""

import pytest
import torch
import transformers

import envs
from runtime import generation
from runtime.generation import Cache, encode_prompts, generate

PROMPTS = ["look around", "You are in a room with a desk 1. " * 6, "take the mug", "look around"]


def another(kind):
    """A small random model of another family."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=900,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["tiny", "Qwen3", "Llama"])
def test_greedy_tokens_equal_hf_generate(policy, kind):
    model = policy.model if kind == "tiny" else another(kind)
    tokenizer = policy.tokenizer
    prompts = encode_prompts(tokenizer, PROMPTS)
    ours = generate(model, tokenizer, prompts, max_new_tokens=12, temperature=0, seed=0, rows=3)
    for prompt, (ids, _, _) in zip(prompts, ours, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert ids == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["tiny", "Qwen3", "Llama"])
def test_logprobs_are_those_of_the_training_forward(policy, games, kind):
    model = policy.model if kind == "tiny" else another(kind)
    tokenizer = policy.tokenizer
    items = envs.list_items("alfworld", "train", games)[:4]
    prompts = [envs.build_prompt(envs.make_env("alfworld", item).reset()) for item in items]
    prompts = encode_prompts(tokenizer, prompts)
    answers = generate(model, tokenizer, prompts, max_new_tokens=90, temperature=1.0, seed=5)
    for prompt, (ids, logprobs, _) in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        theirs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), theirs, atol=1e-5, rtol=0)


def sampled(policy, prompts, *, temperature=1.0, seed=0, **options) -> list:
    how = {"temperature": temperature, "seed": seed} | options
    return generate(policy.model, policy.tokenizer, prompts, **how)


def test_temperature_scales_the_logits_before_the_logprobs(policy):
    (prompt,) = encode_prompts(policy.tokenizer, ["look around"])
    ((ids, logprobs, _),) = sampled(policy, [prompt], max_new_tokens=1, temperature=0.5)
    with torch.no_grad():
        scores = (policy.model(torch.tensor([prompt])).logits[0, -1] / 0.5).log_softmax(-1)
    assert logprobs[0] == pytest.approx(scores[ids[0]].item(), abs=1e-5)


def test_sampling_is_a_function_of_the_seed(policy):
    def drawn(seed):
        answers = sampled(policy, ["hello"] * 8, max_new_tokens=8, seed=seed)
        return [ids for ids, _, _ in answers]

    assert drawn(1) == drawn(1) and drawn(1) != drawn(2)
    assert len({tuple(ids) for ids in drawn(1)}) > 1  # equal prompts draw independently


def test_samples_do_not_depend_on_how_rows_are_batched_or_on_a_used_cache(policy):
    prompts = encode_prompts(policy.tokenizer, PROMPTS * 3)
    options = {"max_new_tokens": 60, "temperature": 2.0, "seed": 3}
    whole = sampled(policy, prompts, **options)
    cache = Cache(policy.model, 5, 300)
    for rows, used in ((1, None), (5, cache), (5, cache)):  # the last finds what was left in it
        cut = sampled(policy, prompts, rows=rows, cache=used, **options)
        assert [a[0] for a in whole] == [a[0] for a in cut]
    lengths = {len(ids) for ids, _, _ in whole}
    assert len(lengths) > 2  # so rows did end, and leave the batch, at different times


def test_response_stops_at_the_first_eos_and_keeps_it(policy):
    ends = generation.eos_ids(policy.model, policy.tokenizer)
    for ids, logprobs, text in sampled(policy, PROMPTS * 4, max_new_tokens=60, seed=1):
        assert not set(ids[:-1]) & set(ends) and len(ids) == len(logprobs)
        assert ids[-1] in ends or len(ids) == 60
        assert "<|im_end|>" not in text


def test_a_response_ends_at_every_end_that_the_model_or_its_tokenizer_names(policy):
    """Qwen2.5 ends a turn with one token and a text with another; either ends a response."""
    own = policy.tokenizer.eos_token_id
    for named, expected in ((None, {own}), (7, {7, own}), ([7, 9], {7, 9, own})):
        policy.model.generation_config.eos_token_id = named
        assert set(generation.eos_ids(policy.model, policy.tokenizer)) == expected


def test_greedy_tokens_carry_their_log_probs_at_temperature_1():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    token, logprob = generation.sample(logits, torch.tensor([0.5]), 0.0)
    assert token.item() == 2
    assert logprob.item() == pytest.approx(logits.log_softmax(-1)[0, 2].item())


def test_sample_draws_each_token_as_often_as_its_probability():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(40_000, 4)
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = generation.sample(logits, uniform, temperature=0.7)
    expected = (logits[0] / 0.7).softmax(-1)
    counts = torch.bincount(tokens, minlength=4) / 40_000
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)
    assert counts[2] == 0
    torch.testing.assert_close(logprobs.exp(), expected[tokens])


def test_a_failed_capture_of_the_decode_step_falls_back_to_eager(policy, monkeypatch, capsys):
    expected = sampled(policy, PROMPTS, max_new_tokens=6)

    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(generation, "capture", fail)
    cache = Cache(policy.model, len(PROMPTS), 200)
    cache.pool = "a pool, as on a GPU"
    answers = sampled(policy, PROMPTS, max_new_tokens=6, cache=cache)
    for (ids, logprobs, text), ours in zip(answers, expected, strict=True):
        assert (ids, text) == (ours[0], ours[2])
        assert logprobs == pytest.approx(ours[1], abs=1e-5)  # the caches differ in length
    said = capsys.readouterr().out
    assert said.count("the capture failed (operation not permitted") == 1


def test_bfloat16_prompts_of_one_token_and_no_prompts_at_all(policy):
    policy.model = another("Qwen3").bfloat16()
    assert len(sampled(policy, [[5], [5, 6]], max_new_tokens=3)) == 2
    assert sampled(policy, [], max_new_tokens=3) == []


def test_a_uniform_number_of_exactly_0_draws_no_token_without_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for number in (0.0, 1.0 - 2**-24):
        token, _ = generation.sample(logits, torch.tensor([number]), temperature=1.0)
        assert token.item() == 1
