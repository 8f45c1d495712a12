"""Durable writes: fsync, names that only a living writer holds, and errors a user can act on.

Everything is written under a hidden temporary name first and renamed when it is on the disk. The
writer holds a lock on that name while it lives, so whoever comes later can tell what a dead writer
left and clear it. Needs a POSIX file system (Linux, macOS, WSL).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opensora.errors import OpensoraError, StorageError

_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<state>tmp|old)$", re.DOTALL)
_LOCKLESS_GRACE_SECONDS = 24 * 3600.0
_STORAGE_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG),
}


def replace_file(path: str | Path, content: bytes) -> None:
    """Write one small file so that a reader finds the old content or the new, never a part.

    Raises:
        StorageError: the disk is full, read-only or failing; the old content is untouched.
    """
    path = Path(path).absolute()
    with storage_errors(path):
        temporary, lock = claim(path, lambda name: name.touch(exist_ok=False))
    try:
        with storage_errors(path):
            write_synced(temporary, content)
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


def preflight(folder: str | Path, *, num_bytes: int = 0) -> None:
    """Learn before the work, not after it, that `folder` takes files and has `num_bytes` free.

    Creates the folder.

    Raises:
        StorageError: with the free and the needed space, or the reason it cannot be written.
    """
    folder = Path(folder).absolute()
    taken = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    if not taken.is_dir():
        raise StorageError(f"{taken} is a file: choose another folder")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = leftover_name(folder / "probe", "tmp")
        try:
            write_synced(probe, b"probe")
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StorageError(
            f"{folder} has {_readable(free)} free and {_readable(num_bytes)} are needed; "
            "free some space or choose another folder"
        )


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk. Its name needs `sync_folder` as well."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; without this a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leftover_name(path: Path, state: str) -> Path:
    """A hidden sibling of `path` for a new version ('tmp') or for the one it replaces ('old')."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{state}")


def lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder, or None while another holds it.

    The lock goes when the descriptor is closed or the process dies. On a file system without
    locks the descriptor is returned all the same.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        return descriptor
    return descriptor


def claim(path: Path, create: Callable[[Path], object]) -> tuple[Path, int]:
    """Create a hidden temporary sibling of `path`; returns it and the descriptor of its lock."""
    while True:
        temporary = leftover_name(path, "tmp")
        create(temporary)
        with suppress(FileNotFoundError):  # reclaimed in the instant before it was locked
            descriptor = lock(temporary)
            if descriptor is not None and temporary.exists():
                return temporary, descriptor
            if descriptor is not None:
                os.close(descriptor)


def reclaim(folder: str | Path) -> None:
    """Clear what dead writers left in `folder`; put back what was moved aside for nothing.

    On a file system without locks a leftover counts as dead a day after its last change.
    """
    with suppress(OSError):
        for entry in os.scandir(folder):
            match = _LEFTOVER.match(entry.name)
            if match is not None and not entry.is_symlink():
                with suppress(OSError):  # another process may be clearing it too
                    _reclaim_one(Path(entry.path), Path(folder) / match["name"], match["state"])


def _reclaim_one(leftover: Path, target: Path, state: str) -> None:
    descriptor = lock(leftover)
    if descriptor is None:
        return
    try:
        if not has_locks(descriptor):
            age = time.time() - leftover.stat().st_mtime
            if age < _LOCKLESS_GRACE_SECONDS:
                return
        if state == "old" and not target.exists():
            os.rename(leftover, target)
            sync_folder(target.parent)
        elif leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    finally:
        os.close(descriptor)


def has_locks(descriptor: int) -> bool:
    """Whether the file system of an open file, which this process has locked, knows locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what a full, read-only or failing disk raises into one StorageError.

    Libraries with their own writers (safetensors, torch) raise their own classes, so their
    message is searched for the operating system's words.
    """
    try:
        yield
    except (OpensoraError, GeneratorExit):
        raise
    except Exception as error:
        words = (os.strerror(errno.ENOSPC), os.strerror(errno.EROFS))
        known = isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS
        if not known and not any(word in str(error) for word in words):
            raise
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = _readable(shutil.disk_usage(existing).free)
        raise StorageError(
            f"{path} cannot be written ({error}); {free} are free there. "
            "Free some space, mend the permissions or choose another folder"
        ) from error


def _readable(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
