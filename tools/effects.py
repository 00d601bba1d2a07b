"""Were the verdicts right? The true effect of every skill of a run, measured with many episodes.

    python -m tools.effects --run tiny --episodes 60

For each skill of mine/ with at least N_eval evaluations, `--episodes` training items of its bucket
are played with the skill alone in the prompt and without any, by the policy that mining ended with.

| column   | meaning                                                                               |
|----------|---------------------------------------------------------------------------------------|
| u, n     | the utility that mining arrived at, after so many evaluations                         |
| effect   | success with the skill - without, on the same items, +- its standard error            |
| right    | share of its groups whose Delta_g had the sign of the effect (0 counts as no)         |

Below: how often a verdict was right, active with an effect above --active_above, or retired with
no more. Episodes are sampled at --temperature. The early groups were played by earlier policies.
"""

import math
import random
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

import envs
from config import Config, UserError, write_atomically
from evaluate import evaluate
from runtime import saves
from runtime.flags import check_name, known_flags
from runtime.policy import Policy, load_policy
from runtime.run import list_items, run_script, set_up
from skills import SkillBank


def items_of(bucket, config, items, count) -> list[str]:
    """`count` items of a bucket, drawn at random."""

    def is_of_it(item) -> bool:
        return envs.make_env(config.env, item, config.engine).reset().task_type == bucket

    return list(islice(filter(is_of_it, random.Random(0).sample(items, len(items))), count))


def successes(policy, config, items, skill=None) -> np.ndarray:
    """Play each item once, with the skill alone in the prompt or plain -> 0 or 1 for each."""
    config = replace(config, show="skill")
    bank = SkillBank(config, [replace(skill, status="active")]) if skill else None
    outcomes = evaluate(policy, config, items, config.temperature, seed=1, bank=bank)
    return np.array([outcome["success"] for outcome in outcomes], float)


def measure(config, folder, count) -> str:
    """The tables of a run's skills, and of its verdicts."""
    skills = SkillBank.load(folder, config).skills
    policy = Policy(*load_policy(folder / "model", config, set_up(config), trainable=False))
    items = list_items(config, config.split)
    lines = ["| status | u | n | effect | right | skill |", "|---|---|---|---|---|---|"]
    plain = {}  # bucket -> (items, success without a skill)
    verdicts = []
    groups = []
    for skill in (skill for skill in skills if skill.n >= config.n_eval):
        if skill.bucket not in plain:
            chosen = items_of(skill.bucket, config, items, count)
            plain[skill.bucket] = chosen, successes(policy, config, chosen)
        chosen, base = plain[skill.bucket]
        gains = successes(policy, config, chosen, skill) - base
        effect = gains.mean()
        error = gains.std(ddof=1) / math.sqrt(len(gains))
        right = [delta * effect > 0 for delta in skill.deltas]
        groups += right
        if skill.status != "candidate":
            verdicts.append((skill.status == "active") == (effect > config.active_above))
        cells = [skill.status, f"{skill.utility:+.2f}", str(skill.n)]
        cells += [f"{effect:+.2f} +- {error:.2f}", f"{np.mean(right):.2f}"]
        lines.append(f"| {' | '.join(cells)} | when {skill.condition}: {skill.strategy} |")
    lines += ["", f"verdicts right: {sum(verdicts)} of {len(verdicts)}"]
    lines += [f"groups whose Delta_g had the sign of the effect: {sum(groups)} of {len(groups)}"]
    return "\n".join(lines)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="tiny", help="name of a run that has mined")
    parser.add_argument("--episodes", type=int, default=60, help="with each skill, and without")
    args = parser.parse_args()
    check_name("run", args.run)
    if args.episodes < 2:
        raise UserError(f"--episodes {args.episodes}: must be 2 at least, for a standard error")
    root = Path("runs") / args.run
    folder = saves.find(root, "mine")
    if folder is None:
        raise UserError(f"{root}/mine is missing: run `python mine.py --run {args.run}` first")
    config = Config(**known_flags(folder / "config.json") | {"run": args.run})
    text = measure(config, folder, args.episodes)
    write_atomically(root / "effects.md", f"{text}\n")
    print(text)


if __name__ == "__main__":
    run_script(main)
