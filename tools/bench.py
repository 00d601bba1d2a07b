"""Speed and memory, a JSON line per figure, with a peer or a limit measured in the same run.

    python -m tools.bench                                                  # the tiny policy
    python -m tools.bench --preset alfworld-7b --model qwen2.5-7b-shape    # the 7B's shape on a GPU
    python -m tools.bench --out results/speed.jsonl                        # keep the lines

| figure      | measures                                  | compared with                          |
|-------------|-------------------------------------------|----------------------------------------|
| rollout     | tokens/s of `generate`, a rollout's       | `model.generate` on the same prompts   |
|             | prompts                                   |                                        |
| decode      | ms a step with the whole batch            | reading weights and cache like a copy  |
| graph       | (GPU) that step as a CUDA graph           | the same step without a graph          |
| update      | tokens/s of `update` on the rollout       | `padded_step` on the same rows         |
| memory_*    | (GPU) peak bytes of rollout and update    | what runtime/memory.py expects         |
| iteration   | seconds of a whole iteration of phase 0,  |                                        |
|             | and of its parts                          |                                        |

--prompt_tokens repeats the prompts of the embedded data to the length of real ones. Random weights
never end a response: each has --max_response_tokens tokens then.
"""

import json
import time
from dataclasses import dataclass, replace
from datetime import date
from functools import partial

import torch
import torch.nn.functional as F
import transformers

from common import Row, collate, open_groups, rl_rows, rollout, update
from config import PRESETS, flag
from runtime import memory
from runtime.flags import parse_config
from runtime.generation import Cache, eos_ids, generate, response_lengths
from runtime.policy import Policy, load_policy, load_reference, make_optimizer
from runtime.run import append, list_items, peak_memory, run_script, set_up


@dataclass
class Bench:
    prompt_tokens: int = flag(0, "of each prompt, cut or repeated", at_least=0, group="bench")
    update_rows: int = flag(512, "rows of the update, at most", at_least=1)
    out: str = flag("", "append the JSON lines to this file too")


def report(bench, line):
    """Print a line, and keep it at once: what comes later may fail."""
    line = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps(line), flush=True)
    if bench.out:
        append(bench.out, [line])


def figure(bench, name, value, unit, peer_name, peer, **more):
    """A value, and its ratio to a peer's in the same unit."""
    line = {"figure": name, "value": value, "unit": unit, peer_name: peer, "ratio": value / peer}
    report(bench, line | more)


def memory_figure(bench, name, expected):
    """Peak of the GPU's memory since the last call."""
    if torch.cuda.is_available():
        figure(bench, name, peak_memory(), "bytes", "expected", expected)


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


def hf_generate(policy, prompts, new_tokens, ends) -> int:
    """The peer: a left-padded batch and `model.generate` -> the number of tokens sampled."""
    model = policy.model
    pad = policy.tokenizer.pad_token_id or 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"attention_mask": mask.to(model.device), "pad_token_id": pad, "eos_token_id": ends}
    options |= {"do_sample": True, "top_k": 0, "max_new_tokens": new_tokens}
    with torch.no_grad():
        out = model.generate(input_ids=ids, **options)
    return int(response_lengths(out[:, width:], torch.tensor(ends, device=out.device)).sum())


def bench_rollout(policy, config, bench, prompts):
    """At temperature 1, until each row has ended."""
    rows, new = config.generation_rows, config.max_response_tokens
    ends = eos_ids(policy.model, policy.tokenizer)
    sampled = {}  # tokens of each of the two

    def ours():
        options = {"max_new_tokens": new, "temperature": 1.0, "rows": rows, "seed": 0}
        answers = generate(policy.model, policy.tokenizer, prompts, **options)
        sampled[ours] = sum(len(ids) for ids, _, _ in answers)

    def theirs():
        batches = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
        sampled[theirs] = sum(hf_generate(policy, batch, new, ends) for batch in batches)

    speed, peer = (1 / seconds(run, policy.model.device) * sampled[run] for run in (ours, theirs))
    more = {"prompts": len(prompts), "response_tokens": sampled[ours] / len(prompts)}
    more["prompt_tokens"] = sum(map(len, prompts)) / len(prompts)
    figure(bench, "rollout", speed, "tokens/s", "hf_generate", peer, **more)


