"""Phase 1 of SIRI: the policy writes skills from its own successes, and each must prove itself.

    python mine.py                            # after warmup.py
    python mine.py --run slow --mine_every 3
    python mine.py --run control --fork tiny --skill_share 0     # the control: GiGPO goes on

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

import common
import envs
from common import Run, SkillBank, episode_advantages, rl_rows, rollout, rollout_metrics
from runtime.miner import ask_endpoint, is_endpoint, load_miner

MEMORY = 2048  # the newest plain successes that are kept for mining


def mine(policy, config, bank, successes, k, seed) -> Counter:
    """A round of mining -> what became of each summary: "added", "unparsable", "duplicate", ..."""
    chosen = choose(successes, config.mine_episodes, seed)
    prompts = [summary_prompt(episode, bank, config) for episode in chosen]
    texts = write_summaries(prompts, policy, config, seed)
    outcome = Counter()
    for episode, text in zip(chosen, texts, strict=True):
        skill = common.parse_skill(text)
        outcome[bank.add(*skill, episode["task_type"], k) if skill else "unparsable"] += 1
    return outcome


def choose(successes, count, seed) -> list:
    """The episodes to summarize: task types take turns, each with its 32 newest in random order."""
    buckets = defaultdict(list)
    for episode in reversed(successes):
        buckets[episode["task_type"]].append(episode)
    rng = random.Random(seed)
    pools = [rng.sample(newest[:32], min(32, len(newest))) for _, newest in sorted(buckets.items())]
    chosen = []
    while len(chosen) < count and any(pools):
        chosen += [pool.pop() for pool in pools if pool]
    return chosen[:count]


def summary_prompt(episode, bank, config) -> str:
    """The request for a skill from one solved episode."""
    bucket = episode["task_type"]
    known = [s.condition for s in bank.skills if s.bucket == bucket and s.status == "active"]
    return envs.build_mining_prompt(
        episode["task"], bucket, episode["steps"], known, config.mine_obs_chars, config.env
    )


def write_summaries(prompts, policy, config, seed) -> list:
    """Prompts -> texts, by the current policy (nothing trains while it writes) or by --miner."""
    if is_endpoint(config.miner):
        return ask_endpoint(prompts, config, seed)
    writer = load_miner(config, policy.model.device) if config.miner else policy
    return common.sample_texts(writer, config, prompts, seed)


def main():
    config = common.parse_config("mine", __doc__)
    run = Run(config, "mine")
    policy, state = run.start(after="warmup")
    successes = state["successes"]
    bank = SkillBank.load(run.source, config) if run.resumed else SkillBank.given(config)
    print(f"mine: {len(successes)} successes to learn from, {len(bank.skills)} skills")

    for k in run.iterations(config.mine_iterations):
        # 1. mining, by the policy as it is now
        mined = Counter()
        if config.skill_share and (k - 1) % config.mine_every == 0:
            mined = mine(policy, config, bank, successes, k, run.seed(k))

        # 2. paired rollouts: half of each group with skills, half plain, same game
        tried = ("candidate", "active")
        groups = common.plan_groups(run.draw_tasks(k), config, bank=bank, statuses=tried)
        episodes = rollout(policy, config, groups, run.seed(k))
        successes = (successes + common.plain_successes(episodes, k))[-MEMORY:]

        # 3. Delta_g = R_g^skill - R_g^base, and the life of the skills
        deltas = common.group_deltas(episodes)
        bank.evaluate(episodes, deltas)

        # 4. advantages, loss and step: both halves one GiGPO group, each row under its own prompt
        advantages = episode_advantages(episodes, config)
        rows = rl_rows(episodes, advantages, config)
        losses = common.update(policy, rows, config, run.seed(k))

        # 5. log and save
        metrics = rollout_metrics(episodes, advantages, config, deltas) | losses | bank.count()
        metrics |= {f"mined_{name}": n for name, n in mined.items()}
        line = f"{common.arms(metrics)}  skills {bank.summary()}"
        line += f"  mined {dict(mined)}" if mined else ""
        run.log(k, metrics, episodes, advantages, line)
        finished = k == config.mine_iterations
        run.save_when_due(policy, k, finished, bank, successes=successes)

    print(bank.table())
    if not bank.count()["active"]:
        print("no skill became active: distill.py will train plain GiGPO (--mine_iterations)")
    print(f"mine done. Next: python distill.py --run {config.run}")


if __name__ == "__main__":
    common.run_script(main)
