"""Phase 1 of SIRI: the policy writes skills from its own successes, and each must prove itself.

    python mine.py                            # after warmup.py
    python mine.py --run slow --mine_every 3

Reads   runs/<run>/warmup/
Writes  runs/<run>/mine/: model/, and skills.jsonl, every skill with its life
Next    python distill.py --run <run>

    for k = 1, 2, ...:                                                  SIRI, method section 5
        every I_mine iterations: the frozen current policy summarizes its own plain successes
            into (condition, strategy) pairs, the new candidates of the bank
        roll out each task in two halves: with the skills retrieved for it in the prompt, and plain
        Delta_g = success of the skill half - success of the plain half, for each group g
        u_s <- (1 - alpha) u_s + alpha Delta_g;  candidate -> active -> retired
        A = A_E + w A_S, both halves one group; minimize L_GiGPO + beta L_KL, each row under its
            own prompt
"""

import random
from collections import Counter, defaultdict

import common
import envs
import parallel
from common import Run, SkillBank, episode_advantages, rl_rows, rollout, rollout_metrics


def mine(model, tokenizer, config, bank, successes, iteration, seed) -> Counter:
    """One round of mining (5.1): summaries of plain successes -> candidates, and what became of
    each summary ("added", "unparsable", ...).

    `model` is the current policy; nothing trains while it writes: the paper's frozen snapshot.
    Buckets take turns, each with its 32 newest successes in random order.
    """
    buckets, chosen = defaultdict(list), []
    for episode in reversed(successes):
        buckets[episode["task_type"]].append(episode)
    rng = random.Random(seed)
    pools = [rng.sample(b[:32], min(32, len(b))) for _, b in sorted(buckets.items())]
    while len(chosen) < config.mine_episodes and any(pools):
        chosen += [pool.pop() for pool in pools if pool]
    chosen = chosen[: config.mine_episodes]
    prompts = []
    for episode in chosen:
        task, bucket = episode["task"], episode["task_type"]
        known = [s.condition for s in bank.skills if s.bucket == bucket and s.status == "active"]
        steps = episode["steps"]
        prompts.append(
            envs.build_mining_prompt(
                task, bucket, steps, known, config.mine_obs_chars, config.env
            )
        )
    with parallel.whole(model):
        answers = common.generate(
            model, tokenizer, parallel.share(prompts), temperature=1.0, seed=seed + parallel.rank(),
            max_new_tokens=config.max_response_tokens,
        )  # fmt: skip
    answers = parallel.gather(answers)
    outcome = Counter()
    for episode, (_, _, text) in zip(chosen, answers):
        skill = common.parse_skill(text)
        outcome[bank.add(*skill, episode["task_type"], iteration) if skill else "unparsable"] += 1
    return outcome


def main():
    config = common.parse_config("mine", __doc__.split("\n")[0])
    device = common.set_up(config)
    items = common.list_items(config, config.split)
    run = Run(config, "mine")
    source, state = run.resume_or_start(after="warmup")

    model, tokenizer = common.load_policy(source / "model", config, device)
    reference = common.load_reference(config, device)
    optimizer = common.make_optimizer(model, config, state["optimizer"])
    successes = state["successes"]
    bank = SkillBank.load(run.folder, config) if state["iteration"] else SkillBank(config)
    print(f"mine: {len(successes)} successes to learn from, {len(bank.skills)} skills")

    for k in range(state["iteration"] + 1, config.mine_iterations + 1):
        seed = common.sampling_seed(config, "mine", k)
        # 1. mining, by the policy as it is now
        mined = Counter()
        if (k - 1) % config.mine_every == 0:
            mined = mine(model, tokenizer, config, bank, successes, k, seed)

        # 2. paired rollouts: half of each group with skills, half plain, same game
        plan = common.plan_rollouts(common.draw_items(items, config, "mine", k), config, bank)
        episodes = rollout(
            model, tokenizer, config, plan, temperature=config.temperature, seed=seed
        )
        successes = (successes + common.plain_successes(episodes, k))[-4 * config.n_req :]

        # 3. Delta_g = R_g^skill - R_g^base, and the life of the skills
        deltas = common.group_deltas(episodes)
        common.evaluate_skills(bank, episodes, deltas)

        # 4. advantages, loss and step: both halves one GiGPO group, each row under its own prompt
        advantages = episode_advantages(episodes, config)
        rows = rl_rows(episodes, advantages, config)
        losses = common.update(
            model, reference, optimizer, rows, config, tokenizer=tokenizer, seed=seed
        )

        # 5. log and save
        counts = bank.count()
        metrics = rollout_metrics(episodes, deltas) | losses | counts
        metrics |= {f"mined_{name}": n for name, n in mined.items()}
        line = f"{common.arms(metrics)}  skills {common.skill_line(counts)}"
        run.log(k, metrics, episodes, line + (f"  mined {dict(mined)}" if mined else ""))
        finished = k == config.mine_iterations
        if finished or k % config.save_every == 0:
            saved = {"iteration": k, "successes": successes, "finished": finished}
            run.save(model, tokenizer, optimizer, bank, **saved)

    print(common.skill_table(bank))
    if not bank.count()["active"]:
        print("no skill became active: distill.py will train plain GiGPO (--mine_iterations)")
    print(f"mine done. Next: python distill.py --run {config.run}")


if __name__ == "__main__":
    common.run_script(main)
