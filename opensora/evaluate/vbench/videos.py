"""Which files of a folder are which videos: by VBench's names, or whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora.errors import DataError, closest
from opensora.evaluate.vbench.prompts import Entry, file_name, prompt_of

SUFFIXES = (".mp4", ".gif")
"""What VBench reads."""


@dataclass(frozen=True)
class Video:
    """A file to judge.

    Attributes:
        sample: its number among the samples of the prompt; None in custom folders.
    """

    path: Path
    prompt: str
    sample: int | None = None


@dataclass(frozen=True)
class Collection:
    """What a folder holds of what was looked for.

    Attributes:
        videos: prompt -> its videos by rising sample number; only prompts that have some.
        missing: names of files that are not there.
        strays: videos whose names belong to no prompt, each with the nearest prompt or ''.
    """

    videos: dict[str, list[Video]]
    missing: list[str]
    strays: dict[str, str]


def list_videos(folder: Path) -> list[str]:
    """Names of the mp4 and gif files of a folder, sorted.

    Raises:
        DataError: the folder cannot be read or has none.
    """
    try:
        names = sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.suffix.lower() in SUFFIXES and entry.is_file() and entry.name[0] != "."
        )
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None
    if not names:
        raise DataError(f"{folder} holds no .mp4 or .gif files")
    return names


def by_prompt(
    folder: Path, wanted: Iterable[Entry], known: Sequence[Entry], samples: dict[str, int]
) -> Collection:
    """Videos under VBench's names, '{prompt}-{i}.mp4' or '.gif'.

    Args:
        wanted: entries whose videos are looked for; those of other known entries are no strays.
        samples: prompt -> samples 0 to n - 1 are looked for.

    Raises:
        DataError: no file of the folder has such a name.
    """
    names = list_videos(folder)
    present = set(names)
    videos: dict[str, list[Video]] = {}
    missing: list[str] = []
    for prompt in dict.fromkeys(entry.prompt for entry in wanted):
        for sample in range(samples[prompt]):
            candidates = [file_name(prompt, sample, suffix) for suffix in SUFFIXES]
            found = next((name for name in candidates if name in present), None)
            if found is None:
                missing.append(candidates[0])
            else:
                videos.setdefault(prompt, []).append(Video(folder / found, prompt, sample))
    prompts = {entry.prompt for entry in known}
    strays = [
        name for name in names if prompt_of(name)[0] not in prompts or prompt_of(name)[1] is None
    ]
    if not videos:
        hint = ""
        if strays:
            nearest = closest(prompt_of(strays[0])[0], prompts)
            hint = f"; '{strays[0]}' is not" + (f" (nearest: '{nearest}')" if nearest else "")
        raise DataError(
            f"no video in {folder} is named '<prompt>-<i>.mp4' after the prompts looked for{hint}. "
            "Rename them, or judge any names with mode=custom"
        )
    # A folder of another benchmark may have thousands of strays, and nearness is slow to find.
    near = {name: closest(prompt_of(name)[0], prompts) or "" for name in strays[:10]}
    return Collection(videos, missing, {name: near.get(name, "") for name in strays})


def by_any_name(folder: Path) -> Collection:
    """All videos of a folder, each its own prompt, the way of VBench's mode 'custom_input'."""
    videos: dict[str, list[Video]] = {}
    for name in list_videos(folder):
        prompt, _ = prompt_of(name)
        videos.setdefault(prompt, []).append(Video(folder / name, prompt))
    return Collection(videos, [], {})
