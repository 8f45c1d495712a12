"""A measure of memory and a VAE whose every layer counts."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora.ops.conv3d import CausalConv3d
from opensora.vae.causal import CausalVAE, CausalVAEConfig


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is entered, as long as they live.

    Attributes:
        live, peak: bytes now and at most.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in self.known | before:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def forget(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.live -= num_bytes


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def peak_memory():
    """Call with a function: the most bytes that it held at once beside its arguments."""

    def measure(function) -> int:
        with torch.no_grad(), PeakMemory() as memory:
            function()
        return memory.peak

    return measure


def make_vae(seed: int = 0, **changes) -> CausalVAE:
    """A small CausalVAE with no zero-initialised layer and with latent statistics."""
    torch.manual_seed(seed)
    settings = {"widths": (8, 16, 16), "temporal_kernel": (3, 3, 3), "latent_channels": 4}
    vae = CausalVAE(CausalVAEConfig(**(settings | changes)))
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    vae.latent_mean.normal_(std=0.1)
    vae.latent_std.uniform_(0.5, 1.5)
    return vae.eval()


@pytest.fixture(scope="session")
def build_vae():
    """Call with changes to the config: a small CausalVAE whose every layer counts."""
    return make_vae


@pytest.fixture(scope="module")
def vae():
    return make_vae()
