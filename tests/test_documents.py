"""What the documents tell people to type exists, parses and, where it is Python, runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from opensora import config as configs
from opensora.cli import main as cli
from opensora.cli.inspect import kind_of, schemas
from opensora.errors import UsageError
from opensora.train import forecast

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "eval").rglob("*.md")),
]


def lines_of(document: Path) -> list[str]:
    """Commands in a document's shell blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = [
    pytest.param(line, id=f"{document.name}: {line}")
    for document in DOCUMENTS
    for line in lines_of(document)
]


def words_of(line: str) -> list[str]:
    """A command without the launcher in front of it."""
    words = shlex.split(line.partition("|")[0])
    while "=" in words[0]:  # the environment
        words = words[1:]
    if words[0] == "torchrun":
        words = ["opensora", *words[words.index("opensora") + 1 :]]
    if words[0] == "sbatch":
        words = ["bash", *words[next(i for i, w in enumerate(words) if w.endswith(".sh")) :]]
    return words


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_one_that_there_is(line):
    program, *words = words_of(line)
    if program == "opensora":
        check_command(words)
        return
    assert program in ("bash", "python"), "documents use opensora, torchrun, bash and python"
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))
    for option in (word for word in words[1:] if word.startswith("--")):
        assert option in source


def check_command(words: list[str]) -> None:
    """Parse it as the command line would, and load the config that it names with its changes."""
    command: Any = typer.main.get_command(cli.app)
    context = command.make_context("opensora", list(words))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args])
        context = command.make_context(name, [*rest, *context.args], parent=context)
    values = context.params
    named = [v for v in values.values() if isinstance(v, Path) and v.suffix == ".yaml"]
    for path in named:
        tree = configs.override(configs.read(ROOT / path), list(values.get("overrides") or []))
        loaded: Any = configs.validate(schemas()[kind_of(tree)], tree, where=str(path))
        if values.get("gpus") and not values["sample"]:
            for bucket in forecast._largest(loaded):
                forecast.share_of(loaded, values["gpus"], bucket)


def test_the_documents_hold_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize(
    "words",
    [
        ["trian", "configs/tiny/vae.yaml"],
        ["train", "configs/tiny/vae.yaml", "--fast"],
        ["train", "configs/tiny/vae.yaml", "stepz=3"],
        ["data", "render", "out", "--number", "3"],
        ["plan", "configs/stdit/819k.yaml", "--gpus", "8"],  # one clip is too few for eight
    ],
    ids=" ".join,
)
def test_a_command_that_there_is_not_would_be_found(words):
    with pytest.raises((typer.BadParameter.__mro__[1], UsageError)):
        check_command(words)


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", document.read_text("utf-8")):
            assert (document.parent / target).exists(), f"{document.name} -> {target}"


def test_the_python_of_the_readme_runs(world, tmp_path, monkeypatch):
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S
    )
    monkeypatch.chdir(tmp_path)
    exec(code.replace("outputs/quickstart/t2v", str(world.generator)), {})
    assert (tmp_path / "square.mp4").stat().st_size > 0
