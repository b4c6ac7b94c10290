"""Tensors that FSDP2 shards over processes: complete when they are saved, sharded again when they are restored.

A checkpoint does not depend on the number of processes that wrote it; any number of them can continue from it.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def whole(values: Any) -> Any:
    """Return a structure with every sharded tensor complete on the CPU; all processes must call it."""
    return tree_map(lambda value: value.full_tensor().cpu() if isinstance(value, DTensor) else value, values)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are sharded over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a complete tensor into one that may be sharded; each process takes its own part, nothing is sent."""
    target.copy_(_like(value, target))


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's state that was saved `whole`, as its own `state_dict()`, into it.

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
    """Return `value` sharded as `target` is, where it is a tensor of the same shape."""
    if not isinstance(target, DTensor) or not isinstance(value, torch.Tensor) or value.shape != target.shape:
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
