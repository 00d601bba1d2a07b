"""Phase 2 of SIRI: what the skills do better goes into the weights; then the skills are dropped.

    python distill.py                         # after mine.py
    python distill.py --lambda_max 0          # skills in half of the prompts, no internalization

Reads   runs/<run>/mine/
Writes  runs/<run>/distill/: model/, the result, which needs no skill; skills.jsonl, a report
Next    python evaluate.py --run <run>

    for k = 1, 2, ...:                                                docs/method.md, section 4
        roll out each task in two halves, with the active skills and plain; Delta_g, utilities
        A = A_E + w A_S, both halves one group
        a step of the skill half where Delta_g > 0 gives one more row: the PLAIN prompt x_t with
            the response y_t that was given under the skill
        L_int = - sum gate w log pi(y | x_t, y_<) / sum gate                     method Eq. 12
            gate: action tokens of those rows;  w = clip(A / sigma_A, 0, c)      method Eq. 10, 11
        lambda(k) = lambda_max min(1, k / K_warm)                                method Eq. 13
        minimize L_GiGPO + beta L_KL - c_H H + lambda(k) L_int                   method Eq. 14
"""

import common
from common import Row, Run, SkillBank, episode_advantages, rl_rows, rollout, rollout_metrics


def internalization_rows(episodes, advantages, deltas, tokenizer, config) -> list:
    """Steps of the skill half as rows for the plain prompt, where the gate is open.

    sigma_A brings advantages that keep the reward's scale (--normalize_std false) to the scale of
    the clip. Steps with A <= 0 have weight 0, but count among the gated tokens.
    """
    sigma_A = 1.0 if config.normalize_std else config.success_reward
    rows = []
    for episode, step_advantages in zip(episodes, advantages, strict=True):
        delta = deltas.get(episode.group, 0.0)
        if config.internalize_gate == "none":
            delta = 1.0
        if not episode.skills or delta <= 0:  # gate (a): a skill was used, (b): Delta_g > 0
            continue
        for step, advantage in zip(episode.steps, step_advantages, strict=True):
            mask = [True] * len(step.response_ids)
            if config.internalize_tokens == "action":  # gate (c)
                mask = common.find_action_tokens(tokenizer, step.response_ids)
            weight = advantage / sigma_A if config.internalize_weight == "advantage" else 1.0
            row = Row(
                prompt_ids=step.plain_ids,  # x_t, the plain prompt of the step
                response_ids=step.response_ids,  # y_t, sampled under xs_t, with the skill
                advantage=float(weight),  # clipped to [0, c], it is w
                rollout_logprobs=step.logprobs,
                internalize=True,
                delta=delta,  # Delta_g
                action_mask=mask,
                skill_ids=step.prompt_ids,  # xs_t
            )
            rows.append(row)
    return rows


def main():
    config = common.parse_config("distill", __doc__)
    run = Run(config, "distill")
    policy, _ = run.start(after="mine")
    bank = SkillBank.load(run.source, config)
    print(f"distill: skills {bank.summary()}, lambda_max {config.lambda_max}")
    if not bank.count()["active"] or not config.skill_share:
        print("no active skill: this phase trains plain GiGPO")

    for k in run.iterations(config.distill_iterations):
        # 1. paired rollouts: half of each group with the active skills, half plain; Delta_g
        groups = common.plan_groups(run.draw_tasks(k), config, bank=bank, statuses=("active",))
        episodes = rollout(policy, config, groups, run.seed(k))
        deltas = common.group_deltas(episodes)
        bank.evaluate(episodes, deltas)

        # 2. advantages; RL rows under their own prompt, internalization rows under the plain one
        advantages = episode_advantages(episodes, config)
        rows = rl_rows(episodes, advantages, config)
        internal = internalization_rows(episodes, advantages, deltas, policy.tokenizer, config)

        # 3. loss and step: L_GiGPO + beta L_KL - c_H H + lambda(k) L_int
        lambda_k = config.lambda_max * min(1.0, k / config.lambda_iterations)
        if config.hand_off:
            lambda_k = max(0.0, 1 - (k - 1) / config.lambda_iterations) if internal else 0.0
        losses = common.update(policy, rows + internal, config, run.seed(k), lambda_=lambda_k)

        # 4. log and save
        gated = sum(sum(row.action_mask) for row in internal)
        skill_tokens = sum(len(s.response_ids) for e in episodes if e.skills for s in e.steps)
        metrics = rollout_metrics(episodes, advantages, config, deltas) | losses | bank.count()
        share = gated / max(1, skill_tokens)
        metrics |= {"lambda": lambda_k, "gated_tokens": gated, "gated_share": share}
        line = f"{common.arms(metrics)}  lambda {lambda_k:.3f}  gated {gated} tokens  "
        run.log(k, metrics, episodes, advantages, line + f"skills {bank.summary()}")
        run.save_when_due(policy, k, k == config.distill_iterations, bank)

    print(f"distill done: {run.folder}/model needs no skill.")
    print(f"Next: python evaluate.py --run {config.run}")


if __name__ == "__main__":
    common.run_script(main)
