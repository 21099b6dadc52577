"""AdamW over flat fp32 buffers: clipping, update and the copy that the model computes with, in one pass.

The arithmetic and the state (`step`, `exp_avg`, `exp_avg_sq`) are torch.optim.AdamW's. Nothing here waits for
the device: what is decided by the gradient is decided there.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from llama_mcore.distributed.device import on_gpu
from llama_mcore.model.kernels import missing_for_compile


def update(
    optimizer: torch.optim.AdamW,
    gradients: Sequence[Tensor],
    copies: Sequence[Tensor],
    clip: Tensor,
    skip: Tensor,
) -> None:
    """Update the one parameter of each group of `optimizer`, an fp32 master [n], and its Adam state.

    gradients: fp32 [n] of each group; times `clip`, an fp32 scalar, what is applied; their content is lost.
    copies: where each master is copied to, [n] in the model's dtype. skip: an fp32 scalar; 1 leaves masters
    and states as they are, 0 does not. Both scalars are on the device.
    """
    for group, gradient, copy in zip(optimizer.param_groups, gradients, copies, strict=True):
        (master,) = group["params"]
        state = _state(optimizer, master)
        state["step"] += 1 - skip
        buffers = (master.detach(), gradient, state["exp_avg"], state["exp_avg_sq"], copy)
        if on_gpu() and not missing_for_compile():
            _compiled()(*buffers, clip, skip, *_factors(group, state["step"]), *group["betas"], group["eps"])
        else:
            _fused(*buffers, state["step"], clip, skip, group)


def _state(optimizer: torch.optim.AdamW, master: Tensor) -> dict[str, Tensor]:
    """Adam's state of a master, created as torch does before its first update."""
    state = optimizer.state[master]
    if not state:
        state["step"] = torch.zeros((), device=master.device)
        state["exp_avg"] = torch.zeros_like(master)
        state["exp_avg_sq"] = torch.zeros_like(master)
    return state


def _factors(group: dict, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of this step, as fp32 scalars on the device so that nothing is compiled again: lr
    over the first moment's bias correction, root of the second's, and what weight decay leaves."""
    beta1, beta2 = group["betas"]
    lr = torch.full((), group["lr"], dtype=torch.float64, device=step.device)
    step = step.double().clamp(min=1)  # a skipped first step is still number 0, whose corrections are 0
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    return (lr / bias1).float(), bias2.sqrt().float(), (1 - lr * group["weight_decay"]).float()


def one_pass(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor,
    clip: Tensor,
    skip: Tensor,
    step_size: Tensor,
    root_bias2: Tensor,
    decay: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """The update as a formula; compiled it is one kernel, which reads 16 and writes 14 bytes a parameter."""
    gradient = gradient * clip
    first = torch.lerp(exp_avg, gradient, 1 - beta1)
    second = exp_avg_sq * beta2 + gradient * gradient * (1 - beta2)
    updated = master * decay - step_size * first / (second.sqrt() / root_bias2 + eps)
    keep = skip > 0
    updated = torch.where(keep, master, updated)
    copy.copy_(updated)
    master.copy_(updated)
    exp_avg.copy_(torch.where(keep, exp_avg, first))
    exp_avg_sq.copy_(torch.where(keep, exp_avg_sq, second))


@cache
def _compiled():  # type: ignore[no-untyped-def]
    # for each size: a run has one per group, and a size that may change costs the kernel its constants
    return torch.compile(one_pass, dynamic=False)


def _fused(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor,
    step: Tensor,
    clip: Tensor,
    skip: Tensor,
    group: dict,
) -> None:
    torch._fused_adamw_(
        *([master], [gradient], [exp_avg], [exp_avg_sq], [], [step]),
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=clip.reciprocal(),
        found_inf=skip,
    )
    copy.copy_(master)
