"""What `test_tensor.py` runs on two ranks: `tensor_ranks.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from opensora import runtime
from opensora.dist.mesh import Layout, Mesh
from opensora.dist.sharded import local, norm, whole
from opensora.engine import recompute, tensor
from opensora.engine.flops import FlopCounter
from opensora.engine.recompute import RecomputeConfig
from opensora.models.mmdit import MMDiT, MMDiTConfig
from opensora.types import Condition

POLICIES = ("none", "block", "selective", "pair")


def build(depth: int = 2) -> MMDiT:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": depth, "single_depth": 3, "num_heads": 4, "rope": (4, 2, 2)}
    config = MMDiTConfig(**sizes, text_channels=6, pooled_channels=4)
    model = MMDiT(config, in_channels=3).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def work(model: MMDiT) -> tuple[torch.Tensor, dict[str, torch.Tensor], float, int]:
    """Prediction, gradients, their norm, and FLOPs on this rank."""
    draw = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    mask = torch.arange(5)[None] < torch.tensor([5, 2])[:, None]
    cond = Condition(normal(2, 5, 6), mask, normal(2, 4), fps=torch.tensor([8.0, 24.0]))
    x, t, weight = normal(2, 3, 3, 6, 2), torch.tensor([[0.0, 0.3, 0.8], [0.5] * 3]), normal(2)
    with FlopCounter() as counter:
        out = model(x, t, cond)
        (out * weight[:, None, None, None, None]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    total = float(norm(gradients.values()))
    return out.detach(), {n: whole(g) for n, g in gradients.items()}, total, counter.total


def main(output: Path) -> None:
    place = runtime.start("cpu", timeout_seconds=120)
    mesh = Mesh(Layout(tp=place.world_size), place.rank)
    found = {}
    for policy in POLICIES:
        model = build()
        tensor.apply(model, mesh)
        recompute.apply(model, RecomputeConfig(policy=policy, tiles=2 if policy == "pair" else 1))
        found[policy] = work(model)
    held = sum(local(p).numel() for p in build_shared(mesh).parameters())
    torch.save({"found": found, "held": held}, output / f"{place.rank}.pt")
    place.close()


def build_shared(mesh: Mesh) -> torch.nn.Module:
    """The blocks of a model without double ones, placed."""
    model = build(depth=0)
    tensor.apply(model, mesh)
    return torch.nn.ModuleDict({"blocks": model.single_blocks})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
