"""Were the verdicts right? The true effect of every skill of a run, measured with many episodes.

    python -m tools.effects --run tiny --episodes 60

For each skill of mine/ that was evaluated at least N_eval times, `--episodes` training items of its
bucket are played with the skill alone in the prompt and without any, by the policy that mining
ended with, at the training temperature. Prints, and writes to runs/<run>/effects.md:

| column   | meaning                                                                               |
|----------|---------------------------------------------------------------------------------------|
| u, n     | the utility that mining arrived at, after so many evaluations                         |
| effect   | success with the skill - without, on the same items, +- its standard error            |
| right    | share of its groups whose Delta_g had the sign of the effect (0 counts as no)         |

and how often a verdict was right: active with an effect above --active_above, or retired with none.
The policy of mine/ is not the one the early groups were played with; its effect is what the skill
can still do when phase 2 begins.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

import envs
from common import open_groups, rollout
from config import Config, UserError, write_atomically
from runtime import saves
from runtime.flags import known_flags
from runtime.policy import Policy, load_policy
from runtime.run import list_items, run_script, set_up
from skills import SkillBank


def items_of_buckets(config, buckets, count) -> dict:
    """bucket -> `count` training items of it, spread over the split."""
    found = {bucket: [] for bucket in buckets}
    items = list_items(config, config.split)
    step = max(1, len(items) // 997)
    for start in range(step):
        for item in items[start::step]:
            bucket = envs.make_env(config.env, item, config.engine).reset().task_type
            if bucket in found and len(found[bucket]) < count:
                found[bucket].append(item)
            if all(len(chosen) == count for chosen in found.values()):
                return found
    return found


def successes(policy, config, items, skills) -> np.ndarray:
    """Play each item once -> 0 or 1 for each."""
    groups = open_groups(items, config, members=1)
    for (episode,) in groups:
        episode.skills = skills
        episode.shown = [(skill.condition, skill.strategy) for skill in skills]
    episodes = rollout(policy, config, groups, seed=1, desc="effects")
    if len(episodes) < len(items):  # or success with and without would be of different items
        raise UserError("some items cannot be played, see above; fix or remove them")
    return np.array([episode.success for episode in episodes], float)


def verdict_is_right(skill, effect, config):
    """Whether an active skill helps and a retired one does not; None for a candidate. A skill that
    a full bucket retired counts as retired.
    """
    if skill.status == "candidate":
        return None
    return (skill.status == "active") == (effect > config.active_above)


def measure(config, folder, count) -> str:
    bank = SkillBank.load(folder, config)
    device = set_up(config)
    policy = Policy(*load_policy(folder / "model", config, device, trainable=False))
    tried = [skill for skill in bank.skills if skill.n >= config.n_eval]
    items = items_of_buckets(config, {skill.bucket for skill in tried}, count)
    plain = {bucket: successes(policy, config, chosen, []) for bucket, chosen in items.items()}
    lines = ["| status | u | n | effect | right | skill |", "|---|---|---|---|---|---|"]
    verdicts = []
    groups = []
    for skill in tried:
        base = plain[skill.bucket]
        guided = successes(policy, config, items[skill.bucket], [skill])
        effect = guided.mean() - base.mean()
        error = (guided - base).std(ddof=1) / math.sqrt(len(base))
        right = [delta * effect > 0 for delta in skill.deltas]
        groups += right
        verdicts.append(verdict_is_right(skill, effect, config))
        cells = [skill.status, f"{skill.utility:+.2f}", str(skill.n)]
        cells += [f"{effect:+.2f} +- {error:.2f}", f"{np.mean(right):.2f}"]
        lines.append(f"| {' | '.join(cells)} | when {skill.condition}: {skill.strategy} |")
    final = [verdict for verdict in verdicts if verdict is not None]
    lines += ["", f"verdicts right: {sum(final)} of {len(final)}; groups whose Delta_g had the "]
    lines[-1] += f"sign of the effect: {sum(groups)} of {len(groups)}"
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="tiny", help="name of a run that has mined")
    parser.add_argument(
        "--episodes", type=int, default=60, help="items, each with the skill and without"
    )
    args = parser.parse_args()
    root = Path("runs") / args.run
    folder = saves.find(root, "mine")
    if folder is None:
        raise UserError(f"{root}/mine is missing: run `python mine.py --run {args.run}` first")
    config = Config(**known_flags(folder / "config.json") | {"run": args.run})
    text = measure(config, folder, args.episodes)
    words = " ".join(sys.argv[1:])
    write_atomically(root / "effects.md", f"`python -m tools.effects {words}`\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    run_script(main)
