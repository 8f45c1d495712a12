"""What is to be drawn, and where prompts are read from."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensora.errors import UsageError, did_you_mean
from opensora.infer.conditions import Reference

PROMPT_FILES = (".txt", ".csv")


@dataclass(frozen=True)
class Job:
    """One video to draw; `index` names its file.

    Attributes:
        prompt: as it was written; names the file.
        told: what the model is told, one for each window of a long video; the prompt by default.
        references: files whose frames are given.
    """

    index: int
    prompt: str
    seed: int
    told: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the model is told."""
        return self.told or (self.prompt,)

    @property
    def record(self) -> dict[str, Any]:
        """The job as a line of the record has it; what it does not use is left out. Files are named
        with a digest, so that another picture of the same name is not taken for it.

        Raises:
            DataError: a file cannot be read.
        """
        tree = {key: value for key, value in asdict(self).items() if value != ()}
        if self.references:
            tree["references"] = [{**asdict(r), "sha256": r.sha256} for r in self.references]
        return json.loads(json.dumps(tree))


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one a line, or from the column `text` of a CSV.

    Empty lines are left out.

    Raises:
        UsageError: the file cannot be read, or has no prompts.
    """
    path = Path(path)
    if path.suffix.lower() in (".json", ".jsonl", ".parquet", ".yaml", ".yml"):
        raise UsageError(f"{path}: prompts are read from a .txt, one a line, or a .csv")
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = _column(text, path) if path.suffix.lower() == ".csv" else text.split("\n")
    except UnicodeDecodeError:
        raise UsageError(f"the prompts in {path} cannot be read: save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"the prompts in {path} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise UsageError(f"the prompts in {path} cannot be read: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path} holds no prompts")
    return prompts


def _column(text: str, path: Path) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(rows.fieldnames or [])
    if "text" not in columns:
        hint = did_you_mean("text", columns)
        if len(columns) == 1 and re.search(r"[;\t]", columns[0]):
            hint = " Separate columns by commas."
        raise UsageError(f"{path} has no column 'text' with the prompts.{hint}")
    return [row["text"] or "" for row in rows]


def jobs(prompts: Sequence[str], *, seed: int, per_prompt: int = 1) -> list[Job]:
    """One job for each prompt and repetition; every sample has a seed of its own."""
    return [
        Job(index, prompt, seed + index)
        for index, prompt in enumerate(p for p in prompts for _ in range(per_prompt))
    ]
