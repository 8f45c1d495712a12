"""Faults of a training on two gloo ranks under torchrun, and what becomes of them, as a table.

    python tools/chaos.py [--only hang kill ... --keep FOLDER]

Every row is a tiny run with one fault. torchrun may start the ranks once more; where the run ends
nevertheless, the same command is given again, as an operator would. In the end the weights,
optimizer, averages and losses must be those of a run without the fault, bit for bit. Ends with 1
where a row did not come out as it should.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY, TIMEOUT = 16, 4, 5.0
DATA = (
    "data={kind: synthetic, num_samples: 64, buckets: {resolutions: {32px: {5: {batch_size: 4}}}, "
    'aspect_ratios: ["1:1"], fps: 8}}'
)


@dataclass(frozen=True)
class Fault:
    """A row: what happens to which rank at which step (from 0), and how the launcher then ends.

    Attributes:
        code: exit code of the first command.
        within: seconds in which the fault must be told, on a machine of its own.
        told: what a line of stderr must say.
        rival: rank that has the fault in the run to compare with, where it leaves a trace.
        mute: records may be missing.
    """

    name: str
    text: str
    rank: int = 1
    step: int = 6
    code: int = 0
    within: float = 10.0
    told: str = ""
    rival: int | None = None
    mute: bool = False


HUNG = r"no progress for \d+ s, rank 1 is behind: rank 1 at step \d"
LIMIT = TIMEOUT + 15.0
FAULTS = (
    Fault("hang", "a rank sleeps", told=HUNG, within=LIMIT),
    Fault("hang-with-lock", "a rank hangs in C, holding the lock", told=HUNG, within=LIMIT),
    Fault("stop", "a rank is stopped (SIGSTOP)", told=HUNG, within=LIMIT),
    Fault("kill", "SIGKILL to a rank", told=r"lost rank 1 "),
    Fault("kill-at-start", "SIGKILL before the ranks meet", step=0),
    Fault("kill-at-end", "SIGKILL after the last step", step=STEPS, told=r"lost rank 1 "),
    Fault("term-rank", "SIGTERM to a rank", code=75, told="stopped by a signal after step 7"),
    Fault("term-launcher", "SIGTERM to the launcher", code=75, told="stopped by a signal after"),
    Fault("save-rank", "SIGUSR1 to a rank"),
    Fault("save-launcher", "SIGUSR1 to the launcher"),
    Fault("memory", "a rank is out of memory", code=71, told=r"rank 1: out of memory in step 7"),
    Fault("data-end", "a rank has no more data", code=65, told=r"rank 1: the data ended at step 6"),
    Fault("nan", "the loss of a rank is not a number", told="step 7 skipped", rival=0),
    Fault("disk", "the disk is full for five steps", rank=0, told="Training goes on", mute=True),
)


@dataclass
class Attempt:
    """A command that was given, and what it said when."""

    code: int
    lines: list[tuple[float, str]]


def launch(output: Path, fault: str, moment: Path) -> Attempt:
    """Run the tiny config on two ranks to the end."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CHAOS_FAULT": fault,
        "CHAOS_MOMENT": str(moment),
    }
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--shutdown-timeout=60"]
    config = [str(ROOT / "configs/tiny/stdit.yaml"), DATA, "task.vae_from=null"]
    config += [f"output={output}", f"steps={STEPS}", "log.bar=false", "validation.every=0"]
    config += [f"checkpoint={{every: {SAVE_EVERY}, keep: 9}}", f"watchdog.timeout={TIMEOUT}"]
    command = [sys.executable, "-m", "opensora.cli.launch", *options]
    process = subprocess.Popen(
        [*command, str(ROOT / "tools/chaos_rank.py"), "train", *config],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[tuple[float, str]] = []
    log_path = moment.with_name("log")

    def listen() -> None:
        assert process.stderr is not None
        lines.extend((round(time.time(), 2), line.rstrip()) for line in process.stderr)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        process.wait(timeout=300)
    finally:
        process.kill()
        listener.join()
        with open(log_path, "a", encoding="utf-8") as log:
            log.writelines(f"{moment} {line}\n" for moment, line in lines)
    return Attempt(process.returncode, lines)


def remains(output: Path) -> tuple[str, list[Any]]:
    """A digest of the last checkpoint's tensors, and (step, loss) of every record."""
    last = max((output / "checkpoints").glob("step-*"))
    digest = hashlib.sha256()
    for path in sorted(last.rglob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest(), [(r["step"], r["loss"]) for r in records(output)]


def records(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in found if record["kind"] == "train"]


@contextmanager
def disk(folder: Path, *, small: bool) -> Iterator[Path]:
    """A folder for a run; `small` mounts a file system of 160 MiB on it, which needs root."""
    folder.mkdir(parents=True)
    if not small:
        yield folder
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "chaos", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def check(fault: Fault, folder: Path, whole: tuple[str, list[Any]] | None) -> dict[str, Any]:
    """Run one row; returns its cells and what is wrong with it.

    Args:
        whole: what is left of the run without a fault; None where the row has its own rival.
    """
    moment = folder / "moment"
    if fault.rival is not None:
        rival = folder / "rival"
        launch(rival, f"{fault.name}:{fault.rival}:{fault.step}", moment)
        whole = remains(rival)
    with disk(folder / "disk", small=fault.name == "disk") as place:
        output = place / "run"
        first = launch(output, f"{fault.name}:{fault.rank}:{fault.step}", moment)
        attempts = [first] if first.code == 0 else [first, launch(output, "none:0:0", moment)]
        cells = judge(fault, attempts, float(moment.read_text()), output, whole)
    if cells["wrong"]:
        print("\n".join(line for a in attempts for _, line in a.lines), file=sys.stderr)
    return cells


def judge(
    fault: Fault, attempts: list[Attempt], moment: float, output: Path, whole: Any
) -> dict[str, Any]:
    """The cells of a row, from what the commands said and left."""
    lines = [line for attempt in attempts for line in attempt.lines]
    told = re.compile(fault.told or r"resumed|Sending process|INFO")
    detected = next((t - moment for t, line in lines if t > moment and told.search(line)), None)
    resumed = [int(m[1]) for _, line in lines if (m := re.search(r" at step (\d+) of", line))]
    after = [r["time"] - moment for r in records(output) if r["step"] > fault.step + 1]
    (digest, losses), (whole_digest, whole_losses) = remains(output), whole
    same = set(losses) <= set(whole_losses) if fault.mute else losses == whole_losses
    equal = same and digest == whole_digest
    quick = fault.told == "" or (detected is not None and detected < fault.within)
    lost = max(0, min(fault.step, STEPS) - resumed[-1]) if resumed else 0
    if fault.code == 75 or not resumed:
        lost = 0
    wrong = [
        *([f"ended with {attempts[0].code}"] if attempts[0].code != fault.code else []),
        *([f"then with {attempts[-1].code}"] if attempts[-1].code else []),
        *(["not told in time"] if not quick else []),
        *(["not equal"] if not equal else []),
        *([f"lost {lost} steps"] if lost > SAVE_EVERY else []),
        *(["a traceback"] if any("Traceback" in line for _, line in lines) else []),
    ]
    return {
        "fault": fault.text,
        "detected": detected if fault.told else None,
        "recovered": after[0] if after else None,
        "lost": lost,
        "equal": equal,
        "code": attempts[0].code,
        "wrong": ", ".join(wrong),
    }


def row(cells: dict[str, Any]) -> str:
    seconds = [f"{cells[k]:.1f} s" if cells[k] is not None else "" for k in _TIMES]
    equal = "yes" if cells["equal"] else "NO"
    wrong = f" {cells['wrong']} |" if cells["wrong"] else ""
    code = cells["code"]
    return (
        f"| {cells['fault']} | {' | '.join(seconds)} | {cells['lost']} | {code} | {equal} |{wrong}"
    )


_TIMES = ("detected", "recovered")


def main() -> int:
    """Print the table; 1 where a row is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="rows")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which are kept")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if fault.name in options.only]
    if os.geteuid() != 0:
        chosen = [fault for fault in chosen if fault.name != "disk"]
        print("the row `disk` is left out: mounting a small disk needs root", file=sys.stderr)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        launch(folder / "whole", "none:0:0", folder / "moment")
        whole = remains(folder / "whole")
        print(
            f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, two gloo ranks, {STEPS} steps,"
        )
        print(f"a checkpoint every {SAVE_EVERY}, watchdog.timeout={TIMEOUT:g}\n")
        print("| fault | told after | next step after | steps done again | exit code | equal |")
        print("|---|---|---|---|---|---|", flush=True)
        for fault in chosen:
            cells = check(fault, folder / fault.name, whole)
            failed += bool(cells["wrong"])
            print(row(cells), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
