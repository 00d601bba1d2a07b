"""Teach a policy by imitation of the lessons: a tiny one from nothing, or any Hugging Face model.

    python -m tiny.imitate --seed 0 --out base                     # three steps to policy_household
    python -m tiny.imitate --start base --seed 1 --count 20000 --knows 0.4 --lr 0.01 --out next
    python -m tiny.imitate --start next --seed 2 --count 6000 --knows 0.3 --lr 0.005 --out policy
    python -m tiny.imitate --model smollm2 --count 1200 --steps 0.4 --knows 0.3 --out taught
    python -m tiny.imitate --data DIR --out real    # on the training games of a data folder instead

A fresh machine has no pretrained model, so a Qwen2-architecture policy of 0.7M parameters plays its
part. It shows that the algorithm works from end to end, and nothing about language models.

A tiny policy learns the responses and, to learn to copy names, the prompts: with Muon for its
matrices and AdamW for the rest, in float32. With `--model` a pretrained one learns the responses
alone, with AdamW, in bfloat16.

An interrupted command goes on from its last save and ends as the unbroken one does.
"""

import json
import math
import random
import re
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

import envs
from common import Row, collate, micro_batches, token_logprobs
from config import Config, UserError, check, flag, read_json, write_atomically
from runtime import saves
from runtime.flags import other_value, read_command_line
from runtime.generation import encode_prompts, generate
from runtime.policy import load_policy, make_optimizer
from runtime.run import load_state, run_script
from skills import parse_skill
from tiny import lessons_household, lessons_shop
from tiny.scratch import new_model, train_tokenizer

TEACHERS = {"alfworld": lessons_household, "webshop": lessons_shop}


@dataclass
class Lessons:
    """What a policy is taught, and how: the flags."""

    out: str = flag("", "folder to write the policy to", free=True)
    world: str = flag("alfworld", "whose lessons", choices=("alfworld", "webshop"))
    seed: int = flag(0, "of the lessons, their order and new weights", at_least=0)
    count: int = flag(60_000, "lessons to learn from, each once", at_least=1)
    steps: float = flag(1.0, "share of acting steps to show", at_least=0.25, at_most=1)
    thoughts: bool = flag(True, "false: the policy acts without thinking, <think></think>")
    knows: float = flag(-1.0, "share of right choices without a skill; below 0: 0, in shops 0.45")
    difficulties: list[int] = flag([], "options of a product, in turns", choices=(1, 2, 3, 4, 5))
    data: str = flag("", "a world's data folder: lessons from its training games or goals")
    start: str = flag("", "a tiny policy made by this command, to go on with")
    model: str = flag("", "a pretrained model to teach: folder, hub name or smollm2")
    rows: int = flag(0, "lessons of an optimizer step; 0: 32, with --model 8", at_least=0)
    lr: float = flag(0.0, "largest learning rate; 0: 2e-2, with --model 3e-4", at_least=0)
    layers: int = flag(4, "of a new policy", at_least=1)
    hidden: int = flag(128, "width of a new policy", at_least=8)
    micro_tokens: int = flag(16384, "tokens per forward-backward", free=True, at_least=1)
    save_minutes: float = flag(10.0, "minutes between saves", free=True, at_least=0)
    held_out: int = flag(256, "other lessons, to measure what was learned", at_least=1)


def draw(lessons: Lessons, count, seed, split="train") -> list:
    """`count` (prompt, response) pairs by the world's teacher; only a data folder has splits."""
    chosen = {"knows": lessons.knows} if lessons.knows >= 0 else {}
    if lessons.difficulties:
        chosen["difficulties"] = lessons.difficulties
    if lessons.data:
        chosen |= {"data": lessons.data, "split": split}
    pairs = TEACHERS[lessons.world].lessons(math.ceil(count / lessons.steps), seed, **chosen)
    acting = [k for k, (_, response) in enumerate(pairs) if not is_summary(response)]
    skipped = set(random.Random(f"{seed} steps").sample(acting, len(pairs) - count))
    pairs = [pair for k, pair in enumerate(pairs) if k not in skipped]
    if not lessons.thoughts:
        empty = re.compile("<think>.*?</think>", re.S)
        pairs = [(x, empty.sub("<think></think>", y, count=1)) for x, y in pairs]
    return pairs


def is_summary(response) -> bool:
    """Whether a lesson's response is the JSON of a skill, not a step's thought and action."""
    return response.startswith("{")


