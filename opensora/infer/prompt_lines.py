"""What a line of a prompt file can say besides words, as Open-Sora's prompts do.

    a sunny beach{"reference_path": "beach.png", "mask_strategy": "0"}
    |0|a beach by day|2|the same beach at night

The first gives frames, the second has a prompt for windows 0 and 1 of a long video and another from
window 2 on. A mask strategy is a list of up to six numbers, separated by commas; several are
separated by semicolons: the window in which frames are given, the number of the reference, the
first latent frame taken of it, the latent frame where it goes, how many, and the level from which
they are changed (0 keeps them). What is left out is 0, and 1 for how many.

The syntax is that of `opensora/utils/inference_utils.py` in Open-Sora 1.2, whose words for scores
are here as well.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from opensora.errors import UsageError, did_you_mean
from opensora.infer.conditions import Reference

_KEYS = ("reference_path", "mask_strategy")
_TURN = re.compile(r"\|(\d+)\|")
_DEFAULTS = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Line:
    """A prompt as it was written, and what it means.

    Attributes:
        prompts: one for each window of a long video in turn, the last one going on; a single one
            where the line has no turns.
        references: files whose frames are given.
    """

    prompts: tuple[str, ...]
    references: tuple[Reference, ...] = ()


def parse(line: str, *, reference_path: str = "", mask_strategy: str = "") -> Line:
    """Take a line apart.

    Args:
        reference_path: files separated by semicolons, where the line names none.
        mask_strategy: where the line has none; "0" gives the first frame of the first file.

    Raises:
        UsageError: JSON that cannot be read, unknown keys, or a strategy that makes no sense.
    """
    text, settings = _split_json(line)
    path = settings.get("reference_path", reference_path)
    strategy = settings.get("mask_strategy", mask_strategy)
    if strategy and not path:
        raise UsageError(f"the mask strategy '{strategy}' has no reference_path")
    return Line(turns(text.strip()), references(path, strategy or "0") if path else ())


def words_of(line: str) -> str:
    """The words of a line, without turns and JSON, which name its file."""
    with suppress(UsageError):
        line, _ = _split_json(line)
    return _TURN.sub(" ", line).strip()


def _split_json(line: str) -> tuple[str, dict[str, str]]:
    """The words of a line and its trailing JSON object; braces within words are words."""
    if "{" not in line or not line.rstrip().endswith("}"):
        return line, {}
    reason = start = None
    settings: dict[str, str] = {}
    for start in (brace.start() for brace in re.finditer("{", line)):
        try:
            settings = json.loads(line[start:])
        except json.JSONDecodeError as error:
            reason = error
        else:
            break
    if not settings:
        if not any(f'"{key}"' in line for key in _KEYS):
            return line, {}
        raise UsageError(f"the JSON at the end of '{line}' cannot be read: {reason}")
    for key, value in settings.items():
        if key not in _KEYS:
            raise UsageError(f"'{line}' has the key '{key}'.{did_you_mean(key, _KEYS)}")
        if not isinstance(value, str):
            raise UsageError(f"'{line}': {key} is {value!r}; it is a string")
    return line[:start], settings


def turns(text: str) -> tuple[str, ...]:
    """The prompt of each window: "|0|a|2|b" is a, a, b.

    Raises:
        UsageError: turns that do not begin at 0 or do not rise.
    """
    if not text.startswith("|"):
        return (text,)
    _, *parts = _TURN.split(text)
    numbers, words = [int(n) for n in parts[::2]], [w.strip() for w in parts[1::2]]
    if not numbers or numbers[0] != 0 or numbers != sorted(set(numbers)):
        raise UsageError(
            f"the turns of '{text}' are written |0|words|2|words, from window 0 on and rising"
        )
    counts = [after - before for before, after in pairwise(numbers)]
    return tuple(w for w, n in zip(words, [*counts, 1], strict=True) for _ in range(n))


def references(path: str, strategy: str) -> tuple[Reference, ...]:
    """The files of a mask strategy, with where their frames go.

    Raises:
        UsageError: a number that is none, too many of them, or a file that is not named.
    """
    paths = [part.strip() for part in path.split(";")]
    found = []
    for group in strategy.split(";"):
        try:
            numbers = [float(part) for part in group.split(",")]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 6 or not all(n.is_integer() for n in numbers[:5]):
            raise UsageError(
                f"'{group}' in the mask strategy '{strategy}' is not up to six numbers: window, "
                "reference, its first latent frame, the target's, how many, level"
            )
        window, index, start, at, count, level = (*numbers, *_DEFAULTS[len(numbers) :])
        if not 0 <= index < len(paths):
            raise UsageError(
                f"'{group}' asks for reference {int(index)}; there are {len(paths)} in '{path}'"
            )
        if count < 1 or window < 0 or not 0 <= level <= 1:
            raise UsageError(
                f"'{group}': the window is at least 0, the count at least 1, the level in [0, 1]"
            )
        place = {"at": int(at), "start": int(start), "count": int(count)}
        found.append(Reference(paths[int(index)], level=level, window=int(window), **place))
    return tuple(found)


def with_scores(
    prompt: str,
    *,
    aesthetic: float | None = None,
    motion: float | None = None,
    camera: str | None = None,
) -> str:
    """A prompt that asks for scores in the words that Open-Sora trains with, unless it does."""
    for name, value in (
        ("aesthetic score", None if aesthetic is None else f"{aesthetic:.1f}"),
        ("motion score", None if motion is None else f"{motion:.1f}"),
        ("camera motion", camera),
    ):
        if value is not None and f"{name}:" not in prompt:
            prompt = f"{prompt} {name}: {value}."
    return prompt
