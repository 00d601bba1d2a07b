"""Phase 0 of SIRI: GiGPO on plain prompts until the policy has successes to learn from.

    python warmup.py                          # the embedded default, minutes on 2 cores
    python warmup.py --preset alfworld-7b     # Qwen2.5-7B-Instruct on ALFWorld, one big GPU
    python warmup.py --run slow --lr 1e-4     # any field of common.Config is a flag, see --help

Reads   the initial policy (--model) and the tasks of --split
Writes  runs/<run>/warmup/: model/, config.json, state.pt with the stored successes D_succ
Next    python mine.py --run <run>

    for k = 1, 2, ...:                                                  SIRI, method section 4
        roll out `group_size` plain episodes of each of `tasks` tasks
        store the solved ones: N_succ grows
        A = A_E + w A_S                                                 GiGPO Eq. 3-8
        minimize L_GiGPO + beta L_KL
        stop once N_succ >= N_req
"""

import common
from common import Run, episode_advantages, plain_successes, rl_rows, rollout, rollout_metrics


def main():
    config = common.parse_config("warmup", __doc__.split("\n")[0])
    device = common.set_up(config)
    items = common.list_items(config, config.split)
    run = Run(config, "warmup")
    state = run.resume() or {"iteration": 0, "successes": [], "finished": False}

    source = run.folder / "model" if state["iteration"] else config.model
    model, tokenizer = common.load_policy(source, config, device)
    reference = common.load_reference(config, device)  # pi_ref, the same in all phases
    optimizer = common.make_optimizer(model, config, state.get("optimizer"))
    successes = state["successes"]  # D_succ
    print(f"warmup: {len(items)} tasks, {model.num_parameters():,} parameters on {device}")

    finished, k = state["finished"], state["iteration"]
    while not finished:
        k += 1
        # 1. rollout: every task `group_size` times, plain prompt
        seed = common.sampling_seed(config, "warmup", k)
        plan = common.plan_rollouts(common.draw_items(items, config, "warmup", k), config)
        episodes = rollout(
            model, tokenizer, config, plan, temperature=config.temperature, seed=seed
        )
        successes += plain_successes(episodes, k)

        # 2. advantages: A = A_E + w A_S
        advantages = episode_advantages(episodes, config)

        # 3. loss and step: L_GiGPO + beta L_KL
        rows = rl_rows(episodes, advantages, config)
        losses = common.update(
            model, reference, optimizer, rows, config, tokenizer=tokenizer, seed=seed
        )

        # 4. log and save
        metrics = rollout_metrics(episodes) | losses | {"n_succ": len(successes)}
        line = f"success {metrics['success']:.2f}  N_succ {len(successes)}/{config.n_req}  "
        line += f"steps {metrics['steps']:.1f}  invalid {metrics['invalid']:.2f}"
        run.log(k, metrics, episodes, line)
        finished = len(successes) >= config.n_req or k >= config.warmup_iterations
        if finished or k % config.save_every == 0:
            saved = {"iteration": k, "successes": successes, "finished": finished}
            run.save(model, tokenizer, optimizer, **saved)

    print(f"warmup done: {len(successes)} successes. Next: python mine.py --run {config.run}")


if __name__ == "__main__":
    common.run_script(main)
