"""Run by test_parallel.py, alone and under torchrun: a step on fixed rows, then what came of it.

python tests/two_ranks.py <rows.pt> <out.pt>
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import update
from config import PRESETS, Config
from runtime import parallel
from runtime.generation import generate
from runtime.policy import Policy, digest_policy, load_policy, load_reference, make_optimizer
from runtime.run import set_up


def main(source, target):
    flags = {"device": "cpu", "minibatch_rows": 99, "micro_tokens": 600, "kl_coef": 0.01}
    flags |= {"gradient_checkpointing": True, "recompute_old": True}
    config = Config(**PRESETS["tiny-household"] | flags)
    device = set_up(config)
    model, tokenizer = load_policy(config.model, config, device)
    reference = load_reference(config, device)
    policy = Policy(model, tokenizer, reference, make_optimizer(model, config.lr))
    rows = torch.load(source, weights_only=False)

    gradients = {}
    policy.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad for n, p in model.named_parameters()})
    )
    metrics = update(policy, rows, config, 1, lambda_=0.1)
    metrics["reference"] = digest_policy(reference)
    gradients = parallel.full_tensors(gradients)
    weights = parallel.full_tensors(model.state_dict())
    # the rollout after the step must see the moved weights
    with parallel.unsharded(model):
        prompts = parallel.scatter([row.prompt_ids for row in rows[:6]])
        answers = generate(model, tokenizer, prompts, max_new_tokens=8, temperature=0, seed=0)
    answers = parallel.all_gather(answers)
    # an optimizer made from the saved state goes on as the old one
    state = parallel.full_tensors(policy.optimizer.state_dict())
    if parallel.rank() == 0:
        torch.save([metrics, gradients, weights, answers, state], target)
    parallel.all_gather([])  # rank 0 has written
    state = torch.load(target, weights_only=False)[-1]
    policy.optimizer = make_optimizer(model, config.lr, saved=state)
    update(policy, rows, config, 1, lambda_=0.1)
    weights = parallel.full_tensors(model.state_dict())
    if parallel.rank() == 0:
        torch.save(weights, target + ".second")
    parallel.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
