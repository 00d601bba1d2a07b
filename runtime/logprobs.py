"""The log-probs of a response by the training forward, without ever holding all its logits."""

import torch
from torch.utils.checkpoint import checkpoint

LOGITS = 2**27  # float32 logits held at once: 0.5 GB each of the five tensors of their backward


def token_logprobs(model, ids, response_mask, temperature=1.0, entropy=True):
    """Log-probs of the response tokens, and entropies there -> two [B, L], 0 outside the mask.

    logits[:, t] predict ids[:, t + 1], so the log-prob of token t comes from position t - 1. Only
    the N positions that predict a response token of their own row get logits, and of those no more
    than `chunk` rows of V are held at once: the backward pass makes them again. `entropy` False
    saves that part (zeros come back).
    """
    targets = ids[response_mask]  # [N]
    predicts = response_mask.roll(-1, 1)  # [B, L] position t - 1 predicts token t
    head = model.lm_head
    chunk = max(1, LOGITS // head.out_features)  # rows of V logits held at once

    def logprobs_of(hidden, target):  # [n, D], [n] -> [n, 2]: log-prob and entropy
        logits = torch.nn.Linear.forward(head, hidden)  # [n, V]
        log_p = (logits.float() / temperature).log_softmax(-1)  # [n, V]
        picked = log_p.gather(-1, target[:, None])[:, 0]  # [n]
        spread = -(log_p.exp() * log_p).sum(-1) if entropy else torch.zeros_like(picked)  # [n]
        return torch.stack([picked, spread], -1)

    def forward(hidden):  # in the place of lm_head: [B, L, D] -> [N, 2] instead of [B, L, V]
        hidden = hidden[predicts]  # [N, D]
        if len(targets) <= chunk:
            return logprobs_of(hidden, targets)
        parts = zip(hidden.split(chunk), targets.split(chunk))
        return torch.cat([checkpoint(logprobs_of, *part, use_reentrant=False) for part in parts])

    head.forward = forward  # inside the model's own forward, where FSDP has the weights together
    try:
        values = model(input_ids=ids, use_cache=False).logits  # [N, 2]
    finally:
        del head.forward
    filled = values.new_zeros(*ids.shape, 2)  # [B, L, 2]
    filled[response_mask] = values
    return filled.unbind(-1)
