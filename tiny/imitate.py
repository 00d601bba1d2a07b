"""Make the tiny policies: a tokenizer and a small Qwen2, by imitation of the lessons.

    python -m tiny.imitate --seed 0 --out base                     # how the shipped policy was made
    python -m tiny.imitate --start base --seed 1 --count 20000 --knows 0.4 --lr 0.01 --out next
    python -m tiny.imitate --start next --seed 2 --count 6000 --knows 0.3 --lr 0.005 --out policy
    python -m tiny.imitate --data DIR --out real    # on the training games of a data folder instead

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
from config import UserError
from tiny import household, shop

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SENTENCES = [  # of the prompts of `envs.py`, beside a world's ROLE
    "Your task is to:",
    "The latest observations and your actions:",
    envs.INSTRUCTION,
]


def train_tokenizer(texts, world="alfworld", short=False):
    """A byte-level BPE over words, numbers and punctuation; any text round-trips exactly.

    A space goes with the word behind it, in the shop with the word before it: there an option has
    to be the same token in the task (`color: red,`), on the page (`'red'`) and in `click[red]`.

    short   fewer tokens for the long prompts of real games: one for the fixed sentences, and one
            for what stands between two receptacles in the list of actions
    """
    tokenizer = Tokenizer(models.BPE())
    chunks = r" ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9]+?(?= ?[A-Za-z0-9]|$)"
    if world == "webshop":
        chunks = r"[A-Za-z]+ ?|[0-9]+ ?|[^A-Za-z0-9]+?(?=[A-Za-z0-9]|$)"
    if short:
        chunks = r"'\n'go to|" + chunks
    split = pre_tokenizers.Split(Regex(chunks), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024 if short else 896,  # real rooms have more kinds of things
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tags = ["<think>", "</think>", "<action>", "</action>"]
    whole = tags + [envs.world(world).ROLE, *SENTENCES] if short else tags
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def as_chat(tokenizer, prompt) -> str:
    """A user message up to where the answer begins."""
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def encode(tokenizer, texts) -> list:
    """The token ids of each text, nothing added."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def new_model(tokenizer, hidden, layers) -> Qwen2ForCausalLM:
    """A small Qwen2 with random weights for the vocabulary of the tokenizer."""
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
    return Qwen2ForCausalLM(config)


def make_batches(lengths, rows, seed) -> list:
    """Lists of `rows` indices of about equal length, in random order."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    batches = []
    for i in range(0, len(order), 16 * rows):
        chunk = sorted(order[i : i + 16 * rows], key=lengths.__getitem__)
        batches += [chunk[k : k + rows] for k in range(0, len(chunk), rows)]
    random.Random(seed).shuffle(batches)
    return batches


def imitation_losses(model, prompts, answers, pad_id) -> tuple:
    """Next-token loss on the responses, and on the prompts (lists of token ids) -> two scalars."""
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)  # [B, L]
    at = torch.arange(1, ids.shape[1])[None]  # [1, L - 1]
    start = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    # right padding needs no attention mask
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, L - 1, V]
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # [B, L - 1]
    in_prompt = at < start
    in_response = (at >= start) & (at < end)
    return losses[in_response].mean(), losses[in_prompt].mean()


def train_policy(
    out: Path,
    *,
    world="alfworld",
    seed=0,
    count=60_000,
    knows=None,
    difficulties=None,
    data=None,
    start=None,
    lr=2e-2,
    hidden=128,
    layers=4,
    rows=32,
) -> float:
    """Imitation of `count` lessons in one pass, `rows` a batch; saves HF format to `out`.

    knows          how much the demonstrator knows; None: what the shipped policies began with
    difficulties   of the shop's lessons; None: the demo's
    data           a data folder of ALFWorld: the lessons show its training games
    start          a policy to go on from, with its tokenizer
    -> held-out loss in nats a token
    """
    torch.manual_seed(seed)
    if data and world == "webshop":
        raise UserError("--data: for ALFWorld's games; leave it out, or --world webshop")
    teacher = shop if world == "webshop" else household
    chosen = {"knows": knows, "difficulties": difficulties, "data": data}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    pairs = teacher.lessons(count, seed, **chosen)
    if start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32)
    else:
        texts = [prompt + answer for prompt, answer in pairs[:20_000]]
        tokenizer = train_tokenizer(texts, world, short=bool(data))
        model = new_model(tokenizer, hidden, layers)
    prompts = encode(tokenizer, [as_chat(tokenizer, prompt) for prompt, _ in pairs])
    answers = encode(tokenizer, [answer for _, answer in pairs])
    answers = [ids + [tokenizer.eos_token_id] for ids in answers]
    lengths = [len(prompt) for prompt in prompts]
    mean = sum(lengths) / count
    size = f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens"
    print(f"{size}, {count} lessons of {mean:.0f} tokens")

    def losses_on(batch):
        own_prompts = [prompts[i] for i in batch]
        own_answers = [answers[i] for i in batch]
        return imitation_losses(model, own_prompts, own_answers, tokenizer.pad_token_id)

    kept = count - min(512, count // 5)  # the rest measures the result
    batches = make_batches(lengths[:kept], rows, seed)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=lr / 4, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    once = {"total_steps": len(batches), "pct_start": 0.03, "cycle_momentum": False}
    cycle = torch.optim.lr_scheduler.OneCycleLR
    schedules = [cycle(o, o.param_groups[0]["lr"], **once) for o in optimizers]
    bar = tqdm(batches, desc="imitation", unit="batch")
    for batch in bar:
        loss, prompt_loss = losses_on(batch)
        model.zero_grad()
        (loss + prompt_loss).backward()  # the prompts teach copying names; responses need it
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", prompt_loss=f"{prompt_loss.item():.3f}")
    held_out = []
    with torch.no_grad():
        for i in range(kept, count, 64):
            loss, _ = losses_on(range(i, min(i + 64, count)))
            held_out.append(loss.item())
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
    parser.add_argument(
        "--knows", type=float, help="share of right appliances (0), or of options chosen (0.45)"
    )
    parser.add_argument(
        "--difficulties", type=int, nargs="+", help="shop: options of a product, in turns; 1 to 5"
    )
    parser.add_argument("--data", help="folder with json_2.1.1, to learn from its training games")
    parser.add_argument("--start", type=Path, default=None, help="policy to go on from")
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    try:
        train_policy(**vars(parser.parse_args()))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
