"""The memory table against what PyTorch really allocates, and what it advises."""

from dataclasses import replace

import pytest
import torch

from common import Row, backward, fill_logprobs, token_logprobs
from config import Config, UserError
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


@pytest.mark.slow
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


def by_hand(ranks=1, size=2, moments=3, checkpointing=True, prompt=3072) -> dict:
    """The parts of the 7B's table from its shape, written a second time."""
    width, inner, layers, heads, vocabulary = 3584, 18944, 28, 4 * 128, 152064
    # q, k, v with biases, output; gate, up, down; two norms
    layer = 2 * width**2 + width + 2 * (width + 1) * heads + 3 * width * inner + 2 * width
    embedding = vocabulary * width
    weights = size * (2 * embedding + layers * layer + width)
    tokens, logits = 16384, 2**27
    kept = tokens * ((12 if size == 2 else 9.5) * width + 4 * inner) * size
    sharded = ranks > 1
    return {
        "weights": weights / ranks,
        "gradients": weights / ranks,
        "optimizer": moments * weights / ranks,
        "one parameter": moments * embedding * size,
        "reference": weights / ranks,
        "whole weights": weights * sharded,
        "unsharded": size * (2 * embedding + width + 2 * layer) * sharded,
        "KV cache": 2 * layers * heads * size * (prompt + 512) * 128 / ranks,
        "prefill": max(4096, prompt) * (7 * width + 3 * inner) * size,
        "decode": 4 * 4 * 128 / ranks * vocabulary,
        "checkpoints": tokens * width * size * layers if checkpointing else kept * layers,
        "saved": kept * checkpointing,
        "layer": tokens * (2 * width + 3 * inner) * size,
        "layer, forward": tokens * (6 * width + 3 * inner) * size,
        "logits": 20 * logits,
        "logits, forward": (8 + size) * logits,
        "disk": (1 + moments) * weights,
    }


