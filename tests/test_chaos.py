"""`tools/chaos.py` itself: a short form of its table comes out as it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("launch")]


def table(*rows: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/chaos.py"), "--only", *rows],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_rank_that_hangs_under_torchrun_is_found_and_the_run_ends_as_without_it():
    told = table("hang")
    assert told.count("| yes |") == 1
    assert "| a rank sleeps |" in told


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.slow
def test_every_fault_comes_out_as_it_should():
    assert table(*ALL).count("| yes |") == len(ALL)


ALL = (
    *("hang", "hang-with-lock", "stop", "kill", "kill-at-start", "kill-at-end", "term-rank"),
    *("term-launcher", "save-rank", "save-launcher", "memory", "data-end", "nan", "disk"),
)
