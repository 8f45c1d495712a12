"""Uploaded pictures: bytes of a stranger -> a PNG that this code wrote.

The server never decodes them itself. A process of its own does, one at a time, with bounds on
memory, CPU, wall clock and pixels (`decode`); what it refuses, or what kills it, is an answer 422.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import opensora
from opensora import disk
from opensora.errors import DataError
from opensora.serve.config import ServeConfig
from opensora.serve.refusals import Refusal, quoted

PARAM = "input_reference"
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")
_one_at_a_time = threading.Lock()
_places = threading.BoundedSemaphore(4)
"""Uploads that are decoded or wait for it; each holds a thread that other requests need too."""


def looks_like_a_picture(content: bytes) -> bool:
    """Whether the first bytes are those of png, jpeg, webp or bmp."""
    return content.startswith(_MAGIC) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


@contextmanager
def decoded(content: bytes, folder: Path, config: ServeConfig) -> Iterator[Path]:
    """A PNG in `folder` with the picture in `content`; removed afterwards where it was not moved.

    Raises:
        Refusal: it is no picture, larger than the bounds, or another one is being decoded.
        StorageError: the disk refuses.
    """
    if not looks_like_a_picture(content):
        raise Refusal(
            "invalid_picture", "`input_reference` is no png, jpeg, webp or bmp", param=PARAM
        )
    busy = Refusal("busy", "other pictures are being decoded; ask again", retry_after=5)
    if not _places.acquire(blocking=False):
        raise busy
    token = secrets.token_hex(8)
    upload, picture = folder / f".{token}.tmp", folder / f".{token}.png"
    try:
        if not _one_at_a_time.acquire(timeout=config.decode_seconds):
            raise busy
        try:
            with disk.storage_errors(upload):
                upload.write_bytes(content)
            _decode(upload, picture, config)
        finally:
            _one_at_a_time.release()
        yield picture
    finally:
        _places.release()
        upload.unlink(missing_ok=True)
        picture.unlink(missing_ok=True)


def _decode(upload: Path, picture: Path, config: ServeConfig) -> None:
    bounds = (config.max_reference_pixels, config.decode_seconds, config.decode_bytes)
    program = [sys.executable, "-P", "-m", "opensora.serve.decode"]
    command = [*program, str(upload), str(picture), *map(str, bounds)]
    # Nothing of this process's environment goes along, a token least of all.
    environment = {
        "PYTHONPATH": str(Path(opensora.__file__).resolve().parents[1]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": os.defpath,
    }
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=config.decode_seconds,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise Refusal(
            "invalid_picture", "`input_reference` takes too long to decode", param=PARAM
        ) from None
    if done.returncode == DataError.exit_code:
        reason = quoted(done.stderr.decode("utf-8", "replace").strip(), 200)
        raise Refusal("invalid_picture", f"`input_reference`: {reason}", param=PARAM)
    if done.returncode or not picture.exists():
        raise Refusal(
            "invalid_picture", "`input_reference` cannot be decoded within bounds", param=PARAM
        )
