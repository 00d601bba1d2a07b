"""Phase 2 of SIRI: what the skills do better goes into the weights; then the skills are dropped.

    python distill.py                              # after mine.py
    python distill.py --without internalization    # skills in half of the prompts, no L_int

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

from common import (
    SUCCESS_REWARD,
    Row,
    episode_advantages,
    find_action_tokens,
    open_groups,
    put_skills,
    rl_rows,
    rollout,
    update,
)
from runtime.flags import parse_config
from runtime.generation import opening
from runtime.metrics import halves, rollout_metrics
from runtime.run import Run, run_script
from skills import SkillBank, group_deltas


def internalization_rows(episodes, advantages, deltas, tokenizer, config) -> list[Row]:
    """Steps of the skill half as rows for the plain prompt, where the gate (Eq. 10) is open.

    sigma_A brings advantages that keep the reward's scale (--normalize_std false) to the scale of
    the clip. Steps with A <= 0 have weight 0, but count among the gated tokens.
    """
    if "internalization" in config.without:
        return []
    sigma_A = 1.0 if config.normalize_std else SUCCESS_REWARD
    begun = opening(tokenizer)
    rows = []
    for episode, step_advantages in zip(episodes, advantages, strict=True):
        if not episode.skills:  # gate (a): the episode used a skill
            continue
        if deltas.get(episode.group, 0.0) <= 0 and "gate" not in config.without:  # gate (b)
            continue
        for step, advantage in zip(episode.steps, step_advantages, strict=True):
            gate = find_action_tokens(tokenizer, step.response_ids, begun)  # gate (c)
            if "action_mask" in config.without:
                gate = [True] * len(step.response_ids)
            weight = min(max(float(advantage) / sigma_A, 0.0), config.advantage_clip)  # Eq. 11
            if "weight" in config.without:
                weight = 1.0
            # y_t was sampled under xs_t, with the skill; it is to become likelier under x_t
            rows.append(Row(step.plain_ids, step.response_ids, gate=gate, weight=weight))
            gated = [token for token, on in zip(step.response_ids, gate, strict=True) if on]
            step.distilled = {"weight": round(weight, 4), "distilled": tokenizer.decode(gated)}
    return rows


def lambda_at(k, config) -> float:
    """The weight of L_int in iteration k: linear up to lambda_max (Eq. 13)."""
    if "internalization" in config.without:
        return 0.0
    return config.lambda_max * min(1.0, k / config.lambda_iterations)


def main():
    config = parse_config("distill", __doc__)
    paired = "skills" not in config.without
    run = Run(config, "distill", after="mine")
    policy = run.policy
    bank = SkillBank.load(run.source, config)
    print(f"distill: skills {bank.summary()}, lambda up to {lambda_at(run.last, config):g}")
    if not (paired and bank.count()["active"]):
        print("no active skill: this phase trains plain GiGPO")

    for k in run.iterations():
        # 1. paired rollouts: half of each group with the active skills, half plain; Delta_g
        groups = open_groups(run.draw_tasks(k), config)
        if paired:
            put_skills(groups, bank, ("active",))
        episodes = rollout(policy, config, groups, run.seed(k))
        deltas = group_deltas(episodes)
        bank.evaluate(episodes, deltas)

        # 2. advantages; RL rows under their own prompt, internalization rows under the plain one
        advantages = episode_advantages(episodes, config)
        rows = rl_rows(episodes, advantages)
        internal = internalization_rows(episodes, advantages, deltas, policy.tokenizer, config)

        # 3. loss and step: L_GiGPO + beta L_KL - c_H H + lambda(k) L_int
        lambda_k = lambda_at(k, config)
        losses = update(policy, rows + internal, config, run.seed(k), lambda_=lambda_k)

        # 4. log and save
        gated = sum(sum(row.gate) for row in internal)
        skill_tokens = sum(len(s.response_ids) for e in episodes if e.skills for s in e.steps)
        metrics = rollout_metrics(episodes, advantages, config, deltas) | losses | bank.count()
        metrics |= {"lambda": lambda_k, "gated_tokens": gated}
        metrics["gated_share"] = gated / max(1, skill_tokens)
        line = f"{halves(metrics)}  lambda {lambda_k:.3f}  gated {gated} tokens"
        run.log(k, metrics, episodes, advantages, f"{line}  skills {bank.summary()}")
        run.end_iteration(k, k == run.last, bank)

    run.finish(skills=f"{bank.summary()}; the model needs none")


if __name__ == "__main__":
    run_script(main)
