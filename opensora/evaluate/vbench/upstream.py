"""Dimensions that are left to an installation of VBench's own package, one process each.

A dimension that fails there leaves a log and does not stop the others; one that is done is not done
again by the same call.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from opensora.disk import replace_file
from opensora.errors import DataError
from opensora.evaluate.vbench import upstream_call
from opensora.evaluate.vbench.config import UpstreamConfig
from opensora.evaluate.vbench.prompts import Version

I2V_OWN = ("i2v_subject", "i2v_background", "camera_motion")
PACKAGES: dict[Version, str] = {"v1": "vbench", "i2v": "vbench2_beta_i2v"}


@dataclass(frozen=True)
class Delegated:
    """What upstream says about a dimension.

    Attributes:
        overall: its score.
        videos: its rows, {"video_path", "video_results", ...}.
    """

    overall: float
    videos: list[dict[str, Any]]


class Upstream:
    """The installation that a config names."""

    def __init__(self, config: UpstreamConfig, version: Version):
        self.config = config
        self.package = PACKAGES[version]

    @cached_property
    def lacking(self) -> str | None:
        """Why it cannot be used, in words; None where it can."""
        code = (
            "import importlib.util, sys; "
            f"sys.exit(0 if importlib.util.find_spec('{self.package}') else 3)"
        )
        try:
            done = subprocess.run(
                [self._python, "-c", code], cwd=self._cwd, env=self._environment, check=False
            )
        except OSError as error:
            return f"upstream.python '{self._python}' cannot be started ({error.strerror})"
        return None if done.returncode == 0 else f"'{self._python}' has no package {self.package}"

    def run(
        self, dimension: str, full_info: Path, videos: Sequence[Path], output: Path, device: str
    ) -> Delegated:
        """One dimension on the videos that `full_info` lists.

        Args:
            videos: the files, whose sizes and times tell whether an earlier result still holds.
            output: folder of results and logs.

        Raises:
            DataError: upstream failed; the message has its last words and the place of the log.
        """
        output.mkdir(parents=True, exist_ok=True)
        result, log = output / f"{dimension}.json", output / f"{dimension}.log"
        key = _key(full_info, videos)
        kept = _kept(result, key)
        if kept is not None:
            return kept
        fresh = output / f"{dimension}.new.json"
        module = self.package if dimension in I2V_OWN else "vbench"
        code = Path(upstream_call.__file__).read_text(encoding="utf-8")
        words = [self.package, module, dimension, str(full_info.absolute()), device]
        with open(log, "wb") as file:
            done = subprocess.run(
                [self._python, "-c", code, *words, str(fresh.absolute())],
                cwd=self._cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1] if lines else f"exit code {done.returncode}"
            raise DataError(f"upstream failed ({last}), see {log}")
        answer = json.loads(fresh.read_text(encoding="utf-8"))
        fresh.unlink()
        if not math.isfinite(answer[0]):
            raise DataError(f"upstream found no score ({answer[0]}), see {log}")
        replace_file(result, json.dumps({"key": key, "result": answer}).encode())
        return Delegated(*answer)

    @property
    def _python(self) -> str:
        return self.config.python or sys.executable

    @property
    def _cwd(self) -> str | None:
        return self.config.folder

    @property
    def _environment(self) -> dict[str, str]:
        """A checkout is found without being installed; ranks of ours are none of theirs."""
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {k: v for k, v in os.environ.items() if k not in launched}
        if self.config.folder is None:
            return kept
        paths = [str(Path(self.config.folder).absolute()), kept.get("PYTHONPATH", "")]
        return kept | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _key(full_info: Path, videos: Sequence[Path]) -> str:
    digest = hashlib.blake2b(full_info.read_bytes(), digest_size=16)
    for path in videos:
        facts = path.stat()
        digest.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _kept(result: Path, key: str) -> Delegated | None:
    try:
        tree = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Delegated(*tree["result"]) if tree.get("key") == key else None
