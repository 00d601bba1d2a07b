"""The log-probs of a response by the training forward, without ever holding all its logits."""

from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from runtime.batches import collate

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
        log_p = tempered(logits, temperature)  # [n, V]
        picked = log_p.gather(-1, target[:, None])[:, 0]  # [n]
        spread = -(log_p.exp() * log_p).sum(-1) if entropy else torch.zeros_like(picked)  # [n]
        return torch.stack([picked, spread], -1)

    def forward(hidden):  # in the place of lm_head: [B, L, D] -> [N, 2] instead of [B, L, V]
        hidden = hidden[predicts]  # [N, D]
        if len(targets) <= chunk:
            return logprobs_of(hidden, targets)
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([checkpoint(logprobs_of, *part, use_reentrant=False) for part in parts])

    head.forward = forward  # inside the model's own forward, where FSDP has the weights together
    try:
        values = model(input_ids=ids, use_cache=False).logits  # [N, 2]
    finally:
        del head.forward
    filled = values.new_zeros(*ids.shape, 2)  # [B, L, 2]
    filled[response_mask] = values
    return filled.unbind(-1)


def expected_logprobs(model, rows, t, temperature, pad_id):
    """E_v [log pi(v | plain prompt, y_<)] for v ~ pi(. | skill prompt, y_<), the latter without
    gradient, at the action tokens of the internalization rows -> [B, L], 0 elsewhere.

    In the place of log pi(y | x_t, y_<) in L_int its gradient is that of the KL divergence from the
    skill-prompted to the plain distribution. Holds all V logits of those tokens.
    """
    mask = t["action_mask"]  # [B, L]
    skilled = [replace(row, prompt_ids=row.skill_ids or row.prompt_ids) for row in rows]
    with torch.no_grad():
        s = collate(skilled, pad_id, model.device)
        teacher = log_distributions(model, s["ids"], s["action_mask"], temperature)  # [N, V]
    student = log_distributions(model, t["ids"], mask, temperature)  # [N, V]
    filled = student.new_zeros(mask.shape)  # [B, L]
    filled[mask] = (teacher.exp() * student).sum(-1)
    return filled


def log_distributions(model, ids, mask, temperature):
    """Log-probs of every token of the vocabulary in the place of each token of `mask` -> [N, V]."""
    predicts = mask.roll(-1, 1)  # [B, L]
    head = model.lm_head
    head.forward = lambda hidden: torch.nn.Linear.forward(head, hidden[predicts])
    try:
        logits = model(input_ids=ids, use_cache=False).logits  # [N, V]
    finally:
        del head.forward
    return tempered(logits, temperature)


def tempered(logits, temperature):
    """Logits -> log-probs at a temperature, in float32."""
    return (logits.float() / temperature).log_softmax(-1)
