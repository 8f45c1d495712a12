"""The digested folder: complete or absent at every instant, and no damaged byte unnoticed."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora import digests, disk, store
from opensora.errors import CheckpointError, DataError, StorageError, UsageError


def write_folder(path: Path, content: bytes = b"content", **meta) -> Path:
    with store.write(path, kind="test", meta=meta) as folder:
        (folder / "a.bin").write_bytes(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_bytes(content * 3)
    return path


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_written_folder_reads_back_and_leaves_nothing_beside_it(tmp_path):
    path = write_folder(tmp_path / "one", step=3)
    manifest = store.open_verified(path, kind="test")
    assert manifest.meta == {"step": 3}
    assert set(manifest.files) == {"a.bin", "sub/b.bin"}
    assert manifest.files["sub/b.bin"].size == 21
    assert store.is_complete(path)
    assert store.verify(path) == []
    assert names(tmp_path) == {"one"}


def test_meta_may_be_completed_inside_the_block_and_may_hold_any_json(tmp_path):
    meta = {}
    with store.write(tmp_path / "one", kind="test", meta=meta):
        meta["figures"] = {"größe": (1, 2.5), 7: None}
    found = store.read_manifest(tmp_path / "one").meta
    assert found == {"figures": {"größe": [1, 2.5], "7": None}}


def test_an_exception_in_the_block_leaves_no_trace(tmp_path):
    def fail():
        with store.write(tmp_path / "one", kind="test", meta={}) as folder:
            (folder / "a.bin").write_bytes(b"half")
            raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fail()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": object()}, {"x": "\ud800"}])
def test_meta_that_json_cannot_hold_is_refused(tmp_path, meta):
    with (
        pytest.raises(UsageError, match="cannot be written as JSON"),
        store.write(tmp_path / "one", kind="test", meta=meta),
    ):
        pass
    assert names(tmp_path) == set()


def test_what_exists_is_never_overwritten_unasked(tmp_path):
    write_folder(tmp_path / "one", b"first")
    with pytest.raises(UsageError, match="already exists"):
        write_folder(tmp_path / "one", b"second")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(UsageError, match="not a complete folder"),
        store.write(tmp_path / "mine", kind="test", meta={}, replace=True),
    ):
        pass
    assert (tmp_path / "one" / "a.bin").read_bytes() == b"first"
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_replace_swaps_the_folder_and_leaves_nothing_beside_it(tmp_path):
    write_folder(tmp_path / "one", b"first")
    with store.write(tmp_path / "one", kind="test", meta={}, replace=True) as folder:
        (folder / "a.bin").write_bytes(b"second")
    assert (tmp_path / "one" / "a.bin").read_bytes() == b"second"
    assert names(tmp_path) == {"one"}


def test_links_are_refused_because_their_target_is_not_kept(tmp_path):
    with (
        pytest.raises(UsageError, match="is a link"),
        store.write(tmp_path / "one", kind="test", meta={}) as folder,
    ):
        (folder / "link").symlink_to(tmp_path)


# Writes a folder in a forked child that dies at its n-th call that changes the disk, for every n;
# then a second child does the same work unharmed. Prints what was found after each of the two.
CRASHES = """
    import json, os, sys
    from pathlib import Path
    from opensora import store
    root, action = Path(sys.argv[1]), sys.argv[2]
    target = "step-1" if action == "replace" else "step-2"

    def fill(folder, content):
        for name in ("x.bin", "y.bin"):
            with open(folder / name, "wb") as file:
                file.write(content[:2]); file.flush(); os.fsync(file.fileno())
                file.write(content[2:])

    def work(here, stop):
        calls = 0
        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == stop:
                    os._exit(137)
                return function(*args, **kwargs)
            return call
        for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        replace = store.is_complete(here / target)
        with store.write(here / target, kind="test", meta={}, replace=replace) as folder:
            fill(folder, b"newer")
        store.set_pointer(here, target)
        store.prune(here, 1)

    def in_child(here, stop):
        pid = os.fork()
        if pid == 0:
            work(here, stop)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        chosen = store.latest(here)
        return {"code": code, "problems": store.verify(chosen),
                "content": (chosen / "x.bin").read_text(),
                "names": sorted(os.listdir(here))}

    results, stop = [], 0
    while not results or results[-1]["died"]["code"] == 137:
        stop += 1
        here = root / str(stop)
        with store.write(here / "step-1", kind="test", meta={}) as folder:
            fill(folder, b"older")
        store.set_pointer(here, "step-1")
        results.append({"died": in_child(here, stop), "again": in_child(here, 0)})
    print(json.dumps(results))
