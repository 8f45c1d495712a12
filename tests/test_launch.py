"""The launchers: the run's own exit code, signals that arrive, requests that are refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from opensora.cli.launch import outcome

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
DATA = (
    "data={kind: synthetic, num_samples: 64, buckets: {resolutions: {32px: {5: {batch_size: 4}}}, "
    'aspect_ratios: ["1:1"], fps: 8}}'
)

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("launch")]


TEXT = {"capture_output": True, "text": True}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **more}


def training(output: Path, *overrides: str) -> list[str]:
    config = str(ROOT / "configs/tiny/stdit.yaml")
    return [config, DATA, "task.vae_from=null", f"output={output}", "log.bar=true", *overrides]


def start(script: str, *arguments: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(SCRIPTS / script), *arguments],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def stop_in_the_middle(process: subprocess.Popen, output: Path, *, one_rank: bool = False) -> str:
    """SIGTERM to the script once a run has made steps and was asked to save; what it printed.

    Args:
        one_rank: SIGTERM goes to the last rank alone.
    """
    deadline = time.monotonic() + 120
    metrics = output / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    while not list((output / "checkpoints").glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)
    if one_rank:
        (launcher,) = children(process.pid)
        os.kill(max(children(launcher)), signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired as error:
        family = subprocess.run(["ps", "-eo", "pid,ppid,stat,wchan,etimes,args"], **TEXT).stdout
        pytest.fail(f"not ended after 120 s\n{error.stdout}\n{family}")


def test_a_run_that_is_told_to_stop_ends_with_75_and_goes_on(tmp_path):
    output = tmp_path / "a run"
    process = start("train.sh", *training(output, "steps=4000"), NPROC="2")
    told = stop_in_the_middle(process, output, one_rank=True)
    assert process.returncode == 75, told
    assert "--nproc-per-node 2 --standalone" in told
    saved = sorted((output / "checkpoints").glob("step-*"))[-1]
    steps = int(saved.name.removeprefix("step-")) + 3
    more = training(output, f"steps={steps}", "resume_despite=[steps]")
    again = start("train.sh", *more, NPROC="2")
    told = again.communicate(timeout=200)[0]
    assert again.returncode == 0, told
    assert f"resumed {saved}" in told


def test_a_refusal_keeps_its_code_and_is_not_tried_again(tmp_path):
    process = start("train.sh", *training(tmp_path, "parallel.ring=3"), NPROC="1", MAX_RESTARTS="3")
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 64, told
    assert told.count("ring=3 = 3 ranks, but there are 1") == 1
    nothing = start("train.sh")
    assert "name a config" in nothing.communicate(timeout=120)[0]
    assert nothing.returncode == 64


def test_a_job_that_is_told_to_stop_goes_back_into_the_queue(tmp_path):
    """Slurm's own commands are stood in for: srun runs its one task here."""
    tools, log = tmp_path / "bin", tmp_path / "scontrol.log"
    tools.mkdir()
    stand_ins = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 exec "$@"\n',
        "scontrol": f'echo "$@" >>"{log}"\n[[ $1 == requeue ]] || echo localhost\n',
    }
    for name, text in stand_ins.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tools / name).chmod(0o755)
    slurm = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
    }
    output = tmp_path / "run"
    process = start("slurm.sh", *training(output, "steps=4000"), **slurm)
    told = stop_in_the_middle(process, output)
    assert process.returncode == 75, told
    assert log.read_text().splitlines() == ["show hostnames localhost", "requeue 7"]


def test_a_kubernetes_job_says_what_its_pods_run():
    words = [
        "video-1",
        "registry/opensora:1",
        "4",
        "configs/stdit/819k.yaml",
        'task.model={a: "b"}',
    ]
    process = start("kubernetes.sh", *words, GPUS="2")
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert service["metadata"]["name"] == pod["subdomain"] == "video-1"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert container["command"] == ["bash", "/opensora/scripts/train.sh", *words[3:]]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["MASTER_ADDR"] == "video-1-0.video-1"
    assert (values["NNODES"], values["NPROC"]) == ("4", "2")
    for wrong in (["Bad_Name", "i", "1", "c"], ["name", "i", "none", "c"], ["name"]):
        refused = start("kubernetes.sh", *wrong)
        refused.communicate(timeout=120)
        assert refused.returncode == 64


@pytest.mark.parametrize(
    ("lines", "failed", "stopped", "code"),
    [
        (["0 0", "0 0"], False, False, 0),
        (["0 75", "0 75"], False, False, 75),
        (["0 75", "0 0"], False, True, 75),
        (["0 69", "0 71"], False, False, 71),
        (["0 69"], True, False, 69),
        (["0 124", "0 69"], True, False, 124),
        (["0 69", "1 0", "1 0"], False, False, 0),  # the second attempt came to its end
        (["0 75"], True, False, 1),  # stopped because another rank crashed
        ([], True, False, 1),
        ([], False, True, 75),
    ],
)
def test_the_launcher_ends_with_the_code_that_says_most(lines, failed, stopped, code):
    assert outcome(lines, failed=failed, stopped=stopped) == code
