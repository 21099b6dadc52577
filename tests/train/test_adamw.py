"""llama_mcore.train.adamw: torch's AdamW with the clipping before it and the copy after it.

Bounds: an fp32 operation rounds by `EPS`. The moments forget their errors with beta, so that some 4 roundings
a step add up to 4 / (1 - beta) of them; an update has about 10 operations and the errors of both moments.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor import metrics

from llama_mcore.train import adamw
from tests.model.test_kernels import compiles

EPS = 2.0**-24
BETAS, LR, STEPS, SIZE = (0.9, 0.95), 1e-2, 30, 1003
MOMENTS = {"exp_avg": 4 * EPS / (1 - BETAS[0]), "exp_avg_sq": 4 * EPS / (1 - BETAS[1])}
UPDATE = 10 * EPS + sum(MOMENTS.values())
CLIP = {"not clipped": 1.0, "clipped": 0.37}


@pytest.fixture(params=["fused", pytest.param("compiled", marks=[pytest.mark.process, compiles])])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's fused kernel, or the function that is compiled on a GPU, compiled here for the CPU."""
    if request.param == "compiled":
        monkeypatch.setattr(adamw, "on_gpu", lambda: True)
    return


def optimizer_of(dtype: torch.dtype, decay: float, lr: float = LR) -> torch.optim.AdamW:
    generator = torch.Generator().manual_seed(3)
    masters = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in (SIZE, 11)]
    groups = [
        {"params": masters[:1], "weight_decay": decay},
        {"params": masters[1:], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=1e-8)


def masters_of(optimizer: torch.optim.AdamW) -> list[Tensor]:
    return [group["params"][0] for group in optimizer.param_groups]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=generator) * 10.0 ** (step % 3) for size in (SIZE, 11)]


def rate(step: int) -> float:
    return LR * (1 + step) / STEPS


def take_step(
    optimizer: torch.optim.AdamW, step: int, copies: list[Tensor], clip: float = 1.0, skip: bool = False
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate(step)
    adamw.update(optimizer, gradients(step), copies, torch.tensor(clip), torch.tensor(float(skip)))


def bf16_copies(optimizer: torch.optim.AdamW) -> list[Tensor]:
    return [master.detach().bfloat16() for master in masters_of(optimizer)]


def reference(dtype: torch.dtype, decay: float, clip: float) -> torch.optim.AdamW:
    """torch's own AdamW after all steps."""
    optimizer = optimizer_of(dtype, decay)
    for step in range(STEPS):
        for group, gradient in zip(optimizer.param_groups, gradients(step), strict=True):
            group["lr"], group["params"][0].grad = rate(step), (gradient * torch.tensor(clip)).to(dtype)
        optimizer.step()
    return optimizer


def largest(x: Tensor) -> float:
    return x.abs().max().item()


@pytest.mark.parametrize("clip", CLIP.values(), ids=CLIP)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs_adamw(kernel: None, dtype: torch.dtype, decay: float, clip: float) -> None:
    """Results of both precisions: the one differs from ours by its own rounding too."""
    found, expected = optimizer_of(torch.float32, decay), reference(dtype, decay, clip)
    copies = bf16_copies(found)
    for step in range(STEPS):
        take_step(found, step, copies, clip)
    times = 2 if dtype is torch.float32 else 1
    for ours, theirs, copy in zip(masters_of(found), masters_of(expected), copies, strict=True):
        path = sum(rate(step) for step in range(STEPS))
        bound = times * (STEPS * 2 * EPS * largest(theirs) + path * UPDATE)
        assert largest(ours - theirs) < bound
        assert torch.equal(copy, ours.detach().bfloat16())
        state, other = found.state[ours], expected.state[theirs]
        assert state.keys() == other.keys()
        assert state["step"] == other["step"] == STEPS
        for kind, bound in MOMENTS.items():
            assert largest(state[kind] - other[kind]) < times * bound * largest(other[kind])


def test_a_skipped_step_changes_no_bit(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_of(torch.float32, 0.1)
    copies = bf16_copies(optimizer)
    take_step(optimizer, 0, copies)
    before = everything(optimizer, copies)
    spoilt = [gradient.fill_(torch.nan) for gradient in gradients(1)]
    monkeypatch.setattr(f"{__name__}.gradients", lambda step: spoilt)
    take_step(optimizer, 1, copies, clip=torch.nan, skip=True)
    assert all(map(torch.equal, everything(optimizer, copies), before))


def test_a_run_that_skips_its_first_step_goes_on(kernel: None) -> None:
    skipping, plain = (optimizer_of(torch.float32, 0.1) for _ in range(2))
    both = {optimizer: bf16_copies(optimizer) for optimizer in (skipping, plain)}
    take_step(skipping, 1, both[skipping], skip=True)
    for optimizer, copies in both.items():
        take_step(optimizer, 2, copies)
    found, expected = (everything(optimizer, copies) for optimizer, copies in both.items())
    assert all(map(torch.equal, found, expected))


def everything(optimizer: torch.optim.AdamW, copies: list[Tensor]) -> list[Tensor]:
    states = [value for master in masters_of(optimizer) for value in optimizer.state[master].values()]
    return [tensor.detach().clone() for tensor in (*masters_of(optimizer), *states, *copies)]


@pytest.mark.process
@compiles
def test_compiled_it_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "on_gpu", lambda: True)
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch.compiler.reset()
    metrics.reset()
    optimizer = optimizer_of(torch.float32, 0.1)
    take_step(optimizer, 0, bf16_copies(optimizer))
    assert metrics.generated_kernel_count == len(optimizer.param_groups)


@pytest.mark.process
@compiles
def test_nothing_is_compiled_again_as_rate_clip_and_step_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adamw, "on_gpu", lambda: True)
    optimizer = optimizer_of(torch.float32, 0.1)
    copies = bf16_copies(optimizer)
    take_step(optimizer, 0, copies)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 4):
            take_step(optimizer, step, copies, clip=1 / step)


def test_state_of_torchs_own_optimizer_is_gone_on_with(kernel: None) -> None:
    """Stages 3 and 0 use that, and so did runs before; a checkpoint goes from one to the other."""
    one = reference(torch.float32, 0.1, 1.0)
    other = optimizer_of(torch.float32, 0.1)
    other.load_state_dict(one.state_dict())
    copies = bf16_copies(other)
    take_step(other, STEPS, copies)
    assert all(other.state[master]["step"] == STEPS + 1 for master in masters_of(other))
