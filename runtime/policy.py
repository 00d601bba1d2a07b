"""Loading a policy, its frozen reference and its optimizer."""

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import optimi
import torch
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    set_seed,
)
from transformers import logging as transformers_logging

from config import Config, UserError
from runtime import guard, parallel
from runtime.generation import (
    CUT,
    FAMILIES,
    Cache,
    control_tokens,
    encode_prompts,
    eos_ids,
    forward,
    render,
)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

SHAPE = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
SHAPE = (*SHAPE.split(), "vocab_size", "tie_word_embeddings")
READ = "model_type hidden_act rms_norm_eps rope_parameters layer_types sliding_window".split()
READ += ["num_attention_heads", "num_key_value_heads"]  # what changes a model of equal weights
SHAPES = {  # Qwen2.5 with random weights, to measure without a download
    "qwen2.5-7b-shape": dict(zip(SHAPE, (3584, 18944, 28, 28, 4, 152064, False), strict=True)),
    "qwen2.5-1.5b-shape": dict(zip(SHAPE, (1536, 8960, 28, 12, 2, 151936, True), strict=True)),
}
SHIPPED = {  # folders of this project
    "tiny": "tiny/policy_shop",
    "tiny-silent": "tiny/policy_shop_silent",  # acts without thinking
    "tiny-household": "tiny/policy_household",
    "tiny-alfworld": "tiny/policy_alfworld",
}
LARGEST_GAP = {torch.float32: 1e-2, torch.bfloat16: 1.0}  # nats, far above rounding
BUILT = {  # models that a command writes; each script knows them by these names
    "smollm2": "runs/smollm2-base"  # make smollm2
}


