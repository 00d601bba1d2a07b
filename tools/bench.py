"""Speed and memory, a JSON line per figure, beside a peer or a limit measured in the same run.

    python -m tools.bench                                                     # the tiny policy, 2 cores
    python -m tools.bench --preset alfworld-7b --model qwen2.5-7b-shape       # the 7B's shape on a GPU
    python -m tools.bench --out results/bench.jsonl

| figure    | measures                                      | beside                               |
|-----------|-----------------------------------------------|--------------------------------------|
| rollout   | tokens/s of `generate`, the prompts of a real | `model.generate`, the same prompts   |
|           | rollout, turn by turn                         |                                      |
| decode    | seconds a step with the whole batch           | weights + KV cache over copy speed   |
| update    | tokens/s of `update` on that rollout's rows   | the same rows, each padded to the    |
|           |                                               | longest, logits at every position    |
| mfu       | update FLOP/s, 6 a parameter and token (and 2 | a large matrix product               |
|           | more with --recompute_old)                    |                                      |
| memory_*  | peak bytes, rollout and update (GPU only)     | the table of `memory.py`             |
| iteration | seconds of the second iteration of each phase |                                      |
| env       | steps/s of the plain-Python ALFWorld          | stock alfworld                       |

Without --data the generated games are used, and with --prompt_tokens their prompts are repeated to
the length of real ones. Random weights never end a response: each has --new_tokens tokens then.
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

import common
import envs
import memory
import tiny
from common import flag
from generation import Cache, eos_ids, generate, response_lengths


@dataclass
class Bench:
    turns: int = flag(4, "turns of the rollout")
    new_tokens: int = flag(48, "longest response")
    prompt_tokens: int = flag(0, "cut or repeat prompts to this length; 0: as they are")
    update_rows: int = flag(512, "rows of the update, at most")
    iterations: int = flag(2, "iterations of each phase; 0: leave this figure out")
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


def hardware(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")  # Linux only
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def play(model, tokenizer, config, bench) -> tuple:
    """A rollout of some turns -> (its episodes, the prompts of each turn as token ids)."""
    items = common.list_items(config, config.split)
    plan = common.plan_rollouts(common.draw_items(items, config, "bench", 1), config)
    short = replace(config, max_steps=bench.turns, max_response_tokens=bench.new_tokens)
    episodes = common.rollout(model, tokenizer, short, plan, temperature=1.0, seed=0)
    for step in (s for e in episodes for s in e.steps):
        if bench.prompt_tokens:
            repeats = 1 + bench.prompt_tokens // len(step.prompt_ids)
            step.prompt_ids = (step.prompt_ids * repeats)[: bench.prompt_tokens]
    turns = [
        [e.steps[t].prompt_ids for e in episodes if len(e.steps) > t] for t in range(bench.turns)
    ]
    return episodes, [prompts for prompts in turns if prompts]


def hf_generate(model, tokenizer, prompts, new_tokens, ends) -> int:
    """The peer: a left-padded batch and `model.generate` -> the number of tokens sampled."""
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True,
            pad_token_id=pad, eos_token_id=ends, top_k=0,
        )[:, width:]  # fmt: skip
    return int(response_lengths(out, torch.tensor(ends, device=out.device)).sum())


def padded_step(model, optimizer, rows, pad, tokens_at_once):
    """The peer of the update: every row padded to the longest, float32 logits at every position."""
    optimizer.zero_grad()
    model.train()
    tokens, width = sum(len(row.response_ids) for row in rows), max(map(len, rows))
    count = max(1, tokens_at_once // width)
    for start in range(0, len(rows), count):
        batch = rows[start : start + count]
        t = common.collate(batch, pad, model.device)
        ids, mask = (
            F.pad(t[name], (0, width - t[name].shape[1])) for name in ("ids", "response_mask")
        )
        lengths = torch.tensor([len(row) for row in batch], device=model.device)
        attention = torch.arange(width, device=model.device) < lengths[:, None]  # [B, L]
        logits = model(input_ids=ids, attention_mask=attention.long(), use_cache=False).logits
        losses = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
        )
        ((losses * mask[:, 1:]).sum() / tokens).backward()
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


class Report:
    """Prints each figure as a line of JSON, and keeps the lines."""

    def __init__(self, first):
        self.lines = []
        self.write(first)

    def write(self, line):
        self.lines.append(
            json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
        )
        print(self.lines[-1], flush=True)

    def figure(self, name, value, unit, peer_name="", peer=None, **more):
        line = {"figure": name, "value": value, "unit": unit}
        if peer:
            line |= {peer_name: peer, "ratio": value / peer}
        self.write(line | more)

    def peak(self, name, expected):
        """Peak of the GPU's memory since the last call."""
        if torch.cuda.is_available():
            self.figure(name, torch.cuda.max_memory_allocated(), "bytes", "expected", expected)
            torch.cuda.reset_peak_memory_stats()


def bench_rollout(model, tokenizer, config, bench, turns, report):
    """The prompts of every turn, at temperature 1, until each row has ended."""
    n, rows, ends, counts = bench.new_tokens, config.generation_rows, eos_ids(model, tokenizer), {}
    width = max(len(prompt) for prompts in turns for prompt in prompts) + n

    def ours():
        cache, count = Cache(model, min(rows, len(turns[0])), width), 0
        for turn, prompts in enumerate(turns):
            answers = generate(
                model, tokenizer, prompts, max_new_tokens=n, temperature=1.0, seed=turn, rows=rows,
                cache=cache,
            )  # fmt: skip
            count += sum(len(ids) for ids, _, _ in answers)
        counts["ours"] = count

    def theirs():
        counts["hf"] = sum(
            hf_generate(model, tokenizer, prompts[i : i + rows], n, ends)
            for prompts in turns
            for i in range(0, len(prompts), rows)
        )

    times = seconds(ours, model.device), seconds(theirs, model.device)
    total = sum(map(len, turns))
    report.figure(
        "rollout", counts["ours"] / times[0], "tokens/s", "hf_generate", counts["hf"] / times[1],
        prompts=total, response_tokens=counts["ours"] / total,
        prompt_tokens=sum(len(prompt) for prompts in turns for prompt in prompts) / total,
    )  # fmt: skip