def begin(lessons: Lessons, pairs, folder=None) -> tuple:
    """The policy before its first lesson, or as saved in `folder` -> (model, tokenizer)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(lessons.seed)
    if name := folder or lessons.model or lessons.start:
        dtype = "bfloat16" if lessons.model else "float32"
        return load_policy(name, Config(dtype=dtype, gradient_checkpointing=False), device)
    texts = [prompt + answer for prompt, answer in pairs[:20_000]]
    tokenizer = train_tokenizer(texts, lessons.world, short=bool(lessons.data))
    return new_model(tokenizer, lessons.hidden, lessons.layers).to(device), tokenizer


def make_optimizers(model, lessons: Lessons, saved=None) -> list:
    """AdamW for a pretrained model; for a tiny one Muon for its matrices and AdamW for the rest."""
    if lessons.model:
        lr = lessons.lr or 3e-4
        return [make_optimizer(model, lr, beta2=0.98, weight_decay=0.0, saved=saved and saved[0])]
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    lr = lessons.lr or 2e-2
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=lr / 4, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer, state in zip(optimizers, saved or (), strict=bool(saved)):
        optimizer.load_state_dict(state)
    return optimizers


def rate(k, total) -> float:
    """Batch k of `total` -> its share of the largest learning rate: up in 3% of them, then down."""
    up = 0.03 * total
    if k < up:
        return 0.52 - 0.48 * math.cos(math.pi * k / up)
    return 0.5 + 0.5 * math.cos(math.pi * (k - up) / (total - up))


def make_rows(tokenizer, pairs) -> list:
    """Lessons -> rows; the response ends with EOS."""
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in pairs])
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    eos = [tokenizer.eos_token_id]
    return [Row(prompt, answer + eos) for prompt, answer in zip(prompts, answers, strict=True)]


def make_batches(rows, size, seed) -> list:
    """Lists of `size` rows of about equal length, in random order."""
    order = random.Random(seed).sample(rows, len(rows))
    batches = []
    for i in range(0, len(order), 16 * size):
        chunk = sorted(order[i : i + 16 * size], key=lambda row: len(row.prompt_ids))
        batches += [chunk[k : k + size] for k in range(0, len(chunk), size)]
    random.Random(seed).shuffle(batches)
    return batches


def imitation_losses(model, rows, pad_id, with_prompts) -> tuple:
    """Next-token losses, summed over the responses, and over the prompts -> two scalars."""
    t = collate(rows, pad_id, model.device)
    responses = t["response_mask"]  # [B, L]
    lengths = torch.tensor([len(row.prompt_ids) for row in rows], device=model.device)  # [B]
    at = torch.arange(responses.shape[1], device=model.device)  # [L]
    prompts = (at < lengths[:, None]) & (at > 0) & with_prompts  # [B, L] nothing predicts the first
    logprobs, _ = token_logprobs(model, t["ids"], responses | prompts, entropy=False)  # [B, L]
    return -logprobs[responses].sum(), -logprobs[prompts].sum()


def learn(model, rows, pad_id, lessons: Lessons) -> tuple:
    """Accumulate the gradient of one batch's mean losses -> (loss, prompt loss) a token."""
    responses = sum(len(row.response_ids) for row in rows)
    prompts = sum(len(row.prompt_ids) for row in rows)
    loss = 0.0
    prompt_loss = 0.0
    for batch in micro_batches(rows, lessons.micro_tokens):
        parts = imitation_losses(model, batch, pad_id, with_prompts=not lessons.model)
        (parts[0] / responses + parts[1] / prompts).backward()
        loss += parts[0].item() / responses
        prompt_loss += parts[1].item() / prompts
    return loss, prompt_loss


