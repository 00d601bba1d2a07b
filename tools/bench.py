"""Speed and memory, a JSON line per figure, beside a peer or a limit measured in the same run.

    python -m tools.bench                                                  # the tiny policy
    python -m tools.bench --preset alfworld-7b --model qwen2.5-7b-shape    # the 7B's shape on a GPU
    python -m tools.bench --out results/bench.jsonl

| figure      | measures                                      | beside                             |
|-------------|-----------------------------------------------|------------------------------------|
| rollout     | tokens/s of `generate`, the prompts of a real | `model.generate`, the same prompts |
|             | rollout, turn by turn                         |                                    |
| decode      | seconds a step with the whole batch           | weights + KV cache over copy speed |
| update      | tokens/s of `update` on that rollout's rows   | the same rows, each padded to the  |
|             |                                               | longest, logits at every position  |
| mfu         | update FLOP/s, 6 a parameter and token (and 2 | a large matrix product             |
|             | more with --recompute_old)                    |                                    |
| memory_*    | peak bytes, rollout and update (GPU only)     | what runtime/memory.py expects     |
| iteration_* | seconds of the last iteration of each phase   |                                    |
| env         | steps/s of the plain-Python ALFWorld          | stock alfworld                     |
| webshop     | us a step of the WebShop engine on the        |                                    |
|             | generated catalogue, caches warm              |                                    |

Without --data the generated games are used, and with --prompt_tokens their prompts are repeated to
the length of real ones. Random weights never end a response: each has --new_tokens tokens then.
"""

import json
import platform
import random
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
from config import flag, parse_config, read_jsonl
from runtime import memory
from runtime.batches import Row, collate
from runtime.generation import Cache, eos_ids, generate, response_lengths
from runtime.policy import SHAPES, Policy, load_policy, make_optimizer
from runtime.run import list_items, run_script, set_up
from tiny import household, shop

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("warmup", "mine", "distill")


@dataclass
class Bench:
    turns: int = flag(4, "turns of the rollout")
    new_tokens: int = flag(48, "longest response")
    prompt_tokens: int = flag(0, "cut or repeat prompts to this length; 0: as they are")
    update_rows: int = flag(512, "rows of the update, at most")
    iterations: int = flag(2, "iterations of each phase; 0: leave this figure out")
    env_steps: int = flag(20, "steps played in the stock engine")
    out: str = flag("", "append the JSON lines to this file too")


class Report:
    """Prints each figure as a line of JSON and appends it to a file: a later figure may fail."""

    def __init__(self, out, first):
        self.out = out
        self.write(first)

    def write(self, line):
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        line = json.dumps(rounded)
        print(line, flush=True)
        if self.out:
            with open(self.out, "a") as file:
                file.write(line + "\n")

    def figure(self, name, value, unit, peer_name="", peer=None, **more):
        """A value, and what it is beside a peer's in the same unit: ratio = value / peer."""
        line = {"figure": name, "value": value, "unit": unit}
        if peer:
            line |= {peer_name: peer, "ratio": value / peer}
        self.write(line | more)

    def peak(self, name, expected):
        """Peak of the GPU's memory since the last call."""
        if torch.cuda.is_available():
            self.figure(name, torch.cuda.max_memory_allocated(), "bytes", "expected", expected)
            torch.cuda.reset_peak_memory_stats()


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


# --------------------------------------------------------------------------------------------------
# The hardware, and what it could do
# --------------------------------------------------------------------------------------------------


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
    items = list_items(config, config.split)
    items = random.Random(config.seed).sample(items, min(config.tasks, len(items)))
    groups = common.plan_groups(items, config, members=config.group_size)
    episodes = common.rollout(policy, config, groups, seed=0, temperature=1.0)
    turns = [[] for _ in range(bench.turns)]
    for episode in episodes:
        for turn, step in zip(turns, episode.steps, strict=True):
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
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": new_tokens}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            pad_token_id=pad,
            eos_token_id=ends,
            **sampling,
        )
    return int(response_lengths(out[:, width:], torch.tensor(ends, device=out.device)).sum())


