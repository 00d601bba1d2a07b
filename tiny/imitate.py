"""Make the tiny policies: a tokenizer and a small Qwen2, by imitation of the lessons.

    python -m tiny.imitate --seed 0 --out base                     # how the shipped policy was made
    python -m tiny.imitate --start base --seed 1 --count 20000 --knows 0.4 --lr 0.01 --out next
    python -m tiny.imitate --start next --seed 2 --count 6000 --knows 0.3 --lr 0.005 --out policy

A fresh machine has no pretrained model, so a Qwen2-architecture policy of 0.7M parameters plays the
part of the instruct model (lessons: tiny/household.py, tiny/shop.py). It is a stand-in: it shows
that the algorithm works from end to end, and nothing about language models.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import envs
from tiny import household, shop

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts, world="alfworld"):
    """A byte-level BPE over words, numbers and punctuation; any text round-trips exactly.

    A space goes with the word behind it, in the shop with the word before it: there an option has
    to be the same token in the task (`color: red,`), on the page (`'red'`) and in `click[red]`.
    """
    tokenizer = Tokenizer(models.BPE())
    chunks = r" ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9]+?(?= ?[A-Za-z0-9]|$)"
    if world == "webshop":
        chunks = r"[A-Za-z]+ ?|[0-9]+ ?|[^A-Za-z0-9]+?(?=[A-Za-z0-9]|$)"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(chunks), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=896,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tags = ["<think>", "</think>", "<action>", "</action>"]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def train_policy(
    out: Path, seed=0, count=60_000, knows=0.0, start=None, lr=2e-2, rows=32, hidden=128, layers=4,
    world="alfworld",
):  # fmt: skip
    """Imitation of `count` lessons in one pass; saves HF format -> held-out loss."""
    torch.manual_seed(seed)
    if world == "webshop":
        pairs = shop.lessons(count, seed)
    else:
        pairs = household.lessons(count, seed, knows)
    tokenizer = train_tokenizer([p + answer for p, answer in pairs[:20_000]], world)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    if start:  # go on from a policy, with its tokenizer
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32)
    encode = lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]  # noqa: E731
    chat = lambda p: [{"role": "user", "content": p}]  # noqa: E731
    prompts = encode(
        [
            tokenizer.apply_chat_template(chat(p), tokenize=False, add_generation_prompt=True)
            for p, _ in pairs
        ]
    )
    answers = [ids + [tokenizer.eos_token_id] for ids in encode([answer for _, answer in pairs])]
    lengths = [len(p) for p in prompts]
    print(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, "
        f"{count} lessons of {sum(lengths) / count:.0f} tokens"
    )

    kept = count - min(512, count // 5)  # the rest measures the result
    order = list(range(kept))
    random.Random(seed).shuffle(order)
    chunks = [
        sorted(order[i : i + 16 * rows], key=lengths.__getitem__)
        for i in range(0, len(order), 16 * rows)
    ]
    batches = [chunk[i : i + rows] for chunk in chunks for i in range(0, len(chunk), rows)]
    random.Random(seed).shuffle(batches)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=lr / 4, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    once = {"total_steps": len(batches), "pct_start": 0.03, "cycle_momentum": False}
    cycle = torch.optim.lr_scheduler.OneCycleLR
    schedules = [cycle(o, o.param_groups[0]["lr"], **once) for o in optimizers]

    def loss_on(batch):
        """Next-token loss on the responses, and on the prompts -> two scalars."""
        rows_ids = [torch.tensor(prompts[i] + answers[i]) for i in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows_ids, True, tokenizer.pad_token_id)  # [B, L]
        at = torch.arange(1, ids.shape[1])[None]  # right padding needs no attention mask
        start = torch.tensor([len(prompts[i]) for i in batch])[:, None]
        end = torch.tensor([len(row) for row in rows_ids])[:, None]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, L - 1, V]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # [B, L - 1]
        response, prompt = (at >= start) & (at < end), at < start
        return losses[response].mean(), losses[prompt].mean()

    bar = tqdm(batches, desc="imitation", unit="batch")
    for batch in bar:
        loss, prompt_loss = loss_on(batch)
        model.zero_grad()
        (loss + prompt_loss).backward()  # the prompts teach copying names; responses need it
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, schedule in zip(optimizers, schedules):
            o.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", prompt_loss=f"{prompt_loss.item():.3f}")
    with torch.no_grad():
        held_out = [loss_on(range(i, min(i + 64, count)))[0].item() for i in range(kept, count, 64)]
    final = sum(held_out) / len(held_out)
    print(f"held-out loss {final:.3f} nats a token -> {out}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return final


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the policy to")
    parser.add_argument("--world", choices=envs.WORLDS, default="alfworld")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60_000, help="lessons to learn from")
    parser.add_argument("--knows", type=float, default=0.0, help="share of right appliances")
    parser.add_argument("--start", type=Path, default=None, help="policy to go on from")
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    args = parser.parse_args()
    train_policy(
        args.out, args.seed, args.count, args.knows, args.start, args.lr,
        hidden=args.hidden, layers=args.layers, world=args.world,
    )  # fmt: skip


if __name__ == "__main__":
    main()
