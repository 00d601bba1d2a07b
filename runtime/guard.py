"""What keeps a long run alive and its weights clean.

A step whose loss or gradient is not finite is left out, on all ranks alike, and a group whose world
raises an error. Where it does not stop, the run does, with its last save intact.
"""

import math
import re
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from config import UserError
from runtime import parallel, saves

MOST = 3  # refused steps in a row


def is_out_of_memory(error) -> bool:
    """Of a card or of the machine: without a card PyTorch has no exception of its own for it."""
    said = isinstance(error, RuntimeError) and re.search(
        "out of memory|allocate memory", str(error)
    )
    return isinstance(error, MemoryError) or bool(said)


def is_finite(policy, rows, log, config) -> bool:
    """Whether loss and gradient norm of a mini-batch, alike on all ranks, are numbers. If not, its
    rows are kept in runs/<run>/not-finite.pt; UserError after MOST in a row.
    """
    if math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"]):
        policy.refused = 0
        return True
    policy.refused += 1
    path = Path("runs") / config.run / "not-finite.pt"
    if parallel.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        saves.write_tensors({**log, "rows": list(map(asdict, rows))}, path)
    values = f"loss {log['loss']}, gradient norm {log['grad_norm']}"
    print(f"{values}: step left out, its rows are in {path}")
    if policy.refused == MOST:
        raise UserError(
            f"{MOST} steps in a row had a loss or gradient that is not finite; the last save stays."
            f" See the rows in {path} (torch.load); begin the phase anew with a lower --lr"
        )
    return False


def without_failures(episodes) -> list:
    """The episodes of the groups of which none failed. UserError if that is less than half."""
    failed = {e.group: e for e in reversed(episodes) if e.failure}  # group: its first failure
    for episode in failed.values():
        tqdm.write(f"group left out: {episode.item}: {episode.failure}")
    groups = {e.group for e in episodes}
    if 2 * len(failed) > len(groups):
        raise UserError(
            f"{len(failed)} of {len(groups)} groups could not be played, such as {episode.item}: "
            f"{episode.failure}. Fix or remove these items, then the same command goes on"
        )
    return [e for e in episodes if e.group not in failed]