def bench_rollout(policy, config, bench, turns, report):
    """The prompts of every turn, at temperature 1, until each row has ended."""
    model = policy.model
    tokenizer = policy.tokenizer
    rows = config.generation_rows
    new = bench.new_tokens
    ends = eos_ids(model, tokenizer)
    lengths = [len(prompt) for prompts in turns for prompt in prompts]
    sampled = {}  # tokens of each of the two

    def ours():
        cache = Cache(model, min(rows, len(turns[0])), max(lengths) + new)
        options = {"max_new_tokens": new, "temperature": 1.0, "rows": rows, "cache": cache}
        sampled["ours"] = 0
        for turn, prompts in enumerate(turns):
            for ids, _, _ in generate(model, tokenizer, prompts, seed=turn, **options):
                sampled["ours"] += len(ids)

    def theirs():
        sampled["theirs"] = 0
        for prompts in turns:
            for i in range(0, len(prompts), rows):
                sampled["theirs"] += hf_generate(policy, prompts[i : i + rows], new, ends)

    our_time = seconds(ours, model.device)
    their_time = seconds(theirs, model.device)
    speed = sampled["ours"] / our_time
    count = len(lengths)
    more = {
        "prompts": count,
        "response_tokens": sampled["ours"] / count,
        "prompt_tokens": sum(lengths) / count,
    }
    peer = sampled["theirs"] / their_time
    report.figure("rollout", speed, "tokens/s", "hf_generate", peer, **more)


def bench_decode(policy, bench, prompts, report):
    """A decode step of the whole batch has to read the weights and the cache."""
    model = policy.model
    new = bench.new_tokens
    rows = len(prompts)
    options = {"temperature": 1.0, "seed": 0, "rows": rows, "stop": False}

    def decode(length):
        cache = Cache(model, rows, max(map(len, prompts)) + new)  # with its graphs

        def run():
            generate(
                model, policy.tokenizer, prompts, max_new_tokens=length, cache=cache, **options
            )

        return seconds(run, model.device)

    step = (decode(new) - decode(1)) / (new - 1)
    size = next(model.parameters()).element_size()
    context = sum(map(len, prompts)) + rows * new / 2
    read = size * model.num_parameters() + memory.cache_bytes(model.config, size, context)
    bound = read / copy_bandwidth(model.device)
    more = {"rows": rows, "ms": 1e3 * step}
    report.figure("decode", 1 / step, "steps/s", "bandwidth_bound", 1 / bound, **more)


# --------------------------------------------------------------------------------------------------
# Update
# --------------------------------------------------------------------------------------------------