@pytest.mark.parametrize(
    "ranks, flags, changes",
    [
        (1, {}, {}),
        (1, {"dtype": "float32"}, {"size": 4, "moments": 2}),
        (1, {"gradient_checkpointing": False}, {"checkpointing": False}),
        (1, {"max_prompt_tokens": 6144}, {"prompt": 6144}),
        (2, {}, {"ranks": 2}),
    ],
)
def test_the_parts_of_the_7b_are_those_of_its_shape(ranks, flags, changes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    parts = memory.parts(Config(model="qwen2.5-7b-shape", **flags))
    assert parts == pytest.approx(by_hand(**changes))


def test_parts_that_flags_make_small(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = Config(model="qwen2.5-7b-shape", kl_coef=0, tasks=3, group_size=5, micro_tokens=100)
    parts = memory.parts(config)
    assert memory.count_parameters(config.model)[0] == 7_615_616_512
    assert parts["reference"] == 0
    assert parts["decode"] == 16 * 15 * 152064  # no more rows than episodes
    few = memory.parts(replace(config, max_prompt_tokens=10, generation_rows=1))
    assert few["prefill"] == 10 * (7 * 3584 + 3 * 18944) * 2
    assert few["logits"] == 20 * 152064 * (10 + 512)  # one row is passed at least
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert memory.parts(config)["decode"] == 16 * 10 * 152064  # two of three tasks


@pytest.mark.parametrize("offload", [False, True])
def test_rollout_scoring_and_update_take_turns(offload):
    """Each with what it holds; offloaded state is on the card while it is used, piece by piece."""
    names = list(by_hand())
    p = {name: 100.0 * 3**k for k, name in enumerate(names)}
    held = p["weights"] + (0 if offload else p["optimizer"] + p["reference"])
    assert memory.situations(p, offload) == {
        "rollout": held + p["whole weights"] + p["KV cache"] + p["decode"],
        "scoring": held
        + (p["reference"] if offload else 0)
        + 2 * p["unsharded"]
        + p["logits, forward"],
        "update": held + p["gradients"] + p["unsharded"] + p["checkpoints"] + p["logits"],
    }
    p |= {"prefill": 2 * p["decode"], "layer, forward": 2 * p["logits, forward"]}
    p |= {"one parameter": 2 * (p["logits"] + p["checkpoints"])}
    turns = memory.situations(p, offload)
    assert turns["rollout"] == held + p["whole weights"] + p["KV cache"] + p["prefill"]
    assert turns["update"] - held - p["gradients"] - p["unsharded"] == (
        p["one parameter"] if offload else p["checkpoints"] + p["logits"]
    )
    p |= {"logits": 0, "one parameter": 0}
    backward = turns | memory.situations(p, offload)
    held += p["gradients"] + p["unsharded"] + p["checkpoints"]
    assert backward["update"] == held + p["saved"] + p["layer"]
    assert backward["scoring"] == turns["scoring"] and p["layer, forward"] > p["logits, forward"]


def test_a_card_fits_what_leaves_a_gigabyte_for_cuda(monkeypatch):
    config = Config(model="qwen2.5-1.5b-shape")
    sizes = {"24 GB": 24_564, "48 GB": 49_140, "80 GB": 81_559, "141 GB": 143_771}
    for name, mib in sizes.items():
        for short, verdict in ((0, "too small"), (1, "fits")):
            need = (mib - 1024) * 2**20 - short
            monkeypatch.setattr(memory, "peak", lambda config, need=need: need)
            (line,) = [x for x in memory.table(config).split("\n") if f" {name} card" in x]
            assert line.split(": ")[1].startswith(verdict), line
    monkeypatch.undo()
    turns = memory.situations(memory.parts(config), False)
    assert memory.peak(config) == pytest.approx(1.05 * max(turns.values()))
    offloaded = memory.situations(memory.parts(config), True)
    assert memory.peak(replace(config, offload=True)) == pytest.approx(
        1.05 * max(offloaded.values())
    )


def test_the_table_of_the_7b(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = Config(model="qwen2.5-7b-shape")
    table = memory.table(config)
    assert table.startswith("qwen2.5-7b-shape: 7,615,616,512 parameters in bfloat16\n")
    assert "\n  weights             15.23 GB\n" in table and "whole weights" not in table
    peak = memory.peak(config)
    assert f"\n  peak            {peak / 1e9:>9.2f} GB, with 5% for fragments\n" in table
    assert "141 GB card: fits" in table and "80 GB card: with --offload" in table
    offloaded = memory.table(replace(config, offload=True))
    assert "80 GB card: fits" in offloaded
    # 45.69 GB of optimizer and 15.23 GB of reference; the optimizer's go there and back
    assert "\n  host memory         60.92 GB\n" in offloaded
    assert "\n  offload              4.57 s an optimizer step at 20 GB/s\n" in offloaded
    many = replace(config, generation_rows=512, tasks=64)
    assert "141 GB card: with --generation_rows a quarter" in memory.table(many)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "in bfloat16, on each of 2 GPUs\n" in memory.table(config)
    assert "80 GB card: fits" in memory.table(config)


def test_the_advice_is_the_fewest_changes_that_are_enough(monkeypatch):
    """Cheapest first. Several GPUs shard what would be offloaded, so there it is not proposed."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = Config(micro_tokens=16384, generation_rows=3)
    sizes = {"micro_tokens": 4096, "generation_rows": 1, "offload": True}
    for enough, words in {
        ("micro_tokens",): "with --micro_tokens a quarter",
        ("generation_rows",): "with --generation_rows a quarter",
        ("offload",): "with --offload",
        ("micro_tokens", "offload"): "with --micro_tokens a quarter, --offload",
        ("generation_rows", "offload"): "with --generation_rows a quarter, --offload",
        (*sizes, "more"): "too small: more GPUs (torchrun), or a smaller --model",
    }.items():

        def peak(changed, enough=enough):
            return 5 if all(getattr(changed, name, 0) == sizes.get(name) for name in enough) else 6

        with monkeypatch.context() as patch:
            patch.setattr(memory, "peak", peak)
            assert memory.advice(config, 6) == words
            if enough == ("offload",):
                patch.setenv("WORLD_SIZE", "2")
                assert memory.advice(config, 6).startswith("too small")


def test_a_shape_that_says_its_head_size_or_is_unknown(tmp_path):
    shape = memory.model_config("qwen2.5-1.5b-shape")
    assert memory.cache_bytes(shape, 2, 10) == 2 * 28 * 2 * 128 * 2 * 10
    shape.head_dim = 64
    assert memory.cache_bytes(shape, 2, 10) == 2 * 28 * 2 * 64 * 2 * 10
    assert memory.model_config("tiny").vocab_size < 2000  # a shipped folder
    with pytest.raises(UserError, match="no config.json .*; give a local folder or one of qwen2.5"):
        memory.model_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="is a gpt2"):
        memory.table(Config(model=str(tmp_path)))


def test_dry_run_of_a_preset_needs_no_network(monkeypatch):
    """The presets' shapes are known: nothing asks the hub, whose retries took half a minute."""

    def refuse(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(memory.AutoConfig, "from_pretrained", refuse)
    table = memory.table(Config())
    assert table.startswith("Qwen/Qwen2.5-7B-Instruct: 7,615,616,512 parameters in bfloat16")
