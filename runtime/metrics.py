"""What the phases log of their episodes; the glossary is docs/metrics.md."""

import numpy as np


def success_rate(episodes):
    return float(np.mean([e.success for e in episodes])) if episodes else None


def rollout_metrics(episodes, deltas=None) -> dict:
    """What every phase logs of its episodes; success_plain and success_skill are the two arms."""
    steps = [s for e in episodes for s in e.steps]
    metrics = {
        "episodes": len(episodes),
        "success": success_rate(episodes),
        "success_plain": success_rate([e for e in episodes if not e.skills]),
        "success_skill": success_rate([e for e in episodes if e.skills]),
        "steps": float(np.mean([len(e.steps) for e in episodes])),
        "invalid": float(np.mean([not s.valid for s in steps])),
        "prompt_tokens": float(np.mean([len(s.prompt_ids) for s in steps])),
        "response_tokens": float(np.mean([len(s.response_ids) for s in steps])),
    }
    if deltas is not None:
        metrics["delta"] = float(np.mean(list(deltas.values()))) if deltas else None
        metrics["paired_groups"] = len(deltas)
    return metrics


def arms(metrics) -> str:
    """The success of both arms and their mean difference, for the summary line."""
    names = ("success_plain", "success_skill", "delta")
    shown = ["  - " if metrics[name] is None else f"{metrics[name]:.2f}" for name in names]
    plain, skill, delta = shown
    groups = metrics["paired_groups"]
    return f"success plain {plain} skill {skill}  delta {delta} in {groups} groups"
