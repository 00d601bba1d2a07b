"""Phase 2 of SIRI: what the skills do better goes into the weights; then the skills are dropped.

    python distill.py                         # after mine.py
    python distill.py --run slow --lambda_max 0      # the control: plain GiGPO, as many iterations

Reads   runs/<run>/mine/
Writes  runs/<run>/distill/: model/, the result, which needs no skill; skills.jsonl, a report
Next    python evaluate.py --run <run>

    for k = 1, 2, ...:                                                  SIRI, method section 6
        roll out each task in two halves, with the active skills and plain; Delta_g, utilities
        A = A_E + w A_S, both halves one group
        a step of the skill half where Delta_g > 0 gives one more row: the PLAIN prompt x_t with
            the response y_t that was given under the skill
        L_int = - sum gate w log pi(y | x_t, y_<) / sum gate
            gate: action tokens of those rows;  w = clip(A / sigma_A, 0, c)
        lambda(k) = lambda_max min(1, k / K_warm)
        minimize L_GiGPO + beta L_KL + lambda(k) L_int
"""

import common
from common import Row, Run, SkillBank, episode_advantages, rl_rows, rollout, rollout_metrics


def distillation_rows(episodes, advantages, deltas, tokenizer, config) -> list:
    """Steps of the skill half as rows for the plain prompt (6.1, 6.4), if gate and weight allow.

    sigma_A brings advantages that keep the reward's scale (--normalize_std false) to the scale of
    the clip.
    """
    sigma = 1.0 if config.normalize_std else config.success_reward
    rows = []
    for episode, row in zip(episodes, advantages):
        utility = deltas.get(episode.group, 0.0)
        if not episode.skills or utility <= 0:
            continue  # gates (a) a skill was used, (b) Delta_g > 0
        for step, advantage in zip(episode.steps, row):
            if advantage > 0:  # else w = 0
                mask = common.action_mask(tokenizer, step.response_ids)  # gate (c)
                ids, weight = (step.plain_ids, step.response_ids), float(advantage / sigma)
                rows.append(Row(*ids, weight, step.logprobs, True, utility, mask))
    return rows


def main():
    config = common.parse_config("distill", __doc__.split("\n")[0])
    device = common.set_up(config)
    items = common.list_items(config, config.split)
    run = Run(config, "distill")
    source, state = run.resume_or_start(after="mine")

    model, tokenizer = common.load_policy(source / "model", config, device)
    reference = common.load_reference(config, device)
    optimizer = common.make_optimizer(model, config, state["optimizer"])
    bank = SkillBank.load(source, config)
    print(f"distill: skills {common.skill_line(bank.count())}, lambda_max {config.lambda_max}")
    if not bank.count()["active"]:
        print("no active skill: this phase trains plain GiGPO")

    for k in range(state["iteration"] + 1, config.distill_iterations + 1):
        seed = common.sampling_seed(config, "distill", k)
        # 1. paired rollouts, active skills only; Delta_g
        drawn = common.draw_items(items, config, "distill", k)
        plan = common.plan_rollouts(drawn, config, bank, statuses=("active",))
        episodes = rollout(
            model, tokenizer, config, plan, temperature=config.temperature, seed=seed
        )
        deltas = common.group_deltas(episodes)
        common.evaluate_skills(bank, episodes, deltas)

        # 2. advantages; RL rows under their own prompt, internalization rows under the plain one
        advantages = episode_advantages(episodes, config)
        rows, extra = rl_rows(episodes, advantages, config), []
        if config.lambda_max:
            extra = distillation_rows(episodes, advantages, deltas, tokenizer, config)

        # 3. loss and step: L_GiGPO + beta L_KL + lambda(k) L_int
        lambda_k = config.lambda_max * min(1.0, k / config.lambda_iterations)
        losses = common.update(
            model, reference, optimizer, rows + extra, config, tokenizer=tokenizer, seed=seed,
            lambda_=lambda_k,
        )  # fmt: skip

        # 4. log and save
        counts, gated = bank.count(), sum(sum(row.action_mask) for row in extra)
        skilled = sum(len(s.response_ids) for e in episodes if e.skills for s in e.steps)
        metrics = rollout_metrics(episodes, deltas) | losses | counts
        metrics |= {"lambda": lambda_k, "gated_tokens": gated}
        metrics["gated_share"] = gated / max(1, skilled)
        line = f"{common.arms(metrics)}  lambda {lambda_k:.3f}  gated {gated} tokens  "
        run.log(k, metrics, episodes, line + f"skills {common.skill_line(counts)}")
        finished = k == config.distill_iterations
        if finished or k % config.save_every == 0:
            run.save(model, tokenizer, optimizer, bank, iteration=k, finished=finished)

    print(f"distill done: {run.folder}/model needs no skill.")
    print(f"Next: python evaluate.py --run {config.run}")


if __name__ == "__main__":
    common.run_script(main)
