"""Puts the page together and writes it: one HTML file that needs nothing else, not even a network.

A content security policy in the file itself allows its one style sheet and its one script, by
digest, and no other; so even markup that slipped through could neither run nor fetch.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from opensora import __version__
from opensora.disk import replace_file
from opensora.errors import DataError, UsageError
from opensora.report import facts, gallery, scores, training
from opensora.report.clips import Shelf
from opensora.report.findings import Findings
from opensora.report.gather import gather
from opensora.report.markup import Markup, element, join
from opensora.report.reading import finite
from opensora.report.scale import duration
from opensora.report.words import plural

PAGE_NAME = "report.html"
MAX_BYTES = 25_000_000


def write_report(root: Path, output: Path | None = None, *, max_bytes: int = MAX_BYTES) -> Path:
    """Write a page about everything that runs, samples, scores and data left below `root`.

    The page is a function of the files alone: writing it again gives the same bytes.

    Args:
        root: a run folder, or any folder that holds some.
        output: the file to write, by default `report.html` in `root`.
        max_bytes: how much of the page embedded videos may take; those beyond it are linked by
            relative paths, and the page says so.

    Returns:
        The file written.

    Raises:
        UsageError: `root` is no folder, or `max_bytes` is negative.
        DataError: there is nothing in `root` to report.
        StorageError: the disk is full, read-only or failing.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; name a run, or a folder that holds runs")
    if max_bytes < 0:
        raise UsageError(f"max_bytes is {max_bytes}; it is 0 (link everything) or more")
    output = root / PAGE_NAME if output is None else Path(output).absolute()
    findings = gather(root)
    if findings.is_empty:
        raise DataError(
            f"there is nothing to report in {root}: no metrics.jsonl, samples.jsonl, scores.json, "
            "manifest.csv or commands.log at any depth. Name the output folder of a run"
        )
    shelf = Shelf(root, output.parent.resolve(), max_bytes, findings.notes)
    text = render(findings, shelf)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, text.encode("utf-8"))
    return output


def render(findings: Findings, shelf: Shelf) -> Markup:
    """The whole document."""
    style, script = _asset("page.css"), _asset("page.js")
    sections = _sections(findings, shelf)
    name = findings.root.name or "report"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{name} · opensora report"),
        element("style", style),
    )
    body = element(
        "body",
        _header(findings, name, sections),
        element("main", [_section(*section) for section in sections]),
        element("footer", element("p", f"Written by opensora {__version__}. Works offline.")),
        element("script", script),
    )
    return join(Markup("<!doctype html>\n"), element("html", head, body, lang="en"), "\n")


def _sections(findings: Findings, shelf: Shelf) -> list[tuple[str, str, Markup]]:
    """(anchor, heading, content) in reading order, which is also who may spend the budget first."""
    how = [
        facts.commands(findings.commands),
        facts.machine(findings),
        facts.configs(findings.runs, shelf),
    ]
    parts = [
        ("samples", "What it makes", gallery.galleries(findings.galleries, shelf)),
        ("scores", "How well", scores.section(findings.scores, findings.root)),
        ("training", "How it learned", training.section(findings.runs, shelf)),
        ("data", "What it saw", gallery.data(findings.datasets, findings.root, shelf)),
        ("again", "How to do it again", join(how) or None),
    ]
    # Last, because only now is it known what the sections above could not show.
    parts.append(("missing", "Left out", facts.left_out(findings.notes, shelf)))
    return [(anchor, heading, content) for anchor, heading, content in parts if content]


def _section(anchor: str, heading: str, content: Markup) -> Markup:
    return element("section", element("h2", heading), element("div", content), id=anchor)


def _header(findings: Findings, name: str, sections: list[tuple[str, str, Markup]]) -> Markup:
    links = [element("a", heading, href=f"#{anchor}") for anchor, heading, _ in sections]
    return element(
        "header",
        _emblem(),
        element("p", "opensora report", class_="overline"),
        element("h1", name),
        element("p", _summary(findings), class_="summary"),
        _headline(findings),
        element("nav", links, aria_label="Sections"),
    )


def _emblem() -> Markup:
    """Three shapes on their way: what the arena's videos show."""
    shapes = (
        element("circle", cx=0, cy=0, r=11, class_="shape one"),
        element("rect", x=-10, y=-10, width=20, height=20, rx=2, class_="shape two"),
        element("path", d="M0-12L12 10H-12z", class_="shape three"),
    )
    placed = [
        element("g", shape, transform=f"translate({20 + 36 * i} 20)")
        for i, shape in enumerate(shapes)
    ]
    return element("svg", placed, class_="emblem", viewBox="0 0 200 40", aria_hidden="true")


def _summary(findings: Findings) -> str:
    """A sentence or two: how much there is, on which machine, from when."""
    num_videos = sum(len(found.samples) for found in findings.galleries)
    num_clips = sum(found.num_clips for found in findings.datasets)
    parts = []
    if findings.runs:
        parts.append(plural(len(findings.runs), "training run"))
    if num_videos:
        parts.append(plural(num_videos, "generated video"))
    if num_clips:
        parts.append(plural(num_clips, "clip") + " of data")
    if not parts:
        parts.append(plural(len(findings.scores), "evaluation"))
    words = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    words = words.removeprefix(" and ")
    environments = [findings.environment, *(run.environment for run in findings.runs)]
    processors = [e["processor"] for e in environments if e.get("processor")]
    if processors:
        words += f", on {processors[0]}"
        threads = [finite(e.get("threads")) for e in environments if e.get("threads")]
        words += f" ({plural(int(threads[0]), 'thread')})" if threads and threads[0] else ""
    if findings.newest:
        moment = datetime.fromtimestamp(findings.newest, UTC)
        words += f". Last written {moment.day} {moment:%B %Y, %H:%M} UTC"
    return words[:1].upper() + words[1:] + "." if words else ""


def _headline(findings: Findings) -> Markup | None:
    """The few figures that a visitor came for."""
    tiles: list[Markup] = []
    if findings.scores:
        for name, estimate, target in scores.headlines(findings.scores[0]):
            mark = None
            if target is not None:
                met = target.met(estimate.mean)
                look, words = ("good", "✓ on target") if met else ("bad", "✗ off target")
                mark = element("small", words, class_=look)
            share = f"{100 * estimate.mean:.1f}".removesuffix(".0") + "%"
            tiles.append(_tile(name, share, mark))
    times = [training.seconds(run) for run in findings.runs]
    known = [time for time in times if time is not None]
    if known:
        tiles.append(_tile("Training time", duration(sum(known)), None))
    return element("dl", tiles, class_="tiles headline") if tiles else None


def _tile(name: str, value: str, mark: Markup | None) -> Markup:
    return element("div", element("dt", name), element("dd", value, mark))


def _asset(name: str) -> Markup:
    return Markup(resources.files("opensora.report").joinpath(name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    """Nothing but the two texts with these digests, embedded media, and files beside the page."""

    def allow(text: str) -> str:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    return "; ".join(
        (
            "default-src 'none'",
            f"style-src {allow(style)}",
            f"script-src {allow(script)}",
            "img-src data: 'self' file:",
            "media-src data: 'self' file:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
