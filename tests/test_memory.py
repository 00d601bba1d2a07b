"""The memory table against what PyTorch really allocates, and what it advises."""

from dataclasses import replace

import pytest
import torch

from common import Row, backward, fill_logprobs, token_logprobs
from config import Config
from runtime import memory
from runtime.generation import Cache, generate
from runtime.policy import SHAPES, Policy, load_policy

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SMALL = {
    "narrow": dict(zip(SIZES, (256, 1024, 6, 4), strict=True))
    | {"num_key_value_heads": 2, "vocab_size": 4000, "tie_word_embeddings": False},
    "wide": dict(zip(SIZES, (512, 1408, 3, 8), strict=True))
    | {"num_key_value_heads": 2, "vocab_size": 16000, "tie_word_embeddings": True},
}


def peak_bytes(run) -> int:
    """The most bytes that were allocated at once during run(), beyond those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = 0
    peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "name, checkpointing", [("narrow", True), ("narrow", False), ("wide", True)]
)
def test_table_is_within_15_percent_of_what_update_scoring_and_rollout_allocate(
    name, checkpointing, monkeypatch
):
    monkeypatch.setitem(SHAPES, name, SMALL[name])
    # hardly any prompt: every token of a micro-batch needs logits, the table's worst case
    flags = {"max_prompt_tokens": 2, "max_response_tokens": 126, "micro_tokens": 1024, "tasks": 1}
    flags |= {"gradient_checkpointing": checkpointing, "generation_rows": 8}
    config = Config(model=name, dtype="float32", **flags)
    model, tokenizer = load_policy(name, config, "cpu")
    rows = []
    for _ in range(16):  # two micro-batches: the second meets the gradients of the first
        response = torch.randint(5, 800, (126,)).tolist()
        rows.append(Row([5, 6], response, 1.0, [-5.0] * 126))
    long = replace(config, max_prompt_tokens=300)
    policy = Policy(model, tokenizer)

    def sample():
        cache = Cache(model, 8, 300 + 126)
        # a few tokens: what is held does not grow with them, the cache has its full length
        options = {"max_new_tokens": 8, "rows": 8, "cache": cache, "stop": False}
        prompts = [[5] * 299 + [i] for i in range(8)]
        generate(model, tokenizer, prompts, temperature=1.0, seed=0, **options)

    measured = {"scoring": peak_bytes(lambda: fill_logprobs(policy, rows, config))}
    for row in rows:
        row.ref_logprobs = row.old_logprobs
    model.train()
    measured["update"] = peak_bytes(lambda: backward(policy, rows, config, 0.0))
    model.eval()
    model.zero_grad(set_to_none=True)
    measured["rollout"] = peak_bytes(sample)
    for situation, peak in measured.items():
        settings = long if situation == "rollout" else config
        parts = memory.parts(settings) | {"optimizer": 0, "reference": 0}
        expected = memory.situations(parts, offload=False)[situation] - parts["weights"]
        assert peak == pytest.approx(expected, rel=0.15), situation


def test_logits_of_a_long_micro_batch_are_never_held_at_once(monkeypatch):
    monkeypatch.setitem(SHAPES, "wide", SMALL["wide"])
    config = Config(model="wide", dtype="float32", micro_tokens=1024)
    model, _ = load_policy("wide", config, "cpu")
    model.train()
    torch.manual_seed(0)
    ids = torch.randint(5, 800, (8, 128))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False

    def gradient():
        model.zero_grad()
        values, entropies = token_logprobs(model, ids, mask, 0.7)
        (values.sum() - 0.1 * entropies.sum()).backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    whole = peak_bytes(gradient)
    expected = gradient()
    monkeypatch.setattr("common.LOGITS", 64 * 16000)  # 64 of 1,016 positions at once
    chunked = peak_bytes(gradient)
    torch.testing.assert_close(gradient(), expected, atol=1e-5, rtol=1e-4)  # kernels differ
    assert chunked < 0.4 * whole


def test_table_of_the_7b_counts_what_exists(monkeypatch):
    config = Config(model="qwen2.5-7b-shape")
    parts = memory.parts(config)
    assert memory.count_parameters(config.model)[0] == 7_615_616_512
    assert parts["weights"] == 2 * 7_615_616_512
    assert parts["optimizer"] == 3 * parts["weights"]  # two moments and the Kahan buffer
    assert parts["KV cache"] == 128 * (3072 + 512) * 56 * 1024
    assert parts["disk"] == pytest.approx(60.9e9, rel=0.01)
    assert memory.parts(replace(config, kl_coef=0))["reference"] == 0
    table = memory.table(config)
    assert "141 GB card: fits" in table
    assert "80 GB card: with --offload" in table
    offloaded = replace(config, offload=True)
    assert "80 GB card: fits" in memory.table(offloaded)
    assert "60.92 GB" in memory.table(offloaded).split("host memory")[1]
    assert memory.peak(offloaded) < memory.peak(config) - 45e9
    small = replace(offloaded, model="qwen2.5-1.5b-shape")
    assert "24 GB card: fits" in memory.table(small)
    many = replace(config, generation_rows=512, tasks=64)
    assert "141 GB card: with --generation_rows a quarter" in memory.table(many)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "80 GB card: fits" in memory.table(config)
    assert memory.parts(config)["weights"] == parts["weights"] / 2


def test_dry_run_of_a_preset_needs_no_network(monkeypatch):
    """The presets' shapes are known: nothing asks the hub, whose retries took half a minute."""

    def refuse(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(memory.AutoConfig, "from_pretrained", refuse)
    table = memory.table(Config())
    assert table.startswith("Qwen/Qwen2.5-7B-Instruct: 7,615,616,512 parameters in bfloat16")
