"""What a video would take, before any weight is read: FLOPs, memory by part, what makes it fit.

The real model and the real VAE run on tensors that have shapes only (`engine.footprint`); of a
deep model some blocks do, and the rest follows. Memory is that of tensors alive at the same time.
Not seen: what text encoders take beside their weights, and what kernels of a device take inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora import zoo
from opensora.engine import planner
from opensora.engine.flops import rehearsal
from opensora.engine.footprint import Footprint, LiveMemory
from opensora.engine.planner import Device
from opensora.errors import UsageError
from opensora.infer.quantize import BYTES, linears_of
from opensora.infer.savings import DecodeConfig, SavingsConfig
from opensora.infer.settings import check_fit
from opensora.text.encoders import TextConfig
from opensora.text.t5_clip import T5CLIPConfig
from opensora.text.words import WordsConfig
from opensora.types import Condition
from opensora.zoo import DenoiserConfig, GeneratorConfig, VAEConfig

TEXT_TOKENS = 256
"""Length of a prompt in a plan."""

WAYS: tuple[tuple[SavingsConfig, bool], ...] = tuple(
    (SavingsConfig.model_validate({"offload": offload, "quantize": quantize, "decode": d}), batched)
    for offload, quantize in ((False, "none"), (False, "int8"), (True, "none"), (True, "int8"))
    for batched in (True, False)
    for d in ({}, {"chunk": 1}, {"chunk": 1, "tile": True})
)
"""Savings, and whether branches of guidance share a call; those that cost less come first."""


ENCODERS = {
    "google/t5-v1_1-xxl": 4_762_310_656,
    "DeepFloyd/t5-v1_1-xxl": 4_762_310_656,
    "openai/clip-vit-large-patch14": 123_060_480,
}
"""Parameters of the text encoders of public checkpoints, from the sizes in their config.json: T5
has 24 layers of 4 x 4096 x 4096 and 3 x 4096 x 10240, CLIP 12 of 768 and 3072, with embeddings."""


@dataclass(frozen=True)
class Wanted:
    """What to draw: pixel frames, height and width of `batch` videos at once, in `steps` steps,
    with `branches` of guidance (1: none)."""

    num_frames: int
    height: int
    width: int
    steps: int = 30
    batch: int = 1
    branches: int = 2


@dataclass(frozen=True)
class Parts:
    """Bytes and counts that no choice of savings changes.

    Attributes:
        parameters: of the denoiser, exactly.
        blocks: bytes of each block's parameters, float32.
        linears: bytes among them that are quantized, block by block.
        scales: bytes of the scales of quantized weights, block by block.
        largest: of one of those layers, which is unpacked when it computes.
        rest: bytes of the denoiser beside its blocks.
        vae, text: bytes of either; text is 0 where it is not known.
    """

    parameters: int
    blocks: tuple[int, ...]
    linears: tuple[int, ...]
    scales: tuple[int, ...]
    largest: int
    rest: int
    vae: int
    text: int


@dataclass(frozen=True)
class Phases:
    """Peak bytes on the device of each phase, weights included.

    Attributes:
        weights: those among them of the denoiser while it runs.
        host: bytes that wait on the host.
    """

    encode: float
    denoise: float
    decode: float
    weights: float
    activations: float
    host: float

    @property
    def peak(self) -> float:
        return max(self.encode, self.denoise, self.decode)

    @property
    def worst(self) -> str:
        """The phase with the peak."""
        return max(("encode", "denoise", "decode"), key=lambda name: getattr(self, name))


def rehearse(make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]) -> Footprint:
    """What a call without gradients takes, in float32; `forward` is its peak beside its inputs."""
    memory = LiveMemory()
    with rehearsal(torch.device("cpu")) as (counter, _), memory, torch.no_grad():
        module, call = make()
        before = memory.live
        memory.reset()
        out = call()
        peak = memory.peak - before
        del out
        parameters = sum(p.numel() for p in module.parameters())
    return Footprint(parameters, counter.total, peak, 0, 0, 0)


def denoiser_call(
    config: DenoiserConfig, latents: tuple[int, int, int, int], rows: int, words: int
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A denoiser and its call on `rows` latents (C, T, H, W) with prompts of `words` tokens."""
    model = zoo.DENOISERS[config.kind](config, in_channels=latents[0]).eval()
    cond = Condition(
        torch.empty(rows, words, config.text_channels),
        torch.ones(rows, words, dtype=torch.bool),
        torch.empty(rows, config.pooled_channels) if config.pooled_channels else None,
        fps=torch.empty(rows),
        size=torch.empty(rows, 2),
    )
    x, t = torch.empty(rows, *latents), torch.empty(rows, latents[1])
    return model, lambda: model(x, t, cond)


def denoiser(
    config: DenoiserConfig, latents: tuple[int, int, int, int], rows: int, *, words: int
) -> Footprint:
    """What one call of a denoiser takes."""

    def at(depths: dict[str, int]) -> Footprint:
        shallow = config.model_copy(update=depths)
        return rehearse(partial(denoiser_call, shallow, latents, rows, words))

    depths = {key: (getattr(config, key), *rule) for key, rule in config.layers.items()}
    return planner.extrapolate(at, depths)


def decoding(
    config: VAEConfig, latents: tuple[int, int, int, int], rows: int, choice: DecodeConfig
) -> int:
    """Peak bytes of decoding beside weights and latents.

    Where tiles are left to memory (auto), there are none here. A tile's edges are data, so of a
    tiled picture one tile is rehearsed; beside it lie the pixels of the whole video and those of
    the tile before.
    """
    channels, frames, *size = latents
    tile = [min(side, choice.tiling.tile) if choice.tile is True else side for side in size]

    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        vae = zoo.build_vae(config).eval()
        part = torch.empty(rows, channels, frames, *tile)
        return vae, lambda: vae.decode(part, chunk=choice.chunk)

    peak = rehearse(make).forward
    if tile != list(size):
        with torch.device("meta"):
            time, down, across = zoo.build_vae(config).stride
        places = size[0] * size[1] + tile[0] * tile[1]
        peak += 4 * 3 * rows * (1 + (frames - 1) * time) * places * down * across
    return peak


