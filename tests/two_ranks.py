"""Run by test_parallel.py, alone and under torchrun: a step on fixed rows, then what came of it.

python tests/two_ranks.py <rows.pt> <out.pt>
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from config import PRESETS, Config
from runtime import parallel
from runtime.generation import generate
from runtime.policy import Policy, load_policy, load_reference, make_optimizer
from runtime.run import set_up


def main(source, target):
    config = Config(**PRESETS["tiny"] | {"data": "", "device": "cpu"})
    config.minibatch_rows = 99
    config.micro_tokens = 600
    config.kl_coef = 0.01
    config.gradient_checkpointing = True
    config.recompute_old = True
    device = set_up(config)
    model, tokenizer = load_policy("tiny", config, device)
    reference = load_reference(config, device)
    policy = Policy(model, tokenizer, reference, make_optimizer(model, config))
    rows = torch.load(source, weights_only=False)

    gradients = {}
    policy.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad for n, p in model.named_parameters()})
    )
    metrics = common.update(policy, rows, config, 1, lambda_=0.1)
    gradients = parallel.join(gradients)
    weights = parallel.join(model.state_dict())
    # the rollout after the step must see the moved weights
    with parallel.whole(model):
        prompts = parallel.share([row.prompt_ids for row in rows[:6]])
        answers = generate(model, tokenizer, prompts, max_new_tokens=8, temperature=0, seed=0)
    answers = parallel.gather(answers)
    # an optimizer made from the saved state goes on as the old one
    state = parallel.join(policy.optimizer.state_dict())
    if parallel.rank() == 0:
        torch.save([metrics, gradients, weights, answers, state], target)
    parallel.wait()
    state = torch.load(target, weights_only=False)[-1]
    policy.optimizer = make_optimizer(model, config, state)
    common.update(policy, rows, config, 1, lambda_=0.1)
    weights = parallel.join(model.state_dict())
    if parallel.rank() == 0:
        torch.save(weights, target + ".second")
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
