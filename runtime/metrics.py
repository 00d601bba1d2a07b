"""What the phases log of their episodes; the glossary is docs/reference.md."""

from collections import defaultdict

import numpy as np

GAP = {"float32": 1e-3, "bfloat16": 0.1}  # nats a token, more than rounding makes of it
NO_ADVANTAGE = 1e-8  # a step with no more than this is not trained
FLAT = 3  # iterations in a row without contrast, after which a line says so


def mean(values) -> float:
    return float(np.mean(values))


def success_rate(episodes) -> float | None:
    return mean([e.success for e in episodes]) if episodes else None


def rollout_metrics(episodes, advantages, config, deltas=None) -> dict:
    """What every phase logs of its episodes; success_plain and success_skill are of the halves."""
    steps = [s for e in episodes for s in e.steps]
    lengths = [len(s.response_ids) for s in steps]
    groups = defaultdict(list)
    types = defaultdict(list)
    for e in episodes:
        groups[e.group].append(e.success)
        types[e.task_type].append(e)
    lost = sum(
        len(s.response_ids)
        for e, own in zip(episodes, advantages, strict=True)
        for s, advantage in zip(e.steps, own, strict=True)
        if abs(advantage) <= NO_ADVANTAGE
    )
    metrics = {
        "episodes": len(episodes),
        "groups": len(groups),
        "success": success_rate(episodes),
        "success_plain": success_rate([e for e in episodes if not e.skills]),
        "success_skill": success_rate([e for e in episodes if e.skills]),
        "success_by_type": {name: success_rate(chosen) for name, chosen in sorted(types.items())},
        "no_contrast": mean([len(set(results)) == 1 for results in groups.values()]),
        "advantage_p95": float(np.percentile(np.abs(np.concatenate(advantages)), 95)),
        "steps": mean([len(e.steps) for e in episodes]),
        "invalid": mean([not s.valid for s in steps]),
        "cut": mean([n == config.max_response_tokens for n in lengths]),
        "prompt_tokens": mean([len(s.prompt_ids) for s in steps]),
        "response_tokens": mean(lengths),
        "sampled_tokens": sum(lengths),
        "taught_nothing": float(lost / sum(lengths)),
    }
    if deltas is not None:
        metrics["delta"] = mean(list(deltas.values())) if deltas else None
        metrics["paired_groups"] = len(deltas)
    return metrics


def halves(metrics) -> str:
    """The success of both halves and their mean difference, for the summary line."""
    values = [metrics[name] for name in ("success_plain", "success_skill", "delta")]
    plain, skill, delta = ("  - " if value is None else f"{value:.2f}" for value in values)
    return (
        f"success plain {plain} skill {skill}  delta {delta} in {metrics['paired_groups']} groups"
    )


def warnings(metrics, config, flat, first) -> list[str]:
    """What a user should know of an iteration at once, a line each.

    flat    so many iterations in a row, this one included, had mostly groups without contrast
    first   whether it is the first iteration of this process
    """
    lines = []
    if metrics["cut"] == 1:
        lines.append(
            f"no response ended by itself, all were cut after {config.max_response_tokens} tokens: "
            "raise --max_response_tokens, or look at the chat template and eos_token of --model"
        )
    gap = metrics.get("logprob_gap", 0.0)
    if first and not gap <= GAP[config.dtype]:
        lines.append(
            f"sampler and trainer differ by {gap:.2g} nats a token, which is no rounding: look for "
            "what config.json of --model has and runtime/generation.py does not compute"
        )
    if flat == FLAT:
        lines.append(
            f"for {FLAT} iterations most groups had no contrast, all solved or none, and taught "
            "nothing: try easier tasks, a larger --group_size, a longer warm-up, or skills"
        )
    return lines