def bench_decode(policy, config, bench, prompts):
    """A decode step of the whole batch: against what it has to read, and with and without graph."""
    model = policy.model
    rows, new = len(prompts), config.max_response_tokens

    def step_ms(graphs) -> float:
        cache = Cache(model, rows, max(map(len, prompts)) + new, graphs=graphs)
        options = {"temperature": 1.0, "seed": 0, "rows": rows, "stop": False, "cache": cache}
        run = partial(generate, model, policy.tokenizer, prompts, **options)
        first, every = (seconds(partial(run, max_new_tokens=n), model.device) for n in (1, new))
        return 1e3 * (every - first) / (new - 1)

    source, target = torch.empty(2, 1 << 26, device=model.device)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source), model.device)  # bytes/s
    size = next(model.parameters()).element_size()
    context = sum(map(len, prompts)) + rows * new / 2
    read = size * model.num_parameters() + memory.cache_bytes(model.config, size, context)
    step = step_ms(graphs=True)
    figure(bench, "decode", step, "ms", "bandwidth_bound", 1e3 * read / copied, rows=rows)
    if model.device.type == "cuda":
        figure(bench, "graph", step, "ms", "eager", step_ms(graphs=False))


def padded_step(policy, rows, tokens_at_once):
    """The peer of the update: every row padded to the longest, float32 logits at every position."""
    model = policy.model.train()
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


def bench_update(policy, config, bench, steps):
    """One optimizer step on the rows that the rollout has left."""
    rows = [
        Row(step.prompt_ids, step.response_ids, 1.0 if n % 2 else -1.0, step.logprobs)
        for n, step in enumerate(steps[: bench.update_rows])
    ]
    one_step = replace(config, minibatch_rows=len(rows))
    policy.optimizer = make_optimizer(policy.model, config.lr, offload=config.offload)
    total, device = sum(map(len, rows)), policy.model.device
    ours = total / seconds(lambda: update(policy, rows, one_step, seed=0), device)
    parts = memory.parts(config) | {"KV cache": 0, "reference": 0}
    memory_figure(bench, "memory_update", memory.situations(parts, config.offload)["update"])
    peer = total / seconds(lambda: padded_step(policy, rows, config.micro_tokens), device)
    more = {"rows": len(rows), "row_tokens": total / len(rows)}
    figure(bench, "update", ours, "tokens/s", "padded_full_logits", peer, **more)


def bench_iteration(policy, config, bench, items):
    """One iteration by its parts, with the world's own prompts and --max_steps steps an episode.
    Random weights solve nothing, so rows get advantages of 1 and -1 in turn.
    """
    device = policy.model.device
    policy.reference = load_reference(config, device)
    policy.optimizer = make_optimizer(policy.model, config.lr, offload=config.offload)
    spent = {"optimizer": 0.0}  # seconds of each part; a step that is not finite is not taken

    def timed(part, work):
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent[part] = spent.get(part, 0.0) + time.perf_counter() - start
        return result

    policy.optimizer.step = partial(timed, "optimizer", policy.optimizer.step)
    groups = open_groups(items, config)
    episodes = timed("rollout", lambda: rollout(policy, config, groups, seed=0))
    rows = rl_rows(episodes, [[(-1.0) ** n for n in range(len(e.steps))] for e in episodes])
    metrics = timed("update", lambda: update(policy, rows, config, seed=0))
    spent["score"] = metrics["score_seconds"]  # the old and the reference log-probs
    spent["gradients"] = spent.pop("update") - spent["score"] - spent["optimizer"]
    line = {"figure": "iteration", "value": sum(spent.values()), "unit": "s"} | spent
    line |= {"optimizer_steps": metrics["optimizer_steps"], "rows": len(rows)}
    line["row_tokens"] = sum(map(len, rows)) / len(rows)
    line["response_tokens"] = sum(len(row.response_ids) for row in rows) / len(rows)
    report(bench, line | {"offload": config.offload})


def main():
    config, bench = parse_config("bench", __doc__, Bench)
    config.data = config.data or PRESETS["tiny-household"]["data"]
    device = set_up(config)
    policy = Policy(*load_policy(config.model, config, device))
    first = {"hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    first |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    first |= {"transformers": transformers.__version__, "date": str(date.today())}
    first |= {"model": config.model, "dtype": config.dtype}
    report(bench, first | {"parameters": policy.model.num_parameters()})

    short = replace(config, max_steps=2)
    items = list_items(config, config.split)[: config.tasks]
    groups = open_groups(items, config)
    steps = [step for e in rollout(policy, short, groups, seed=0) for step in e.steps]
    for step in steps if bench.prompt_tokens else ():
        repeats = 1 + bench.prompt_tokens // len(step.prompt_ids)
        step.prompt_ids = (step.prompt_ids * repeats)[: bench.prompt_tokens]
    parts = memory.parts(short) | {"optimizer": 0, "reference": 0}  # neither is loaded yet
    memory_figure(bench, "memory_rollout", memory.situations(parts, False)["rollout"])
    prompts = [step.prompt_ids for step in steps]
    bench_rollout(policy, config, bench, prompts)
    bench_decode(policy, config, bench, prompts[: config.generation_rows])
    bench_update(policy, config, bench, steps)
    policy.optimizer = None  # its memory goes before the next one is made
    bench_iteration(policy, config, bench, items)


if __name__ == "__main__":
    run_script(main)
