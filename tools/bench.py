"""Speed and memory, a JSON line per figure, with a peer or a limit measured in the same run.

    python -m tools.bench                                                  # the tiny policy
    python -m tools.bench --preset alfworld-7b --model qwen2.5-7b-shape    # the 7B's shape on a GPU
    python -m tools.bench --out results/speed.jsonl

| figure      | measures                                      | compared with                      |
|-------------|-----------------------------------------------|------------------------------------|
| rollout     | tokens/s of `generate`, the prompts of a real | `model.generate`, the same prompts |
|             | rollout, turn by turn                         |                                    |
| decode      | ms a step with the whole batch, replayed as   | reading weights and KV cache at    |
|             | a CUDA graph on a GPU                         | the speed of a copy                |
| graph       | (GPU only) that step                          | the same step without a graph      |
| update      | tokens/s of `update` on that rollout's rows   | the same rows, each padded to the  |
|             |                                               | longest, logits at every position  |
| mfu         | update FLOP/s, 6 a parameter and token (and 2 | a large matrix product             |
|             | more with --recompute_old)                    |                                    |
| memory_*    | peak bytes, rollout and update (GPU only)     | what runtime/memory.py expects     |
| iteration_* | seconds of the last iteration of each phase   |                                    |

With --prompt_tokens the prompts of the embedded data are repeated to the length of real ones.
Random weights never end a response: each has --new_tokens tokens then. They never succeed either,
so no row would have an advantage: for them leave the iterations out (--iterations 0).
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from common import Row, collate, open_groups, rollout, update
from config import PHASES, PRESETS, flag, read_jsonl
from runtime import memory
from runtime.flags import parse_config
from runtime.generation import Cache, eos_ids, generate, response_lengths
from runtime.policy import Policy, load_policy, make_optimizer
from runtime.run import append, list_items, run_script, set_up

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Bench:
    turns: int = flag(4, "turns of the rollout", at_least=1, group="bench")
    new_tokens: int = flag(48, "longest response", at_least=2)
    prompt_tokens: int = flag(0, "cut or repeat prompts to this length; 0: as they are", at_least=0)
    update_rows: int = flag(512, "rows of the update, at most", at_least=1)
    iterations: int = flag(2, "iterations of each phase; 0: leave them out", at_least=0)
    out: str = flag("", "append the JSON lines to this file too")


def report(bench, line):
    """Print a figure, and keep it at once: a later one may fail."""
    line = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps(line), flush=True)
    if bench.out:
        append(bench.out, [line])


def figure(bench, name, value, unit, peer_name="", peer=None, **more):
    """A value, and its ratio to a peer's in the same unit."""
    line = {"figure": name, "value": value, "unit": unit}
    if peer:
        line |= {peer_name: peer, "ratio": value / peer}
    report(bench, line | more)


