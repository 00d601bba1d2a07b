"""What the phases log of their episodes; the glossary is docs/reference.md."""

from collections import defaultdict

import numpy as np


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