def measure(model, tokenizer, pairs, lessons: Lessons) -> dict:
    """Held-out lessons: the loss in nats a token, and how greedy responses compare.

    steps, exact, valid    lessons in acting; the expert's action, well-formed; well-formed
    summaries, parsable    lessons in summarizing; those a skill can be read from
    """
    rows = make_rows(tokenizer, pairs)
    pad_id = tokenizer.pad_token_id or 0
    with torch.no_grad():
        batches = micro_batches(rows, lessons.micro_tokens)
        losses = [imitation_losses(model, batch, pad_id, False)[0].item() for batch in batches]
    lengths = [len(row.response_ids) for row in rows]
    prompts = [row.prompt_ids for row in rows]
    greedy = {"max_new_tokens": 2 * max(lengths), "temperature": 0, "seed": 0, "rows": 32}
    answers = generate(model, tokenizer, prompts, **greedy)
    result = {"loss": sum(losses) / sum(lengths)}
    result |= dict.fromkeys(("steps", "exact", "valid", "summaries", "parsable"), 0)
    for (_, wanted), (_, _, text) in zip(pairs, answers, strict=True):
        if is_summary(wanted):
            result["summaries"] += 1
            result["parsable"] += parse_skill(text) is not None
        else:
            action, valid = envs.parse_action(text)
            result["steps"] += 1
            result["valid"] += valid
            result["exact"] += valid and action == envs.parse_action(wanted)[0]
    return result


def find_progress(out: Path, lessons: Lessons) -> tuple:
    """(what an earlier call of the command recorded, the folder of its save), or ({}, None)."""
    folder = saves.find(out.parent, out.name)
    if folder is None:
        return {}, None
    record = read_json(folder / "imitation.json")
    for f in fields(lessons):
        now = getattr(lessons, f.name)
        was = record["settings"].get(f.name, now)  # a folder may be older than a flag
        if not f.metadata["free"] and was != now:
            raise other_value(out, f.name, was, now)
    return record, folder


def save(out: Path, model, tokenizer, record, moving=None):
    """Write the policy, the record of how it was made, and `moving`: what training goes on with."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    write_atomically(part / "imitation.json", json.dumps(record, indent=1))
    if moving:
        saves.write_tensors(moving, part / "state.pt")
    saves.put(part, out)


def train_policy(lessons: Lessons) -> dict:
    """Give the lessons, once each, and write the policy -> what `measure` found."""
    out = Path(lessons.out)
    record, folder = find_progress(out, lessons)
    if "result" in record:
        print(f"{out} is finished")
        return record["result"]
    record = {"settings": asdict(lessons)}
    pairs = draw(lessons, lessons.count, lessons.seed)
    model, tokenizer = begin(lessons, pairs, folder)
    state = load_state(folder, ["batches"]) if folder else {"batches": 0, "optimizers": None}
    optimizers = make_optimizers(model, lessons, state["optimizers"])
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rows = make_rows(tokenizer, pairs)
    policy = f"{model.num_parameters():,} parameters, {len(tokenizer)} kinds of tokens"
    print(f"{policy}; {len(rows)} lessons, {sum(map(len, rows)):,} tokens")

    batches = make_batches(rows, lessons.rows or (8 if lessons.model else 32), lessons.seed)
    pad_id = tokenizer.pad_token_id or 0
    saved_at = time.time()
    model.train()
    bar = tqdm(batches, desc="imitation", unit="batch", initial=state["batches"])
    for k in range(state["batches"], len(batches)):
        loss, prompt_loss = learn(model, batches[k], pad_id, lessons)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in groups:
            group["lr"] = rate(k, len(batches)) * group.setdefault("largest_lr", group["lr"])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", prompt_loss=f"{prompt_loss:.3f}")
        if time.time() - saved_at > 60 * lessons.save_minutes:
            states = [optimizer.state_dict() for optimizer in optimizers]
            save(out, model, tokenizer, record, {"batches": k + 1, "optimizers": states})
            saved_at = time.time()
    model.eval()
    spread = 8  # one of so many lessons, or they would be of few games
    split = envs.world(lessons.world).EVAL_SPLIT
    held_out = draw(lessons, spread * lessons.held_out, lessons.seed + 1_000_000, split)
    record["result"] = measure(model, tokenizer, held_out[::spread], lessons)
    save(out, model, tokenizer, record)
    print("held-out lessons, loss in nats a token:", record["result"], f"-> {out}")
    return record["result"]


def main():
    lessons = Lessons(**read_command_line([Lessons], __doc__))
    check(lessons)
    if not lessons.out:
        raise UserError("--out: name the folder to write to")
    if lessons.hidden % 8:
        raise UserError(f"--hidden {lessons.hidden}: must be a multiple of 8")
    if lessons.start and lessons.model:
        raise UserError("--start or --model, not both")
    if lessons.difficulties and (lessons.world != "webshop" or lessons.data):
        raise UserError("--difficulties: of the made shops, --world webshop without --data")
    train_policy(lessons)


if __name__ == "__main__":
    run_script(main)