@dataclass
class Policy:
    """What rollout and update need."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerFast
    reference: torch.nn.Module | None = None  # frozen; None without a KL term
    optimizer: torch.optim.Optimizer | None = None
    steps: int = 0  # optimizer steps taken by this process
    refused: int = 0  # steps in a row that were left out, see runtime/guard.py


def local_path(path) -> Path | str:
    """The folder of a shipped or built model; anything else stays as it is."""
    name = str(path)
    if name in SHIPPED:
        return Path(__file__).resolve().parent.parent / SHIPPED[name]
    if name in BUILT and not Path(BUILT[name]).exists():
        raise UserError(f"--model {name}: {BUILT[name]} is not there yet; run `make {name}` first")
    return BUILT.get(name, path)


def load_policy(path, config: Config, device, trainable=True) -> tuple:
    """Hub name, folder or name of `SHAPES` -> (model, tokenizer)."""
    path = local_path(path)
    known = Path(path).exists() or path in SHAPES
    if not known and (str(path).count("/") != 1 or str(path).startswith((".", "/", "runs/"))):
        raise UserError(f"{path}: no such model folder; give --model a folder or a hub name")
    dtype = getattr(torch, config.dtype)
    # tokenizer.json as it is: AutoTokenizer would put Qwen2's own pre-tokenizer in its place
    words = local_path("tiny") if path in SHAPES else path
    tokenizer = read(path, PreTrainedTokenizerFast.from_pretrained, words)
    tokenizer.clean_up_tokenization_spaces = False  # it would change actions
    check_tokenizer(path, tokenizer)
    if path in SHAPES:
        set_seed(config.seed)  # the same weights each time, as from a file
        shape = Qwen2Config(**SHAPES[path], eos_token_id=tokenizer.eos_token_id)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    else:
        options = {"trust_remote_code": False}  # no code of a folder runs
        shape = read(path, AutoConfig.from_pretrained, path, **options)
        check_shape(path, shape, config)
        shape.return_dict, shape.output_attentions, shape.output_hidden_states = True, False, False
        options |= {"config": shape, "dtype": dtype, "attn_implementation": "sdpa"}
        options |= {"output_loading_info": True}
        model, info = read(path, AutoModelForCausalLM.from_pretrained, path, **options)
        check_whole(path, model, tokenizer, info)
        model = model.to(device)
    for module in model.modules():  # ratios start at exactly 1: no dropout, in training either
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    check_sampler(path, model, tokenizer)
    model.requires_grad_(trainable)
    if trainable and config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.23
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    parallel.shard(model)
    return model.eval(), tokenizer


def read(path, reader, *args, **options):
    """What a reader of transformers makes of a model's files. UserError where it fails: in which
    way depends on what is in them.
    """
    try:
        return reader(*args, **options)
    except Exception as error:
        if guard.is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        remedy = "give a local folder or a hub name"
        raise UserError(f"--model {path}: cannot be loaded ({reason}); {remedy}") from None


def check_shape(path, shape, config):
    """UserError for an architecture that `generate` does not compute."""
    if shape.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        what = f"is a {shape.model_type}; runtime/generation.py reads {known}"
        raise UserError(f"--model {path} {what}")
    longest = config.max_prompt_tokens + config.max_response_tokens
    lengths = f"--max_prompt_tokens and --max_response_tokens ({longest} together)"
    if longest > shape.max_position_embeddings:
        known = f"knows {shape.max_position_embeddings} positions"
        raise UserError(f"--model {path} {known}; lower {lengths}")
    kinds = set(getattr(shape, "layer_types", None) or []) - {"full_attention"}
    window = getattr(shape, "sliding_window", 0) if kinds == {"sliding_attention"} else 0
    if kinds and longest > (window or 0):
        seen = f"has layers of {', '.join(sorted(kinds))} over {window or 0} tokens"
        raise UserError(f"--model {path} {seen}, the sampler reads all; lower {lengths}")
    if (rope := (shape.rope_parameters or {}).get("rope_type")) == "longrope":
        raise UserError(f"--model {path} has {rope}, which changes with the length: not supported")


def check_tokenizer(path, tokenizer):
    """UserError where prompts cannot be written, or an action would not come back as sampled."""
    if not tokenizer.chat_template:
        remedy = "use an instruct model, or give it a chat_template.jinja"
        raise UserError(f"--model {path}: its tokenizer has no chat template; {remedy}")
    (text,) = read(path, render, tokenizer, [CUT])
    if text.count(CUT) != 1:
        raise UserError(f"--model {path}: its chat template does not write a user's message once")
    ids = tokenizer(text.replace(CUT, "hello"), add_special_tokens=False).input_ids
    for word, token in read(path, control_tokens, tokenizer).items():
        if ids.count(token) != text.count(word):
            raise UserError(f"--model {path}: its tokenizer does not read {word} as one token")
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise UserError(f"--model {path}: its tokenizer is random; set dropout to null in it")
    text = "<think>I don 't know .</think><action>click[B < prev]</action>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    again = tokenizer.decode(ids, skip_special_tokens=True)
    if again.strip() != text:
        raise UserError(f"--model {path}: its tokenizer reads {text!r} as {again!r}")


@torch.no_grad()
def check_sampler(path, model, tokenizer):
    """UserError where `generate` and the model itself read a short text differently, or cannot."""
    read(path, eos_ids, model, tokenizer)
    ids = torch.tensor(encode_prompts(tokenizer, ["hello"]), device=model.device)  # [1, T]
    last = torch.tensor([ids.shape[1] - 1], device=model.device)
    cache = read(path, Cache, model, 1, ids.shape[1], graphs=False)
    sampled = read(path, forward, model.eval(), ids, last * 0, last, cache).float()  # [1, V]
    trained = read(path, model, input_ids=ids, use_cache=False).logits[:, -1].float()
    likely = trained.topk(10).indices  # [1, 10]
    ours, theirs = (x.log_softmax(-1).gather(-1, likely) for x in (sampled, trained))
    gap = (ours - theirs).abs().max().item()
    if not gap < LARGEST_GAP[model.dtype]:
        what = "what its config.json has is not what runtime/generation.py computes"
        raise UserError(f"--model {path}: sampler and trainer differ by {gap:.2g} nats: {what}")


def check_whole(path, model, tokenizer, info):
    """UserError where weights, config and tokenizer of a model folder do not belong together."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            found = f"{len(info[what])} {what.replace('_', ' ')}, the first is "
            found += min(map(str, info[what]))
            remedy = "copy the folder again"
            raise UserError(
                f"--model {path}: weights do not fit its config.json ({found}); {remedy}"
            )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        found = f"its tokenizer has {len(tokenizer)} tokens, its weights {rows}"
        raise UserError(f"--model {path}: {found}; they are of two models")


