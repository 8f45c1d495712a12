"""A training step of STDiT: tokens a second, share of the matmul rate, and diffusers beside it.

    python tools/bench/step.py [--width 384 --depth 6 --heads 6 --batch 8 --latent 5x16x16]

Both models have the same width, depth, heads, patches and tokens, and take the same step: forward,
squared error, backward, AdamW. diffusers' LatteTransformer3DModel is the nearest relative: spatial
and temporal blocks alternate, with shared adaptive norms; it has cross-attention in its spatial
blocks only, so it does fewer FLOPs a step. Both counts are printed.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timing import machine, paired, show
from torch import nn

from opensora import runtime
from opensora.engine import compiling
from opensora.engine.flops import FlopCounter
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.types import Condition

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT_TOKENS, TEXT_CHANNELS, CHANNELS = 32, 256, 16


def ours(options: argparse.Namespace, device: torch.device) -> tuple[STDiT, Any]:
    """STDiT and a call of it."""
    config = STDiTConfig(
        width=options.width,
        depth=options.depth,
        num_heads=options.heads,
        text_channels=TEXT_CHANNELS,
    )
    model = STDiT(config, in_channels=CHANNELS).to(device)
    x, t = inputs(options, device)
    cond = Condition(
        tokens=torch.randn(options.batch, TEXT_TOKENS, TEXT_CHANNELS, device=device),
        mask=torch.ones(options.batch, TEXT_TOKENS, dtype=torch.bool, device=device),
        fps=torch.full((options.batch,), 8.0, device=device),
    )
    return model, lambda: model(x, t, cond)


def theirs(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Any]:
    """diffusers' Latte of the same shape and a call of it."""
    from diffusers import LatteTransformer3DModel

    frames, height, _ = options.latent
    model = LatteTransformer3DModel(
        num_attention_heads=options.heads,
        attention_head_dim=options.width // options.heads,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=options.depth,
        cross_attention_dim=options.width,
        attention_bias=True,
        sample_size=height,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_CHANNELS,
        video_length=frames,
    ).to(device)
    x, _ = inputs(options, device)
    t = torch.full((options.batch,), 500, device=device)
    text = torch.randn(options.batch, TEXT_TOKENS, TEXT_CHANNELS, device=device)
    return model, lambda: model(x, t, encoder_hidden_states=text, return_dict=False)[0]


def inputs(options: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents and levels."""
    x = torch.randn(options.batch, CHANNELS, *options.latent, device=device)
    return x, torch.rand(options.batch, options.latent[0], device=device)


def stepper(model: nn.Module, call: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A whole training step as a function."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            loss = call().float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def flops(step: Any) -> int:
    """FLOPs of matrix products and attention in one step, forward and backward."""
    with FlopCounter() as counter:
        step()
    return counter.total


def matmuls(device: torch.device, dtype: torch.dtype, *, at_least: float) -> tuple[Any, int]:
    """Plain square products of at least so many FLOPs, as a function, and their FLOPs."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    times = max(1, round(at_least / (2 * size**3)))

    def work() -> None:
        for _ in range(times):
            a @ a

    return work, times * 2 * size**3


def measure(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """Our step alone against the matmul rate, and in turn with theirs."""
    model, call = ours(options, device)
    step = stepper(model, call, dtype, device)
    count = flops(step)
    frames, height, width = options.latent
    tokens = options.batch * frames * (height // 2) * (width // 2)
    if options.compile:
        compiling.apply(model.blocks)
    products, products_count = matmuls(device, dtype, at_least=count / 4)
    # In turn, because the rate of a shared machine drifts by more than what is measured.
    took, _, ratio = paired(step, products, repeats=options.repeats)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "gflops_a_step": count / 1e9,
        "seconds": took,
        "tokens_per_second": tokens / took["median"],
        "share_of_matmul_rate": ratio * count / products_count,
    }
    if options.diffusers:
        other, other_call = theirs(options, device)
        other_step = stepper(other, other_call, dtype, device)
        mine, their, ratio = paired(step, other_step, repeats=options.repeats)
        result["diffusers"] = {
            "parameters": sum(p.numel() for p in other.parameters()),
            "gflops_a_step": flops(other_step) / 1e9,
            "seconds": their,
            "our_seconds": mine,
            "their_time_over_ours": ratio,
            "our_flop_rate_over_theirs": ratio * count / flops(other_step),
        }
    return result


def main() -> None:
    """Measure in both precisions and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6, help="pairs of blocks")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--latent", default="5x16x16", help="frames x height x width")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--compile", action="store_true", help="compile the blocks of ours")
    parser.add_argument("--diffusers", action="store_true", help="time diffusers' Latte as well")
    options = parser.parse_args()
    options.latent = tuple(int(n) for n in options.latent.split("x"))
    torch.set_num_threads(options.threads)
    device = runtime.pick_device(options.device)
    show(
        {
            "benchmark": "step",
            "shape": f"width {options.width}, {options.depth} pairs, {options.heads} heads",
            "compiled": options.compile,
            "machine": machine(device),
            **{name: measure(options, device, DTYPES[name]) for name in options.precisions},
        }
    )


if __name__ == "__main__":
    main()
