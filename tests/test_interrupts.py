"""A signal is not lost where C code swallows the exception that it raises."""

import subprocess
import sys


def run(body: str) -> str:
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr.splitlines()[-1]


SWALLOWED = """
import os, signal, weakref
from opensora import interrupts
interrupts.listen()
class Thing: pass
thing = Thing()
reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.{signal}))
del thing
print("went on", flush=True)
{then}
print("never")
"""


def test_both_signals_end_a_command_as_ctrl_c_does():
    for name in ("SIGTERM", "SIGINT"):
        code = "import os, signal\nfrom opensora import interrupts\ninterrupts.listen()\n"
        assert run(code + f"os.kill(os.getpid(), signal.{name})") == "KeyboardInterrupt"


def test_one_whose_exception_was_dropped_by_a_callback_comes_again_and_nothing_is_told():
    body = SWALLOWED.format(signal="SIGTERM", then="import time; time.sleep(60)")
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=50)
    assert done.stdout == "went on\n"
    assert done.stderr.count("Traceback") == 1  # the one of the exception that ends it
    assert "ignored" not in done.stderr
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_what_others_drop_is_told_as_before():
    body = "from opensora import interrupts\ninterrupts.listen()\ninterrupts.listen()\n"
    told = run(body + "class A:\n  def __del__(self): raise ValueError('dropped')\nA()")
    assert told == "ValueError: dropped"


def test_one_whose_exception_was_swallowed_ends_what_would_wait_for_others():
    waits = {
        "join": "import torch, datetime, opensora.meeting as m\n"
        "m.join(torch.device('cpu'), 0, 2, datetime.timedelta(seconds=100))",
        "listen": "from opensora.train.signals import listening\nwith listening(): print('never')",
    }
    for then in waits.values():
        body = SWALLOWED.replace("class Thing", "interrupts._again = int\nclass Thing")
        told = run(body.format(signal="SIGTERM", then=then))
        assert told == "went on\nKeyboardInterrupt"
