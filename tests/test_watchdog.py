"""A rank without progress is found, written down and ended; one with progress is left alone."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch.distributed

from opensora import peers as peers_module
from opensora.errors import LostRank, OutOfMemory
from opensora.peers import Mark, Peers, birth, ending_alike, node
from opensora.watchdog import Watchdog, WatchdogConfig, verdict, watching

LIMIT = 1.0
LONG_LIMIT = 60.0
START = 10.0
"""What a busy machine may take for an interpreter."""

BEGIN = f"""
    import ctypes, sys, time
    from pathlib import Path
    from opensora.peers import Peers
    from opensora.watchdog import WatchdogConfig, watching

    def sleep_for_ever():
        time.sleep(600)

    def hold_the_lock():
        ctypes.PyDLL(None).sleep(600)

    config = WatchdogConfig(timeout={LIMIT}, long_timeout={LONG_LIMIT})
    with watching(config, Peers(), Path(sys.argv[1])) as watchdog:
"""


def run(body: str, folder: Path) -> tuple[int, str, float]:
    """Exit code, stderr and seconds of a process of one rank."""
    code = textwrap.dedent(BEGIN) + textwrap.indent(textwrap.dedent(body), "    ")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE, text=True, timeout=60
    )
    return done.returncode, done.stderr, time.monotonic() - began


def test_a_rank_that_sleeps_is_written_down_and_ended_with_124(tmp_path):
    code, told, seconds = run('watchdog.at(7, "data")\nsleep_for_ever()', tmp_path)
    assert (code, told.count("\n")) == (124, 1)
    assert "no progress for 1 s, rank 0 is behind: rank 0 at step 7, data" in told
    assert "sleep_for_ever" in told
    assert seconds < START + LIMIT + 15
    stacks = (tmp_path / "hang/rank-0.txt").read_text()
    assert "in sleep_for_ever" in stacks
    assert stacks.count("Thread 0x") + stacks.count("Current thread 0x") >= 2


def test_a_rank_that_holds_the_lock_is_written_down_and_ended(tmp_path):
    """No Python code can run then, so the code is that of the timer in C: 1."""
    code, _, seconds = run('watchdog.at(7, "compute")\ntime.sleep(0.3)\nhold_the_lock()', tmp_path)
    assert code == 1
    assert seconds < START + LIMIT + 15
    assert "in hold_the_lock" in (tmp_path / "hang/rank-0.txt").read_text()


def test_a_rank_that_holds_the_lock_right_after_a_long_stage_has_the_short_time(tmp_path):
    """The thread that watches could not look again in between."""
    code, _, seconds = run(
        """
        watchdog.at(7, "checkpoint", long=True)
        time.sleep(0.2)
        watchdog.at(8, "data")
        hold_the_lock()
        """,
        tmp_path,
    )
    assert code == 1
    assert seconds < START + LIMIT + 15


def test_a_rank_with_progress_is_left_alone_and_leaves_nothing(tmp_path):
    body = """
        for step in range(8):
            watchdog.at(step, "compute")
            time.sleep(0.3)
        watchdog.at(9, "checkpoint", long=True)
        time.sleep(1.8)
    """
    assert run(body, tmp_path)[:2] == (0, "")
    assert not (tmp_path / "hang").exists()


def test_nobody_watches_with_a_timeout_of_0(tmp_path):
    with watching(WatchdogConfig(timeout=0), Peers(), tmp_path) as watchdog:
        watchdog.at(1, "compute")
        assert not watchdog._thread.is_alive()
    assert not list(tmp_path.iterdir())


def test_telling_where_one_is_costs_next_to_nothing(tmp_path):
    """A step tells a handful of times; 20 us would be 0.1 % of a step of 100 ms."""
    watchdog = Watchdog(WatchdogConfig(), Peers(), tmp_path)
    rounds = []
    for _ in range(20):
        began = time.perf_counter()
        for step in range(500):
            watchdog.at(step, "compute")
        rounds.append((time.perf_counter() - began) / 500)
    assert min(rounds) < 20e-6


def mark(step: int, stage: int = 2, where: str = "in model.py:1 f", **changes) -> Mark:
    now = time.time()
    values = {
        "since": now - 5,
        "limit": 1.0,
        "told": now,
        "host": "here",
        "node": "",
        "pid": 1,
        "born": "1",
    }
    return Mark(step, stage, "compute", **{**values, "where": where, **changes})


WAITING = "waiting for others in distributed_c10d.py:1 all_reduce"


@pytest.mark.parametrize(
    ("marks", "behind"),
    [
        ({0: mark(7, where=WAITING), 1: mark(7)}, "rank 1 is behind"),
        ({0: mark(7), 1: mark(8, where=WAITING)}, "rank 0 is behind"),
        ({0: mark(7, where=WAITING), 1: mark(7, where="")}, "rank 1 is behind"),
        ({0: mark(7, stage=1), 1: mark(7, stage=2)}, "rank 0 is behind"),
        ({0: mark(7), 1: mark(7)}, "ranks 0, 1 are behind"),
    ],
)
def test_who_is_behind_is_told(marks, behind):
    assert behind in verdict(marks)
    assert verdict(marks).startswith("no progress for 5 s, ")


@pytest.mark.parametrize(
    ("step", "limit", "awaited"),
    [
        (7, 60.0, True),  # as far, and has its time
        (6, 60.0, True),
        (8, 60.0, False),  # further: it waits for this rank
        (7, 1.0, False),
    ],
)
def test_a_rank_that_may_take_its_time_is_waited_for(step, limit, awaited, tmp_path):
    store = torch.distributed.HashStore()
    first, second = Peers(0, 2, store), Peers(1, 2, store)
    second.tell(mark(step, limit=limit))
    assert Watchdog(WatchdogConfig(), first, tmp_path)._awaits_somebody(mark(7)) is awaited


def test_one_rank_ends_the_others_with_its_line_and_code():
    store = torch.distributed.HashStore()
    first, second = Peers(0, 2, store), Peers(1, 2, store)
    with pytest.raises(OutOfMemory), ending_alike(second):
        raise OutOfMemory("out of memory in step 3")
    with (
        pytest.raises(LostRank, match=r"^rank 1: out of memory in step 3$") as caught,
        ending_alike(first),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    assert caught.value.exit_code == 71


def test_a_rank_that_was_killed_is_named(monkeypatch):
    monkeypatch.setattr(peers_module, "WORDS_SECONDS", 0.5)
    store = torch.distributed.HashStore()
    first, second = Peers(0, 2, store), Peers(1, 2, store)
    first.tell(mark(8))
    second.tell(mark(7, pid=4242, host="node1"))
    told = r"lost rank 1 \(process 4242 on node1, step 7"
    with pytest.raises(LostRank, match=told) as caught, ending_alike(first):
        raise torch.distributed.DistBackendError("NCCL: remote process exited")
    assert caught.value.exit_code == 69


def test_an_error_of_this_rank_stays_what_it_is():
    with pytest.raises(KeyError), ending_alike(Peers(0, 2, torch.distributed.HashStore())):
        raise KeyError("x")


def test_a_process_that_is_gone_is_known_by_its_birth():
    child = subprocess.Popen(["sleep", "60"])
    born = birth(child.pid)
    mine = mark(1, node=node(), pid=child.pid, born=born)
    assert not mine.is_dead()
    child.kill()
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert mine.is_dead()  # a zombie does nothing any more
    child.wait()
    assert mine.is_dead()
    assert not mark(1, node="elsewhere", pid=child.pid, born=born).is_dead()


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch):
    class Stuck:
        def set(self, *words):
            time.sleep(3)
            raise RuntimeError

    monkeypatch.setattr(peers_module, "PATIENCE_SECONDS", 0.1)
    peers = Peers(0, 2, Stuck())  # type: ignore[arg-type]
    began = time.monotonic()
    for _ in range(20):
        assert peers.tell(mark(1)) is False
    assert peers.marks() == {}
    assert time.monotonic() - began < 1
