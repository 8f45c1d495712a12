"""The digested folder: how anything that must survive a crash is put on disk.

A writer fills a hidden temporary folder. When it is done, every file is fsynced and digested, the
manifest is written last, and one rename publishes the whole. So a folder exists complete or not at
all, and `is_complete` is the one question that choosing the latest, pruning and exporting ask.
Checkpoints and latent caches stand on this; what is inside the files is not known here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from opensora.digests import FileRecord, difference, digest, in_threads
from opensora.disk import (
    claim,
    leftover_name,
    lock,
    reclaim,
    replace_file,
    storage_errors,
    sync_folder,
    write_synced,
)
from opensora.errors import DataError, OpensoraError, StorageError, UsageError

FORMAT_VERSION = 1
ASK_FOR = "give a run folder, its checkpoints/ or one checkpoints/step-N/"
MANIFEST_NAME = "manifest.json"
POINTER_NAME = "latest"


@dataclass(frozen=True)
class Manifest:
    """The commit record of a folder.

    Attributes:
        kind: what the folder is, such as 'checkpoint' or 'latents'.
        meta: the caller's JSON.
        files: path inside the folder (with '/') -> record.
        committed_ns: UTC nanoseconds since 1970, later than the folder the pointer named at the
            time, so that a clock set back does not make a new checkpoint look old.
    """

    kind: str
    meta: dict[str, Any]
    files: dict[str, FileRecord]
    committed_ns: int
    format_version: int = FORMAT_VERSION


@contextmanager
def write(
    path: str | Path,
    *,
    kind: str,
    meta: dict[str, Any],
    replace: bool = False,
    known: dict[str, FileRecord] | None = None,
) -> Iterator[Path]:
    """Write a folder that appears at `path` whole or not at all.

    Yields a temporary folder beside `path` to fill (subfolders are fine). Several processes may
    fill it, as long as they have closed their files before this process leaves the block. `meta`
    is read when the block ends, so figures may be added to it inside. On an exception the
    temporary folder is removed and `path` is untouched.

    Args:
        replace: let the new folder take the place of a complete one. The old one is moved aside
            until the new one stands; after a crash between the two, the next reader or writer
            puts it back.
        known: records of files that whoever wrote them has synced and digested already; read when
            the block ends, as `meta` is.

    Raises:
        UsageError: `path` exists, or the content cannot be recorded.
        StorageError: the disk is full, read-only or failing.
    """
    path = Path(path).absolute()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        reclaim(path.parent)
        _check_target(path, replace)
        temporary, lock_descriptor = claim(path, os.mkdir)
    try:
        with storage_errors(path):
            yield temporary
            _commit(temporary, kind, meta, known or {}, _next_moment(path.parent))
            _publish(temporary, path, replace)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock_descriptor)


def read_manifest(
    path: str | Path, *, kind: str | None = None, error: type[OpensoraError] = DataError
) -> Manifest:
    """The manifest of a folder, checked against its own digest.

    Args:
        kind: what the folder has to be, or None for anything.
        error: the class to raise; checkpoints pass CheckpointError.
    """
    path = Path(path)
    if not path.exists():
        reclaim(path.absolute().parent)
    try:
        text = (path / MANIFEST_NAME).read_bytes().decode("utf-8")
        document = json.loads(text)
        genuine = text == _manifest_text(document)
        genuine &= document.pop("digest") == _text_digest(document)
    except OSError as problem:
        reason = "is torn or was not written here" if path.exists() else "does not exist"
        raise error(f"{path} {reason} ({MANIFEST_NAME}: {problem.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        genuine, document = False, {}
    if not genuine:
        raise error(f"{path / MANIFEST_NAME} is damaged: it does not match its own digest")
    if document["format_version"] > FORMAT_VERSION:
        raise error(
            f"{path} has format {document['format_version']} and this program reads up to "
            f"{FORMAT_VERSION}; upgrade opensora to read it"
        )
    files = {name: FileRecord(**record) for name, record in document.pop("files").items()}
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise error(f"{path} lists the file '{name}', which is outside the folder")
    manifest = Manifest(files=files, **document)
    if kind is not None and manifest.kind != kind:
        raise error(f"{path} holds '{manifest.kind}' where '{kind}' is needed")
    return manifest


def is_complete(path: str | Path, *, kind: str | None = None) -> bool:
    """Whether the folder was committed and every listed file still has its size.

    Reads no content; `verify` does.
    """
    try:
        manifest = read_manifest(path, kind=kind)
        return all((Path(path) / n).stat().st_size == r.size for n, r in manifest.files.items())
    except (OpensoraError, OSError):
        return False


def verify(path: str | Path, *, files: Iterable[str] | None = None) -> list[str]:
    """Digest the files again and describe each one that differs; an empty list means sound.

    Args:
        files: the listed names to check; by default all, and a search for unlisted files.

    Raises:
        DataError: the manifest itself is missing or damaged.
        UsageError: the manifest does not list one of `files`.
    """
    return _problems(Path(path), read_manifest(path), files)


def open_verified(
    path: str | Path,
    *,
    kind: str,
    files: Iterable[str] | None = None,
    error: type[OpensoraError] = DataError,
) -> Manifest:
    """The manifest of a folder whose content has just been checked: call it, then read.

    Args:
        files: as in `verify`.
        error: the class to raise; checkpoints pass CheckpointError.

    Raises:
        error: the folder is missing, torn, of another kind, or damaged; the message names each
            damaged file, and the tensors in it where the file is safetensors.
    """
    manifest = read_manifest(path, kind=kind, error=error)
    problems = _problems(Path(path), manifest, files)
    if problems:
        raise error(f"{path} is damaged: " + "; ".join(problems))
    return manifest


def complete_folders(root: str | Path, *, kind: str | None = None) -> list[Path]:
    """The complete folders directly under `root`, the one committed first first."""
    root = Path(root)
    if not root.is_dir():
        return []
    reclaim(root)
    found = [p for p in root.iterdir() if not p.name.startswith(".") and is_complete(p, kind=kind)]
    return sorted(found, key=lambda p: (read_manifest(p).committed_ns, _natural_key(p.name)))


def latest(root: str | Path, *, kind: str | None = None) -> Path | None:
    """The complete folder under `root` that was committed last, or None.

    The pointer does not decide: a crash may have come between the commit and the pointer.
    """
    folders = complete_folders(root, kind=kind)
    return folders[-1] if folders else None


def set_pointer(root: str | Path, name: str) -> None:
    """Write `name` into the file `latest` under `root`, for people and other programs.

    Raises:
        UsageError: `root/name` is not a complete folder.
    """
    root = Path(root)
    if not is_complete(root / name):
        raise UsageError(f"the pointer may only name a complete folder; {root / name} is not one")
    replace_file(root / POINTER_NAME, f"{name}\n".encode())


def prune(root: str | Path, keep: int, *, kind: str | None = None) -> list[Path]:
    """Remove all but the `keep` newest complete folders under `root`; returns the removed.

    What is not complete is neither counted nor touched, except the leftovers of dead writers,
    which are cleared. Keep at least two, so that one damaged folder is not the end.

    Raises:
        UsageError: `keep` is below 1.
    """
    if keep < 1:
        raise UsageError(f"cannot keep {keep} folders under {root}: keep 1 or more")
    surplus = complete_folders(root, kind=kind)[:-keep]
    for folder in surplus:
        remove(folder)
    return surplus


def remove(path: str | Path) -> None:
    """Delete a folder so that a crash midway leaves nothing that looks complete."""
    path = Path(path).absolute()
    with storage_errors(path):
        doomed = leftover_name(path, "tmp")
        os.rename(path, doomed)
        sync_folder(path.parent)
        shutil.rmtree(doomed)


def _check_target(path: Path, replace: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not is_complete(path):
        raise UsageError(
            f"{path} exists and is not a complete folder of this program; "
            "move it away or use another name"
        )
    if not replace:
        raise UsageError(f"{path} already exists and is complete; remove it or use another name")


def _next_moment(root: Path) -> int:
    """Now in UTC nanoseconds, or just after the pointed-at folder if the clock was set back."""
    try:
        name = (root / POINTER_NAME).read_text(encoding="utf-8").strip()
        return max(time.time_ns(), read_manifest(root / name).committed_ns + 1)
    except (OSError, ValueError):
        return time.time_ns()


def _commit(
    folder: Path, kind: str, meta: dict[str, Any], known: dict[str, FileRecord], moment: int
) -> None:
    """Make every file durable, then write the manifest that says so."""
    names = _list_files(folder)
    missing = sorted(known.keys() - set(names))
    if missing:
        raise StorageError(
            f"{folder / missing[0]} was written by another process and cannot be seen by this one: "
            "both need the same file system"
        )
    if MANIFEST_NAME in names:
        raise UsageError(f"{folder}: the name {MANIFEST_NAME} is taken by the store itself")

    rest = [name for name in names if name not in known]
    records = dict(zip(rest, in_threads(lambda n: seal(folder / n), rest), strict=True)) | known
    document = asdict(Manifest(kind, meta, records, moment))
    try:
        text = _manifest_text({"digest": _text_digest(document), **document})
        content = text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise UsageError(f"the meta of {folder.name} cannot be written as JSON: {error}") from error
    write_synced(folder / MANIFEST_NAME, content)
    for subfolder, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(subfolder))


def seal(path: Path) -> FileRecord:
    """Make a file durable; returns its record."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return digest(path)


