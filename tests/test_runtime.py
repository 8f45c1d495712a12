"""Where a process runs, and randomness that depends on its address alone."""

import os
import subprocess
import sys
import textwrap
from datetime import timedelta

import numpy as np
import pytest
import torch

from opensora import meeting, runtime
from opensora.errors import UsageError


@pytest.fixture
def launcher(monkeypatch):
    """An environment without a launcher's variables; returns the way to set some."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield monkeypatch.setenv
    torch.set_num_threads(threads)


def test_without_a_launcher_a_process_stands_alone(launcher):
    alone = runtime.start("cpu")
    assert (alone.rank, alone.world_size, alone.device.type) == (0, 1, "cpu")
    assert alone.is_main
    values = torch.arange(3.0)
    assert alone.all_reduce(values) is values
    alone.barrier()
    alone.close()
    alone.close()


def test_ranks_on_one_machine_share_its_cores(launcher, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher("LOCAL_WORLD_SIZE", "4")
    runtime.start("cpu")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    launcher("OMP_NUM_THREADS", "1")
    runtime.start("cpu")
    assert torch.get_num_threads() == 1


def test_bad_devices_and_launchers_are_refused(launcher):
    with pytest.raises(UsageError, match="'quantum' is not usable"):
        runtime.pick_device("quantum")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="'cuda' is not usable"):
            runtime.pick_device("cuda")
    launcher("RANK", "first")
    with pytest.raises(UsageError, match="RANK is 'first'"):
        runtime.start("cpu")


def test_an_address_depends_on_every_part_and_never_changes():
    golden = runtime.address(0, "noise", 1, 2)
    assert golden == 7444058354673907437
    others = [
        runtime.address(1, "noise", 1, 2),
        runtime.address(0, "noises", 1, 2),
        runtime.address(0, "noise", 2, 1),
        runtime.address(0, "noise", 1),
        runtime.address(0, "noise", 1, 2, 0),
        runtime.address(-1, "noise", 1, 2),
    ]
    assert len({golden, *others}) == 7
    assert all(0 <= value < 2**63 for value in (golden, *others))


def test_a_samples_noise_does_not_depend_on_its_neighbours():
    together = runtime.noise((2, 3), [5, 6, 7], seed=1, purpose="noise", step=4)
    alone = runtime.noise((2, 3), torch.tensor([6]), seed=1, purpose="noise", step=4)
    assert together.shape == (3, 2, 3)
    assert together.dtype == torch.float32
    assert torch.equal(together[1:2], alone)
    for other in (
        runtime.noise((2, 3), [6], seed=2, purpose="noise", step=4),
        runtime.noise((2, 3), [6], seed=1, purpose="noise", step=5),
        runtime.noise((2, 3), [6], seed=1, purpose="timesteps", step=4),
    ):
        assert not torch.equal(alone, other)


def test_noise_over_many_samples_is_standard_normal():
    values = runtime.noise((64,), range(1000), seed=0, purpose="noise")
    # Mean and variance of 64,000 draws: five standard errors are 0.020 and 0.028.
    assert abs(float(values.mean())) < 0.020
    assert abs(float(values.var()) - 1) < 0.028
    first = values[:, 0]
    # The first draws of consecutive ids are independent: the correlation's error is 1/sqrt(999).
    correlation = torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]
    assert abs(float(correlation)) < 5 / 999**0.5


def test_uniform_numbers_are_addressed_and_in_range():
    values = runtime.uniform(range(500), seed=3, purpose="crop", step=1, count=2)
    assert values.shape == (500, 2)
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    assert abs(float(values.mean()) - 0.5) < 5 / (12 * 1000) ** 0.5
    assert torch.equal(
        runtime.uniform([77], seed=3, purpose="crop", step=1, count=2)[0], values[77]
    )


def test_fractions_are_a_fixed_function_of_address_and_id():
    ids = np.arange(100_000)
    values = runtime.fractions(ids, 0, "keep", 3)
    assert values[:3] == pytest.approx(
        [0.011557758218161962, 0.7035724627302322, 0.4410076830382311], abs=1e-15
    )
    assert np.array_equal(runtime.fractions(ids[500:600], 0, "keep", 3), values[500:600])
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    assert len(np.unique(values)) == len(values)
    # 20 equal bins of 5,000: chi-square with 19 degrees of freedom is below 50 but once in 10,000.
    counts = np.bincount((values * 20).astype(int), minlength=20)
    assert ((counts - 5000) ** 2 / 5000).sum() < 50
    for other in (
        runtime.fractions(ids, 1, "keep", 3),
        runtime.fractions(ids, 0, "keep", 4),
        runtime.fractions(ids, 0, "order", 3),
        runtime.fractions(ids + 1, 0, "keep", 3),
    ):
        assert abs(np.corrcoef(values, other)[0, 1]) < 5 / len(ids) ** 0.5


def test_a_restarted_attempt_does_not_see_the_addresses_of_the_dead(monkeypatch):
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(agent.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    places = []
    for attempt in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        places.append(meeting._meeting_place("peers", timedelta(seconds=10)))
    places[0].set("address", "of a rank")
    assert [place.check(["address"]) for place in places] == [True, True, False]


RANKS = """
    import os, signal, sys
    import torch
    from opensora import meeting, runtime
    place = runtime.start("cpu", timeout_seconds=30)
    mine = torch.tensor([1.0 + place.rank])
    total = float(place.all_reduce(mine))
    largest = float(place.all_reduce(mine, "max"))
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    place.barrier()
    place.close()
    name = f"restart{os.environ['TORCHELASTIC_RESTART_COUNT']}-rank{place.rank}"
    open(os.path.join(sys.argv[1], name), "w").write(f"{total} {largest} {float(mine)}")
"""


@pytest.mark.dist
def test_two_ranks_reduce_and_meet_again_after_one_was_killed(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "--max-restarts=1", str(script), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = {path.name: path.read_text() for path in out.iterdir()}
    assert found == {"restart1-rank0": "3.0 2.0 1.0", "restart1-rank1": "3.0 2.0 2.0"}
