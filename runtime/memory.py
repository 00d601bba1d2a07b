"""The memory a run needs, part by part, before anything is loaded: `--dry_run` of the phases.

    python warmup.py --preset alfworld-7b --dry_run
    WORLD_SIZE=4 python warmup.py --preset alfworld-7b --dry_run     # for each of 4 GPUs

Bytes are counted from the model's shape alone, without weights, and without a network for Qwen2.5.
Rollout, scoring and update take turns (`situations`), and the largest counts.

N GPUs hold an N-th of weights, gradients, optimizer and reference each. A rollout needs the whole
weights on each all the same, the update the largest pieces that FSDP puts together.
"""

import itertools
import math
import os
from dataclasses import replace
from functools import lru_cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from config import UserError
from runtime.generation import CHUNK
from runtime.policy import SHAPES, check_shape, local_path

# MiB that nvidia-smi reports for an RTX 4090, A6000, H100 and H200; CUDA itself takes about 1,024
CARDS = {"24 GB": 24_564, "48 GB": 49_140, "80 GB": 81_559, "141 GB": 143_771}
LOGITS = 2**27  # float32 logits held at once: 0.5 GB each of the five tensors of their backward
FRAGMENTS = 1.05  # what the allocator cannot use
HOST_LINK = 20e9  # bytes/s between host and card, each way: PCIe 4 x16 with pinned memory
GB = 1e9
KNOWN = {  # the presets' models, so that the table needs no network
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b-shape",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b-shape",
}


def model_config(path: str):
    """The shape of a model: a preset's, one of `SHAPES`, else its config, local or from the hub."""
    name = KNOWN.get(path, path)
    if name in SHAPES:
        return Qwen2Config(**SHAPES[name])
    try:
        return AutoConfig.from_pretrained(local_path(path))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        remedy = f"give a local folder or one of {', '.join(SHAPES)}"
        raise UserError(f"--model {path}: no config.json ({reason}); {remedy}") from None


@lru_cache
def count_parameters(path) -> tuple:
    """(all parameters, those of one layer, those of the largest single one) of a model's shape."""
    shape = model_config(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    return model.num_parameters(), layer, max(p.numel() for p in model.parameters())


def cache_bytes(shape, size, tokens):
    """Keys and values of all layers for so many tokens."""
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * head * size * tokens


def parts(config) -> dict:
    """Part -> bytes, on the card unless its name says otherwise."""
    shape = model_config(config.model)
    check_shape(config.model, shape, config)
    size = getattr(torch, config.dtype).itemsize
    parameters, per_layer, largest = count_parameters(config.model)
    weights = size * parameters
    vocabulary, width, inner = shape.vocab_size, shape.hidden_size, shape.intermediate_size
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    longest = config.max_prompt_tokens + config.max_response_tokens
    rows = min(config.generation_rows, math.ceil(config.tasks / ranks) * config.group_size)
    tokens = max(config.micro_tokens, longest)
    read_at_once = min(max(CHUNK, config.max_prompt_tokens), rows * config.max_prompt_tokens)
    moments = 3 if size == 2 else 2  # in bfloat16 with a Kahan buffer
    # of a layer, for its backward pass: q, k, v, attention, two residuals and norms (float32 copies
    # under bfloat16); gate, up, their activation and product; measured, see tests/test_memory.py
    saved = tokens * ((12 if size == 2 else 9.5) * width + 4 * inner) * size
    checkpoints = tokens * width * size * shape.num_hidden_layers  # the input of every layer
    if not config.gradient_checkpointing:
        checkpoints, saved = saved * shape.num_hidden_layers, 0
    chunk = min(LOGITS, tokens * vocabulary)  # tokens is the worst case: hardly any prompt
    root = parameters - per_layer * shape.num_hidden_layers  # embedding and head
    return {
        "weights": weights / ranks,
        "gradients": weights / ranks,
        "optimizer": moments * weights / ranks,
        "one parameter": moments * largest * size,  # its optimizer state, with --offload
        "reference": weights / ranks if config.kl_coef else 0,
        "whole weights": weights if ranks > 1 else 0,
        "unsharded": size * (root + 2 * per_layer) if ranks > 1 else 0,
        "KV cache": cache_bytes(shape, size, longest * rows),
        "prefill": read_at_once * (7 * width + 3 * inner) * size,  # one layer's intermediates
        "decode": 4 * 4 * rows * vocabulary,  # float32 scores, in sampling
        "checkpoints": checkpoints,
        "saved": saved,
        "layer": tokens * (2 * width + 3 * inner) * size,  # its backward pass, in addition
        "layer, forward": tokens * (6 * width + 3 * inner) * size,
        "logits": chunk * 20,  # with their gradients
        "logits, forward": chunk * (8 + size),
        "disk": (1 + moments) * weights,  # a save; a phase keeps two, three while one is written
    }


def situations(p: dict, offload: bool) -> dict[str, float]:
    """The parts -> situation -> bytes on the card."""
    held = p["weights"] + (0 if offload else p["optimizer"] + p["reference"])
    rollout = held + p["whole weights"] + p["KV cache"]
    scoring = held + (p["reference"] if offload else 0) + 2 * p["unsharded"]
    update = held + p["gradients"] + p["unsharded"]
    backward = p["checkpoints"] + max(p["saved"] + p["layer"], p["logits"])
    return {
        "rollout": rollout + max(p["prefill"], p["decode"]),
        "scoring": scoring + max(p["layer, forward"], p["logits, forward"]),
        "update": update + max(backward, p["one parameter"] if offload else 0),
    }


def peak(config) -> float:
    """Bytes on the card, with what the allocator cannot use."""
    return FRAGMENTS * max(situations(parts(config), config.offload).values())


def table(config) -> str:
    """The parts, their peak, the cards it fits, and what to change for a smaller one."""
    p = parts(config)
    ranks = os.environ.get("WORLD_SIZE", "1")
    lines = [f"{config.model}: {count_parameters(config.model)[0]:,} parameters in {config.dtype}"]
    lines[0] += "" if ranks == "1" else f", on each of {ranks} GPUs"
    lines += [f"  {name:<16}{value / GB:>9.2f} GB" for name, value in p.items() if value]
    for name, value in situations(p, config.offload).items():
        lines.append(f"  {name:<16}{value / GB:>9.2f} GB on the card")
    need = peak(config)
    lines.append(f"  {'peak':<16}{need / GB:>9.2f} GB, with 5% for fragments")
    if config.offload:
        host = p["optimizer"] + p["reference"]
        lines.append(f"  {'host memory':<16}{host / GB:>9.2f} GB")
        seconds = 2 * p["optimizer"] / HOST_LINK
        lines.append(f"  {'offload':<16}{seconds:>9.2f} s an optimizer step at 20 GB/s")
    for name, mib in CARDS.items():
        room = (mib - 1024) * 2**20
        lines.append(f"  {name:>6} card: {'fits' if need < room else advice(config, room)}")
    return "\n".join(lines)


def advice(config, room: float) -> str:
    """What makes it fit: the cheapest changes that are enough together."""
    changes = {
        "micro_tokens": config.micro_tokens // 4,
        "generation_rows": max(1, config.generation_rows // 4),
        "offload": True,
    }
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # they shard what would be offloaded
        del changes["offload"]
    for count in range(1, len(changes) + 1):
        for names in itertools.combinations(changes, count):
            if peak(replace(config, **{name: changes[name] for name in names})) < room:
                flags = [f"--{name}{'' if name == 'offload' else ' a quarter'}" for name in names]
                return "with " + ", ".join(flags)
    return "too small: more GPUs (torchrun), or a smaller --model"
