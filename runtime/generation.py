"""Sampling from a Qwen2 (or Llama, Qwen3) in plain PyTorch: one forward over a preallocated cache.

`generate` samples what `model.generate` would, with the modules of the same model. It is faster
since

- equal prompts are read once, in chunks of similar length, padded on the right and without a mask
  (the fast attention kernel); the last layer computes the last position only;
- the KV cache is written in place, and key heads are not repeated for their query heads (GQA);
- rows that have ended leave the batch, whose size halves each time half of it has ended;
- on a GPU sampling waits for nothing, and the decode step is replayed as a CUDA graph.

Shapes: B rows, T new tokens, S cached tokens, D hidden size, V vocabulary.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

FAMILIES = ("qwen2", "qwen3", "llama")  # what `forward` is the forward of
CHUNK = 4096  # tokens of a prefill chunk: fits the caches of a CPU, fills a GPU
CUT = "\ud800"  # half of a surrogate pair: no text has it
BUCKET = 64  # the cache is read up to a multiple of this length, so that few shapes occur


def encode_prompts(tokenizer, prompts) -> list:
    """User messages -> token ids of the chat prompt, ready for the assistant's turn.

    Only the template makes control tokens. A message that spells one, such as <|im_end|>, is cut
    inside the spelling, and the parts are encoded on their own: it stays ordinary text.
    """
    if not prompts:
        return []
    for word in control_tokens(tokenizer):
        spelled = re.compile(f"(?<={re.escape(word[0])}){re.escape(word[1:])}", re.I)
        prompts = [spelled.sub(lambda found: CUT + found[0], prompt) for prompt in prompts]
    parts = [text.split(CUT) for text in render(tokenizer, prompts)]
    flat = [part.encode(errors="replace").decode() for x in parts for part in x]
    ids = iter(tokenizer(flat, add_special_tokens=False).input_ids)
    return [[token for _ in x for token in next(ids)] for x in parts]


def render(tokenizer, prompts, answer=None, start=True) -> list[str]:
    """User messages -> the chat as the template writes it, with an assistant's `answer`, or with
    the `start` of one.
    """
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    if answer is not None:
        chats = [[*chat, {"role": "assistant", "content": answer}] for chat in chats]
    options = {"tokenize": False, "add_generation_prompt": start and answer is None}
    options["date_string"] = "26 Jul 2024"  # Llama 3.2's own; else its prompts change every day
    return tokenizer.apply_chat_template(chats, **options)


def control_tokens(tokenizer) -> dict[str, int]:
    """Spelling -> id of the special tokens, and of what else the template writes as one token; not
    the tags, which a prompt may name.
    """
    (written,) = render(tokenizer, [CUT], answer=CUT)
    found = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        word = token.content
        if (token.special or word in written) and not re.fullmatch("</?(think|action)>", word):
            found[word] = token_id
    return found


def opening(tokenizer) -> str:
    """What the template itself writes of a response: <think> in many reasoning models, or a thought
    that is empty; nothing in others.
    """
    (before,), (whole,) = (render(tokenizer, [CUT], start=start) for start in (False, True))
    written = whole[len(before) :] if whole.startswith(before) else ""
    found = re.search("<(think|action)>.*", written, re.S)
    return found[0] if found else ""


def eos_ids(model, tokenizer) -> list:
    """Every token that ends a response: the model's, the tokenizer's (Qwen2.5-Instruct has two),
    and what the template writes after an assistant's message, which base models do not name.
    """
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    (text,) = render(tokenizer, ["hello"], answer=CUT)
    after = tokenizer(text.rpartition(CUT)[2], add_special_tokens=False).input_ids
    control = control_tokens(tokenizer).values()
    written = next((token for token in after if token in control), None)
    return sorted({*ids, tokenizer.eos_token_id, written} - {None})


class Cache:
    """Keys and values of at most `rows` sequences of `length` tokens; drop it to free the memory.

    keys, values   per layer [rows, length, KV heads, head size]
    graphs         captured decode steps, by shape (on a GPU, unless `graphs` is False)
    """

    def __init__(self, model, rows, length, graphs=True):
        shape = model.config
        weight = model.lm_head.weight
        head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        size = (shape.num_hidden_layers, rows, length, shape.num_key_value_heads, head)
        self.keys = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.rows = rows
        self.length = length
        self.graphs = {}
        # graphs run one at a time and start from their inputs, so they may share their memory
        self.pool = torch.cuda.graph_pool_handle() if graphs and weight.is_cuda else None

    def move(self, sources, targets):
        """Copy rows `sources` onto rows `targets`, in all layers."""
        for tensor in (self.keys, self.values):
            for layer in tensor:
                layer[targets] = layer[sources]


def rotate(x, cos, sin):
    """Rotary positions: x [B, T, heads, head size], cos and sin [B, T, 1, head size]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def forward(model, ids, rows, positions, cache, visible=None):
    """Read tokens into rows of the cache -> logits [B, V] after the last of each row.

    | argument  | shape            | meaning                                                       |
    |-----------|------------------|---------------------------------------------------------------|
    | ids       | [B, T]           | whole prompts, right-padded; or T = 1, one further token each |
    | rows      | [B]              | the row of the cache that each sequence owns                  |
    | positions | [B]              | of the last token: prompt length - 1, or where it is written  |
    | visible   | int, T = 1 only  | cached tokens to read; those after `positions` are masked     |

    What the padding writes lies after `positions` and is overwritten before it can be seen.
    """
    decoder = model.model
    B, T = ids.shape
    prompt = visible is None
    at = torch.arange(T, device=ids.device).expand(B, T) if prompt else positions[:, None]  # [B, T]
    x = decoder.embed_tokens(ids)  # [B, T, D]
    cos, sin = (table[:, :, None] for table in decoder.rotary_emb(x, at))
    if not prompt:
        mask = torch.arange(visible, device=ids.device) <= at  # [B, S]
    for layer, keys, values in zip(decoder.layers, cache.keys, cache.values, strict=True):
        attention = layer.self_attn
        h = layer.input_layernorm(x)  # [B, T, D]
        size = (B, T, -1, keys.shape[-1])
        q, k, v = (f(h).view(size) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):  # Qwen3
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # [B, T, heads, head size]
        keys[rows[:, None], at] = k
        values[rows[:, None], at] = v
        if prompt:
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # [B, heads, T, head size]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            y = y.transpose(1, 2).reshape(B, T, -1)
            if layer is decoder.layers[-1]:  # nothing reads the other positions any more
                every = torch.arange(B, device=ids.device)
                x = x[every, positions][:, None]  # [B, 1, D]
                y = y[every, positions][:, None]
        else:
            # the query heads of one key head stand where positions would: nothing is repeated
            q = q.view(B, keys.shape[2], -1, keys.shape[3])  # [B, KV heads, queries, head size]
            k, v = (z[:B, :visible].transpose(1, 2) for z in (keys, values))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
            y = y.reshape(B, 1, -1)
        x = x + attention.o_proj(y)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))[:, -1]


