"""Phase 0 of SIRI: GiGPO on plain prompts until the policy has successes to learn from.

    python warmup.py                          # the embedded shop, a minute on 2 cores
    python warmup.py --preset alfworld-7b     # Qwen2.5-7B-Instruct on ALFWorld, one big GPU
    python warmup.py --run slow --lr 1e-5     # any field of config.Config is a flag, see --help

Reads   the initial policy (--model) and the tasks of --split
Writes  runs/<run>/warmup/: model/, config.json, state.pt with the stored successes D_succ
Next    python mine.py --run <run>

    for k = 1, 2, ...:                                                docs/method.md, section 2
        roll out `group_size` plain episodes of each of `tasks` tasks
        store the solved ones: N_succ grows
        A = A_E + w A_S                                               method Eq. 1 to 4
        minimize L_GiGPO + beta L_KL - c_H H                          method Eq. 7
        stop once N_succ >= N_req, or after --warmup_iterations
"""

from common import episode_advantages, open_groups, rl_rows, rollout, update
from runtime.flags import parse_config
from runtime.metrics import rollout_metrics
from runtime.run import Run, run_script
from skills import plain_successes


def main():
    config = parse_config("warmup", __doc__)
    run = Run(config, "warmup", successes=[])
    policy = run.policy
    successes = run.state["successes"]  # D_succ

    for k in run.iterations():
        # 1. rollout: every task `group_size` times, plain prompt
        groups = open_groups(run.draw_tasks(k), config)
        episodes = rollout(policy, config, groups, run.seed(k))
        successes += plain_successes(episodes, k)

        # 2. advantages: A = A_E + w A_S
        advantages = episode_advantages(episodes, config)

        # 3. loss and step: L_GiGPO + beta L_KL - c_H H
        losses = update(policy, rl_rows(episodes, advantages), config, run.seed(k))

        # 4. log and save
        metrics = rollout_metrics(episodes, advantages, config) | losses
        metrics["n_succ"] = len(successes)
        line = f"success {metrics['success']:.2f}  N_succ {len(successes)}/{config.n_req}  "
        line += f"steps {metrics['steps']:.1f}  invalid {metrics['invalid']:.2f}"
        run.log(k, metrics, episodes, advantages, line)
        enough = len(successes) >= config.n_req
        run.end_iteration(k, enough or k == run.last, successes=successes)
        if enough:
            break

    run.finish(n_succ=len(successes))


if __name__ == "__main__":
    run_script(main)
