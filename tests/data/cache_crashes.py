"""Kills the writer of a latent cache at each of its steps: `cache_crashes.py FOLDER new|update`.

A forked child dies at its n-th change of the disk, for every n; a second child does the same work
unharmed. What each of them left goes to FOLDER/found.json.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import safetensors.torch
from data_support import IDENTITY, encode_video, make_job

from opensora import store
from opensora.data.encode import encode, publish
from opensora.data.latents import open_cache
from opensora.data.plan import once
from opensora.data.shards import ENTRIES_NAME, SHARD_KIND, read_entries
from opensora.errors import DataError

CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")
NEWER = {"identity": {**IDENTITY, "weights": "newer"}, "latents": lambda x: -encode_video(x)}


def die_at(stop: int) -> None:
    """End this process at the n-th change of the disk; a file that is being written stays torn."""
    done = 0

    def counted(function: Callable[..., Any], torn: Callable[..., None] | None = None) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == stop:
                if torn is not None:
                    torn(*args, **options)
                os._exit(137)
            return function(*args, **options)

        return call

    def half(tensors: Any, path: Path) -> None:
        content = safetensors.torch.save(tensors)
        whole_open(path, "wb").write(content[: len(content) // 2])

    def opening(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        chosen = writing if "r" not in mode else whole_open
        return chosen(path, mode, *args, **options)

    whole_open = io.open
    writing = counted(whole_open, lambda path, mode, *a, **o: whole_open(path, mode, *a, **o))
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = io.open = opening  # type: ignore[assignment]
    safetensors.torch.save_file = counted(safetensors.torch.save_file, half)


def state_of(directory: Path, action: str) -> str:
    """Which cache a reader would find."""
    try:
        found = open_cache(directory).identity
    except DataError as error:
        assert "was not finished" in str(error) or "does not exist" in str(error), error
        return "unfinished"
    return "old" if action == "update" and found == json.loads(json.dumps(IDENTITY)) else "new"


def look(here: Path, action: str) -> dict[str, Any]:
    """What is in a cache's folder, and whether a reader could use it."""
    directory = here / "cache"
    entries = [
        entry
        for shard in store.complete_folders(directory, kind=SHARD_KIND)
        for entry in read_entries(shard / ENTRIES_NAME)
    ]
    job = make_job(here, num_rows=6, **(NEWER if action == "update" else {}))
    buckets = {int(row): batch.bucket for batch in once(job.assigner) for row in batch.rows}
    current = [e.row for e in entries if e.recipe == job.recipe(e.row, buckets[e.row])]
    state = state_of(directory, action)
    cache = None if state == "unfinished" else open_cache(directory)
    return {
        "state": state,
        "kept": len(current),
        "rows": sorted(entry.row for entry in entries),
        "problems": [] if cache is None else cache.verify(),
        "values": cache and [float(cache.latents(row).sum()) for row in sorted(cache.entries)],
        "left": sorted(p.name for p in directory.iterdir() if not p.name.startswith("shard-"))
        if directory.exists()
        else [],
    }


def in_child(here: Path, action: str, stop: int) -> dict[str, Any]:
    pid = os.fork()
    if pid == 0:
        with open(here / "encoded", "w") as told:
            job = make_job(here, num_rows=6, **(NEWER if action == "update" else {}))
            die_at(stop)
            count = encode(job)
            publish(job)
            told.write(str(count))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    encoded = int((here / "encoded").read_text() or 0)
    return {"code": code, "encoded": encoded, **look(here, action)}


def main(folder: Path, action: str) -> None:
    os.fsync = lambda descriptor: None  # processes die here, not machines
    results: list[dict[str, Any]] = []
    while not results or results[-1]["died"]["code"] == 137:
        here = folder / str(len(results) + 1)
        here.mkdir()
        if action == "update":
            job = make_job(here, num_rows=6)
            encode(job)
            publish(job)
        died = in_child(here, action, len(results) + 1)
        results.append({"died": died, "again": in_child(here, action, 0)})
    (folder / "found.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
