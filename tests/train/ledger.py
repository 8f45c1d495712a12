"""What a model really consumed over many attempts that died: `ledger.py OUT` writes OUT/*.json.

One process imports torch and forks the ranks of each attempt, which train a toy task on the real
plan, loader, trainer and checkpoints, and die as they are told. The model counts its own updates in
a buffer that is saved with its weights; the ledger says which samples it met at each count.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rich.progress  # noqa: F401  (these two would be imported by every forked rank)
import torch
import torch._dynamo
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from train_support import tiny

from opensora import runtime
from opensora.data import plan, sources
from opensora.engine import checkpoint, engines
from opensora.errors import Preempted
from opensora.train import optim
from opensora.train.progress import Progress
from opensora.train.run import share_work
from opensora.train.signals import listening
from opensora.train.tasks import StepLoss, Task
from opensora.train.trainer import Trainer
from opensora.types import LatentBatch

STEPS, EVERY = 60, 3
MOMENTS = ("forward", "update", "commit", "pointer", "signal")


@dataclass(frozen=True)
class Attempt:
    """A run of the same command that ends early.

    Attributes:
        world_size, num_workers: of this attempt.
        moment: when rank `victim` dies: in a forward pass, between an update and the next step,
            before a checkpoint's rename, or before its pointer; or when it is asked to stop. None
            runs to the end.
        steps: that this attempt makes before, where the moment is no checkpoint's.
    """

    world_size: int = 1
    num_workers: int = 0
    moment: str | None = None
    victim: int = 0
    steps: int = 0


def attempts(count: int, seed: int) -> list[Attempt]:
    """Random attempts that die, and one that goes to the end."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        world_size = draw.choice([1, 2, 4])
        moment = MOMENTS[number % len(MOMENTS)]
        on_main = moment in ("commit", "pointer")
        victim = 0 if on_main else draw.randrange(world_size)
        workers, steps = draw.choice([0, 2]), draw.randrange(1, 6)
        found.append(Attempt(world_size, workers, moment, victim, steps))
    return [*found, Attempt(2, 2)]


class Counting(Task):
    """A linear layer on latents; `clock` is how many updates its weights have had."""

    def __init__(self, told: Callable[[dict[str, Any]], None], act: Callable[[str], None]):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        self.told, self.act = told, act

    def forward(self, batch: LatentBatch, step: int) -> StepLoss:
        self.told({"clock": int(self.clock), "step": step, "ids": batch.sample_ids.tolist()})
        self.act("forward")
        mean = batch.latents.mean((2, 3, 4))
        per_sample = (self.layer(mean)[:, 0] - mean.sum(1)).square()
        count = torch.tensor(float(len(batch)))
        total = per_sample.sum()
        return StepLoss(total, count, per_sample.detach(), {"loss": (total.detach(), count)})

    def decided(self, *, accepted: bool) -> None:
        assert accepted
        self.clock += 1
        self.act("update")

    def validation(self, batch: Any) -> Any:
        raise NotImplementedError

    def tokens(self, batch: LatentBatch) -> int:
        return len(batch)

    def shape(self, batch: LatentBatch) -> dict[str, Any]:
        return {"num_frames": 1, "height": 8, "width": 8, "fps": 8.0}


def one_rank(folder: Path, mix: str, number: int, attempt: Attempt) -> None:
    """Train in this process until the attempt's moment."""
    place = runtime.start("cpu", timeout_seconds=60)
    path = folder / f"ledger-{place.rank}.jsonl"
    calls, asked = 0, False

    def told(entry: dict[str, Any]) -> None:
        with open(path, "a") as file:
            file.write(json.dumps({"attempt": number, "rank": place.rank, **entry}) + "\n")

    def act(moment: str) -> None:
        nonlocal calls, asked
        calls += moment == "update"
        due = calls >= attempt.steps and place.rank == attempt.victim
        if due and moment == attempt.moment:
            os.kill(os.getpid(), signal.SIGKILL)
        if due and (moment, attempt.moment) == ("forward", "signal") and not asked:
            asked = True  # a second signal would mean at once
            os.kill(os.getpid(), signal.SIGTERM)

    if place.is_main and attempt.moment in ("commit", "pointer"):
        _die_at("rename" if attempt.moment == "commit" else "replace")
    data = f"data={{kind: synthetic, mix: {mix}, num_samples: 50, num_workers: "
    data += f"{attempt.num_workers}, buckets: {{resolutions: {{32px: {{1: [1, 5], 5: [1, 6]}}}}, "
    data += 'aspect_ratios: ["1:1"]}}'
    every = f"checkpoint={{every: {EVERY}, keep: 2}}"
    config = tiny("stdit", folder / "run", data, f"steps={STEPS}", every)
    task = Counting(told, act)
    share = share_work(config, task, place)
    needs = sources.Needs((4, 8, 8), (1, 2, 2), 4, None, share.training, share.validation)
    source = sources.open_source(config.data, needs, seed=0)
    engine = engines.build(config.engine, place, share.mesh, precision=torch.float32)
    engine.wrap(task, partial(optim.build, config.optim))
    with listening() as requests:
        trainer = Trainer(
            config, runtime=place, task=task, engine=engine, source=source, requests=requests
        )
        trainer.state.resume()
        trainer.run()
    place.close()


