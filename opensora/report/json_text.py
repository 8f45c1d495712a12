"""JSON for people: as it is in the file, with keys, strings and values told apart."""

from __future__ import annotations

import json
import re
from typing import Any

from opensora.report.markup import Markup, element, escape, join

_JSON_TOKEN = re.compile(
    r"(?P<key>\"(?:[^\"\\]|\\.)*\")(?=\s*:)|(?P<text>\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<value>-?\d[\d.eE+-]*|true|false|null|NaN|-?Infinity)"
)

_NUMBER_LIST = re.compile(r"\[\n[^\[\]{}\"]*\n *\]")
"""A list without strings or nesting, which reads better on one line."""


def pretty(tree: Any) -> Markup:
    """JSON with its keys, strings and values told apart by class."""
    text = json.dumps(tree, indent=2, ensure_ascii=False)
    text = _NUMBER_LIST.sub(lambda found: " ".join(found.group().split()), text)
    parts: list[Markup] = []
    end = 0
    for match in _JSON_TOKEN.finditer(text):
        parts.append(escape(text[end : match.start()]))
        parts.append(element("span", match.group(), class_=f"json-{match.lastgroup}"))
        end = match.end()
    return join(parts, escape(text[end:]))
