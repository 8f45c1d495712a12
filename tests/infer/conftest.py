"""A small pipeline with random weights, whose videos depend on prompt, seed and settings."""

import pytest
import torch

from opensora import zoo
from opensora.infer.pipeline import Shape, VideoPipeline
from opensora.infer.savings import DecodeConfig, SavingsConfig
from opensora.zoo import GeneratorConfig

WHOLE = SavingsConfig(decode=DecodeConfig(tile=False))
"""Of what stands in for a pipeline: nothing is decoded, so nothing is decided."""

SHAPE = Shape(num_frames=5, height=32, width=32, fps=8.0)


def build_pipeline(seed: int = 0, **changes) -> VideoPipeline:
    """5x32x32 videos from 2x4x4 latents."""
    config = GeneratorConfig.model_validate(
        {
            "vae": {
                "kind": "causal",
                "patch": 4,
                "widths": [16, 32, 32],
                "spatial_down": [False, True],
                "latent_channels": 4,
            },
            "model": {
                "kind": "stdit",
                "width": 32,
                "depth": 1,
                "num_heads": 2,
                "text_channels": 16,
                "pooled_channels": 16,
            },
            "text": {"kind": "words", "channels": 16, "buckets": 256},
            "timesteps": {"kind": "uniform", "shift": {"kind": "constant", "value": 3.0}},
            **changes,
        }
    )
    torch.manual_seed(seed)
    vae, text = zoo.build_vae(config.vae), zoo.build_text(config.text)
    model = zoo.build_denoiser(config.model, vae=vae, text=text)
    for p in [*model.parameters(), *vae.parameters()]:
        if not p.any():  # zero at the start; here every layer shall count
            torch.nn.init.normal_(p, std=0.1)
    return VideoPipeline(
        model=model.eval(),
        text=text.eval(),
        vae=vae.eval(),
        config=config,
        shape=SHAPE,
        fingerprint=f"seed {seed}",
    )


@pytest.fixture(scope="session")
def pipeline() -> VideoPipeline:
    torch.set_num_threads(1)
    return build_pipeline()
