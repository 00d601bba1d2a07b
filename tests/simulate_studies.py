"""How often the 95% intervals hold the truth, in simulated studies: the table of results/README.md.

    python -m tests.simulate_studies      # writes it; ten seconds

A simulated seed has two variants. Its chance of success is logistic(base + seed + own + gain): the
`seed` part is shared by its variants and drawn with a standard deviation of 0.5, the `own` part of
each with 0.3, and `gain` is 0.5 for the second variant. Either is evaluated on 120 items. The truth
is the difference of the two chances, averaged over all seeds there could be.
"""

import numpy as np

from evaluate import wilson
from tools import study

STUDIES = 2000
ITEMS = 120
SHARED, OWN, GAIN = 0.5, 0.3, 0.5  # logits
RATES = (0.05, 0.5, 0.95)  # success of the first variant at its middle seed
SEEDS = (5, 10)


def logistic(x):
    return 1 / (1 + np.exp(-x))


def simulate(rng, seeds, rate, gain=GAIN) -> np.ndarray:
    """Items solved of ITEMS -> [STUDIES, seeds, 2 variants]."""
    logits = np.log(rate / (1 - rate)) + rng.normal(0, SHARED, (STUDIES, seeds, 1))
    logits = logits + rng.normal(0, OWN, (STUDIES, seeds, 2)) + np.array([0, gain])
    return rng.binomial(ITEMS, logistic(logits))


def true_difference(rate, gain=GAIN) -> float:
    """Mean over all seeds, by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    logits = np.log(rate / (1 - rate)) + np.hypot(SHARED, OWN) * points
    gains = logistic(logits + gain) - logistic(logits)
    return float(gains @ weights / weights.sum())


def covered(differences, truth) -> float:
    """Share of the studies [STUDIES, seeds] whose interval holds the truth."""
    bounds = [study.interval(values) for values in differences]
    return float(np.mean([low <= truth <= high for low, high in bounds]))


def coverage() -> list[list[str]]:
    """The lines of the table."""
    rng = np.random.default_rng(0)
    lines = []
    for rate in RATES:
        line = [f"{rate:g}"]
        for seeds in SEEDS:
            solved = simulate(rng, seeds, rate)
            line.append(covered(np.diff(solved)[..., 0] / ITEMS, true_difference(rate)))
        # two studies of five seeds pooled; in the second the gain is twice as large
        gains = (GAIN, 2 * GAIN)
        parts = [np.diff(simulate(rng, 5, rate, gain))[..., 0] / ITEMS for gain in gains]
        truth = np.mean([true_difference(rate, gain) for gain in gains])
        line.append(covered(np.concatenate(parts, 1), truth))
        bounds = [wilson(int(solved), ITEMS) for solved in rng.binomial(ITEMS, rate, STUDIES)]
        line.append(float(np.mean([low <= rate <= high for low, high in bounds])))
        lines.append([line[0], *(f"{share:.1%}" for share in line[1:])])
    return lines


def table() -> str:
    head = ["success", *(f"{n} seeds, paired" for n in SEEDS), "5 + 5 pooled", "Wilson, 120 items"]
    return study.piped([head, ["---"] * len(head), *coverage()])


if __name__ == "__main__":
    study.replace_block(study.ROOT / "results" / "README.md", "coverage", table())
