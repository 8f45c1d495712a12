"""The part of the page that moves: samples with their prompts, the model learning, the data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from opensora.report.clips import Shelf
from opensora.report.findings import QUESTIONS, Dataset, Gallery, Run, Sample
from opensora.report.json_text import pretty
from opensora.report.markup import Markup, element, join
from opensora.report.scale import figure
from opensora.report.words import plain, plural, relative

NUM_OPEN = 24
"""Cards of the first gallery on show at first; the rest unfold."""

NUM_OPEN_LATER = 10

NUM_STEPS = 6
NUM_PROMPTS = 8


def galleries(found: Sequence[Gallery], shelf: Shelf) -> Markup | None:
    """Every folder of samples, each with a filter by right and wrong where it was judged."""
    if not found:
        return None
    single = len(found) == 1
    return join(
        _gallery(gallery, shelf, single=single, num_open=NUM_OPEN if first else NUM_OPEN_LATER)
        for first, gallery in zip([True, *[False] * len(found)], found, strict=False)
    )


def learning(run: Run, shelf: Shelf) -> Markup | None:
    """What a run drew as it trained: a row a prompt, a column a step."""
    if not run.samples:
        return None
    steps = _spread(list(run.samples), NUM_STEPS)
    names = [sample.file.name for sample in run.samples[steps[-1]]]
    shown = names[:NUM_PROMPTS]
    head = element(
        "tr",
        element("th", element("span", "prompt", class_="quiet"), scope="col"),
        [element("th", f"step {step:,}", scope="col") for step in steps],
    )
    rows = []
    for name in shown:
        samples = [_named(run.samples[step], name) for step in steps]
        prompt = next(sample.prompt for sample in reversed(samples) if sample is not None)
        cells = [
            element("td", shelf.player(sample.file, f"{prompt}, step {step}") if sample else None)
            for sample, step in zip(samples, steps, strict=True)
        ]
        rows.append(element("tr", element("th", prompt, scope="row"), cells))
    left_out = []
    if len(steps) < len(run.samples):
        left_out.append(f"{len(steps)} of {len(run.samples)} steps")
    if len(shown) < len(names):
        left_out.append(f"{len(shown)} of {len(names)} prompts")
    return join(
        element("h4", "Drawn while training"),
        element("p", f"Shown: {' and '.join(left_out)}.", class_="note") if left_out else None,
        element(
            "div",
            element("table", element("thead", head), element("tbody", rows), class_="learning"),
            class_="scroll",
        ),
    )


def data(datasets: Sequence[Dataset], root: Path, shelf: Shelf) -> Markup | None:
    """How much data there is, and a few clips of it."""
    if not datasets:
        return None
    return join(
        element(
            "article",
            element("h3", relative(dataset.folder_or_file, root)),
            element(
                "p",
                [
                    element("span", element("b", f"{dataset.num_clips:,}"), " clips"),
                    [
                        element("span", f"{name} ", element("b", value))
                        for name, value in dataset.facts.items()
                    ],
                ],
                class_="facts",
            ),
            element("div", [_card(sample, shelf) for sample in dataset.examples], class_="cards"),
        )
        for dataset in datasets
    )


def _gallery(gallery: Gallery, shelf: Shelf, *, single: bool, num_open: int) -> Markup:
    samples = gallery.samples
    cards = [_card(sample, shelf) for sample in samples]
    rest = cards[num_open:]
    return element(
        "article",
        None if single else element("h3", relative(gallery.path, shelf.root)),
        _sources(samples),
        _filters(samples),
        element("div", cards[:num_open], class_="cards"),
        element(
            "details",
            element("summary", f"{len(rest)} more"),
            element("div", rest, class_="cards"),
            class_="more",
        )
        if rest
        else None,
        class_="gallery",
    )


def _card(sample: Sample, shelf: Shelf) -> Markup:
    answers = sample.answers
    wrong = [name for name, value in answers.items() if value < 1]
    badges = [_badge(name, value) for name, value in answers.items()]
    if not answers:
        badges = [_badge(name, value) for name, value in list(sample.scores.items())[:6]]
    words = [] if sample.seed is None else [f"seed {sample.seed}"]
    words += [f"given {', '.join(sample.given)}"] if sample.given else []
    seed = element("span", " · ".join(words), class_="seed") if words else None
    right = sample.is_right
    return element(
        "figure",
        shelf.player(sample.file, sample.prompt or sample.file.name),
        element(
            "figcaption",
            element("p", sample.prompt or sample.file.name, class_="prompt"),
            element("p", badges, seed, class_="badges") if badges or seed else None,
        ),
        class_="card",
        data_right=None if right is None else str(right).lower(),
        data_wrong=" ".join(wrong) if answers else None,
    )


def _badge(name: str, value: float) -> Markup:
    if name not in QUESTIONS:
        return element("span", f"{plain(name)} {figure(value)}", class_="badge")
    if value >= 1:
        return element("span", f"✓ {plain(name)}", class_="badge good")
    partly = "" if value <= 0 else f" {value:.0%}"
    return element("span", f"✗ {plain(name)}{partly}", class_="badge bad")


def _filters(samples: Sequence[Sample]) -> Markup | None:
    """Buttons that the page's script brings to life; without it they are hidden."""
    judged = [sample for sample in samples if sample.is_right is not None]
    if not judged:
        return None
    wrong = Counter(name for s in judged for name, value in s.answers.items() if value < 1)
    num_right = sum(sample.is_right is True for sample in judged)
    choices = [("all", f"all {len(samples)}"), ("right", f"all right {num_right}")]
    choices += [(f"wrong:{name}", f"✗ {plain(name)} {count}") for name, count in wrong.items()]
    buttons = [
        element(
            "button", label, type="button", data_filter=key, aria_pressed=str(key == "all").lower()
        )
        for key, label in choices
    ]
    return element("p", buttons, class_="filters", role="group", aria_label="Show samples")


def _sources(samples: Sequence[Sample]) -> Markup:
    """Where the samples come from, in a line: how many, by which checkpoint, how drawn."""
    parts = [plural(len(samples), "video")]
    checkpoints = {sample.checkpoint for sample in samples if sample.checkpoint}
    if len(checkpoints) == 1:
        parts.append(f"drawn by {checkpoints.pop()}")
    elif checkpoints:
        parts.append(f"drawn by {len(checkpoints)} checkpoints")
    judged = [sample.is_right for sample in samples if sample.is_right is not None]
    if judged:
        parts.append(f"{sum(judged)} of {len(judged)} right in every question")
    settings = {json.dumps(sample.sampling, sort_keys=True) for sample in samples}
    common = samples[0].sampling if len(settings) == 1 else {}
    how = element(
        "details", element("summary", "How they were drawn"), element("pre", pretty(common))
    )
    return join(element("p", ", ".join(parts) + ".", class_="lead"), how if common else None)


def _named(samples: Sequence[Sample], name: str) -> Sample | None:
    return next((sample for sample in samples if sample.file.name == name), None)


def _spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread, with the first and the last."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
