"""Phase 1 of SIRI: the policy writes skills from its own successes, and each skill must prove
itself.

    python mine.py                                     # after warmup.py
    python mine.py --run half-lr --mine_every 3

Reads   runs/<run>/warmup/
Writes  runs/<run>/mine/: model/, and skills.jsonl, every skill with its life
Next    python distill.py --run <run>

    for k = 0, 1, ...:                                                                 SIRI, method
                                                                                       section 5
        every I_mine iterations: the frozen current policy summarizes its own plain successes
            into (condition, strategy) pairs, new candidates of the bank
        roll out each task in two halves: one with the skills retrieved for it in the prompt, one
        plain Delta_g = success of the skill half - success of the plain half, for each group g u_s
        <- (1 - alpha) u_s + alpha Delta_g; candidate -> active -> retired
        A = A_E + w A_S, both halves one GiGPO group; minimize L_GiGPO + beta L_KL, each row under
        its own prompt
"""

import random
from collections import Counter

import common
import envs
from common import (
    Run,
    SkillBank,
    draw_items,
    episode_advantages,
    plain_successes,
    rl_rows,
    rollout,
    rollout_metrics,
    update,
)


def mine(model, tokenizer, config, bank, successes, iteration, seed) -> Counter:
    """One round of mining (5.1): summaries of recent plain successes -> candidates. Counts what
    became of each summary.

    `model` is the current policy; nothing trains while it writes, so it is the frozen snapshot of
    the paper. Buckets take turns, and in each the newest successes come first.
    """
    buckets, chosen = {}, []
    for episode in reversed(successes):
        buckets.setdefault(episode["task_type"], []).append(episode)
    rng = random.Random(seed)
    pools = [rng.sample(recent[:32], min(32, len(recent))) for _, recent in sorted(buckets.items())]
    while len(chosen) < config.mine_episodes and any(pools):
        chosen += [pool.pop() for pool in pools if pool]
    prompts = []
    for episode in chosen[: config.mine_episodes]:
        known = [
            s.condition
            for s in bank.skills
            if s.bucket == episode["task_type"] and s.status == "active"
        ]
        prompts.append(
            envs.build_mining_prompt(
                episode["task"],
                episode["task_type"],
                episode["steps"],
                known,
                config.mine_obs_chars,
            )
        )
    answers = common.generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=config.max_response_tokens,
        temperature=1.0,
        seed=seed,
    )
    outcome = Counter()
    for episode, (_, _, text) in zip(chosen, answers):
        skill = common.parse_skill(text)
        outcome[bank.add(*skill, episode["task_type"], iteration) if skill else "unparsable"] += 1
    return outcome


def main():
    config = common.parse_config("mine", __doc__.split("\n")[0])
    device = common.set_up(config)
    items = envs.list_items(config.env, config.split, config.data)
    run = Run(config, "mine")
    warmup = run.require("warmup", "warmup.py")
    state = run.resume() or {
        "iteration": 0,
        "finished": False,
        **common.load_state(warmup, "successes", "optimizer"),
    }

    model, tokenizer = common.load_policy(
        (run.folder if state["iteration"] else warmup) / "model", config, device
    )
    reference = None
    if config.kl_coef:
        reference, _ = common.load_policy(config.model, config, device, trainable=False)
    optimizer = common.make_optimizer(model, config)
    optimizer.load_state_dict(state["optimizer"])
    successes = state["successes"]
    bank = (
        SkillBank.load(run.folder / "skills.jsonl", config)
        if state["iteration"]
        else SkillBank(config)
    )
    print(
        f"mine: {len(successes)} successes to learn from, {len(bank.skills)} skills, I_mine {config.mine_every}"
    )

    for k in range(state["iteration"] + 1, config.mine_iterations + 1):
        seed = common.sampling_seed(config, "mine", k)
        # 1. mining, by the policy as it is now
        mined = Counter()
        if (k - 1) % config.mine_every == 0:
            mined = mine(model, tokenizer, config, bank, successes, k, seed)

        # 2. paired rollouts: half of each group with skills, half plain, same game
        plan = common.plan_rollouts(draw_items(items, config, "mine", k), config, bank)
        episodes = rollout(
            model, tokenizer, config, plan, temperature=config.temperature, seed=seed
        )
        successes = (successes + plain_successes(episodes, k))[-4 * config.n_req :]

        # 3. Delta_g = R_g^skill - R_g^base, and the life of the skills
        deltas = common.group_deltas(episodes)
        common.evaluate_skills(bank, episodes, deltas)

        # 4. advantages, loss and step: both halves are one GiGPO group, each row under its own
        # prompt
        advantages = episode_advantages(episodes, config)
        rows = rl_rows(episodes, advantages, config)
        losses = update(model, reference, optimizer, rows, config, tokenizer=tokenizer, seed=seed)

        # 5. log and save
        counts = bank.count()
        metrics = (
            rollout_metrics(episodes, deltas)
            | losses
            | counts
            | {f"mined_{name}": n for name, n in mined.items()}
        )
        run.log(
            k,
            metrics,
            episodes,
            f"{common.arms(metrics)}  skills {common.skill_line(counts)}"
            + (f"  mined {dict(mined)}" if mined else ""),
        )
        finished = k == config.mine_iterations
        if finished or k % config.save_every == 0:
            run.save(
                model,
                tokenizer,
                optimizer,
                bank,
                iteration=k,
                successes=successes,
                finished=finished,
            )

    print(common.skill_table(bank))
    if not any(s.status == "active" for s in bank.skills):
        print(
            "no skill became active: distill.py will train plain GiGPO; try more --mine_iterations"
        )
    print(f"mine done. Next: python distill.py --run {config.run}")


if __name__ == "__main__":
    common.run_script(main)
