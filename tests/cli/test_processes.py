"""Training as a process that is told to stop, killed, and started again by the same command."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from opensora.cli.main import invoke
from opensora.engine import checkpoint

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
STEPS = 60

pytestmark = pytest.mark.xdist_group("cli-processes")


def command(world, output: Path, *overrides: str) -> list[str]:
    return [
        "train",
        str(TINY / "stdit.yaml"),
        *world.overrides("stdit", output),
        f"steps={STEPS}",
        "checkpoint.every=10",
        "validation.every=20",
        *overrides,
    ]


class Process:
    """`python -m opensora` in a process of its own; its bar tells each twentieth of the way."""

    def __init__(self, arguments: list[str], **options):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "opensora", *arguments, "log.bar=true"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )
        self.lines: list[str] = []

    def wait_for(self, step: int) -> None:
        """Until the run tells that a step is done."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line)
            if f" {step}/{STEPS} " in line:
                return
        raise AssertionError("".join(self.lines))

    def end(self) -> tuple[int, str]:
        _, rest = self.popen.communicate(timeout=120)
        return self.popen.returncode, "".join(self.lines) + rest


def state(output: Path) -> dict[str, bytes]:
    """The newest checkpoint's tensors as they lie on the disk, and its counts."""
    folder = checkpoint.find(output)
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    progress = json.loads((folder / "progress.json").read_text())
    return {**found, "progress": {k: v for k, v in progress.items() if k != "seconds"}}


def losses(output: Path) -> list[tuple[str, int, float]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["kind"], record["step"], record["loss"]) for record in records]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert invoke(command(world, output)) == 0
    return output


def test_a_run_that_is_stopped_and_killed_ends_as_the_one_that_is_not(
    uninterrupted, world, tmp_path
):
    output = tmp_path / "run"
    arguments = command(world, output)

    first = Process(arguments)
    first.wait_for(6)
    first.popen.send_signal(signal.SIGUSR1)
    first.wait_for(15)
    first.popen.send_signal(signal.SIGTERM)
    code, told = first.end()
    assert code == 75
    assert "run the same command to go on" in told
    assert "Traceback" not in told
    stopped_at = checkpoint.load(checkpoint.find(output)).step
    assert 15 <= stopped_at < STEPS

    second = Process(arguments)
    second.wait_for(min(STEPS - 3, stopped_at - stopped_at % 3 + 12))
    second.popen.send_signal(signal.SIGKILL)
    code, told = second.end()
    assert code == -signal.SIGKILL
    assert f"at step {stopped_at} of {STEPS}" in told

    assert invoke(arguments) == 0
    assert state(output) == state(uninterrupted)
    assert losses(output) == losses(uninterrupted)


def test_a_disk_that_fills_up_ends_the_run_with_74_and_keeps_what_was_saved(world, tmp_path):
    """The weights no longer fit into the largest file that the process may write."""
    output = tmp_path / "run"
    assert invoke(command(world, output, "steps=10", "validation.every=0")) == 0
    before = state(output)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = command(world, output, "steps=14", "resume_despite=[steps]")
    code, told = Process(arguments, preexec_fn=limit).end()
    assert code == 74, told
    assert "Traceback" not in told
    assert "weights.safetensors cannot be written" in told
    assert state(output) == before
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["latest", "step-000010"]


@pytest.mark.dist
def test_torchrun_stops_all_ranks_and_they_go_on_alone(uninterrupted, world, tmp_path):
    """Two ranks under torchrun, stopped by the signal that a scheduler sends to the launcher."""
    output = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += [f"--master-port={port}", "-m", "opensora"]
    process = subprocess.Popen(
        [*launcher, *command(world, output), "log.bar=true"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if f" 12/{STEPS} " in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    stopped_at = checkpoint.load(checkpoint.find(output)).step
    assert 12 <= stopped_at < STEPS
    assert invoke(command(world, output)) == 0
    # Sums over ranks round differently than sums over a batch, for `stopped_at` steps.
    for (kind, step, mine), (*same, theirs) in zip(
        losses(output), losses(uninterrupted), strict=True
    ):
        assert [kind, step] == same
        assert mine == pytest.approx(theirs, rel=1e-3)
