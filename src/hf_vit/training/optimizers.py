"""The reference's optimizer, clipping and learning-rate schedule, and the parameter groups of fine-tuning.

One optimizer step of the reference (`vit_jax/train.py`: clip by global norm 1, then SGD with momentum 0.9 kept in
bfloat16) is

    clip_by_global_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()

with `MomentumSGD` and `create_scheduler`, in a plain loop, under Accelerate and in Trainer alike.
"""

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler


if TYPE_CHECKING:
    from hf_vit.training.arguments import HfViTTrainingArguments


SCHEDULES = ("cosine", "linear", "constant")
_LINEAR_END = 1e-5
_BLOCK = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.")


def learning_rate_at(
    step: int, *, base_lr: float, total_steps: int, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """Return the learning rate of one step, counted from 0: the first step of a warmup has rate 0.

    Cosine decay goes to 0 and linear decay to 1e-5, both over `total_steps - warmup_steps`; the warmup multiplies.

    Raises:
        ValueError: if the schedule is unknown.
    Source: vit_jax/utils.py, create_learning_rate_schedule; equal in float32.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    progress = min(max((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0), 1.0)
    rate = base_lr
    if schedule == "linear":
        rate = _LINEAR_END + (base_lr - _LINEAR_END) * (1.0 - progress)
    elif schedule == "cosine":
        rate = base_lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return rate * min(1.0, step / warmup_steps) if warmup_steps else rate


def create_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    base_lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: str = "cosine",
) -> LambdaLR:
    """Return the schedule of `learning_rate_at` as a torch scheduler, to be stepped after each optimizer step.

    Args:
        base_lr: the peak rate; a group whose own rate is a fraction of it (see `parameter_groups`) keeps the fraction.

    Raises:
        ValueError: if the schedule is unknown, the rate is not positive, or the warmup is longer than the training.
    """
    if base_lr <= 0:
        raise ValueError(f"expected a positive learning rate, got {base_lr}")
    if warmup_steps > total_steps:
        raise ValueError(f"{warmup_steps} warmup steps are more than the {total_steps} steps of training: lower them")

    def factor(step: int) -> float:
        rate = learning_rate_at(
            step, base_lr=base_lr, total_steps=total_steps, warmup_steps=warmup_steps, schedule=schedule
        )
        return rate / base_lr

    factor(0)
    return LambdaLR(optimizer, factor)


class MomentumSGD(torch.optim.Optimizer):
    """SGD with momentum as optax writes it, with an accumulator that may be bfloat16.

    m = g + momentum * m_stored in the gradient's precision; the parameter moves by -lr * m, and m is stored in
    `accumulator_dtype`. So a bfloat16 accumulator halves the memory of the state while the update keeps float32.
    Not Nesterov, no dampening, no weight decay. In JAX the momentum takes the accumulator's dtype before it
    multiplies, so that 0.9 with a bfloat16 accumulator is 0.8984375: logits after six steps then differ by 3e-7 from
    the reference's, by 2e-3 with 0.9.

    Args:
        accumulator_dtype: dtype in which the momentum is kept between steps; None keeps the parameter's own.
    Source: vit_jax/train.py, make_update_fn, with optax.sgd(accumulator_dtype="bfloat16").
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.03,
        *,
        momentum: float = 0.9,
        accumulator_dtype: torch.dtype | None = torch.bfloat16,
    ):
        if lr < 0:
            raise ValueError(f"expected a learning rate of at least 0, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"expected a momentum in [0, 1), got {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self.accumulator_dtype = accumulator_dtype
        for group in self.param_groups:
            group["momentum"] = torch.tensor(group["momentum"], dtype=accumulator_dtype or torch.float64).item()
        if any(group["weight_decay"] for group in self.param_groups):
            raise ValueError("the reference's SGD has no weight decay: use weight_decay=0 or another optimizer")

    @torch.no_grad()
    def step(self, closure=None):
        """Move every parameter that has a gradient by one step; return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, group["lr"], group["momentum"])
        return loss

    def _step_parameter(self, parameter: nn.Parameter, lr: float, momentum: float) -> None:
        state = self.state[parameter]
        moment = parameter.grad
        assert moment is not None
        if "momentum_buffer" in state:
            moment = moment + momentum * state["momentum_buffer"].to(moment.dtype)
        state["momentum_buffer"] = moment.to(self.accumulator_dtype or parameter.dtype, copy=True)
        parameter.add_(moment, alpha=-lr)

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a state with the accumulators in their own dtype (torch would cast them to the parameters')."""
        super().load_state_dict(state_dict)
        stored = state_dict["state"]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            if key in stored:
                buffer = stored[key]["momentum_buffer"]
                self.state[parameter]["momentum_buffer"] = buffer.to(parameter.device, self.accumulator_dtype)


def _total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip_by_global_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale all gradients in place to a common norm of at most `max_norm`; return their norm before that.

    Gradients are left alone below `max_norm` and become g / norm * max_norm from there on. torch's own
    `clip_grad_norm_` divides by norm + 1e-6, a relative difference of 1e-6 / norm.

    Source: optax clip_by_global_norm.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = _total_norm(gradients)
    divisor, factor = torch.where(norm < max_norm, 1.0, norm), torch.where(norm < max_norm, 1.0, max_norm)
    for gradient in gradients:
        gradient.div_(divisor.to(gradient.dtype)).mul_(factor.to(gradient.dtype))
    return norm


def depth_of(name: str, num_hidden_layers: int) -> int:
    """Return how deep a parameter sits: 0 for the embeddings (hybrid stem included), i + 1 for block i, L + 1 above.

    Prefixes that wrappers put before a name (PEFT, DDP, compile) do not matter.
    """
    block = _BLOCK.search(name)
    if block:
        return int(block[1]) + 1
    return 0 if re.search(r"(?:^|\.)embeddings\.", name) else num_hidden_layers + 1


def takes_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a kernel: not a bias, norm, class token, position table or pooling probe.

    Source: big_vision/optax.py, where wd_mults is (".*/kernel", 1.0) by default.
    """
    return name.endswith(".weight") and parameter.ndim >= 2


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    decay_all_parameters: bool = False,
) -> list[dict]:
    """Return optimizer groups of the trainable parameters, one per (depth, decayed or not); the head's come first.

    Args:
        layer_decay: each layer learns at this fraction of the rate of the layer above; 1.0 turns it off. The rate of
            depth d (see `depth_of`) is lr * layer_decay ** (L + 1 - d).
        decay_all_parameters: decay biases, norms, class token and positions too.

    Raises:
        ValueError: if no parameter is trainable.
    Source: layer-wise decay as in BEiT and MAE (https://arxiv.org/abs/2106.08254, https://arxiv.org/abs/2111.06377).
    """
    blocks = [_BLOCK.search(name) for name, _ in model.named_parameters()]
    num_layers = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depth_of(name, num_layers) if layer_decay != 1.0 else num_layers + 1
        decayed = decay_all_parameters or takes_weight_decay(name, parameter)
        scale = layer_decay ** (num_layers + 1 - depth)
        group = {"params": [], "lr": lr * scale, "weight_decay": weight_decay if decayed else 0.0}
        groups.setdefault((-depth, not decayed), group)["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter of the model is trainable: nothing to optimize")
    return [groups[key] for key in sorted(groups)]


def build_optimizer(model: nn.Module, args: "HfViTTrainingArguments") -> torch.optim.Optimizer:
    """Return the reference's SGD for `optim="sgd"`, transformers' optimizers for other names, on our groups."""
    groups = parameter_groups(
        model,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay,
        decay_all_parameters=args.decay_all_parameters,
    )
    if args.optim == "sgd":
        return MomentumSGD(groups, args.learning_rate, accumulator_dtype=getattr(torch, args.momentum_dtype))
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    return optimizer_class(groups, **settings)


def build_scheduler(optimizer: torch.optim.Optimizer, args: "HfViTTrainingArguments", *, total_steps: int) -> Any:
    """Return the reference's schedule for cosine, linear and constant, transformers' for other names."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    warmup_steps = args.get_warmup_steps(total_steps)
    if name in SCHEDULES:
        return create_scheduler(
            optimizer,
            base_lr=args.learning_rate,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            schedule=name,
        )
    more: Any = args.lr_scheduler_kwargs
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=more,
    )