def sample(logits, uniform, temperature):
    """Logits [B, V] and a uniform number [B] each -> (tokens [B], their logprobs [B]).

    The token whose stretch of the cumulated probabilities the number falls into; the likeliest at
    temperature 0, with its log-prob under the untempered distribution.
    """
    scores = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [B, V]
    if temperature == 0:
        token = scores.argmax(-1)
    else:
        cumulated = scores.exp().cumsum(-1)
        token = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(-1)
        token = token.clamp(max=scores.shape[1] - 1)
    return token, scores.gather(1, token[:, None])[:, 0]


def read_prompts(model, prompts, cache):
    """Prompts (token ids, sorted by length) -> logits [B, V]; row i of the cache holds prompt i."""
    device = cache.keys.device
    owner = {}  # prompt -> the row that reads it, for all that are equal
    for row, prompt in enumerate(prompts):
        owner.setdefault(tuple(prompt), row)
    chunks = [[]]
    for prompt in owner:
        if chunks[-1] and (len(chunks[-1]) + 1) * len(prompt) > CHUNK:
            chunks.append([])
        chunks[-1].append(prompt)
    logits = {}  # prompt -> [V]
    for chunk in chunks:
        ids = pad_sequence([torch.tensor(prompt) for prompt in chunk], batch_first=True)
        last = torch.tensor([len(prompt) - 1 for prompt in chunk], device=device)
        rows = torch.tensor([owner[prompt] for prompt in chunk], device=device)
        logits |= zip(chunk, forward(model, ids.to(device), rows, last, cache), strict=True)
    owners = [owner[tuple(prompt)] for prompt in prompts]
    copies = [row for row, first in enumerate(owners) if row != first]
    if copies:
        cache.move([owners[row] for row in copies], copies)
    return torch.stack([logits[tuple(prompt)] for prompt in prompts])


