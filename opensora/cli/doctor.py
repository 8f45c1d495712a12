"""What `opensora doctor` looks at, and what it says to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opensora.disk import has_locks, leftover_name, lock, storage_errors, write_synced
from opensora.errors import StorageError

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
    if "gloo" not in backends:
        return Finding("collectives", "broken", "this torch has no gloo: ranks cannot meet on CPUs")
    seconds = _sum_of_two_ranks()
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    way = f"through {chosen}" if chosen else "through the interface of this host's name"
    text = f"{', '.join(backends)}; two gloo ranks added up {way} in {seconds * 1e3:.0f} ms"
    return Finding("collectives", "ok", text + _loopback(chosen))


def _sum_of_two_ranks() -> float:
    """Seconds in which two gloo ranks, threads with real connections, meet and reduce a tensor."""
    from datetime import timedelta

    import torch
    import torch.distributed

    store = torch.distributed.HashStore()

    def rank(number: int) -> float:
        timeout = timedelta(seconds=20)
        group = torch.distributed.ProcessGroupGloo(store, number, 2, timeout)
        mine = torch.full((1024,), number + 1.0)
        group.allreduce([mine]).wait()  # pyright: ignore[reportAttributeAccessIssue]
        return float(mine.max())

    began = time.perf_counter()
    with ThreadPoolExecutor(2) as ranks:
        sums = list(ranks.map(rank, range(2)))
    if sums != [3.0, 3.0]:
        raise RuntimeError(f"1 + 2 of two gloo ranks is {sums}")
    return time.perf_counter() - began


def _loopback(chosen: str | None) -> str:
    """What to know where several nodes could not reach this one."""
    try:
        local = socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        local = True
    if chosen or not local:
        return ""
    others = ", ".join(name for _, name in socket.if_nameindex() if name != "lo") or "none"
    return (
        ". This host's name is a loopback address: training on several nodes takes the interface "
        f"that leads to MASTER_ADDR, or GLOO_SOCKET_IFNAME (here: {others})"
    )


def _disk(folder: Path) -> Finding:
    """Write, sync and lock a file, as a checkpoint does."""
    if not folder.is_dir():
        return Finding("disk", "broken", f"{folder.resolve()} is not a folder: create it")
    content = bytes(16 * 2**20)
    probe = leftover_name(folder / "doctor", "tmp")
    try:
        began = time.perf_counter()
        with storage_errors(folder):
            write_synced(probe, content)
        rate = len(content) / (time.perf_counter() - began) / 1e6
        descriptor = lock(probe)
        locks = descriptor is not None and has_locks(descriptor)
        if descriptor is not None:
            os.close(descriptor)
    except StorageError as error:
        return Finding("disk", "broken", str(error))
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free / 2**30
    state: State = "ok" if free > 5 and locks else "note"
    text = f"{free:.0f} GiB free in {folder.resolve()}, {rate:.0f} MB/s synced"
    return Finding("disk", state, text + ("" if locks else "; it has no file locks"))


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
            "pip uninstall torchvision, or install the one that was built for this torch "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})",
        )
    return Finding("torchvision", "ok", f"{version}, not needed")


def _optional(package: str, extra: str) -> Finding:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, "note", f"not installed; pip install 'opensora[{extra}]' brings it")
    return Finding(package, "ok", version)
