"""The memory a run needs, part by part, before anything is loaded: `--dry_run` of the phases.

    python warmup.py --preset alfworld-7b --dry_run
    WORLD_SIZE=4 python warmup.py --preset alfworld-7b --dry_run     # for each of 4 GPUs

Bytes are counted from the model's shape alone (its config.json, no weights):

| part        | bytes                                                                              |
|-------------|------------------------------------------------------------------------------------|
| weights     | P parameters, 2 (bfloat16) or 4 bytes                                              |
| gradients   | as the weights                                                                     |
| optimizer   | two moments, and in bfloat16 the Kahan buffer, each as the weights                 |
| reference   | as the weights; nothing with --kl_coef 0, or with --ref_offload in the update      |
| KV cache    | generation_rows x (prompt + response) x layers x 2 x KV heads x head size          |
| activations | micro_tokens x layers x hidden size (the checkpoints) + what one layer keeps alive |
| logits      | response tokens of a micro-batch x vocabulary, float32, three copies               |

Rollout and update take turns, so the peak is the larger of the cache and the update's own parts.
N GPUs hold an N-th of the first four each; a rollout needs the whole weights on each all the same.
"""

import itertools
import math
import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from config import UserError
from runtime.policy import SHAPES, dtype_of, local_path

# MiB that nvidia-smi reports for an RTX 4090, A6000, H100 and H200; CUDA itself takes about 1,024
CARDS = {"24 GB": 24_564, "48 GB": 49_140, "80 GB": 81_559, "141 GB": 143_771}
GB = 1e9


def model_config(path: str):
    """The shape of a model: its config, local, from the hub, or one of `SHAPES`."""
    if path in SHAPES:
        return Qwen2Config(**SHAPES[path])
    try:
        return AutoConfig.from_pretrained(local_path(path))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        remedy = f"give a local folder or one of {', '.join(SHAPES)}"
        raise UserError(f"--model {path}: no config.json ({reason}); {remedy}") from None


def count_parameters(shape) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape).num_parameters()


def cache_bytes(shape, size, tokens):
    """Keys and values of all layers for so many tokens."""
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * head * size * tokens


def parts(config) -> dict:
    """Part -> bytes on the device."""
    shape = model_config(config.model)
    size = dtype_of(config).itemsize
    parameters = count_parameters(shape)
    weights = size * parameters
    layers, width = shape.num_hidden_layers, shape.hidden_size
    longest = config.max_prompt_tokens + config.max_response_tokens
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rows = min(config.generation_rows, math.ceil(config.tasks / ranks) * config.group_size)
    cache = cache_bytes(shape, size, longest * rows)
    tokens = max(config.micro_tokens, longest)
    # a layer in backward: attention and MLP intermediates of width d and of the MLP's width
    layer = tokens * (12 * width + 4 * shape.intermediate_size) * size
    kept = layers * layer
    if config.gradient_checkpointing:
        kept = layer + layers * tokens * width * size
    responses = tokens * config.max_response_tokens / longest
    return {
        "parameters": parameters,
        "weights": weights / ranks,
        "gradients": weights / ranks,
        "optimizer": (3 if size == 2 else 2) * weights / ranks,
        "reference": weights / ranks if config.kl_coef and not config.ref_offload else 0,
        "whole weights": weights if ranks > 1 else 0,
        "KV cache": cache,
        "activations": kept,
        "logits": int(3 * 4 * responses * shape.vocab_size),
    }


def peak(p: dict) -> float:
    fixed = p["weights"] + p["optimizer"] + p["reference"]
    rollout = p["whole weights"] + p["KV cache"]
    return fixed + max(rollout, p["gradients"] + p["activations"] + p["logits"])


def table(config) -> str:
    """The parts, their peak, the cards it fits, and what to change for a smaller one."""
    p = parts(config)
    ranks = os.environ.get("WORLD_SIZE", "1")
    where = "" if ranks == "1" else f", on each of {ranks} GPUs"
    lines = [f"{config.model}: {p['parameters']:,} parameters in {config.dtype}{where}"]
    sizes = {name: value for name, value in p.items() if name != "parameters" and value}
    lines += [f"  {name:<14}{value / GB:>9.2f} GB" for name, value in sizes.items()]
    need = peak(p) * 1.05  # the allocator's fragments
    lines.append(f"  {'peak':<14}{need / GB:>9.2f} GB, with 5% for fragments")
    for name, mib in CARDS.items():
        room = (mib - 1024) * 2**20
        lines.append(f"  {name:>6} card: {'fits' if need < room else advice(p, room)}")
    return "\n".join(lines)


def advice(p: dict, room: float) -> str:
    """What makes it fit: the cheapest changes that are enough together."""

    def fits(chosen):
        changed = dict(p)
        for name in chosen:
            changed |= changes[name]
        return peak(changed) * 1.05 < room

    changes = {
        "--micro_tokens a quarter": {n: p[n] / 4 for n in ("activations", "logits")},
        "--generation_rows a quarter": {"KV cache": p["KV cache"] / 4},
        "--ref_offload": {"reference": 0},
    }
    for count in range(1, len(changes) + 1):
        for chosen in itertools.combinations(changes, count):
            if fits(chosen):
                return "with " + ", ".join(chosen)
    return "too small: more GPUs (torchrun), or a smaller --model"