def padded_step(policy, rows, tokens_at_once):
    """The peer of the update: every row padded to the longest, float32 logits at every position."""
    model = policy.model
    device = model.device
    policy.optimizer.zero_grad()
    model.train()
    tokens = sum(len(row.response_ids) for row in rows)
    width = max(map(len, rows))
    count = max(1, tokens_at_once // width)
    for start in range(0, len(rows), count):
        batch = rows[start : start + count]
        t = collate(batch, policy.tokenizer.pad_token_id or 0, device)
        missing = width - t["ids"].shape[1]
        ids = F.pad(t["ids"], (0, missing))  # [B, L], as all below
        mask = F.pad(t["response_mask"], (0, missing))
        lengths = torch.tensor([len(row) for row in batch], device=device)
        attention = torch.arange(width, device=device) < lengths[:, None]
        logits = model(input_ids=ids, attention_mask=attention.long(), use_cache=False).logits
        logits = logits[:, :-1].float().transpose(1, 2)  # [B, V, L - 1]
        losses = F.cross_entropy(logits, ids[:, 1:], reduction="none")
        ((losses * mask[:, 1:]).sum() / tokens).backward()
    policy.optimizer.step()
    model.eval()


def bench_update(policy, config, bench, episodes, report):
    """One optimizer step on the rows that the rollout has left."""
    model = policy.model
    rows = []
    for step in (s for e in episodes for s in e.steps):
        advantage = 1.0 if len(rows) % 2 else -1.0
        rows.append(Row(step.prompt_ids, step.response_ids, advantage, step.logprobs))
    rows = rows[: bench.update_rows]
    total = sum(map(len, rows))
    one_step = replace(config, minibatch_rows=len(rows))
    policy.optimizer = make_optimizer(model, config)
    ours = seconds(lambda: common.update(policy, rows, one_step, seed=0), model.device)
    parts = memory.parts(config) | {"KV cache": 0, "reference": 0}
    report.peak("memory_update", memory.peak(parts))
    theirs = seconds(lambda: padded_step(policy, rows, config.micro_tokens), model.device)
    more = {"rows": len(rows), "row_tokens": total / len(rows)}
    peer = total / theirs
    report.figure("update", total / ours, "tokens/s", "padded_full_logits", peer, **more)
    flops = (8 if config.recompute_old else 6) * model.num_parameters() * total / ours
    limit = matmul_flops(model.device, next(model.parameters()).dtype)
    report.figure("mfu", flops, "FLOP/s", "matmul", limit)


# --------------------------------------------------------------------------------------------------
# Whole iterations, and the worlds
# --------------------------------------------------------------------------------------------------


def bench_iterations(config, bench, report):
    """The three scripts as a user runs them: seconds of the last iteration of each."""
    flags = [f"--{f.name}={getattr(config, f.name)}" for f in fields(config)]
    flags += [f"--data={Path(config.data).resolve()}", "--run=bench", "--n_req=1000000000"]
    flags += [f"--{phase}_iterations={bench.iterations}" for phase in PHASES]
    flags += ["--n_eval=1", "--active_above=-1", "--mine_every=1"]  # so that skills are in use
    if config.model in SHAPES:  # random weights never succeed, no row has an advantage
        flags.append("--skip_zero_rows=False")
    with tempfile.TemporaryDirectory() as folder:
        for phase in PHASES:
            command = [sys.executable, ROOT / f"{phase}.py", *flags]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        lines = read_jsonl(Path(folder) / "runs" / "bench" / "metrics.jsonl")
    last = {line["phase"]: line for line in lines}
    for phase, line in last.items():
        rows = line["rows"] + line["internalization_rows"]
        report.figure(f"iteration_{phase}", line["seconds"], "s", rows=rows)


def alfworld_speed(item, engine, count) -> float:
    """Steps/s of an engine, first loading not counted; a new episode every 50 steps."""
    game = envs.make_env("alfworld", item, engine)
    obs = game.reset()
    start = time.perf_counter()
    for i in range(1, count + 1):
        obs, *_ = game.step(obs.admissible[i % len(obs.admissible)])
        if i % 50 == 0:
            obs = game.reset()
    return count / (time.perf_counter() - start)


def bench_webshop(report, sessions=100):
    """The demonstrator's sessions played again; a start counts as a step."""
    folder = shop.write_catalogue()
    rng = random.Random(0)
    played = []  # (session, its actions)
    for item in envs.list_items("webshop", "train", folder)[:sessions]:
        env = envs.make_env("webshop", item)
        steps = shop.demonstrate(env, list(env.goal["goal_options"]), rng)
        played.append((env, [action for _, _, action, _ in steps]))

    def replay():
        for env, actions in played:
            env.reset()
            for action in actions:
                env.step(action)

    steps = sum(1 + len(actions) for _, actions in played)
    spent = seconds(replay, torch.device("cpu"))
    report.figure("webshop", 1e6 * spent / steps, "us/step", steps=steps)


def main():
    config, bench = parse_config("bench", __doc__, Bench)
    if not config.data:  # the generated games or products
        write = shop.write_catalogue if config.env == "webshop" else household.write_games
        config.data = str(write())
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
    report = Report(bench.out, first)

    short = replace(config, max_steps=bench.turns, max_response_tokens=bench.new_tokens)
    episodes, turns = play(policy, short, bench)
    parts = memory.parts(short) | {"optimizer": 0, "reference": 0}  # neither is loaded yet
    report.peak("memory_rollout", memory.situations(parts)["rollout"])
    bench_rollout(policy, config, bench, turns, report)
    bench_decode(policy, bench, turns[-1][: config.generation_rows], report)
    bench_update(policy, config, bench, episodes, report)
    del policy  # the scripts load their own
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if bench.iterations:
        bench_iterations(config, bench, report)
    item = envs.list_items("alfworld", "train", household.write_games())[0]
    fast = alfworld_speed(item, "fast", 20_000)
    stock = alfworld_speed(item, "textworld", bench.env_steps)
    report.figure("env", fast, "steps/s", "stock", stock)
    bench_webshop(report)


if __name__ == "__main__":
    run_script(main)