def replay(cache, step, *inputs, **shape):
    """step(*inputs, **shape) as a CUDA graph; eager on a CPU, and after a capture has failed."""
    key = (len(inputs[0]), *shape.values())
    if cache.pool is not None and key not in cache.graphs:
        try:
            cache.graphs[key] = capture(cache.pool, step, inputs, shape)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            print(f"decoding without CUDA graphs: the capture failed ({reason})")
            cache.pool = None
    if cache.pool is None:
        return step(*inputs, **shape)
    graph, fixed, outputs = cache.graphs[key]
    for old, new in zip(fixed, inputs, strict=True):
        old.copy_(new)
    graph.replay()
    return [x.clone() for x in outputs]


def capture(pool, step, inputs, shape) -> tuple:
    """(graph, the tensors it reads, the tensors it writes) of one step."""
    fixed = [x.clone() for x in inputs]
    side = torch.cuda.Stream()  # libraries set themselves up in a first run, off the record
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*fixed, **shape)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = step(*fixed, **shape)
    return graph, fixed, outputs


def sample_batch(model, prompts, uniform, ends, cache, *, temperature, stop):
    """Decode the prompts (sorted by length) together -> tokens, logprobs [B, max_new_tokens], by as
    many random numbers `uniform`. `ends` are the ids that end a response.
    """
    device = uniform.device
    B, new = uniform.shape
    tokens, logprobs = torch.zeros_like(uniform, dtype=torch.long), torch.zeros_like(uniform)
    where = torch.tensor([len(prompt) for prompt in prompts], device=device)  # next position
    logits = read_prompts(model, prompts, cache)
    token, logprob = sample(logits, uniform[:, 0], temperature)
    slots = torch.arange(B, device=device)  # the response that each row of the cache belongs to
    done = torch.zeros(B, dtype=torch.bool, device=device)

    def step(token, where, u, visible, temperature):
        rows = torch.arange(len(token), device=device)
        logits = forward(model, token[:, None], rows, where, cache, visible)
        return sample(logits, u, temperature)

    longest = len(prompts[-1])
    for t in range(new):
        if t:
            visible = min(cache.length, BUCKET * math.ceil((longest + t) / BUCKET))
            how = {"visible": visible, "temperature": temperature}  # a graph for each
            token, logprob = replay(cache, step, token, where, uniform[slots, t], **how)
            where = where + 1
        tokens[slots, t] = token
        logprobs[slots, t] = logprob
        done = done | torch.isin(token, ends)
        if stop and (device.type == "cpu" or t % 8 == 7):  # a look waits for the GPU
            alive = len(done) - int(done.sum())
            if alive == 0:
                break
            if alive <= len(done) // 2:  # those still running, and ended ones to fill up
                keep = done.int().argsort(stable=True)[: len(done) // 2]
                cache.move(keep, slice(len(keep)))
                slots, done, token, where = (x[keep] for x in (slots, done, token, where))
    return tokens, logprobs


def response_lengths(tokens, ends):
    """Tokens [B, T] -> how many come up to the first end, that one included, or T; [B]."""
    is_end = torch.isin(tokens, ends)
    return torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])


@torch.no_grad()
def generate(
    model, tokenizer, prompts, *, max_new_tokens, temperature, seed, rows=128, stop=True, cache=None
) -> list:
    """Sample one response for each prompt -> [(token ids, logprobs, text)], in their order.

    prompts   token ids of chat prompts, or user messages as text
    rows      decoded together; the samples do not depend on it
    stop      False: go on to the full length, to measure speed
    cache     a Cache to use again, `rows` rows and long enough; by default one is made and dropped
    ids       the sampled tokens, the ending EOS included
    logprobs  theirs under the sampling distribution; see `sample` for temperature 0
    """
    if prompts and isinstance(prompts[0], str):
        prompts = encode_prompts(tokenizer, prompts)
    device = model.device
    ends = torch.tensor(eos_ids(model, tokenizer), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator, device=device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if prompts and cache is None:
        longest = len(prompts[order[-1]]) + max_new_tokens
        cache = Cache(model, min(rows, len(prompts)), longest)
    results = [None] * len(prompts)
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        if device.type == "cuda":  # few batch sizes, so few graphs: a row again, to fill up
            size = cache.rows
            while size // 2 >= len(batch):
                size //= 2
            batch = batch + batch[-1:] * (size - len(batch))
        chosen = [prompts[i] for i in batch]
        how = {"temperature": temperature, "stop": stop}
        tokens, logprobs = sample_batch(model, chosen, uniform[batch], ends, cache, **how)
        answers = (response_lengths(tokens, ends).tolist(), tokens.tolist(), logprobs.tolist())
        for i, n, row, values in zip(batch, *answers, strict=True):
            text = tokenizer.decode(row[:n], skip_special_tokens=True)
            results[i] = (row[:n], values[:n], text)
    return results
