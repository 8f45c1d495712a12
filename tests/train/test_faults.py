"""What happens to one rank, all ranks end with; what is killed goes on as if it never was."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import ROOT, Ranks, metrics, training
from nodes import ADDRESSES, children, two_nodes, why_not
from train_support import digests

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("train-faults")]

OPTIONS = ("steps=24", "checkpoint.every=4", "checkpoint.keep=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run on two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    ranks = Ranks(training(folder / "run", *OPTIONS), folder)
    assert ranks.wait() == [0, 0], ranks.told(0) + ranks.told(1)
    return folder / "run"


def assert_equal(output: Path, whole: Path) -> None:
    assert digests(output) == digests(whole)
    assert metrics(output) == metrics(whole)


def kill_at_random(folder: Path, whole: Path, *, kills: int, seed: int) -> list[int]:
    """Kill one rank or both at random moments of a run until it has been done `kills` times; each
    run is tried again until it is done, and one that is done is followed by a fresh one.

    Returns:
        Steps at which an attempt went on.
    """
    chance, starts = random.Random(seed), []
    done, run, attempt = 0, 0, 0
    while True:
        attempt += 1
        assert attempt < 3 * kills, "runs end before they are killed"
        output = folder / f"run-{run}"
        ranks = Ranks(training(output, *OPTIONS), folder / f"attempt-{attempt}")
        if done < kills:
            wait_at_random(chance, ranks, output)
            ranks.kill(chance.choice([[0, 1], [0], [1]]))
        codes = ranks.wait()
        told = ranks.told(0) + ranks.told(1)
        assert "Traceback" not in told
        assert all(code in (0, 69, 75, -9, -15) for code in codes), (codes, told)
        starts += map(int, re.findall(r"resumed .* at step (\d+) of", told))
        done += -9 in codes
        if codes == [0, 0]:
            assert_equal(output, whole)
            if done == kills:
                return starts
            run += 1


def wait_at_random(chance: random.Random, ranks: Ranks, output: Path) -> None:
    """Until some moment while the ranks start, or after one of the next eight steps."""
    if chance.random() < 0.2:
        time.sleep(chance.uniform(0.0, 3.0))
        return
    saved = [int(p.name.removeprefix("step-")) for p in output.glob("checkpoints/step-*")]
    step = max(saved, default=0) + chance.randint(1, 8)
    while ranks.processes[0].is_alive():
        time.sleep(0.005)
        records = metrics(output)
        if records and step <= records[-1][0] < step + 8:  # not those of the attempt before
            break
    time.sleep(chance.uniform(0.0, 0.1))


def test_ten_random_kills_end_as_the_run_that_was_never_killed(whole, tmp_path):
    starts = kill_at_random(tmp_path, whole, kills=10, seed=0)
    assert any(starts), "no attempt went on from a checkpoint"


@pytest.mark.slow
def test_fifty_random_kills_end_as_the_run_that_was_never_killed(whole, tmp_path):
    starts = kill_at_random(tmp_path, whole, kills=50, seed=1)
    assert any(starts), "no attempt went on from a checkpoint"


def test_memory_that_one_rank_lacks_ends_all_ranks_with_one_report(whole, tmp_path):
    arguments = training(tmp_path / "run", *OPTIONS)
    ranks = Ranks(arguments, tmp_path, fault="memory:1:6")
    assert ranks.wait() == [71, 71]
    report = ranks.told(1).splitlines()[-1]
    assert ranks.told(0).splitlines()[-1] == report.replace("opensora: ", "opensora: rank 1: ")
    for part in (
        "out of memory in step 7 on rank 1: a batch of 2 x 5x32x32",
        "samples ",
        "peak 0.",
        "micro_batch=1",
        "recompute.policy=selective",
        "engine.kind=fsdp",
        "Tried to allocate 20.00 GiB",
    ):
        assert part in report
    assert Ranks(arguments, tmp_path).wait() == [0, 0]
    assert_equal(tmp_path / "run", whole)


def test_data_that_end_on_one_rank_end_all_ranks_with_65(tmp_path):
    ranks = Ranks(training(tmp_path / "run", *OPTIONS), tmp_path, fault="data-end:1:2")
    assert ranks.wait() == [65, 65]
    assert ranks.told(0).endswith("opensora: rank 1: the data ended at step 2 of 24\n")


def test_a_rank_that_hangs_in_c_is_named_and_all_ranks_end(tmp_path):
    """The watchdog of the rank itself cannot run. The others tell, after 15 s at the latest."""
    options = (*OPTIONS, "watchdog.timeout=4")
    ranks = Ranks(training(tmp_path / "run", *options), tmp_path, fault="hang-with-lock:1:6")
    while not (tmp_path / "moment").exists():
        time.sleep(0.05)
    began = time.time()
    codes = ranks.wait()
    assert time.time() - began < 4 + 15 + 10  # which a busy machine may take to end processes
    assert codes[0] == 124
    assert re.search(r"no progress for \d+ s, rank 1 is behind: rank 1 at step ", ranks.told(0))
    stacks = [(tmp_path / f"run/hang/rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "all_reduce" in stacks[0] or "_engine_run_backward" in stacks[0]
    assert "hang_with_the_lock" in stacks[1]


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_two_nodes_train_and_survive_the_death_of_a_rank(whole, tmp_path):
    """Two network namespaces, whose common host name leads to the loopback, where no other node
    can reach a rank: the interface has to be found."""
    output, script = tmp_path / "run", str(ROOT / "scripts/train.sh")
    variables = {"PYTHON": sys.executable, "NNODES": "2", "NPROC": "1", "MAX_RESTARTS": "1"}
    variables |= {"MASTER_ADDR": ADDRESSES[0], "OMP_NUM_THREADS": "1"}
    with two_nodes() as prefixes:
        nodes = [
            subprocess.Popen(
                [*prefix, "bash", script, *training(output, *OPTIONS)[1:]],
                env={**os.environ, **variables, "NODE_RANK": str(number)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, prefix in enumerate(prefixes)
        ]
        while not (output / "metrics.jsonl").exists() or len(metrics(output)) < 5:
            assert all(node.poll() is None for node in nodes), nodes[0].communicate()[1]
            time.sleep(0.01)
        (launcher,) = children(nodes[1].pid)
        (rank,) = children(launcher)
        os.kill(rank, signal.SIGKILL)
        told = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert f"lost rank 1 (process {rank}" in told[0]
    assert_equal(output, whole)
