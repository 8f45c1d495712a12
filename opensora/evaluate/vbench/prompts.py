"""VBench's prompts: what to draw, what each video serves, and what its file is called.

The JSON files of the benchmark lie beside this file, unchanged (see data/NOTICE). Strings in them
are not unique: two prompts stand twice with different dimensions, and two differ by case only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opensora.errors import DataError, UsageError

Version = Literal["v1", "i2v"]

FILES: dict[Version, str] = {
    "v1": "VBench_full_info.json",
    "i2v": "vbench2_i2v_full_info.json",
}
READ_SAMPLES = 5
"""Samples of a prompt that the benchmark reads, of however many were drawn."""

_COUNTER = re.compile(r"-(\d+)$")


@dataclass(frozen=True)
class Entry:
    """One entry of a prompt file.

    Attributes:
        index: its place in the file.
        about: dimension -> what to look for, such as {"color": {"color": "red"}}; the double
            wrapping of scene and spatial_relationship is undone.
        raw: the entry as it stands in the file.
    """

    index: int
    prompt: str
    dimensions: tuple[str, ...]
    about: dict[str, dict[str, Any]]
    raw: dict[str, Any]

    @property
    def picture(self) -> str | None:
        """The file name of the picture that its videos begin with; I2V's entries have one."""
        name = self.raw.get("image_name")
        return name if isinstance(name, str) else None


def load(version: Version = "v1", path: str | Path | None = None) -> tuple[Entry, ...]:
    """The entries of a prompt file, in its order.

    Args:
        path: of another file in VBench's format; the benchmark's own by default.

    Raises:
        UsageError: the file cannot be read or is not in that format.
    """
    source = Path(path) if path else Path(__file__).parent / "data" / FILES[version]
    try:
        tree = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the prompts in {source} cannot be read: {error}") from None
    if not isinstance(tree, list) or not tree:
        raise UsageError(f"{source} holds no prompts: a list of entries is expected")
    return tuple(_entry(index, raw, source) for index, raw in enumerate(tree))


def _entry(index: int, raw: Any, source: Path) -> Entry:
    if not isinstance(raw, dict):
        raise UsageError(f"{source}: entry {index} is no object")
    prompt, dimensions = raw.get("prompt_en"), raw.get("dimension")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"{source}: entry {index} has no text under 'prompt_en'")
    if "/" in prompt or "\0" in prompt or len(f"{prompt}-24.mp4".encode()) > 255:
        raise UsageError(f"{source}: the prompt of entry {index} cannot be a file's name")
    if not isinstance(dimensions, list) or not all(isinstance(d, str) for d in dimensions):
        raise UsageError(f"{source}: entry {index} has no list under 'dimension'")
    about = {name: _unwrapped(name, value) for name, value in raw.get("auxiliary_info", {}).items()}
    return Entry(index, prompt, tuple(dimensions), about, raw)


def _unwrapped(name: str, value: Any) -> dict[str, Any]:
    """{"scene": {"scene": "alley"}} stands as {"scene": {"scene": {"scene": ...}}} in the file."""
    inner = value.get(name) if isinstance(value, dict) else value
    return inner if isinstance(inner, dict) else value


def select(
    entries: Iterable[Entry], dimensions: Sequence[str], limit: int | None = None
) -> list[Entry]:
    """The entries that serve any of the dimensions, in file order.

    Args:
        limit: distinct prompts for each dimension, the first of the file; None takes all.
    """
    counts: dict[str, set[str]] = {name: set() for name in dimensions}
    chosen = []
    for entry in entries:
        wanted = False
        for name in entry.dimensions:
            seen = counts.get(name)
            if seen is not None and (limit is None or len(seen | {entry.prompt}) <= limit):
                seen.add(entry.prompt)
                wanted = True
        if wanted:
            chosen.append(entry)
    return chosen


def read_rewritten(path: str | Path, entries: Sequence[Entry]) -> dict[str, str]:
    """Prompt -> what a model is told in its place.

    Of a prompt that stands twice the first line counts.

    Args:
        path: a text with one line for each entry, in their order, or JSON {prompt: text}.

    Raises:
        UsageError: it cannot be read, or has not a text for every prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree: Any = json.loads(text) if path.suffix.lower() == ".json" else None
    except (OSError, ValueError) as error:
        raise UsageError(f"the rewritten prompts in {path} cannot be read: {error}") from None
    if tree is None:
        lines = [line.strip() for line in text.rstrip().split("\n")]
        if len(lines) != len(entries):
            raise UsageError(
                f"{path} has {len(lines)} lines and the prompt file {len(entries)} entries: give a "
                "line for each, in the same order"
            )
        pairs = zip(entries, lines, strict=True)
        tree = {entry.prompt: line for entry, line in reversed(list(pairs))}
    for entry in entries:
        told = tree.get(entry.prompt) if isinstance(tree, dict) else None
        if not isinstance(told, str) or not told:
            raise UsageError(f"{path} has no text for the prompt '{entry.prompt}'")
    return tree


def file_name(prompt: str, sample: int, suffix: str = ".mp4") -> str:
    """The name that VBench looks for: '{prompt}-{sample}.mp4'."""
    return f"{prompt}-{sample}{suffix}"


def prompt_of(name: str) -> tuple[str, int | None]:
    """The prompt and the sample number in a file's name; None where it has no number."""
    stem = Path(name).stem
    match = _COUNTER.search(stem)
    return (stem[: match.start()], int(match[1])) if match else (stem, None)


def case_collisions(prompts: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of distinct prompts that are one name where file names ignore case."""
    groups: dict[str, dict[str, None]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.casefold(), {})[prompt] = None
    return [tuple(group) for group in groups.values() if len(group) > 1]


def ignores_case(folder: Path) -> bool:
    """Whether the file system of a folder takes 'a' and 'A' for one name. Creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".opensora-case-probe"
    probe.touch()
    try:
        return (folder / probe.name.upper()).exists()
    finally:
        probe.unlink(missing_ok=True)


def refuse_collisions(prompts: Iterable[str], folder: Path) -> None:
    """Refuse to lay videos of prompts that differ by case only into a folder that ignores case.

    Raises:
        DataError: one would overwrite the other.
    """
    collisions = case_collisions(prompts)
    if collisions and ignores_case(folder):
        names = "' and '".join(collisions[0])
        raise DataError(
            f"{folder} lies on a file system that ignores case, where the videos of '{names}' are "
            "one file: use a folder on a case-sensitive file system"
        )