"""


@pytest.mark.parametrize("action", ["add", "replace"])
def test_a_writer_killed_at_any_step_leaves_a_sound_folder_to_choose(tmp_path, action):
    command = [sys.executable, "-c", textwrap.dedent(CRASHES), str(tmp_path), action]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    *killed, finished = json.loads(ran.stdout)
    assert finished["died"]["code"] == 0
    assert len(killed) >= 20
    for result in killed:
        died, again = result["died"], result["again"]
        assert died["code"] == 137
        assert died["problems"] == []
        assert (again["code"], again["problems"], again["content"]) == (0, [], "newer")
        assert set(again["names"]) <= {"step-1", "step-2", "latest"}  # no leftovers
    # Once the new folder is chosen it stays chosen at every later step.
    chosen = [result["died"]["content"] for result in killed]
    assert chosen == sorted(chosen, reverse=True)
    assert set(chosen) == {"older", "newer"}


def test_every_byte_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    events = []

    def record(name, real, describe):
        def call(*args, **kwargs):
            events.append((name, describe(*args)))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    def opened(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    if not Path("/proc/self/fd").exists():
        pytest.skip("the name behind a descriptor is read from /proc")
    record("fsync", os.fsync, opened)
    record("rename", os.rename, lambda old, new: Path(new).name)
    write_folder(tmp_path / "one")
    rename = events.index(("rename", "one"))
    synced = [what for name, what in events[:rename] if name == "fsync"]
    assert {"a.bin", "b.bin", "sub", "manifest.json"} <= set(synced)
    assert max(synced.index("a.bin"), synced.index("b.bin")) < synced.index("manifest.json")
    assert ("fsync", tmp_path.name) in events[rename:]


def test_a_living_writers_folder_is_never_reclaimed(tmp_path):
    with store.write(tmp_path / "one", kind="test", meta={}) as folder:
        (folder / "a.bin").write_bytes(b"a")
        disk.reclaim(tmp_path)
        write_folder(tmp_path / "two")
        assert folder.exists()
    assert store.is_complete(tmp_path / "one")


def test_without_locks_a_leftover_is_cleared_only_after_a_day(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(disk.fcntl, "flock", unsupported)
    fresh, old = tmp_path / ".a.00000000.tmp", tmp_path / ".b.00000000.tmp"
    for folder in (fresh, old):
        folder.mkdir()
    yesterday = time.time() - 90_000
    os.utime(old, (yesterday, yesterday))
    write_folder(tmp_path / "one")
    assert names(tmp_path) == {"one", fresh.name}


def test_latest_is_the_last_commit_even_when_the_clock_or_the_pointer_lags(tmp_path, monkeypatch):
    write_folder(tmp_path / "step-9")
    store.set_pointer(tmp_path, "step-9")
    monkeypatch.setattr(store.time, "time_ns", lambda: 1)
    write_folder(tmp_path / "step-10")
    assert (tmp_path / "latest").read_text() == "step-9\n"
    assert store.latest(tmp_path).name == "step-10"
    store.set_pointer(tmp_path, "step-10")
    write_folder(tmp_path / "step-5")  # an earlier step taken again on purpose
    assert store.latest(tmp_path).name == "step-5"


def test_latest_and_prune_ignore_what_is_not_complete(tmp_path):
    for step in range(4):
        write_folder(tmp_path / f"step-{step}")
    (tmp_path / "step-3" / "a.bin").write_bytes(b"cut")
    (tmp_path / "step-4").mkdir()
    assert store.latest(tmp_path).name == "step-2"
    assert [p.name for p in store.prune(tmp_path, 2)] == ["step-0"]
    assert names(tmp_path) == {"step-1", "step-2", "step-3", "step-4"}
    with pytest.raises(UsageError, match="keep 1 or more"):
        store.prune(tmp_path, 0)


def test_latest_of_a_kind_passes_over_other_kinds(tmp_path):
    write_folder(tmp_path / "one")
    assert store.latest(tmp_path, kind="test").name == "one"
    assert store.latest(tmp_path, kind="checkpoint") is None
    assert store.latest(tmp_path / "absent") is None


def test_the_pointer_names_only_complete_folders(tmp_path):
    with pytest.raises(UsageError, match="only name a complete folder"):
        store.set_pointer(tmp_path, "step-1")


def test_every_flipped_byte_is_detected(tmp_path):
    path = write_folder(tmp_path / "one", content=bytes(range(256)) * 8, step=1, note="größe")
    files = [path / "a.bin", path / "sub" / "b.bin", path / "manifest.json"]
    generator = random.Random(0)
    for _ in range(200):
        file = generator.choice(files)
        genuine = file.read_bytes()
        damaged = bytearray(genuine)
        damaged[generator.randrange(len(genuine))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            store.open_verified(path, kind="test", error=CheckpointError)
        file.write_bytes(genuine)
    store.open_verified(path, kind="test")


def test_truncated_missing_swapped_and_added_files_are_named(tmp_path):
    path = write_folder(tmp_path / "one")
    (path / "a.bin").write_bytes(b"con")
    (path / "sub" / "b.bin").unlink()
    (path / "extra.bin").write_bytes(b"x")
    problems = " ".join(store.verify(path))
    assert "a.bin: 3 bytes where 7 were written" in problems
    assert "sub/b.bin: No such file" in problems
    assert "extra.bin: not listed" in problems
    assert not store.is_complete(path)


def test_a_tensor_that_is_read_in_pieces_has_the_checksum_of_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_CHUNK_BYTES", 100)
    tensors = {"a": torch.arange(60.0), "b": torch.zeros(0), "c": torch.ones(3, dtype=torch.bool)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = digests.digest(tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.tensors == {n: zlib.crc32(t.numpy().tobytes()) for n, t in tensors.items()}


def test_damage_in_safetensors_names_the_tensor(tmp_path):
    tensors = {f"block.{i}.weight": torch.full((300,), float(i)) for i in range(4)}
    with store.write(tmp_path / "one", kind="test", meta={}) as folder:
        save_file(tensors, folder / "model.safetensors")
    file = tmp_path / "one" / "model.safetensors"
    content = bytearray(file.read_bytes())
    assert set(store.read_manifest(tmp_path / "one").files[file.name].tensors) == set(tensors)
    needle = torch.full((300,), 2.0).numpy().tobytes()
    content[content.index(needle) + 700] ^= 4
    file.write_bytes(content)
    (problem,) = store.verify(tmp_path / "one")
    assert problem == "model.safetensors: damaged tensors: 'block.2.weight'"
    content = bytearray(file.read_bytes())
    content[12] ^= 1
    file.write_bytes(content)
    (problem,) = store.verify(tmp_path / "one")
    assert "header is damaged" in problem


def test_only_the_named_files_are_checked_when_some_are_named(tmp_path):
    path = write_folder(tmp_path / "one")
    (path / "a.bin").write_bytes(b"CONTENT")
    assert store.verify(path, files=["sub/b.bin"]) == []
    assert len(store.verify(path, files=["a.bin"])) == 1
    with pytest.raises(UsageError, match="does not list"):
        store.verify(path, files=["c.bin"])


def test_manifests_of_a_newer_format_or_another_kind_are_refused(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "one")
    with pytest.raises(CheckpointError, match="holds 'test' where 'checkpoint' is needed"):
        store.open_verified(path, kind="checkpoint", error=CheckpointError)
    monkeypatch.setattr(store, "FORMAT_VERSION", 0)
    with pytest.raises(DataError, match="upgrade opensora"):
        store.read_manifest(path)


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    path = write_folder(tmp_path / "one")
    document = json.loads((path / "manifest.json").read_text())
    document.pop("digest")
    document["files"] = {"../../secret": document["files"]["a.bin"]}
    digest = store._text_digest(document)
    (path / "manifest.json").write_text(store._manifest_text({"digest": digest, **document}))
    with pytest.raises(DataError, match="outside the folder"):
        store.read_manifest(path)


def test_missing_and_foreign_folders_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        store.read_manifest(tmp_path / "absent")
    with pytest.raises(DataError, match="torn or was not written here"):
        store.read_manifest(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to fill a disk")
def test_a_full_disk_is_told_with_the_space_left_and_keeps_the_previous_folder(tmp_path):
    write_folder(tmp_path / "one")

    def fill():
        with (
            store.write(tmp_path / "two", kind="test", meta={}) as folder,
            open("/dev/full", "wb", buffering=0) as file,
        ):
            (folder / "a.bin").write_bytes(b"a")
            file.write(b"more than fits")

    with pytest.raises(StorageError, match=r"No space left.*free there") as caught:
        fill()
    assert caught.value.exit_code == 74
    assert names(tmp_path) == {"one"}
    assert store.verify(store.latest(tmp_path)) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_failures_of_the_disk_while_committing_are_storage_errors(tmp_path, monkeypatch, code):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=os.strerror(code)):
        write_folder(tmp_path / "one")
    with pytest.raises(StorageError, match=os.strerror(code)):
        disk.replace_file(tmp_path / "file", b"x")
    assert names(tmp_path) == set()


def test_a_foreign_librarys_message_about_a_full_disk_is_recognised(tmp_path):
    with (
        pytest.raises(StorageError),
        store.write(tmp_path / "one", kind="test", meta={}),
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_preflight_refuses_too_little_space_and_unwritable_places(tmp_path):
    disk.preflight(tmp_path / "new" / "folder", num_bytes=1)
    assert names(tmp_path / "new" / "folder") == set()
    with pytest.raises(StorageError, match=r"free and 1024.0 TiB are needed"):
        disk.preflight(tmp_path, num_bytes=2**50)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        disk.preflight(tmp_path / "file" / "below")


def test_replace_file_shows_the_old_content_or_the_new(tmp_path, monkeypatch):
    disk.replace_file(tmp_path / "file", b"old")

    def fail(old, new):
        raise OSError(errno.EIO, "planned")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(StorageError, match="planned"):
            disk.replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    disk.replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == {"file"}


def test_names_with_spaces_letters_of_any_script_and_newlines_work(tmp_path):
    for name in ("with space", "影片", "-leading", "line\nbreak", ".hidden"):
        path = write_folder(tmp_path / name)
        assert store.verify(path) == []
    assert len(names(tmp_path)) == 5
