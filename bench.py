"""Speed and memory, a JSON line per figure, beside a peer or a limit measured in the same run.

    python bench.py                                                     # the tiny policy, 2 cores
    python bench.py --preset alfworld-7b --model qwen2.5-7b-shape       # the 7B's shape on a GPU
    python bench.py --out results/bench.jsonl

| figure  | measures                                        | beside                               |
|---------|-------------------------------------------------|--------------------------------------|
| rollout | tokens/s of `common.generate`                   | `model.generate`, same prompts       |
| decode  | seconds a step with the whole batch             | weights + KV cache over copy speed   |
| update  | tokens/s of `common.update`                     | padded rows with logits everywhere   |
| mfu     | update FLOP/s, 6 a parameter and token          | a large matrix product               |
| memory  | peak bytes of rollout and of update (GPU only)  | the table of `memory.py`             |
| env     | steps/s of the plain-Python ALFWorld            | stock alfworld                       |

Without a world's data the generated games are used: the real lengths are those of the preset.
"""

import json
import platform
import time
from dataclasses import dataclass
from datetime import date

import torch
import torch.nn.functional as F

import common
import envs
import memory
import tiny
from common import flag


@dataclass
class Bench:
    rows: int = flag(64, "prompts decoded together, and rows of the update")
    new_tokens: int = flag(48, "tokens sampled for each prompt")
    prompt_tokens: int = flag(0, "cut or repeat the prompts to this length; 0: as they are")
    env_steps: int = flag(20, "steps played in the stock engine")
    out: str = flag("", "append the JSON lines to this file too")


def seconds(run, device, repeat=3) -> float:
    """The fastest of `repeat` runs after one to warm up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def prompts_of(tokenizer, config, bench) -> list:
    """Token ids of first prompts of generated games."""
    items = envs.list_items("alfworld", "train", tiny.write_games(tiny.GAMES))[: bench.rows]
    texts = [envs.build_prompt(envs.make_env("alfworld", item).reset()) for item in items]
    ids = common.encode_prompts(tokenizer, texts)
    if bench.prompt_tokens:
        ids = [(p * (1 + bench.prompt_tokens // len(p)))[: bench.prompt_tokens] for p in ids]
    return ids


def hf_generate(model, tokenizer, prompts, new_tokens):
    """The peer: left-padded batch, sampling, no stop token so that lengths are equal."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(model.device)
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True,
            min_new_tokens=new_tokens, pad_token_id=pad,
        )  # fmt: skip


def padded_step(model, optimizer, rows, pad, micro=16):
    """The peer of the update: rows in given order, padded, float32 logits at every position."""
    optimizer.zero_grad()
    model.train()
    tokens = sum(len(row.response_ids) for row in rows)
    for start in range(0, len(rows), micro):
        batch = rows[start : start + micro]
        t = common.collate(batch, pad, model.device)
        lengths = torch.tensor([len(row) for row in batch], device=model.device)
        at = torch.arange(t["ids"].shape[1], device=model.device)
        attention = at < lengths[:, None]  # [B, L]
        logits = model(input_ids=t["ids"], attention_mask=attention.long(), use_cache=False).logits
        losses = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), t["ids"][:, 1:], reduction="none"
        )
        ((losses * t["response_mask"][:, 1:]).sum() / tokens).backward()
    optimizer.step()
    model.eval()


def copy_bandwidth(device, n=1 << 26) -> float:
    """Bytes/s read and written by copying 256 MB."""
    a = torch.empty(n, device=device)
    b = torch.empty_like(a)
    return 2 * 4 * n / seconds(lambda: b.copy_(a), device)


def matmul_flops(device, dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ a, device)


def env_steps(item, engine, count) -> float:
    """Steps/s of an engine, first loading not counted; a new episode every 50 steps."""
    game = envs.make_env("alfworld", item, engine)
    obs, start = game.reset(), time.perf_counter()
    for i in range(1, count + 1):
        obs, *_ = game.step(obs.admissible[i % len(obs.admissible)])
        if i % 50 == 0:
            obs = game.reset()
    return count / (time.perf_counter() - start)


def main():
    config, bench = common.parse_config("bench", __doc__.split("\n")[0], Bench)
    device = common.set_up(config)
    model, tokenizer = common.load_policy(config.model, config, device)
    lines = []

    def report(figure, value, peer, peer_name, unit, **more):
        line = {"figure": figure, "value": value, "unit": unit, peer_name: peer}
        line |= {"ratio": value / peer, **more}
        line = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        lines.append(json.dumps(line))
        print(lines[-1], flush=True)

    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    lines.append(json.dumps({
        "hardware": name or platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "date": str(date.today()), "model": config.model,
        "dtype": config.dtype, "parameters": model.num_parameters(),
    }))  # fmt: skip
    print(lines[-1])

    # rollout: the same prompts, the same number of tokens
    prompts, n = prompts_of(tokenizer, config, bench), bench.new_tokens
    tokens = len(prompts) * n
    ours = seconds(lambda: common.generate(
        model, tokenizer, prompts, max_new_tokens=n, temperature=1.0, seed=0,
        rows=len(prompts), stop=False), device)  # fmt: skip
    theirs = seconds(lambda: hf_generate(model, tokenizer, prompts, n), device)
    report("rollout", tokens / ours, tokens / theirs, "hf_generate", "tokens/s", rows=len(prompts))

    # decode: a step has to read the weights and the cache
    first = seconds(lambda: common.generate(
        model, tokenizer, prompts, max_new_tokens=1, temperature=1.0, seed=0,
        rows=len(prompts), stop=False), device)  # fmt: skip
    step = (ours - first) / (n - 1)
    size = next(model.parameters()).element_size()
    context = sum(map(len, prompts)) + len(prompts) * n / 2
    cache = memory.cache_bytes(model.config, size, context)
    bound = (size * model.num_parameters() + cache) / copy_bandwidth(device)
    report("decode", 1 / step, 1 / bound, "bandwidth_bound", "steps/s", ms=1e3 * step)

    # update: rows as a rollout leaves them
    answers = common.generate(
        model, tokenizer, prompts, max_new_tokens=n, temperature=1.0, seed=0, rows=len(prompts)
    )
    rows = [
        common.Row(p, ids, 1.0 if i % 2 else -1.0, logprobs)
        for i, (p, (ids, logprobs, _)) in enumerate(zip(prompts, answers))
    ]
    total = sum(map(len, rows))
    optimizer = common.make_optimizer(model, config)
    batch = {"tokenizer": tokenizer, "seed": 0}
    ours = seconds(lambda: common.update(model, None, optimizer, rows, config, **batch), device)
    pad = tokenizer.pad_token_id or 0
    theirs = seconds(lambda: padded_step(model, optimizer, rows, pad), device)
    report("update", total / ours, total / theirs, "padded_full_logits", "tokens/s", rows=len(rows))
    dtype = next(model.parameters()).dtype
    flops = 8 * model.num_parameters() * total / ours  # 2 for the old log-probs, 6 to train
    report("mfu", flops, matmul_flops(device, dtype), "matmul", "FLOP/s")

    if device.type == "cuda":
        expected = memory.peak(memory.parts(config))
        report("memory", float(torch.cuda.max_memory_allocated()), expected, "expected", "bytes")
    item = envs.list_items("alfworld", "train", tiny.GAMES)[0]
    fast, stock = env_steps(item, "fast", 20_000), env_steps(item, "textworld", bench.env_steps)
    report("env", fast, stock, "stock", "steps/s")
    if bench.out:
        with open(bench.out, "a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    common.run_script(main)