def parts(config: GeneratorConfig) -> Parts:
    """The sizes of a pipeline's parts, exactly.

    Raises:
        UsageError: the config names no VAE.
    """
    if config.vae is None:
        raise UsageError("the config has no task.vae: plan a checkpoint, or set task.vae")
    with torch.device("meta"):
        vae = zoo.build_vae(config.vae)
        model: Any = zoo.DENOISERS[config.model.kind](config.model, in_channels=vae.latent_channels)
        text = text_bytes(config.text)
    blocks = [_bytes(block) for block in model.blocks]
    layers = [[m for m in linears_of(model) if m in set(b.modules())] for b in model.blocks]
    return Parts(
        parameters=sum(p.numel() for p in model.parameters()),
        blocks=tuple(blocks),
        linears=tuple(sum(m.weight.nbytes for m in some) for some in layers),
        scales=tuple(sum(4 * m.out_features for m in some) for some in layers),
        largest=max(m.weight.nbytes for some in layers for m in some),
        rest=_bytes(model) - sum(blocks),
        vae=_bytes(vae),
        text=text,
    )


def text_bytes(config: TextConfig) -> int:
    """Bytes of a text encoder's weights; 0 where its sizes are not known here."""
    if isinstance(config, WordsConfig):
        with torch.device("meta"):
            return _bytes(zoo.build_text(config))  # pyright: ignore[reportArgumentType]
    found = 0
    for one in (config.t5, config.clip) if isinstance(config, T5CLIPConfig) else (config,):
        if one.path not in ENCODERS:
            return 0
        found += ENCODERS[one.path] * (4 if one.dtype == "float32" else 2)
    return found


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


class Forecast:
    """A pipeline and what it is to draw; each thing is rehearsed once.

    Attributes:
        parts: the pipeline's.
        latents: (C, T, H, W) of one video.
    """

    def __init__(self, config: GeneratorConfig, wanted: Wanted, *, words: int = TEXT_TOKENS):
        self.config, self.wanted, self.words = config, wanted, words
        self.parts = parts(config)
        assert config.vae is not None, "its size is known"
        self.vae = config.vae
        with torch.device("meta"):
            vae = zoo.build_vae(config.vae)
        size = (wanted.num_frames, wanted.height, wanted.width)
        check_fit(*size, stride=vae.stride, patch=config.model.patch)
        self.latents = vae.latent_shape(*size)
        self._calls: dict[int, Footprint] = {}
        self._decoded: dict[str, int] = {}

    @property
    def step_flops(self) -> int:
        """Of a step of all videos with all branches."""
        return self._call(self.wanted.batch * self.wanted.branches).flops

    @property
    def flops(self) -> int:
        """Of all steps, without text and VAE."""
        return self.step_flops * self.wanted.steps

    def phases(self, savings: SavingsConfig, *, batched: bool) -> Phases:
        """Memory by phase with some savings."""
        has, wanted = self.parts, self.wanted
        rows = wanted.batch * (wanted.branches if batched else 1)
        small = savings.quantize != "none"
        blocks = [_stored(has, i, savings) for i in range(len(has.blocks))]
        here = sum(blocks)
        if savings.offload:
            count = min(savings.ahead + 1, len(blocks))
            here = max(sum((blocks + blocks)[i : i + count]) for i in range(len(blocks)))
        weights = here + has.rest
        others = 0 if savings.offload else has.text + has.vae
        latents = 4 * wanted.batch * torch.Size(self.latents).numel()
        # The sampler holds x and two estimates, guidance the branches' inputs and results.
        held = latents * (3 + 2 * wanted.branches)
        activations = self._call(rows).forward + held + small * has.largest
        resident = has.rest + (0 if savings.offload else here)
        decoded = self._decode(savings.decode)
        return Phases(
            encode=resident + (has.text if savings.offload else others),
            denoise=weights + others + activations,
            decode=resident + (has.vae if savings.offload else others) + decoded + latents,
            weights=weights,
            activations=activations,
            host=(sum(blocks) + has.text + has.vae) if savings.offload else 0,
        )

    def _call(self, rows: int) -> Footprint:
        if rows not in self._calls:
            self._calls[rows] = denoiser(self.config.model, self.latents, rows, words=self.words)
        return self._calls[rows]

    def _decode(self, choice: DecodeConfig) -> int:
        key = choice.model_dump_json()
        if key not in self._decoded:
            self._decoded[key] = decoding(self.vae, self.latents, self.wanted.batch, choice)
        return self._decoded[key]


def _stored(has: Parts, block: int, savings: SavingsConfig) -> int:
    """Bytes of a block's weights as they are stored."""
    if savings.quantize == "none":
        return has.blocks[block]
    small = has.linears[block] * BYTES[savings.quantize] // 4 + has.scales[block]
    return has.blocks[block] - has.linears[block] + small


def fitting(found: Forecast, target: Device) -> tuple[SavingsConfig, bool, Phases] | None:
    """The first of WAYS that fits a device, with what it takes."""
    for savings, batched in WAYS:
        if not batched and found.wanted.branches == 1:
            continue
        phases = found.phases(savings, batched=batched)
        if phases.peak + target.reserved <= target.memory:
            return savings, batched, phases
    return None
