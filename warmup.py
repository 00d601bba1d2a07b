"""Phase 0 of SIRI: GiGPO on plain prompts until the policy has solved enough tasks to learn from
itself.

    python warmup.py                                   # the embedded default, minutes on 2 cores
    python warmup.py --preset alfworld-7b              # Qwen2.5-7B-Instruct on ALFWorld, one big
                                                       GPU
    python warmup.py --run half-lr --lr 5e-7           # any field of common.Config is a flag:
                                                       python warmup.py --help

Reads   the initial policy (--model) and the tasks of --split
Writes  runs/<run>/warmup/: model/, the stored successes (D_succ in state.pt), config.json
Next    python mine.py --run <run>

    for k = 0, 1, ...:                                                                 SIRI, method
                                                                                       section 4
        roll out `group_size` plain episodes for each of `tasks` tasks
        store the solved ones: N_succ grows
        A = A_E + w A_S                                                                GiGPO Eq. 3-8
        minimize L_GiGPO + beta L_KL
        stop once N_succ >= N_req
"""

import common
import envs
from common import (
    Run,
    draw_items,
    episode_advantages,
    plain_successes,
    rl_rows,
    rollout,
    rollout_metrics,
    update,
)


def main():
    config = common.parse_config("warmup", __doc__.split("\n")[0])
    device = common.set_up(config)
    items = envs.list_items(config.env, config.split, config.data)
    run = Run(config, "warmup")
    state = run.resume() or {"iteration": 0, "successes": [], "finished": False}

    model, tokenizer = common.load_policy(
        run.folder / "model" if state["iteration"] else config.model, config, device
    )
    reference = None  # pi_ref: the policy before phase 0, in all phases
    if config.kl_coef:
        reference, _ = common.load_policy(config.model, config, device, trainable=False)
    optimizer = common.make_optimizer(model, config)
    if state["iteration"]:
        optimizer.load_state_dict(state["optimizer"])
    successes = state["successes"]  # D_succ
    print(
        f"warmup: {len(items)} tasks, N_req {config.n_req}, {model.num_parameters():,} parameters on {device}"
    )

    for k in range(state["iteration"] + 1, config.warmup_iterations + 1):
        if state["finished"]:
            break
        # 1. rollout: every task `group_size` times, plain prompt
        plan = common.plan_rollouts(draw_items(items, config, "warmup", k), config)
        seed = common.sampling_seed(config, "warmup", k)
        episodes = rollout(
            model, tokenizer, config, plan, temperature=config.temperature, seed=seed
        )
        successes += plain_successes(episodes, k)

        # 2. advantages: A = A_E + w A_S
        advantages = episode_advantages(episodes, config)

        # 3. loss and step: L_GiGPO + beta L_KL
        rows = rl_rows(episodes, advantages, config)
        losses = update(model, reference, optimizer, rows, config, tokenizer=tokenizer, seed=seed)

        # 4. log and save
        metrics = rollout_metrics(episodes) | losses | {"n_succ": len(successes)}
        run.log(
            k,
            metrics,
            episodes,
            f"success {metrics['success']:.2f}  N_succ {len(successes)}/{config.n_req}  "
            f"steps {metrics['steps']:.1f}  invalid {metrics['invalid']:.2f}  rows {metrics['rows']}",
        )
        finished = len(successes) >= config.n_req or k == config.warmup_iterations
        if finished or k % config.save_every == 0:
            run.save(
                model, tokenizer, optimizer, iteration=k, successes=successes, finished=finished
            )
        if finished:
            break

    print(
        f"warmup done: {len(successes)} successes stored. Next: python mine.py --run {config.run}"
    )


if __name__ == "__main__":
    common.run_script(main)
