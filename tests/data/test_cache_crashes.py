"""A latent cache survives the death of its writer at every step, and no flipped byte passes."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import cache_crashes
import pytest
from data_support import make_job

from opensora.data.encode import encode, publish
from opensora.data.latents import open_cache
from opensora.errors import DataError


@pytest.fixture(scope="module", params=["new", "update"])
def deaths(request, tmp_path_factory) -> dict:
    """For every change that the writer makes on the disk: what its death there left."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, str(Path(cache_crashes.__file__)), str(folder), request.param]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr[-3000:]
    *killed, finished = json.loads((folder / "found.json").read_text())
    assert finished["died"]["code"] == 0
    return {"action": request.param, "killed": killed, "whole": finished["died"]}


def test_at_every_step_the_cache_is_the_old_the_new_or_said_to_be_unfinished(deaths):
    assert len(deaths["killed"]) >= 20
    states = [result["died"]["state"] for result in deaths["killed"]]
    assert all(result["died"]["code"] == 137 for result in deaths["killed"])
    before = "unfinished" if deaths["action"] == "new" else "old"
    assert set(states) == {before, "new"}
    assert states == sorted(states, key=["unfinished", "old", "new"].index)  # and never back
    assert all(result["died"]["problems"] == [] for result in deaths["killed"])


def test_a_second_attempt_finishes_loses_nothing_and_repeats_nothing(deaths):
    for result in deaths["killed"]:
        again = result["again"]
        assert (again["code"], again["state"], again["problems"]) == (0, "new", [])
        assert again["rows"] == deaths["whole"]["rows"] == list(range(6))  # once in all shards
        assert again["encoded"] == 6 - result["died"]["kept"]  # what stood was not made again
        assert again["values"] == deaths["whole"]["values"]
        assert again["left"] == ["index"]
    # Some deaths came between two shards, so that there was something to keep.
    assert len({result["died"]["kept"] for result in deaths["killed"]}) >= 3


def read_everything(directory: Path) -> None:
    """What a check of the whole cache does."""
    cache = open_cache(directory)
    problems = cache.verify()
    if problems:
        raise DataError("; ".join(problems))
    for row in cache.entries:
        cache.latents(row)
        cache.features(row)


def test_200_flipped_bytes_are_found_and_the_file_or_tensor_named(tmp_path):
    job = make_job(tmp_path, num_rows=6)
    encode(job)
    publish(job)
    files = sorted(path for path in job.directory.rglob("*") if path.is_file())
    assert {path.name for path in files} == {"latents.safetensors", "entries.json", "manifest.json"}
    read_everything(job.directory)
    generator = random.Random(2)
    for number in range(200):
        file = files[number % len(files)]
        genuine = file.read_bytes()
        place = generator.randrange(len(genuine))
        damaged = bytearray(genuine)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            read_everything(job.directory)
        message = str(caught.value)
        assert "damaged" in message
        assert file.parent.name in message
        assert file.name in message
        header = 8 + int.from_bytes(genuine[:8], "little")
        if file.suffix == ".safetensors" and place >= header:
            assert "damaged tensors: '0000" in message
        file.write_bytes(genuine)
    read_everything(job.directory)


@pytest.mark.parametrize("name", ["index", "shard"])
def test_the_mend_that_a_damaged_manifest_asks_for_works(tmp_path, name):
    job = make_job(tmp_path, num_rows=6)
    encode(job)
    publish(job)
    (folder, *_) = sorted(job.directory.glob(f"{name}*"))
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"2", b"3", 1))

    def read():
        cache = open_cache(job.directory)
        for row in cache.entries:
            cache.latents(row)

    with pytest.raises(DataError, match=rf"{folder.name}.*damaged.*remove that folder and encode"):
        read()
    shutil.rmtree(folder)
    encode(job)
    assert publish(job) == 6
    read_everything(job.directory)