def load_reference(config: Config, device):
    """The frozen policy before phase 0, or None when its KL has no weight."""
    if not config.kl_coef:
        return None
    reference, _ = load_policy(config.model, config, device, trainable=False)
    return reference.to("cpu") if config.offload else reference  # checked on the card: fast


def digest_policy(model) -> str:
    """SHA-256 of the weights in memory, wherever they lie, and of what the config makes of them:
    about a second a gigabyte.
    """
    shape = {name: getattr(model.config, name, None) for name in READ}
    found = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        whole = parallel.full_tensors(parameter.detach())  # one at a time; rank 0 has it
        if parallel.rank() == 0:
            found.update(f"{name} {list(whole.shape)}".encode())
            found.update(whole.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return parallel.by_one(found.hexdigest)


class OffloadedAdamW(optimi.AdamW):
    """optimi's AdamW with its state in host memory; on the card only while its parameter steps."""

    def step(self):
        groups = self.param_groups
        for group in groups:
            (parameter,) = group["params"]
            state = self.state[parameter]
            host = {name: value for name, value in state.items() if torch.is_tensor(value)}
            for name, value in host.items():
                state[name] = value.to(parameter.device, non_blocking=True, copy=True)
            self.param_groups = [group]
            super().step()
            for name, value in state.items():
                if torch.is_tensor(value):
                    state[name] = to_host(value, host.get(name))
        self.param_groups = groups


def to_host(value, place=None):
    """A copy in host memory, pinned where there is a card: `place`, or new memory."""
    if place is None:
        place = torch.empty_like(value, device="cpu", pin_memory=torch.cuda.is_available())
    return place.copy_(value, non_blocking=False)


def make_optimizer(model, lr, *, beta2=None, weight_decay=0.01, offload=False, saved=None):
    """AdamW; it goes on from a saved state, through the phases too, with the settings of now.

    A bfloat16 weight has 8 significant bits: at lr 1e-6 plain AdamW moves 2% of the weights, the
    rest of its steps is rounded away. optimi's AdamW keeps what each weight lost in a buffer (Kahan
    summation) and adds it once it counts. Float32 weights need and get no buffer. A bfloat16
    second moment gets stuck above 0.99, so beta2 is 0.95 there and else 0.999, unless it is given.

    Each parameter is a group of its own, so that its step does not need the others' state.
    """
    parameters = list(model.parameters())
    if beta2 is None:
        beta2 = 0.95 if parameters[0].dtype == torch.bfloat16 else 0.999
    plain = all(p.is_cuda and not isinstance(p, DTensor) for p in parameters)
    triton = plain and find_spec("triton") is not None
    groups = [{"params": [parameter]} for parameter in parameters]
    settings = {"lr": lr, "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": weight_decay}
    kind = OffloadedAdamW if offload else optimi.AdamW
    optimizer = kind(groups, **settings, foreach=False, triton=triton)
    if not saved:
        return optimizer
    if len(saved["param_groups"]) != len(parameters):
        raise UserError("the saved optimizer belongs to another model; delete the phase's folder")
    for i, (parameter, group) in enumerate(zip(parameters, optimizer.param_groups, strict=True)):
        then = saved["param_groups"][i]
        if "step" not in then:  # saved before its first step
            continue
        group.update(setup=True, step=then["step"], kahan_sum=then["kahan_sum"])
        for name, value in saved["state"].get(i, {}).items():
            if name == "kahan_comp" and not group["kahan_sum"]:  # triton wants one byte for "none"
                value = torch.zeros(1, dtype=torch.uint8) if triton else None
            if value is not None and offload:
                value = to_host(value)
            elif value is not None:
                value = parallel.distribute_like(value, parameter).to(parameter.device)
            optimizer.state[parameter][name] = value
    return optimizer
