"""Several GPUs: `torchrun --nproc-per-node N -- warmup.py ...`, by PyTorch's FSDP2.

(With the "--", or torchrun takes a script's --run for a flag of its own.)

Every process runs the same script with the same seed. They differ in two places: `rollout` and
`sample_texts` work on the part of their own rank and then gather all, `update` trains the rows of
its own rank while FSDP sums the gradients. What lies between (advantages, Delta_g, the skill bank)
is computed by all alike. Without torchrun there is one rank, and nothing here does anything.

Weights, gradients, optimizer state and reference are sharded over the ranks; the weights are
gathered layer by layer in the update, and whole on each rank in a rollout (`unsharded`). Rank 0
writes the run's folder.
"""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def init(device: str) -> torch.device:
    """Join the processes that torchrun started, if it did -> this rank's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
        if rank():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # rank 0 speaks for all
    elif device.startswith("cuda:"):
        torch.cuda.set_device(device)
    return torch.device(device)


def destroy():
    if dist.is_initialized():
        dist.destroy_process_group()


def all_gather(values: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    if world_size() == 1:
        return values
    lists = [None] * world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def by_one(work):
    """work(), done by rank 0 for all."""
    return all_gather([work()] if rank() == 0 else [])[0]


def all_reduce(values: dict[str, float]) -> dict[str, float]:
    """Name -> sum over the ranks."""
    parts = all_gather([values])
    return {name: sum(part[name] for part in parts) for name in values}


def scatter(values: list) -> list:
    """This rank's part of a list, about as long as the others'; `all_gather` restores the order."""
    n = len(values)
    return values[n * rank() // world_size() : n * (rank() + 1) // world_size()]


def map_scattered(model, parts: list, work) -> list:
    """work(parts) of this rank's part, with the whole weights -> what all ranks made, in order."""
    own = scatter(parts)
    with unsharded(model):
        results = work(own) if own else []
    return all_gather(results)


def own_seed(seed: int) -> int:
    """Another one on each rank: what they sample must differ."""
    return seed + (rank() << 48)  # above any seed of a turn


def backward(loss):
    """loss.backward() of what is the sum over the ranks, of which FSDP takes the mean."""
    (loss * world_size()).backward()


def shard(model):
    """Shard the weights over the ranks, layer by layer; gradients are summed in float32."""
    if world_size() > 1:
        # RoPE's tables must stay float32, so no inputs are cast
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)


def reshard(model):
    """Free the pieces of the weights that other ranks own."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def unsharded(model):
    """The whole weights on this rank, for a rollout, which each does at its own pace. They must go
    before an optimizer step: it moves the shards, and they would silently be the old ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    try:
        yield
    finally:
        reshard(model)


def full_tensors(state):
    """Nested dicts and lists with every DTensor made whole, for a file. All ranks must call it;
    rank 0 gets the tensors, all get scalars.
    """
    if isinstance(state, dict):
        return {name: full_tensors(value) for name, value in state.items()}
    if isinstance(state, list):
        return [full_tensors(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if rank() == 0 or tensor.dim() == 0 else None


def distribute_like(value, parameter):
    """An entry of the optimizer's state, sharded as its parameter is if it has the same shape."""
    if not isinstance(parameter, DTensor) or getattr(value, "shape", None) != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
