"""Phase 1 of SIRI: the policy writes skills from its own successes, and each must prove itself.

    python mine.py                            # after warmup.py
    python mine.py --run slow --mine_every 3
    python mine.py --run control --fork tiny --without skills    # the control: GiGPO goes on

Reads   runs/<run>/warmup/
Writes  runs/<run>/mine/: model/, and skills.jsonl, every skill with its life
Next    python distill.py --run <run>

    for k = 1, 2, ...:                                                docs/method.md, section 3
        every I_mine iterations: the frozen current policy summarizes its own plain successes
            into (condition, strategy) pairs, the new candidates of the bank
        roll out each task in two halves: with the skills retrieved for it in the prompt, and plain
        Delta_g = success of the skill half - success of the plain half          method Eq. 8
        u_s <- (1 - alpha) u_s + alpha Delta_g;  candidate -> active -> retired  method Eq. 9
        A = A_E + w A_S, both halves one group; minimize L_GiGPO + beta L_KL - c_H H, each row
            under its own prompt
"""

import random
from collections import Counter, defaultdict

from common import (
    episode_advantages,
    open_groups,
    put_skills,
    rl_rows,
    rollout,
    sample_texts,
    update,
)
from envs import build_mining_prompt
from runtime.flags import parse_config
from runtime.metrics import halves, rollout_metrics
from runtime.miner import ask_endpoint
from runtime.policy import Policy, load_policy
from runtime.run import Run, run_script
from skills import SkillBank, group_deltas, parse_skill, plain_successes

MEMORY = 2048  # the newest plain successes that are kept for mining
NEWEST = 32  # of a task type, from which a round of mining draws


def mine(policy, config, bank, successes, k, seed) -> Counter:
    """A round of mining -> what became of each summary: "added", "unparsable", "duplicate", ..."""
    chosen = choose(successes, config.mine_episodes, seed)
    prompts = [summary_prompt(episode, bank, config) for episode in chosen]
    texts = write_summaries(prompts, policy, config, seed)
    outcome = Counter()
    for episode, text in zip(chosen, texts, strict=True):
        skill = parse_skill(text)
        outcome[bank.add(*skill, episode["task_type"], k) if skill else "unparsable"] += 1
    return outcome


def choose(successes, count, seed) -> list[dict]:
    """The episodes to summarize: task types take turns, each with its newest in random order."""
    by_type = defaultdict(list)
    for episode in reversed(successes):
        by_type[episode["task_type"]].append(episode)
    rng = random.Random(seed)
    pools = []
    for _, episodes in sorted(by_type.items()):
        newest = episodes[:NEWEST]
        pools.append(rng.sample(newest, len(newest)))
    chosen = []
    while len(chosen) < count and any(pools):
        chosen += [pool.pop() for pool in pools if pool]
    return chosen[:count]


def summary_prompt(episode, bank, config) -> str:
    """The request for a skill from one solved episode."""
    kind = episode["task_type"]
    known = [s.condition for s in bank.skills if s.bucket == kind and s.status == "active"]
    chars = config.mine_obs_chars
    return build_mining_prompt(episode["task"], kind, episode["steps"], known, chars, config.env)


def write_summaries(prompts, policy, config, seed) -> list[str]:
    """Prompts -> texts, by the current policy (nothing trains while it writes) or by --miner."""
    if config.miner.startswith(("http://", "https://")):
        return ask_endpoint(prompts, config, seed)
    if config.miner:  # another model, for this round
        policy = Policy(*load_policy(config.miner, config, policy.model.device, trainable=False))
    return sample_texts(policy, config, prompts, seed)


def main():
    config = parse_config("mine", __doc__)
    paired = "skills" not in config.without
    run = Run(config, "mine", after=None if "warmup" in config.without else "warmup", successes=[])
    policy = run.policy
    successes = run.state["successes"]
    bank = SkillBank.load(run.source, config) if run.resumed else SkillBank(config)
    print(f"mine: {len(successes)} successes to learn from, {len(bank.skills)} skills")

    for k in run.iterations():
        # 1. mining, by the policy as it is now
        mined = Counter()
        if paired and (k - 1) % config.mine_every == 0:
            mined = mine(policy, config, bank, successes, k, run.seed(k))

        # 2. paired rollouts: half of each group with skills, half plain, same game
        groups = open_groups(run.draw_tasks(k), config)
        if paired:
            put_skills(groups, bank, ("candidate", "active"))
        episodes = rollout(policy, config, groups, run.seed(k))
        successes = (successes + plain_successes(episodes, k))[-MEMORY:]

        # 3. Delta_g, and the life of the skills
        deltas = group_deltas(episodes)
        bank.evaluate(episodes, deltas)

        # 4. advantages, loss and step: both halves one GiGPO group, each row under its own prompt
        advantages = episode_advantages(episodes, config)
        losses = update(policy, rl_rows(episodes, advantages), config, run.seed(k))

        # 5. log and save
        metrics = rollout_metrics(episodes, advantages, config, deltas) | losses | bank.count()
        metrics |= {f"mined_{name}": n for name, n in mined.items()}
        line = f"{halves(metrics)}  skills {bank.summary()}"
        line += f"  mined {dict(mined)}" if mined else ""
        run.log(k, metrics, episodes, advantages, line)
        run.end_iteration(k, k == run.last, bank, successes=successes)

    print(bank.table())
    if not bank.count()["active"]:
        print("no skill became active: distill.py will train plain GiGPO (--mine_iterations)")
    run.finish(skills=bank.summary())


if __name__ == "__main__":
    run_script(main)