def peak_memory(bench, name, expected):
    """Peak of the GPU's memory since the last call."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        figure(bench, name, peak, "bytes", "expected", expected)


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


def hardware(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")  # Linux only
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def copy_bandwidth(device, n=1 << 26) -> float:
    """Bytes/s read and written by copying 256 MB."""
    a = torch.empty(n, device=device)
    b = torch.empty_like(a)
    return 2 * 4 * n / seconds(lambda: b.copy_(a), device)


def matmul_flops(device, dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ a, device)


# --------------------------------------------------------------------------------------------------
# Rollout
# --------------------------------------------------------------------------------------------------


def play(policy, config, bench) -> tuple:
    """A rollout of some turns -> (its episodes, the prompts of each turn as token ids)."""
    items = list_items(config, config.split)[: config.tasks]
    episodes = rollout(policy, config, open_groups(items, config), seed=0)
    turns = [[] for _ in range(bench.turns)]
    for episode in episodes:
        for turn, step in zip(turns, episode.steps, strict=False):
            if bench.prompt_tokens:
                repeats = 1 + bench.prompt_tokens // len(step.prompt_ids)
                step.prompt_ids = (step.prompt_ids * repeats)[: bench.prompt_tokens]
            turn.append(step.prompt_ids)
    return episodes, [prompts for prompts in turns if prompts]


def hf_generate(policy, prompts, new_tokens, ends) -> int:
    """The peer: a left-padded batch and `model.generate` -> the number of tokens sampled."""
    model = policy.model
    pad = policy.tokenizer.pad_token_id or 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask.to(model.device),
            pad_token_id=pad,
            eos_token_id=ends,
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
        )
    return int(response_lengths(out[:, width:], torch.tensor(ends, device=out.device)).sum())


def bench_rollout(policy, config, bench, turns):
    """The prompts of every turn, at temperature 1, until each row has ended."""
    model = policy.model
    rows = config.generation_rows
    new = bench.new_tokens
    ends = eos_ids(model, policy.tokenizer)
    lengths = [len(prompt) for prompts in turns for prompt in prompts]
    sampled = {}  # tokens of each of the two

    def ours():
        cache = Cache(model, min(rows, len(turns[0])), max(lengths) + new)
        options = {"max_new_tokens": new, "temperature": 1.0, "rows": rows, "cache": cache}
        sampled["ours"] = 0
        for turn, prompts in enumerate(turns):
            for ids, _, _ in generate(model, policy.tokenizer, prompts, seed=turn, **options):
                sampled["ours"] += len(ids)

    def theirs():
        sampled["theirs"] = 0
        for prompts in turns:
            for i in range(0, len(prompts), rows):
                sampled["theirs"] += hf_generate(policy, prompts[i : i + rows], new, ends)

    speed = 1 / seconds(ours, model.device)
    peer = 1 / seconds(theirs, model.device)
    more = {
        "prompts": len(lengths),
        "response_tokens": sampled["ours"] / len(lengths),
        "prompt_tokens": sum(lengths) / len(lengths),
    }
    speed *= sampled["ours"]
    figure(bench, "rollout", speed, "tokens/s", "hf_generate", peer * sampled["theirs"], **more)


def bench_decode(policy, bench, prompts):
    """A decode step of the whole batch: against what it has to read, and with and without graph."""
    model = policy.model
    rows = len(prompts)
    length = max(map(len, prompts)) + bench.new_tokens

    def step_seconds(graphs) -> float:
        cache = Cache(model, rows, length, graphs=graphs)
        options = {"temperature": 1.0, "seed": 0, "rows": rows, "stop": False, "cache": cache}
        spent = [
            seconds(
                lambda new=new: generate(
                    model, policy.tokenizer, prompts, max_new_tokens=new, **options
                ),
                model.device,
            )
            for new in (1, bench.new_tokens)
        ]
        return (spent[1] - spent[0]) / (bench.new_tokens - 1)

    step = step_seconds(graphs=True)
    size = next(model.parameters()).element_size()
    context = sum(map(len, prompts)) + rows * bench.new_tokens / 2
    read = size * model.num_parameters() + memory.cache_bytes(model.config, size, context)
    bound = read / copy_bandwidth(model.device)
    figure(bench, "decode", 1e3 * step, "ms", "bandwidth_bound", 1e3 * bound, rows=rows)
    if model.device.type == "cuda":
        figure(bench, "graph", 1e3 * step, "ms", "eager", 1e3 * step_seconds(graphs=False))


# --------------------------------------------------------------------------------------------------
# Update
# --------------------------------------------------------------------------------------------------


def padded_step(policy, rows, tokens_at_once):
    """The peer of the update: every row padded to the longest, float32 logits at every position."""
    model = policy.model
    model.train()
    tokens = sum(len(row.response_ids) for row in rows)
    width = max(map(len, rows))
    count = max(1, tokens_at_once // width)
    for start in range(0, len(rows), count):
        some = rows[start : start + count]
        batch = collate(some, policy.tokenizer.pad_token_id or 0, model.device)
        missing = width - batch["ids"].shape[1]
        ids = F.pad(batch["ids"], (0, missing))  # [B, L], as all below
        mask = F.pad(batch["response_mask"], (0, missing))
        lengths = torch.tensor([len(row) for row in some], device=model.device)
        attention = torch.arange(width, device=model.device) < lengths[:, None]
        logits = model(input_ids=ids, attention_mask=attention.long(), use_cache=False).logits
        logits = logits[:, :-1].float().transpose(1, 2)  # [B, V, L - 1]
        losses = F.cross_entropy(logits, ids[:, 1:], reduction="none")
        ((losses * mask[:, 1:]).sum() / tokens).backward()
    policy.optimizer.step()
    policy.optimizer.zero_grad()
    model.eval()


def bench_update(policy, config, bench, episodes):
    """One optimizer step on the rows that the rollout has left."""
    model = policy.model
    steps = [step for e in episodes for step in e.steps][: bench.update_rows]
    rows = [
        Row(step.prompt_ids, step.response_ids, 1.0 if n % 2 else -1.0, step.logprobs)
        for n, step in enumerate(steps)
    ]
    total = sum(map(len, rows))
    one_step = replace(config, minibatch_rows=len(rows))
    policy.optimizer = make_optimizer(model, config.lr, offload=config.offload)
    ours = total / seconds(lambda: update(policy, rows, one_step, seed=0), model.device)
    parts = memory.parts(config) | {"KV cache": 0, "reference": 0}
    expected = memory.situations(parts, config.offload)["update"]
    peak_memory(bench, "memory_update", memory.FRAGMENTS * expected)
    theirs = total / seconds(lambda: padded_step(policy, rows, config.micro_tokens), model.device)
    more = {"rows": len(rows), "row_tokens": total / len(rows)}
    figure(bench, "update", ours, "tokens/s", "padded_full_logits", theirs, **more)
    flops = (8 if config.recompute_old else 6) * model.num_parameters() * ours
    limit = matmul_flops(model.device, next(model.parameters()).dtype)
    figure(bench, "mfu", flops, "FLOP/s", "matmul", limit)


def bench_iterations(config, bench):
    """The three scripts as a user runs them: seconds of the last iteration of each."""
    differing = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "without"}
    flags = [f"--{name}={value}" for name, value in differing.items()]
    flags += ["--run=bench", "--n_req=1000000000"]
    flags += [f"--{phase}_iterations={bench.iterations}" for phase in PHASES]
    flags += ["--n_eval=1", "--active_above=-1", "--mine_every=1"]  # so that skills are in use
    with tempfile.TemporaryDirectory() as folder:
        for phase in PHASES:
            command = [sys.executable, ROOT / f"{phase}.py", *flags]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        lines = read_jsonl(Path(folder) / "runs" / "bench" / "metrics.jsonl")
    for phase, line in {line["phase"]: line for line in lines}.items():
        rows = line["rows"] + line["internalization_rows"]
        figure(bench, f"iteration_{phase}", line["seconds"], "s", rows=rows)


def main():
    config, bench = parse_config("bench", __doc__, Bench)
    if not config.data:
        config.data = PRESETS["tiny" if config.env == "webshop" else "tiny-household"]["data"]
    device = set_up(config)
    policy = Policy(*load_policy(config.model, config, device))
    first = {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": str(date.today()),
        "model": config.model,
        "dtype": config.dtype,
        "parameters": policy.model.num_parameters(),
    }
    report(bench, first)
    short = replace(config, max_steps=bench.turns, max_response_tokens=bench.new_tokens)
    episodes, turns = play(policy, short, bench)
    parts = memory.parts(short) | {"optimizer": 0, "reference": 0}  # neither is loaded yet
    peak_memory(bench, "memory_rollout", memory.situations(parts, False)["rollout"])
    bench_rollout(policy, config, bench, turns)
    bench_decode(policy, bench, turns[-1][: config.generation_rows])
    bench_update(policy, config, bench, episodes)
    del policy  # the scripts load their own
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if bench.iterations:
        bench_iterations(config, bench)


if __name__ == "__main__":
    run_script(main)
