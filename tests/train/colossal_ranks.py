"""What `test_colossal_ranks.py` runs on two ranks in ColossalAI's own environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from runs import training

from opensora import disk, runtime

CASES = {
    "plain": (),
    "pieces": ("micro_batch=2", "optim={kind: adamw, lr: 0.002}"),
    "shared": ("parallel.ulysses=2",),
}


def main(output: Path) -> None:
    place = runtime.start("cpu", timeout_seconds=120)
    for name, overrides in CASES.items():
        rows = training(output / name, place, "stdit", "engine.kind=colossal", *overrides)
        disk.replace_file(output / f"{name}-{place.rank}.json", json.dumps(rows).encode())
    place.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
