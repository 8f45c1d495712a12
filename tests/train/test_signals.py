"""Signals are wishes: told once or for ever, and handlers go when the block ends."""

import os
import signal
import subprocess
import sys

import pytest
from train_support import toy_trainer

from opensora.errors import Preempted
from opensora.train.signals import Asked, Requests, listening


def test_a_wish_to_save_is_told_once_and_a_wish_to_stop_for_ever():
    with listening() as requests:
        assert requests.take() == Asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.take() == Asked(save=True)
        assert requests.take() == Asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.take() == Asked(stop=True)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.take() == Asked(stop=True, save=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_ways_to_stop_are_heard(number):
    with listening() as requests:
        os.kill(os.getpid(), number)
        assert requests.take().stop


def test_the_old_handlers_come_back():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with listening():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_stop_signal_ends_the_process_at_once_with_75():
    code = (
        "import os, signal, time\n"
        "from opensora.train.signals import listening\n"
        "with listening():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(30)\n"
        "print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (75, "first\n")


def test_a_stop_before_the_first_step_saves_nothing(tmp_path):
    requests = Requests(stops=1)
    trainer = toy_trainer(tmp_path / "run", "steps=4", requests=requests)
    with pytest.raises(Preempted, match="before the first step"):
        trainer.run()
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert trainer.task.decisions == []


def test_a_wish_to_save_makes_a_checkpoint_and_the_run_goes_on(tmp_path):
    requests = Requests(saves=1)
    options = ("steps=4", "checkpoint.every=0", "checkpoint.keep=9")
    trainer = toy_trainer(tmp_path / "run", *options, requests=requests)
    trainer.run()
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("step-*"))
    assert kept == ["step-000001", "step-000004"]


def test_a_stop_comes_before_validation_and_samples(tmp_path):
    """A scheduler gives seconds; measuring could take minutes."""
    requests = Requests()
    options = ("steps=4", "validation.every=2")
    trainer = toy_trainer(tmp_path / "run", *options, validation_sizes=(2,), requests=requests)
    trainer.task.decided = lambda accepted: setattr(requests, "stops", 1)
    trainer.validate = lambda: pytest.fail("measured first")
    with pytest.raises(Preempted, match="after step 2 of 4"):
        trainer.run()
    assert (tmp_path / "run/checkpoints/step-000002").is_dir()