def _die_at(call: str) -> None:
    """The process is killed at its first change of a name under `checkpoints`."""
    whole = getattr(os, call)

    def change(old: Any, new: Any, *args: Any, **options: Any) -> Any:
        if Path(new).parent.name == "checkpoints":
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(old, new, *args, **options)

    setattr(os, call, change)


def launch(folder: Path, mix: str, number: int, attempt: Attempt) -> list[int]:
    """Fork the ranks of an attempt and wait; when one dies the others are killed, as torchrun does.

    Returns:
        Exit codes by rank, negative for a signal.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = {}
    for rank in range(attempt.world_size):
        pid = os.fork()
        if pid == 0:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": attempt.world_size}
            numbers |= {"LOCAL_WORLD_SIZE": attempt.world_size, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in numbers.items()}
            os._exit(_code(partial(one_rank, folder, mix, number, attempt)))
        ranks[pid] = rank
    codes = [0] * attempt.world_size
    waiting = set(ranks)
    while waiting:
        pid, status = os.wait()
        waiting.discard(pid)
        codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if os.WIFSIGNALED(status):
            for other in waiting:
                os.kill(other, signal.SIGKILL)
    return codes


def _code(work: Callable[[], None]) -> int:
    try:
        work()
    except Preempted as error:
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def history(folder: Path, mix: str, plan_of_attempts: list[Attempt]) -> dict[str, Any]:
    """Make the attempts one after another.

    Returns:
        'consumed': for each count of updates what the model that was kept met: the step it was
        told and the sample ids by rank; 'codes' by attempt; 'starts', the count at which each
        attempt began; 'weights' at the end.
    """
    folder.mkdir(parents=True)
    codes = [launch(folder, mix, n, attempt) for n, attempt in enumerate(plan_of_attempts)]
    entries = [
        json.loads(line)
        for path in sorted(folder.glob("ledger-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    last: dict[int, int] = {}
    starts: dict[int, int] = {}
    for entry in entries:
        clock, number = entry["clock"], entry["attempt"]
        last[clock] = max(number, last.get(clock, 0))
        starts[number] = min(clock, starts.get(number, clock))
    consumed = {
        clock: [
            (entry["step"], entry["ids"])
            for entry in entries  # by rank, because the files are
            if (entry["clock"], entry["attempt"]) == (clock, number)
        ]
        for clock, number in sorted(last.items())
    }
    weights = checkpoint.load(checkpoint.find(folder / "run")).weights
    return {
        "consumed": [
            ({step for step, _ in met}.pop(), [i for _, ids in met for i in ids])
            for met in consumed.values()
        ],
        "codes": codes,
        "starts": [starts[n] for n in sorted(starts)],
        "weights": weights["layer.weight"].flatten().tolist(),
    }


def off_by_one() -> None:
    """Planted: a resume begins one step late."""
    restored = Progress.restored.__func__  # type: ignore[attr-defined]

    def late(cls: type, state: dict[str, Any]) -> Progress:
        return restored(cls, {**state, "step": state["step"] + 1})

    Progress.restored = classmethod(late)  # type: ignore[method-assign,assignment]


def forgets_a_batch() -> None:
    """Planted: what was read ahead when the run stopped is gone."""
    train = sources.Source.train

    def skipping(self: sources.Source, first_step: int) -> Iterator[Any]:
        iterator = train(self, first_step)
        if first_step:
            next(iterator)
        return iterator

    sources.Source.train = skipping  # type: ignore[method-assign]


def by_turns() -> None:
    """Planted: ranks take samples by turns, so that the order depends on how many there are."""

    def part(self: plan.Batch, rank: int, world_size: int) -> plan.Batch:
        own = slice(rank, None, world_size)
        return plan.replace(self, rows=self.rows[own], spares=self.spares[own])

    plan.Batch.part = part  # type: ignore[method-assign]


PLANTED = (off_by_one, forgets_a_batch, by_turns)
FEW = [Attempt(2, 0, "update", 1, 5), Attempt(1, 2, "signal", 0, 4), Attempt(1)]


def main(output: Path) -> None:
    found = {
        "undisturbed": history(output / "undisturbed", "steps", [Attempt()]),
        "disturbed": history(output / "disturbed", "steps", attempts(20, seed=0)),
        "undisturbed_mix": history(output / "undisturbed_mix", "clips", [Attempt()]),
        "disturbed_mix": history(output / "disturbed_mix", "clips", attempts(5, seed=1)),
    }
    for bug in PLANTED:
        name = bug.__name__
        pid = os.fork()
        if pid == 0:
            bug()
            os._exit(_code(partial(_write, output / name, FEW)))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, name
        found[name] = json.loads((output / name / "found.json").read_text())
    (output / "found.json").write_text(json.dumps(found))


def _write(folder: Path, plan_of_attempts: list[Attempt]) -> None:
    found = history(folder, "steps", plan_of_attempts)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # processes die here, not machines
    main(Path(sys.argv[1]))
