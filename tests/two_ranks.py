"""Run by test_parallel.py, alone and under torchrun: a step on fixed rows, then what came of it.

    python tests/two_ranks.py <rows.pt> <out.pt>
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import parallel


def main(source, target):
    config = common.Config(**common.PRESETS["tiny"] | {"data": "", "device": "cpu"})
    config.minibatch_rows, config.micro_tokens, config.kl_coef = 99, 600, 0.01
    config.gradient_checkpointing, config.recompute_old = True, True
    device = common.set_up(config)
    model, tokenizer = common.load_policy("tiny", config, device)
    reference = common.load_reference(config, device)
    optimizer = common.make_optimizer(model, config)
    rows = torch.load(source, weights_only=False)

    gradients = {}
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad for n, p in model.named_parameters()})
    )
    options = {"tokenizer": tokenizer, "seed": 1, "lambda_": 0.1}
    metrics = common.update(model, reference, optimizer, rows, config, **options)
    gradients = parallel.join(gradients)
    weights = parallel.join(model.state_dict())
    # the rollout after the step must see the moved weights
    with parallel.whole(model):
        prompts = parallel.share([row.prompt_ids for row in rows[:6]])
        answers = common.generate(
            model, tokenizer, prompts, max_new_tokens=8, temperature=0, seed=0
        )
    answers = parallel.gather(answers)
    # an optimizer made from the saved state goes on as the old one
    state = parallel.join(optimizer.state_dict())
    if parallel.rank() == 0:
        torch.save([metrics, gradients, weights, answers, state], target)
    parallel.wait()
    state = torch.load(target, weights_only=False)[-1]
    again = common.make_optimizer(model, config, state)
    common.update(model, reference, again, rows, config, **options)
    weights = parallel.join(model.state_dict())
    if parallel.rank() == 0:
        torch.save(weights, target + ".second")
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
