"""Ranks as processes that are forked from one that has imported everything: a second, not ten.

They are real processes with gloo between them, which can be killed; only torchrun is missing.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensora.train.tracking import read_records

ROOT = Path(__file__).resolve().parents[2]
DATA = (
    "data={kind: synthetic, num_samples: 64, buckets: {resolutions: {32px: {5: {batch_size: 4}}}, "
    'aspect_ratios: ["1:1"], fps: 8}}'
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["opensora.train.run", "opensora.cli.judging", "torch._dynamo"])


def training(output: Path, *overrides: str) -> list[str]:
    """The command of a tiny training that needs no files."""
    config = [str(ROOT / "configs/tiny/stdit.yaml"), DATA, "task.vae_from=null", f"output={output}"]
    return ["train", *config, "log.bar=false", "validation.every=0", *overrides]


class Ranks:
    """`opensora` as `count` ranks.

    Args:
        fault: `kind:rank:step` of tools/chaos_rank.py.
        prepare: is called in every rank before the command.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        *,
        count: int = 2,
        fault: str = "",
        prepare: Callable[[], None] | None = None,
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            **({"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)} if count > 1 else {}),
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            "CHAOS_MOMENT": str(folder / "moment"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"stderr-{rank}" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context.Process(
                target=_rank, args=(arguments, variables, log, fault, prepare)
            )
            process.start()
            self.processes.append(process)

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.processes[rank].kill()

    def wait(self, seconds: float = 240.0) -> list[int | None]:
        """The exit codes. As torchrun does, the ranks that are left are told to stop when one dies,
        and killed when they do not."""
        deadline, told = time.monotonic() + seconds, False
        while any(p.is_alive() for p in self.processes) and time.monotonic() < deadline:
            time.sleep(0.05)
            if not told and any(p.exitcode for p in self.processes):
                for process in self.processes:
                    process.terminate()
                deadline, told = min(deadline, time.monotonic() + 60), True
        codes = [process.exitcode for process in self.processes]
        self.kill(list(range(len(codes))))
        for process in self.processes:
            process.join()
        return codes

    def told(self, rank: int) -> str:
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""


def _rank(
    arguments: list[str],
    variables: dict[str, str],
    log: Path,
    fault: str,
    prepare: Callable[[], None] | None,
) -> None:
    import torch

    os.environ.update(variables)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    kind, _, rest = fault.partition(":")
    rank, _, step = rest.partition(":")
    if rank == variables["RANK"]:
        sys.path.insert(0, str(ROOT / "tools"))
        import chaos_rank

        chaos_rank.inject(kind, int(step))
    if prepare is not None:
        prepare()
    from opensora.cli.main import main

    main(arguments)


def metrics(output: Path) -> list[Any]:
    """(step, loss) of every record of training."""
    records = read_records(output / "metrics.jsonl")
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
