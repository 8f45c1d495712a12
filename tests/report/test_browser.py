"""The page in a real browser: its script runs, its policy holds, and both schemes are drawn."""

import shutil
import subprocess

import numpy as np
import pytest

from opensora.report.page import write_report
from tests.report.conftest import parse, write_samples

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--enable-logging=stderr --virtual-time-budget=1000"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]


def browse(page, folder, *options):
    """What chromium printed: (standard output, its log)."""
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), *OPTIONS.split(), profile, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout, done.stderr


def problems(log):
    return [line for line in log.splitlines() if "CONSOLE" in line]


def test_the_script_runs_under_the_pages_own_policy(tree, tmp_path):
    text, log = browse(write_report(tree), tmp_path, "--dump-dom")
    assert problems(log) == []
    page = parse(text)
    assert "scripted" in page.one("html").attributes["class"]
    assert "pause videos" in page.one("nav").text
    assert not page.all("g", class_="columns")
    assert len(page.all("div", class_="tip")) == len(page.all("figure", class_="chart"))


def test_linked_videos_are_allowed_by_the_policy(tree, tmp_path):
    _, log = browse(write_report(tree, max_bytes=0), tmp_path, "--dump-dom")
    assert problems(log) == []


def test_a_script_in_a_prompt_does_not_run_even_as_markup(tmp_path):
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    write_samples(tmp_path / "samples", [{"file": "a.mp4", "prompt": "PROMPT", "seed": 0}])
    page = write_report(tmp_path)
    # As if escaping had failed: the policy is the second wall.
    page.write_text(page.read_text(encoding="utf-8").replace(">PROMPT<", f">{evil}<"))
    text, log = browse(page, tmp_path, "--dump-dom")
    assert parse(text).one("head").one("title").text != "owned"
    assert any("Content Security Policy" in line for line in problems(log))


def test_light_and_dark_are_both_drawn(tree, tmp_path):
    from PIL import Image

    page = write_report(tree)
    pictures = []
    for scheme in ("1", "0"):
        shot = tmp_path / f"{scheme}.png"
        options = (f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}")
        browse(page, tmp_path, *options, "--window-size=700,800")
        pictures.append(np.asarray(Image.open(shot).convert("RGB"), np.float32))
    light, dark = (np.median(picture, axis=(0, 1)) for picture in pictures)
    assert light.min() > 235
    assert dark.max() < 40
    for picture in pictures:
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
