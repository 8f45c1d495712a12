"""The weights that dimensions need: what they are, where they come from, whether they are here.

Everything lies in one folder, `weights_dir`, under the names below. Only the transformers models
can be fetched from the hub instead, and only when that was asked for.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.errors import CheckpointError


@dataclass(frozen=True)
class Weights:
    """One file or folder of weights.

    Attributes:
        name: of the file or folder in `weights_dir`.
        where: who publishes it.
        megabytes: of the download.
        hub: the repository on the Hugging Face hub, for models that transformers loads.
    """

    name: str
    where: str
    megabytes: float
    hub: str = ""


DINO = Weights(
    "dino-vitb16", "huggingface.co/facebook/dino-vitb16", 343, hub="facebook/dino-vitb16"
)
CLIP_B = Weights(
    "clip-vit-base-patch32",
    "huggingface.co/openai/clip-vit-base-patch32",
    605,
    hub="openai/clip-vit-base-patch32",
)
CLIP_L = Weights(
    "clip-vit-large-patch14",
    "huggingface.co/openai/clip-vit-large-patch14",
    1711,
    hub="openai/clip-vit-large-patch14",
)
AESTHETIC = Weights("sa_0_4_vit_l_14_linear.pth", "github.com/LAION-AI/aesthetic-predictor", 0.004)
RAFT_THINGS = Weights("raft-things.pth", "github.com/princeton-vl/RAFT (models.zip)", 21)


@dataclass(frozen=True)
class Shelf:
    """Where weights are looked for.

    Attributes:
        folder: `weights_dir`, or None where there is none.
        download: take transformers models that the folder lacks from the hub.
    """

    folder: Path | None = None
    download: bool = False

    def find(self, weights: Weights) -> str | None:
        """A path, or a hub repository that may be fetched, or None."""
        if self.folder is not None and (self.folder / weights.name).exists():
            return str(self.folder / weights.name)
        return weights.hub if self.download and weights.hub else None

    def lacking(self, weights: Weights) -> str | None:
        """Why these weights cannot be used, in words; None where they can."""
        if self.find(weights) is not None:
            return None
        place = f"'{self.folder}'" if self.folder is not None else "weights_dir, which is not set"
        reason = f"needs {weights.name} ({weights.megabytes:g} MB, {weights.where}) in {place}"
        return reason + (", or download=true" if weights.hub else "")


def read_state(path: str | Path, what: str) -> dict[str, Tensor]:
    """A state dict from a .pth file, read without running code.

    Raises:
        CheckpointError: unreadable, or something else than a state dict.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as {what} ({reason}): fetch it again") from (
            error
        )
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} is not the state dict of {what}: fetch the right file")
    return state


def fill(module: nn.Module, state: dict[str, Tensor], path: str | Path, what: str) -> nn.Module:
    """Load a state dict that must fit exactly; returns the module, frozen and in eval mode.

    Args:
        state: names may carry the 'module.' of DataParallel.

    Raises:
        CheckpointError: naming a tensor that is missing, left over or of another shape.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own:
            verb = "lacks" if name not in state else "has, but should not,"
            raise CheckpointError(f"{path} {verb} the tensor '{name}': it is not {what}")
        if own[name].shape != state[name].shape:
            raise CheckpointError(
                f"{path}: '{name}' has the shape {tuple(state[name].shape)}, {what} has "
                f"{tuple(own[name].shape)}"
            )
    module.load_state_dict(state)
    return module.requires_grad_(False).eval()
