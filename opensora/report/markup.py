"""HTML that cannot be injected into: every string is escaped unless this file made it.

`element` is the only way to make markup, so a prompt, a path or a config value is always text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

Child: TypeAlias = "Markup | str | int | float | Iterable[Child] | None"

_VOID = {"br", "hr", "img", "meta"}
_NOT_XML = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Markup(str):
    """A string that is finished HTML."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """`text` as HTML that shows exactly it, in an element and in a quoted attribute alike.

    Control characters and lone surrogates, which HTML cannot hold, become U+FFFD.
    """
    return Markup(html.escape(_NOT_XML.sub("\ufffd", str(text))))


def join(*children: Child) -> Markup:
    """The children one after another; None leaves nothing, iterables are flattened."""
    return Markup("".join(_flatten(children)))


def element(
    name: str, /, *children: Child, **attributes: str | int | float | bool | None
) -> Markup:
    """An element with escaped attributes and children.

    In attribute names a trailing underscore is dropped (`class_`) and others become hyphens
    (`aria_label`). None and False leave the attribute out, True writes it without a value.
    """
    parts = [name]
    for key, value in attributes.items():
        written = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(written)
        elif value is not None and value is not False:
            parts.append(f'{written}="{escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    if name in _VOID:
        return Markup(opening)
    return Markup(f"{opening}{join(*children)}</{name}>")


def _flatten(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, str | int | float):
            yield escape(child)
        elif child is not None:
            yield from _flatten(child)
