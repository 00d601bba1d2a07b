"""A tokenizer and a small Qwen2 with random weights: how `tiny/imitate.py` begins from nothing."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import envs

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts, world="alfworld", short=False):
    """A byte-level BPE over words, numbers and punctuation; any text round-trips exactly.

    A space goes with the word behind it, in the shop with the word before it: there an option has
    to be the same token in the task (`color: red,`), on the page (`'red'`) and in `click[red]`.
    `short` has one token for a fixed sentence, or for what stands between two actions or parts of
    a page: the prompts of real data are long.
    """
    tokenizer = Tokenizer(models.BPE())
    chunks = r" ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9]+?(?= ?[A-Za-z0-9]|$)"
    between = r"'\n'go to|"
    size = 1024  # real rooms have more kinds of things
    if world == "webshop":
        chunks = r"[A-Za-z]+ ?|[0-9]+ ?|[^A-Za-z0-9]+?(?=[A-Za-z0-9]|$)"
        between = r"'\n'click\[|' \[SEP\] '|"
        size = 2048  # and titles more words
    if short:
        chunks = between + chunks
    split = pre_tokenizers.Split(Regex(chunks), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size if short else 896,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    whole = ["<think>", "</think>", "<action>", "</action>"]
    if short:
        whole += [envs.world(world).ROLE, "Your task is to:"]
        whole += ["The latest observations and your actions:", envs.INSTRUCTION]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


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
