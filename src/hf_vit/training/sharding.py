"""Tensors that FSDP2 spreads over processes, whole when they are saved and spread again when they are restored.

So a checkpoint does not tell how many processes wrote it, and any number of them can go on from it.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def whole(values: Any) -> Any:
    """Returns a structure with every spread tensor put together on the CPU; all processes must call it."""
    return tree_map(lambda value: value.full_tensor().cpu() if isinstance(value, DTensor) else value, values)


def is_spread(model: nn.Module) -> bool:
    """Tells whether a model's parameters are spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a whole tensor into one that may be spread; each process takes its own part, nothing is sent."""
    target.copy_(_like(value, target))


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads an optimizer's state that was saved `whole`, as its own `state_dict()`, into it.

    Raises:
        ValueError: if it belongs to other groups of parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    by_key = dict(zip(keys, parameters, strict=False))
    state = {
        key: {name: _like(value, by_key[key]) if key in by_key else value for name, value in entries.items()}
        for key, entries in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _like(value: Any, target: torch.Tensor) -> Any:
    """`value` spread as `target` is, where it is a tensor of the same shape."""
    if not isinstance(target, DTensor) or not isinstance(value, torch.Tensor) or value.shape != target.shape:
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
