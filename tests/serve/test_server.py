"""`opensora serve` for real: a process, a socket of the system's choice, a signal, an exit code."""

from __future__ import annotations

import io
import signal
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from opensora.cli.main import invoke
from opensora.errors import UsageError
from opensora.serve import server
from opensora.serve.config import ServeConfig, read_token
from tests.serve.conftest import PATIENCE, TOKEN


def wait_for(http, name, done):
    """A job once `done(job)`."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        job = http.get(f"/v1/videos/{name}").json()
        if done(job):
            return job
        time.sleep(0.05)
    raise AssertionError(f"{name} is {job['status']} at step {job['step']}")


def test_a_video_is_asked_for_over_http_and_its_command_draws_the_same(
    start, tmp_path, monkeypatch, capsys
):
    import shlex

    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), (200, 40, 40), np.uint8)).save(file, "PNG")
    process, address = start()
    with httpx.Client(base_url=address, timeout=PATIENCE) as http:
        assert http.get("/health").json() == {"status": "ok"}
        page = http.get("/")
        assert "script-src 'self'" in page.headers["content-security-policy"]
        form = {"prompt": "--a 'red' $(square)", "seed": "3", "steps": "2"}
        answer = http.post(
            "/v1/videos", data=form, files={"input_reference": ("x", file.getvalue())}
        )
        job = wait_for(http, answer.json()["id"], lambda job: job["completed_at"] is not None)
        assert job["status"] == "completed"
        video = http.get(f"/v1/videos/{job['id']}/content").content
        picture = http.get(f"/v1/videos/{job['id']}/input_reference").content
        part = http.get(f"/v1/videos/{job['id']}/content", headers={"range": "bytes=0-9"})
        assert (part.status_code, part.content) == (206, video[:10])
        assert 'opensora_finished_total{outcome="completed"} 1' in http.get("/metrics").text
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference.png").write_bytes(picture)
    words = shlex.split(job["command"])
    assert words[0] == "opensora"
    assert invoke([*words[1:2], "--output", "same", "--device", "cpu", *words[2:]]) == 0
    (same,) = (tmp_path / "same").glob("*.mp4")
    assert same.read_bytes() == video


def test_a_signal_stops_a_running_job_which_the_next_start_finishes(start):
    process, address = start("--set", "max_steps=100000", "--set", "max_work=10000000000")
    with httpx.Client(base_url=address, timeout=PATIENCE) as http:
        name = http.post("/v1/videos", json={"prompt": "long", "steps": 100_000}).json()["id"]
        wait_for(http, name, lambda job: job["step"] > 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75
    _, address = start()
    with httpx.Client(base_url=address, timeout=PATIENCE) as http:
        assert http.get("/v1/videos").json()["data"][0]["id"] == name
        assert http.delete(f"/v1/videos/{name}").status_code == 200


def test_other_machines_need_a_token(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("OPENSORA_SERVE_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.168.0.5", "gpu.example"):
        assert invoke(["serve", str(tmp_path), "--host", host]) == 64
        assert "a token is needed" in capsys.readouterr().err
        ServeConfig(host=host).check_exposure(TOKEN)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        ServeConfig(host=host).check_exposure(None)


@pytest.mark.parametrize(
    "text", ["", "short", "a token with spaces in it", "x" * 20 + "\n" + "y" * 20]
)
def test_a_weak_token_is_refused(text, tmp_path):
    (tmp_path / "token").write_text(text)
    with pytest.raises(UsageError, match="at least 16"):
        read_token(tmp_path / "token")


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENSORA_SERVE_TOKEN", "from-the-environment")
    assert read_token(None) == "from-the-environment"
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(tmp_path / "token") == TOKEN
    with pytest.raises(UsageError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_a_taken_port_is_one_line():
    with server.listen(ServeConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match="choose another --host or --port"):
            server.listen(ServeConfig(port=port))
