"""Training rows, and how they become padded batches on one GPU or several."""

import random
from dataclasses import dataclass, field

import torch

from runtime import parallel


@dataclass
class Row:
    """A training row: an RL row trains its response, an internalization row its action tokens."""

    prompt_ids: list
    response_ids: list
    advantage: float
    rollout_logprobs: list
    internalize: bool = False  # prompt_ids is x_t of a step of the skill arm; only L_int applies
    delta: float = 0.0  # Delta_g
    action_mask: list = field(default_factory=list)  # per response token
    skill_ids: list = field(default_factory=list)  # xs_t, where --internalize_loss kl reads it
    rank: int = 0  # of the process that trains it
    old_logprobs: torch.Tensor | None = None  # filled by `update`, per response token
    ref_logprobs: torch.Tensor | None = None

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)


def collate(rows, pad_id, device) -> dict:
    """Rows -> right-padded tensors [B, L] and per-row tensors [B]."""
    shape = (len(rows), max(map(len, rows)))
    batch = {
        "ids": torch.full(shape, pad_id),
        "response_mask": torch.zeros(shape, dtype=torch.bool),
        "action_mask": torch.zeros(shape, dtype=torch.bool),
        "old_logprobs": torch.zeros(shape),
        "ref_logprobs": torch.zeros(shape),
        "advantages": torch.tensor([row.advantage for row in rows]),
        "delta": torch.tensor([row.delta for row in rows]),
        "internalize": torch.tensor([row.internalize for row in rows]),
    }
    for i, row in enumerate(rows):
        span = slice(len(row.prompt_ids), len(row))
        batch["ids"][i, : len(row)] = torch.tensor(row.prompt_ids + row.response_ids)
        batch["response_mask"][i, span] = True  # EOS included: the policy must learn to stop
        if row.internalize:
            batch["action_mask"][i, span] = torch.tensor(row.action_mask)
        for name in ("old_logprobs", "ref_logprobs"):
            if getattr(row, name) is not None:
                batch[name][i, span] = getattr(row, name)
    return {name: value.to(device) for name, value in batch.items()}


def make_batches(rows, config, seed) -> list:
    """Rows -> mini-batches, shuffled: RL and internalization rows together, so both act in every
    step. How many and which RL rows each has follows from the RL rows alone: runs with and without
    internalization take the same steps.
    """
    kinds = [[row for row in rows if row.internalize == kind] for kind in (False, True)]
    count = max(1, round(len(kinds[0]) / config.minibatch_rows))
    batches = [[] for _ in range(count)]
    for kind in kinds:
        shuffled = random.Random(seed).sample(kind, len(kind))
        for n, batch in enumerate(batches):
            batch += shuffled[n * len(kind) // count : (n + 1) * len(kind) // count]
    for batch in batches:
        for i, row in enumerate(sorted(batch, key=len)):
            row.rank = i % parallel.world()
    return batches


NOTHING = Row([0], [0], 0.0, [0.0], internalize=True, action_mask=[False])  # without any weight


def micro_batches(rows, max_tokens) -> list:
    """This process's rows sorted by length and cut so that rows x longest row <= `max_tokens`, or
    one row.

    All processes get equally many, since they pass the model together; NOTHING fills up.
    """
    lists = [[] for _ in range(parallel.world())]
    for row in sorted(rows, key=len):
        batches = lists[row.rank]
        if not batches or (len(batches[-1]) + 1) * len(row) > max_tokens:
            batches.append([])
        batches[-1].append(row)
    own = lists[parallel.rank()]
    most = max(map(len, lists))
    return own + [[NOTHING]] * (most - len(own))
