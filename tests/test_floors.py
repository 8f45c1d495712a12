"""The house stands: imports run down, heavy packages have one owner, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "opensora"

FLOORS: list[set[str]] = [
    {"config", "errors", "types", "runtime", "interrupts", "meeting", "peers", "watchdog"}
    | {"store", "digests", "disk", "memory"},
    {"dist"},
    {"ops", "media"},
    {"models", "vae", "text", "diffusion", "data", "arena"},
    {"zoo", "interop"},
    {"world"},
    {"engine"},
    {"train", "infer", "curate"},
    {"evaluate", "report"},
    {"serve"},
    {"cli"},
    {"__main__"},
]
"""Floor 0 first. Rooms on floor 0 may use each other; on every other floor they are strangers."""

OWNERS = {
    "av": {"media"},
    "decord": {"media"},
    "PIL": {"media"},
    "transformers": {"text", "evaluate/features.py", "evaluate/vbench/extractors.py"},
    "tokenizers": {"text"},
    "diffusers": {"interop", "vae"},
    "xformers": {"ops/kernels.py"},
    "flash_attn": {"ops/kernels.py"},
    "deepspeed": {"engine/deepspeed.py"},
    "colossalai": {"engine/colossal.py"},
    "torchao": {"infer/quantize.py"},
    "ray": {"curate/pipeline.py"},
    "pyarrow": {"data"},
    "wandb": {"train/tracking.py"},
    "typer": {"cli"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve/server.py"},
    "python_multipart": {"serve/forms.py"},
}
"""Package -> the only room or file that imports it."""


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is at module level); `require("x")` counts as an import of x."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        outside = id(node) in top
        if isinstance(node, ast.Import):
            yield from ((alias.name, outside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", outside) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            yield from ((str(a.value), False) for a in node.args if isinstance(a, ast.Constant))


def test_every_room_has_a_floor():
    assert {room_of(p) for p in sources()} <= set().union(*FLOORS)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_down(path: Path):
    room = room_of(path)
    for name, _ in imports(path):
        if not name.startswith("opensora."):
            continue
        other = name.split(".")[1]
        if other in ("__version__", room):
            continue
        below, here = floor_of(other), floor_of(room)
        assert below < here or below == here == 0, (
            f"{path.name} on floor {here} ({room}) imports {name} on floor {below}"
        )


def test_no_import_runs_in_a_circle():
    """Those for types alone and those inside functions count as well."""
    files = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in sources()}
    needs = {
        module: {
            part
            for name, _ in imports(path)
            for part in (name, name.rpartition(".")[0])
            if part in files and part != module
        }
        for module, path in files.items()
    }
    circle: list[str] = []
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, " <- ".join(circle)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_have_one_owner_and_are_imported_late(path: Path):
    place = path.relative_to(PACKAGE).as_posix()
    for name, at_module_level in imports(path):
        package = name.split(".")[0]
        if package not in OWNERS:
            continue
        owners = OWNERS[package]
        assert room_of(path) in owners or place in owners, f"{place} imports {package}"
        assert not at_module_level or package == "typer", f"{place} imports {package} when loaded"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_hold_one_idea(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{path.name}:{node.lineno} {node.name} has {length} lines"


def test_importing_the_package_loads_nothing_heavy():
    heavy = [*OWNERS, "scipy", "pandas", "torchvision", "yaml", "safetensors"]
    code = (
        "import sys, opensora, opensora.types, opensora.errors\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert answer == "[]"


def test_help_loads_no_model_code():
    code = (
        "import sys\n"
        "from opensora.cli.main import invoke\n"
        "code = invoke(['--help'])\n"
        "print([n for n in ('torch', 'av', 'transformers') if n in sys.modules])\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
