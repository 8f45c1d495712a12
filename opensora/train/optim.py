"""Optimizers, parameter groups and learning-rate schedules.

Weights of linear and convolution layers may be trained by Muon; embeddings, norms, biases and
tables by AdamW. All state is per parameter, so any engine can save it and any layout can load it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from opensora.config import Config
from opensora.dist.sharded import alike, placed, whole
from opensora.train.moments import StateConfig, stored


class ScheduleConfig(Config):
    """Learning rate over the run, as a factor on each group's rate."""

    warmup_steps: int = Field(default=0, ge=0, description="linear rise from zero")
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    final_factor: float = Field(
        default=0.0, ge=0, le=1, description="what the factor falls to after the last step"
    )

    def factor(self, step: int, total_steps: int) -> float:
        """The factor for the update number `step` (0-based) of `total_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return 1.0
        span = max(1, total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        fall = 1 - progress if self.decay == "linear" else 0.5 + 0.5 * math.cos(math.pi * progress)
        return self.final_factor + (1 - self.final_factor) * fall


class AdamWConfig(StateConfig):
    """AdamW (Loshchilov & Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0, description="on matrices only")
    schedule: ScheduleConfig = ScheduleConfig()


class MuonConfig(StateConfig):
    """Muon on the matrices (Jordan et al. 2024), AdamW on everything else.

    `state_dtype` and `offload` are of Muon's momentum; `adamw` has its own.
    """

    kind: Literal["muon"] = "muon"
    lr: float = Field(
        default=1e-2, gt=0, description="of Muon; scaled by sqrt(max(1, rows / columns))"
    )
    momentum: float = Field(default=0.95, ge=0, lt=1)
    newton_schulz_steps: int = Field(default=5, ge=1)
    weight_decay: float = Field(default=0.0, ge=0, description="on matrices only")
    adamw: AdamWConfig = AdamWConfig(lr=1e-3)
    schedule: ScheduleConfig = ScheduleConfig()


OptimConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """Push all singular values of a stack of matrices (N, R, C) towards one.

    The quintic Newton-Schulz iteration of Muon (Jordan et al. 2024) with its published
    coefficients. Five steps take singular values from 0.01 of the Frobenius norm up to about
    [0.7, 1.2], which is all that Muon needs. On CUDA in bfloat16, as published: a tenth of the
    time.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transposed else matrices
    x = x.bfloat16() if x.is_cuda else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, beta=1, alpha=c) @ x
    return (x.mT if transposed else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised; convolution kernels count as matrices.

    With 2-D parameters it is torch.optim.Muon (Nesterov, "original" rate) but for the precision of
    the iteration, which there is bfloat16 everywhere; that one refuses others. This one folds
    convolutions to (out, in * taps) and runs parameters of one shape as a batch.
    """

    def __init__(self, params: Iterable, *, lr: float, momentum: float, steps: int, decay: float):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "steps": steps, "weight_decay": decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            shapes: dict[tuple, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    columns = p.numel() // p.shape[0]
                    shapes[(p.shape[0], columns, p.dtype, p.device)].append(p)
            for members in shapes.values():
                self._update(members, group)

    def _update(self, members: list[Tensor], group: dict) -> None:
        momentum, updates = group["momentum"], []
        for p in members:
            grad = p.grad
            assert grad is not None
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
            # A sharded matrix is gathered: its singular values are not those of its parts.
            updates.append(whole(grad.lerp(buffer, momentum)).flatten(1))
        stack = orthogonalise(torch.stack(updates), group["steps"])
        rows, columns = stack.shape[-2:]
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        for p, update in zip(members, stack, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(placed(update.view(p.shape), p), alpha=-scale)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, the rest): matrices are the weights of linear and convolution layers.

    Embedding tables, tables of modulation and one-dimensional parameters are the rest.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices, rest = [], []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = p.dim() >= 2 and name.endswith("weight") and id(p) not in embeddings
        (matrices if is_matrix else rest).append(p)
    return matrices, rest


def build(config: AdamWConfig | MuonConfig, module: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; every group remembers its own rate as `initial_lr`."""
    matrices, rest = split_parameters(module)
    adamw = config if isinstance(config, AdamWConfig) else config.adamw
    groups = [{"params": part, "weight_decay": 0.0} for part in alike(rest)]
    optimizers: list[torch.optim.Optimizer] = []
    if isinstance(config, MuonConfig):
        muon = Muon(
            matrices,
            lr=config.lr,
            momentum=config.momentum,
            steps=config.newton_schulz_steps,
            decay=config.weight_decay,
        )
        optimizers.append(stored(muon, config, at_a_time=None))
    else:
        decay = adamw.weight_decay
        groups += [{"params": part, "weight_decay": decay} for part in alike(matrices)]
    elementwise = torch.optim.AdamW(
        groups, lr=adamw.lr, betas=adamw.betas, eps=adamw.eps, fused=True
    )
    optimizers.append(stored(elementwise, adamw))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
