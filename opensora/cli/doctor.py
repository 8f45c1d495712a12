"""What `opensora doctor` looks at, and what it says to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "broken"]

OPTIONAL = {
    "pyarrow": "parquet",
    "decord": "decord",
    "transformers": "text",
    "diffusers": "diffusers",
    "deepspeed": "deepspeed",
    "tensorboard": "log",
    "wandb": "log",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    state: State
    text: str

    def line(self) -> str:
        sign = {"ok": "ok    ", "note": "note  ", "broken": "BROKEN"}[self.state]
        return f"{sign}  {self.name:14} {self.text}"


def examine(folder: Path) -> list[Finding]:
    """Look at everything; a check that itself fails is a finding, never an exception."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("torch", _torch),
        ("processor", _processor),
        ("gpu", _gpu),
        ("compiler", _compiler),
        ("video", _video),
        ("collectives", _collectives),
        ("disk", lambda: _disk(folder)),
        ("torchvision", _torchvision),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(check())
        except Exception as error:
            findings.append(Finding(name, "broken", f"{type(error).__name__}: {error}"))
    findings += _attention()
    return findings + [_optional(package, extra) for package, extra in OPTIONAL.items()]


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")


def _torch() -> Finding:
    import torch

    return Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _processor() -> Finding:
    import torch

    from opensora import runtime

    cpu = torch.device("cpu")
    rates = [runtime.matmul_rate(cpu, d) / 1e9 for d in (torch.float32, torch.bfloat16)]
    text = f"{runtime.processor_name()}, {os.cpu_count()} cores; matmul fp32 {rates[0]:.0f}, "
    return Finding("processor", "ok", text + f"bf16 {rates[1]:.0f} GFLOP/s")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "note", "none; training runs on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("gpu", "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}")


def _compiler() -> Finding:
    """What compile=always, and compile=auto on a GPU, stand on."""
    import torch

    from opensora.engine import compiling

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lacking = compiling.missing(device)
    if lacking:
        return Finding("compiler", "note", f"training runs uncompiled for want of {lacking}")
    return Finding("compiler", "ok", f"training can be compiled for {device.type}")


def _attention() -> list[Finding]:
    """What `attention=` may name here, and what orders of frames and packed sequences run on."""
    import torch

    from opensora.ops import selection

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = selection.survey(device)
    except Exception as error:
        return [Finding("attention", "broken", f"{type(error).__name__}: {error}")]
    return [
        Finding(backend.name, "ok", f"attention on {device.type}")
        if reason is None
        else Finding(backend.name, "note", f"no attention by it: {reason}")
        for backend, reason in found
    ]


def _video() -> Finding:
    """Write and read back a small mp4."""
    import numpy as np

    from opensora.media.read import read_clip
    from opensora.media.write import write_video

    with tempfile.TemporaryDirectory() as folder:
        frames = np.full((5, 32, 32, 3), 128, np.uint8)
        path = write_video(Path(folder) / "probe.mp4", frames, fps=8)
        read = read_clip(path).frames
    close = read.shape == frames.shape and int(np.abs(read.astype(int) - 128).max()) <= 3
    version = importlib.metadata.version("av")
    if not close:
        return Finding("video", "broken", f"PyAV {version}: h264 does not survive a round trip")
    return Finding("video", "ok", f"PyAV {version}, h264 round trip")


def _collectives() -> Finding:
    import torch.distributed

    if not torch.distributed.is_available():
        return Finding("collectives", "broken", "this torch is built without torch.distributed")
    backends = [
        name
        for name, available in (
            ("gloo", torch.distributed.is_gloo_available()),
            ("nccl", torch.distributed.is_nccl_available()),
        )
        if available
    ]
    state: State = "ok" if "gloo" in backends else "broken"
    return Finding("collectives", state, ", ".join(backends) or "no backend")


def _disk(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    free = usage.free / 2**30
    if not os.access(folder, os.W_OK):
        return Finding("disk", "broken", f"{folder.resolve()} cannot be written to")
    state: State = "ok" if free > 5 else "note"
    return Finding("disk", state, f"{free:.0f} GiB free in {folder.resolve()}")


def _torchvision() -> Finding:
    """An installed torchvision that cannot load breaks transformers and diffusers as well."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torchvision", "ok", "not installed, and not needed")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return Finding(
            "torchvision",
            "broken",
            f"{version} does not load with this torch and breaks transformers and diffusers: "
            f"pip uninstall torchvision ({str(error).splitlines()[0]})",
        )
    return Finding("torchvision", "ok", f"{version}, not needed")


def _optional(package: str, extra: str) -> Finding:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, "note", f"not installed; pip install 'opensora[{extra}]' brings it")
    return Finding(package, "ok", version)