def bench_decode(model, tokenizer, bench, prompts, report):
    """A decode step of the whole batch has to read the weights and the cache."""
    n, device = bench.new_tokens, model.device

    def decode(length):
        options = {"max_new_tokens": length, "temperature": 1.0, "seed": 0, "stop": False}
        cache = Cache(model, len(prompts), max(map(len, prompts)) + n)  # with its graphs
        run = lambda: generate(  # noqa: E731
            model, tokenizer, prompts, rows=len(prompts), cache=cache, **options
        )
        return seconds(run, device)

    step = (decode(n) - decode(1)) / (n - 1)
    size = next(model.parameters()).element_size()
    context = sum(map(len, prompts)) + len(prompts) * n / 2
    read = size * model.num_parameters() + memory.cache_bytes(model.config, size, context)
    bound = read / copy_bandwidth(device)
    report.figure(
        "decode", 1 / step, "steps/s", "bandwidth_bound", 1 / bound, rows=len(prompts),
        ms=1e3 * step,
    )  # fmt: skip


def bench_update(model, tokenizer, config, bench, episodes, report):
    """One optimizer step on the rows that the rollout has left."""
    device, pad = model.device, tokenizer.pad_token_id or 0
    steps = [s for e in episodes for s in e.steps][: bench.update_rows]
    rows = [
        common.Row(s.prompt_ids, s.response_ids, 1.0 if i % 2 else -1.0, s.logprobs)
        for i, s in enumerate(steps)
    ]
    total, once = sum(map(len, rows)), replace(config, minibatch_rows=len(rows))
    optimizer = common.make_optimizer(model, config)
    run = lambda: common.update(  # noqa: E731
        model, None, optimizer, rows, once, tokenizer=tokenizer, seed=0
    )
    ours = seconds(run, device)
    parts = memory.parts(config) | {"KV cache": 0, "reference": 0}
    report.peak("memory_update", memory.peak(parts))
    run = lambda: padded_step(model, optimizer, rows, pad, config.micro_tokens)  # noqa: E731
    theirs = seconds(run, device)
    report.figure(
        "update", total / ours, "tokens/s", "padded_full_logits", total / theirs, rows=len(rows),
        row_tokens=total / len(rows),
    )  # fmt: skip
    flops = (8 if config.recompute_old else 6) * model.num_parameters() * total / ours
    dtype = next(model.parameters()).dtype
    report.figure("mfu", flops, "FLOP/s", "matmul", matmul_flops(device, dtype))


def bench_iterations(config, bench, report):
    """The three scripts as a user runs them: seconds of the last iteration of each."""
    root = Path(__file__).resolve().parent.parent
    flags = [f"--{f.name}={getattr(config, f.name)}" for f in fields(config)]
    flags += [f"--data={Path(config.data).resolve()}", "--run=bench", "--n_req=1000000000"]
    flags += [f"--{p}_iterations={bench.iterations}" for p in ("warmup", "mine", "distill")]
    flags += ["--n_eval=1", "--active_above=-1", "--mine_every=1"]  # so that skills are in use
    if config.model in common.SHAPES:  # random weights never succeed, no row has an advantage
        flags.append("--skip_zero_rows=False")
    with tempfile.TemporaryDirectory() as folder:
        for phase in ("warmup", "mine", "distill"):
            command = [sys.executable, root / f"{phase}.py", *flags]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        lines = envs.read_jsonl(Path(folder) / "runs" / "bench" / "metrics.jsonl")
    for phase, line in {line["phase"]: line for line in lines}.items():
        report.figure(
            f"iteration_{phase}", line["seconds"], "s", rows=line["rows"] + line["distill_rows"]
        )


def main():
    config, bench = common.parse_config("bench", __doc__.split("\n")[0], Bench)
    config.data = config.data or str(tiny.write_games(tiny.GAMES))
    device = common.set_up(config)
    model, tokenizer = common.load_policy(config.model, config, device)
    report = Report({
        "hardware": hardware(device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "date": str(date.today()), "model": config.model, "dtype": config.dtype,
        "parameters": model.num_parameters(),
    })  # fmt: skip

    episodes, turns = play(model, tokenizer, config, bench)
    parts = memory.parts(config)
    report.peak("memory_rollout", parts["weights"] + parts["KV cache"])
    bench_rollout(model, tokenizer, config, bench, turns, report)
    bench_decode(model, tokenizer, bench, turns[-1][: config.generation_rows], report)
    bench_update(model, tokenizer, config, bench, episodes, report)
    del model  # the scripts load their own
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if bench.iterations:
        bench_iterations(config, bench, report)
    item = envs.list_items("alfworld", "train", tiny.write_games(tiny.GAMES))[0]
    fast, stock = env_steps(item, "fast", 20_000), env_steps(item, "textworld", bench.env_steps)
    report.figure("env", fast, "steps/s", "stock", stock)
    if bench.out:
        with open(bench.out, "a") as file:
            file.write("\n".join(report.lines) + "\n")


if __name__ == "__main__":
    common.run_script(main)