def _publish(temporary: Path, path: Path, replace: bool) -> None:
    if replace and path.exists() and any(path.iterdir()):
        _swap(temporary, path)
        return
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UsageError(f"{path} was written by another process meanwhile") from error
        raise
    sync_folder(path.parent)


def _swap(temporary: Path, path: Path) -> None:
    """Put `temporary` in the place of `path`; the lock keeps others from undoing it midway."""
    aside = leftover_name(path, "old")
    descriptor = lock(path)
    if descriptor is None:
        raise UsageError(f"{path} is being replaced by another process")
    try:
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(aside, path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(descriptor)


def _problems(path: Path, manifest: Manifest, files: Iterable[str] | None) -> list[str]:
    records, unlisted = manifest.files, []
    if files is None:
        unlisted = sorted(set(_list_files(path)) - set(records) - {MANIFEST_NAME})
    else:
        wanted = list(files)
        missing = [name for name in wanted if name not in records]
        if missing:
            raise UsageError(f"{path} does not list the file '{missing[0]}'")
        records = {name: records[name] for name in wanted}

    def examine(name: str) -> str | None:
        try:
            found = digest(path / name)
        except OSError as problem:
            return f"{name}: {problem.strerror}"
        return None if found == records[name] else f"{name}: {difference(records[name], found)}"

    problems = [problem for problem in in_threads(examine, records) if problem is not None]
    return problems + [f"{name}: not listed in the manifest" for name in unlisted]


def _list_files(folder: Path) -> list[str]:
    """Every file under `folder`, as sorted relative names with '/'."""
    names = []
    for parent, subfolders, files in os.walk(folder):
        for name in (*files, *subfolders):
            entry = Path(parent) / name
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise UsageError(f"{entry} is a link or a special file; a store holds plain files")
        names += [(Path(parent) / name).relative_to(folder).as_posix() for name in files]
    return sorted(names)


def _manifest_text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _text_digest(document: dict[str, Any]) -> str:
    # Through the parsed form, because JSON turns tuples into lists and number keys into strings.
    text = _manifest_text(json.loads(_manifest_text(document)))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts 'step-9' before 'step-10'."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]
