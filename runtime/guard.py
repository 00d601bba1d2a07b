"""What keeps a long run alive and its weights clean.

A step whose loss or gradient is not finite is left out, on all ranks alike. A group whose world
raises an error is left out whole. Where it does not stop, the run does, with its last save intact.
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import envs
from config import UserError
from runtime import parallel

MOST = 3  # refused steps in a row


def is_finite(log, norm) -> bool:
    """Whether loss and gradient norm of a mini-batch, the same on all ranks, are numbers."""
    return math.isfinite(log["loss"]) and math.isfinite(norm)


def refuse(policy, batch, log, norm, config):
    """Count a step that is left out, and keep its rows for a look in runs/<run>/not-finite.pt.

    UserError after MOST in a row.
    """
    policy.refused += 1
    path = Path("runs") / config.run / "not-finite.pt"
    if parallel.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"loss": log["loss"], "grad_norm": norm, "rows": list(map(asdict, batch))}, path)
    print(f"loss {log['loss']}, gradient norm {norm}: step left out, its rows are in {path}")
    if policy.refused == MOST:
        raise UserError(
            f"{MOST} steps in a row had a loss or gradient that is not finite; the last save stays."
            f" Look at the rows in {path} (torch.load); begin the phase anew with a lower --lr, or "
            "fork it"
        )


def attempt(episode, call, *arguments):
    """call(*arguments), a call into the episode's world; None where it raises, and why is kept."""
    try:
        return call(*arguments)
    except Exception as error:  # a world can fail in any way, and must not end the run
        episode.failure = f"{type(error).__name__}: {error}".split("\n")[0]
        return None


def open_games(episodes, config) -> tuple:
    """(games, first observations), None for both where an episode has failed."""
    games = []
    observations = []
    for episode in episodes:
        game = attempt(episode, envs.make_env, config.env, episode.item, config.played_by)
        obs = attempt(episode, game.reset) if game else None
        if obs:
            episode.task = obs.task
            episode.task_type = obs.task_type
        games.append(game)
        observations.append(obs)
    return games, observations


def first_observation(config, item):
    """Of an item; None where it cannot be opened, which its rollout will say."""
    try:
        return envs.make_env(config.env, item, config.played_by).reset()
    except Exception:
        return None


def without_failures(episodes) -> list:
    """The episodes of the groups of which none failed. UserError if that is less than half."""
    failed = {e.group: e for e in reversed(episodes) if e.failure}  # group: its first failure
    for episode in failed.values():
        tqdm.write(f"group left out: {episode.item}: {episode.failure}")
    groups = {e.group for e in episodes}
    if 2 * len(failed) > len(groups):
        example = next(iter(failed.values()))
        raise UserError(
            f"{len(failed)} of {len(groups)} groups could not be played; the last was "
            f"{example.item}: {example.failure}. Mend or remove these items, then the same command "
            "goes on"
        )
    return [e for e in episodes if e.group not in failed]
