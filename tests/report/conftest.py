"""A small tree of runs, samples, scores and data, and a strict reader of pages."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from opensora.media.write import write_video

VOID = {"br", "hr", "img", "meta"}


@dataclass
class Node:
    """An element with its attributes and, in order, the texts and elements inside it."""

    tag: str
    attributes: dict[str, str]
    content: list[str | Node] = field(default_factory=list)

    @property
    def children(self) -> list[Node]:
        return [part for part in self.content if isinstance(part, Node)]

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.content)

    def all(self, tag: str | None = None, **attributes: str) -> list[Node]:
        """Every element below with this tag and these attribute values, in document order."""
        found = []
        for child in self.children:
            wanted = {name.rstrip("_").replace("_", "-"): v for name, v in attributes.items()}
            if tag in (None, child.tag) and wanted.items() <= child.attributes.items():
                found.append(child)
            found += child.all(tag, **attributes)
        return found

    def one(self, tag: str | None = None, **attributes: str) -> Node:
        (node,) = self.all(tag, **attributes)
        return node


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("document", {})]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, {name: value or "" for name, value in attrs})
        assert len(node.attributes) == len(attrs), f"<{tag}> has an attribute twice"
        self.open[-1].content.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.open[-1].content.append(data)


def parse(text: str) -> Node:
    """The document as a tree; fails where elements are not nested as they were written."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    assert [node.tag for node in parser.open] == ["document"], "an element is not closed"
    return parser.open[0]


def read_page(path: Path) -> Node:
    return parse(path.read_text(encoding="utf-8"))


def moving_square(seed: int = 0, *, side: int = 16, frames: int = 3) -> np.ndarray:
    """uint8 (F, H, W, 3): a square that walks to the right."""
    video = np.full((frames, side, side, 3), 240, np.uint8)
    for frame in range(frames):
        video[frame, 4:8, 2 + frame : 6 + frame] = (200, 10 * seed % 255, 30)
    return video


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def write_run(folder: Path, *, steps: int = 40) -> None:
    """A run as the trainer leaves it: train and validation records, an incident, facts, samples."""
    rows: list[dict] = []
    for step in range(10, steps + 1, 10):
        rows.append(
            {"kind": "train", "step": step, "time": 1.0, "loss": 100.0 / step, "skipped": False}
            | {"gradient_norm": 0.5, "tokens_per_second": 2000.0, "matmul_share": 0.5}
            | {"train_seconds": step * 2.0, "peak_memory_bytes": 2**30, "odd_metric": step}
        )
    levels = {f"loss/level_{level:.2f}": 1.0 - level for level in (0.05, 0.5, 0.95)}
    rows.append({"kind": "validation", "step": steps, "loss": 0.25, "psnr": 27.5, **levels})
    write_lines(folder / "metrics.jsonl", rows)
    incident = {"step": 20, "reason": "the loss is nan", "samples": [{"id": 7, "text": "a fish"}]}
    write_lines(folder / "incidents.jsonl", [incident])
    prompts = ["a red circle", "a blue square"]
    config = {"task": {"kind": "text_to_video"}, "steps": steps, "precision": "bf16"}
    write_json(folder / "config.json", {**config, "samples": {"prompts": prompts}})
    facts = {"processor": "Abacus 3000", "threads": 2, "parameters": 1234567}
    write_json(folder / "environment.json", facts | {"matmul_flops_per_second": {"fp32": 1.31e11}})
    for step in (20, 40):
        for index in range(2):
            name = f"samples/step-{step:06d}/{index:04d}-a-thing.mp4"
            write_video(folder / name, moving_square(index), fps=8)


def write_samples(folder: Path, rows: list[dict]) -> None:
    """A gallery; a video is written for each row."""
    for index, row in enumerate(rows):
        write_video(folder / row["file"], moving_square(index), fps=8)
    write_lines(folder / "samples.jsonl", rows)


def write_data(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "manifest.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "num_frames", "height", "width", "fps"))
        for index in range(count):
            writer.writerow((f"videos/{index}.mp4", f"clip number {index}", 3, 16, 16, 8.0))
            write_video(folder / f"videos/{index}.mp4", moving_square(index), fps=8)


SCORES = {
    "untrained": {"colour": {"mean": 0.05, "low": 0.0, "high": 0.1, "n": 64}},
    "trained": {
        "colour": {"mean": 0.97, "low": 0.95, "high": 0.99, "n": 64},
        "shape": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 64},
        "newton_residual": {"mean": 3.5, "low": 3.0, "high": 4.0, "n": 60},
    },
    "settings": {"suite": "arena", "seed": 1},
    "targets": {"trained": {"colour": 0.95, "shape": 0.7}, "untrained": {"colour": {"max": 0.1}}},
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "quickstart")


def write_tree(root: Path) -> Path:
    """outputs/quickstart in small."""
    write_run(root / "runs" / "t2v")
    answers = [{"colour": 1.0, "shape": 1.0}, {"colour": 1.0, "shape": 0.5}, {}]
    write_samples(
        root / "samples",
        [
            {"file": f"{i}.mp4", "prompt": f"prompt {i}", "seed": i, "checkpoint": "step-40"}
            | {"sampling": {"sampler": "euler", "schedule": {"num_steps": 30}}, "scores": scores}
            for i, scores in enumerate(answers)
        ],
    )
    write_json(root / "scores.json", SCORES)
    write_data(root / "data")
    rows = [
        {"command": "opensora train t2v.yaml", "seconds": 90, "exit": 0},
        {"command": "opensora eval 'a b'", "seconds": 3.5, "exit": 65},
    ]
    write_json(root / "commands.json", rows)
    return root
