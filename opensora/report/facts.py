"""The part of the page to do it again with: commands, machine, configs; and what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from opensora.report.clips import Shelf
from opensora.report.findings import Findings, Run, Tree
from opensora.report.json_text import pretty
from opensora.report.markup import Markup, element, join
from opensora.report.reading import Notes, finite, mapping
from opensora.report.scale import duration, figure, size
from opensora.report.words import relative, title


def commands(found: Sequence[Tree]) -> Markup | None:
    """The exact commands in the order they were run, with their times and exit codes."""
    if not found:
        return None
    items = []
    for entry in found:
        code, took = finite(entry.get("exit")), finite(entry.get("seconds"))
        badge = None
        if code is not None and code != 0:
            badge = element("span", f"exit {code:g}", class_="badge bad")
        time = None if took is None else element("span", duration(took), class_="quiet")
        items.append(element("li", element("code", str(entry["command"])), " ", time, " ", badge))
    times = [finite(entry.get("seconds")) for entry in found]
    known = [time for time in times if time is not None]
    total = f"{duration(sum(known))} in all." if len(known) > 1 else None
    return join(
        element("h3", "Commands"),
        element("ol", items, class_="commands"),
        element("p", total, class_="note") if total else None,
    )


def machine(findings: Findings) -> Markup | None:
    """Where it ran, a column for each environment that differs."""
    columns: list[tuple[str, dict[str, str]]] = []
    sources = [(findings.root.name, dict(_flat(findings.environment)))]
    for run in findings.runs:
        precision = {k: str(v) for k, v in run.config.items() if k == "precision"}
        facts = dict(_flat(run.environment)) | precision
        sources.append((relative(run.path, findings.root), facts))
    for name, facts in sources:
        if facts and facts not in [known for _, known in columns]:
            columns.append((name, facts))
    if not columns:
        return None
    keys = dict.fromkeys(key for _, facts in columns for key in facts)
    head = None
    if len(columns) > 1:
        cells = [element("th", name, scope="col") for name, _ in columns]
        head = element("thead", element("tr", element("td"), cells))
    rows = [
        element(
            "tr",
            element("th", title(key), scope="row"),
            [element("td", facts.get(key, "–")) for _, facts in columns],
        )
        for key in keys
    ]
    return join(
        element("h3", "Machine and versions"),
        element(
            "div",
            element("table", head, element("tbody", rows), class_="plain"),
            class_="scroll",
        ),
    )


def configs(runs: Sequence[Run], shelf: Shelf) -> Markup | None:
    """The resolved config of each run, folded."""
    folded = [
        element(
            "details",
            element("summary", relative(run.path, shelf.root)),
            element("pre", pretty(run.config)),
        )
        for run in runs
        if run.config
    ]
    return join(element("h3", "Resolved configs"), folded) if folded else None


def left_out(notes: Notes, shelf: Shelf) -> Markup | None:
    """What is not on the page, and why: nothing is dropped in silence."""
    reasons = []
    if shelf.num_linked:
        reasons.append(f"{shelf.num_linked:,} did not fit the page's size limit")
    if shelf.num_outside:
        reasons.append(f"{shelf.num_outside:,} lie outside the reported folder")
    linked = None
    if reasons:
        linked = element(
            "p",
            f"Of the media files, {' and '.join(reasons)}. They are linked, and play while the "
            "page lies where it was written.",
        )
    rows = [
        element("tr", element("td", element("code", name)), element("td", reason))
        for name, reason in notes.entries
    ]
    table = element("table", element("tbody", rows), class_="plain") if rows else None
    more = element("p", f"{notes.num_more:,} more.", class_="note") if notes.num_more else None
    if linked is None and table is None:
        return None
    return join(linked, element("div", table, class_="scroll") if table else None, more)


def _flat(tree: Tree) -> list[tuple[str, str]]:
    """An environment as (key, words); rates and counts are written for people."""
    facts = []
    for key, value in tree.items():
        if key == "matmul_flops_per_second":
            for precision, rate in mapping(value).items():
                facts.append((f"matmul {precision}", figure(finite(rate), unit="FLOP/s")))
        elif key.endswith("_bytes"):
            facts.append((key.removesuffix("_bytes"), size(finite(value))))
        elif key == "parameters":
            facts.append((key, f"{value:,}" if isinstance(value, int) else str(value)))
        elif isinstance(value, dict | list):
            facts.append((key, json.dumps(value, ensure_ascii=False)))
        else:
            facts.append((key, str(value)))
    return facts
