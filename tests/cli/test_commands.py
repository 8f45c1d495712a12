"""The command line in one process: help, exit codes, one line for every failure."""

import errno
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from opensora.cli import doctor
from opensora.cli import main as cli
from opensora.cli.main import invoke
from tests.infer.conftest import build_pipeline
from tests.infer.test_pipeline import save_run

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny"

COMMANDS = [
    ["train"],
    ["encode"],
    ["sample"],
    ["eval"],
    ["eval", "run"],
    ["eval", "compare"],
    ["eval", "tabulate"],
    ["serve"],
    ["report"],
    ["doctor"],
    ["plan"],
    ["verify"],
    ["export"],
    ["data"],
    ["data", "render"],
    ["data", "probe"],
    ["data", "check"],
    ["config"],
    ["config", "show"],
    ["config", "schema"],
]


@pytest.fixture
def refused(capsys):
    """Run a command that fails; returns its exit code and the one line that it tells."""

    def run(*arguments: object) -> tuple[int, str]:
        code = invoke([str(argument) for argument in arguments])
        told = [line for line in capsys.readouterr().err.splitlines() if "opensora: " in line]
        assert len(told) == 1, told
        return code, told[0]

    return run


def tell(capsys, *arguments: object) -> str:
    """Run a command that succeeds; returns what it prints."""
    assert invoke([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command, capsys):
    text = tell(capsys, *command, "--help")
    assert f"Usage: opensora {' '.join(command)}" in text
    assert len(text.splitlines()) > 5


def test_the_list_of_commands_above_is_whole():
    def walk(command, path):
        for name, below in getattr(command, "commands", {}).items():
            yield [*path, name]
            yield from walk(below, [*path, name])

    found = list(walk(typer.main.get_command(cli.app), []))
    assert sorted(found) == sorted(COMMANDS)


def test_the_help_lists_the_exit_codes(capsys):
    text = " ".join(tell(capsys, "--help").split())
    for code in (
        "64 usage",
        "65 bad data",
        "66 checkpoint",
        "70 numerics",
        "74 disk",
        "75 stopped",
    ):
        assert code in text


def test_the_installed_command_is_the_modules(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["opensora"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main
    assert importlib.import_module("opensora.__main__").main is cli.main


def test_the_version_is_the_packages(capsys):
    assert (
        tell(capsys, "--version") == f"opensora {importlib.import_module('opensora').__version__}\n"
    )


def test_nothing_asked_is_answered_with_help_and_64(capsys):
    for group in ([], ["data"], ["config"]):
        assert invoke(group) == 64
        assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian", "x"], "Did you mean 'train'?"),
        (["data", "rendr"], "Did you mean 'render'?"),
        (["train"], "Missing argument 'config'"),
        (["train", "--stpes", "3"], "No such option: --stpes"),
        (["train", "none.yaml"], "none.yaml cannot be read"),
        (["train", TINY / "vea.yaml"], "Did you mean 'vae.yaml'?"),
        (["train", TINY], "Is a directory"),
        (["train", TINY / "vae.yaml", "stpes=3"], "unknown key 'stpes'. Did you mean 'steps'?"),
        (["train", TINY / "vae.yaml", "task.vae.widht=[8]"], "Did you mean 'widths'?"),
        (["train", TINY / "vae.yaml", "steps"], "'steps' is not an override"),
        (["train", TINY / "vae.yaml", "steps=[1"], "not valid YAML"),
        (["train", TINY / "vae.yaml", "steps=many"], "'steps'"),
        (["train", TINY / "vae.yaml", "device=quantum"], "device 'quantum' is not usable here"),
        (["train", TINY / "scenes.yaml"], "unknown key"),
        (["encode", TINY / "encode.yaml", "vae_fram=x"], "Did you mean 'vae_from'?"),
        (["sample", ".", "a dog", "--sampler", "eulr"], "'euler'"),
        (["sample", ".", "a dog", "--format", "mp5"], "Did you mean 'mp4'?"),
        (["sample", ".", "a dog", "--attention", "flash"], "Did you mean 'flash4'?"),
        (["sample", "x", "a dog", "--steps", "0"], "--steps"),
        (["sample", "x", "a dog", "--seed", str(2**70)], "--seed"),
        (["sample", "x"], "give prompts as arguments, or a --file"),
        (["sample", "x", "a dog", "--file", "y.txt"], "give prompts as arguments, or a --file"),
        (["sample", ".", "--file", "none.txt"], "none.txt cannot be read"),
        (["eval", "x", "--suite", "areena"], "Did you mean 'arena'?"),
        (["eval", "x", "num_prompt=3"], "Did you mean 'num_prompts'?"),
        (["report", "none"], "none is not a folder"),
        (["data", "render", "out", "--split", "trian"], "Did you mean 'train'?"),
        (["data", "render", "out", "--count", "0"], "--count"),
        (["data", "probe", TINY / "vae.yaml", "--captions", "x.csv"], "--captions goes with"),
        (["config", "show", "none.yaml"], "none.yaml cannot be read"),
        (["config", "show", TINY / "vae.yaml", "--kind", "trian"], "Did you mean 'train'?"),
        (["config", "schema", "--kind", "scene"], "Did you mean 'scenes'?"),
    ],
    ids=lambda value: " ".join(map(str, value))[-40:] if isinstance(value, list) else "",
)
def test_misuse_is_refused_with_64_and_the_mend(arguments, told, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, line = refused(*arguments)
    assert code == 64
    assert told in line
    assert not list(tmp_path.iterdir())


def test_bad_data_are_refused_with_65(refused, world, tmp_path):
    output = tmp_path / "run"
    broken = tmp_path / "broken.csv"
    broken.write_text("path,text,num_frames,hieght,width,fps\na.mp4,a,5,32,32,8\n")
    code, line = refused(
        "train", TINY / "vae.yaml", *world.overrides("vae", output), f'data.manifest="{broken}"'
    )
    assert code == 65
    assert "height" in line
    assert "hieght" in line
    absent = tmp_path / "absent.csv"
    absent.write_text("path,text,num_frames,height,width,fps\nnone.mp4,a,5,32,32,8\n")
    code, line = refused(
        "train", TINY / "vae.yaml", *world.overrides("vae", output), f'data.manifest="{absent}"'
    )
    assert (code, "none.mp4" in line) == (65, True)
    large = "data.buckets={resolutions: {256px: {5: {batch_size: 2}}}, fps: 8}"
    code, line = refused("train", TINY / "vae.yaml", *world.overrides("vae", output), large)
    assert code == 65
    assert "24" in line


def test_latents_of_another_vae_are_refused_with_65(refused, world, tmp_path):
    other = tmp_path / "vae"
    overrides = [*world.overrides("vae", other), "seed=1", "steps=1", "validation.every=0"]
    assert invoke(["train", str(TINY / "vae.yaml"), *overrides]) == 0
    code, line = refused(
        "train", TINY / "stdit.yaml", *world.overrides("stdit", tmp_path / "run"),
        f'task.vae_from="{other}"',
    )  # fmt: skip
    assert code == 65
    assert "made by another encoder" in line


def test_checkpoints_that_cannot_be_used_are_refused_with_66(refused, world, tmp_path):
    assert refused("sample", tmp_path / "none", "a dog")[0] == 66
    code, line = refused("sample", world.vae, "a dog")
    assert (code, "sampling needs 'text_to_video'" in line) == (66, True)
    copy = tmp_path / "run/checkpoints/step-000001"
    copy.mkdir(parents=True)
    for file in (world.generator / "checkpoints/step-000001").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for command in (["sample", tmp_path / "run", "a dog"], ["eval", tmp_path / "run"]):
        code, line = refused(*command)
        assert code == 66
        assert "damaged tensors: '" in line
    code, line = refused("verify", tmp_path / "run")
    assert (code, "step-000001 is damaged" in line) == (66, True)


def test_what_is_sound_and_what_is_damaged_is_told_down_to_the_tensor(capsys, world, tmp_path):
    for sound in (world.generator, world.latents):
        lines = tell(capsys, "verify", sound).splitlines()
        assert lines
        assert all(line.startswith("sound") and "MiB" in line for line in lines)
    copy = tmp_path / "copy"
    shutil.copytree(world.generator, copy)
    weights = next(copy.rglob("weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert invoke(["verify", str(copy)]) == 66
    told = capsys.readouterr().out
    assert re.search(r"^damaged .*step-000001  weights\.safetensors: damaged tensors: '", told)
    assert invoke(["verify", str(tmp_path / "nothing")]) == 64


def test_an_export_draws_what_its_checkpoint_draws(capsys, world, tmp_path):
    from opensora.infer.pipeline import VideoPipeline

    tell(capsys, "export", world.generator, tmp_path / "exported")
    first, second = (
        VideoPipeline.from_pretrained(path) for path in (world.generator, tmp_path / "exported")
    )
    assert first.fingerprint == second.fingerprint
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        for folder in (tmp_path / "exported", world.generator)
    ]
    assert sizes[0] <= sizes[1]


def test_a_folder_that_takes_no_files_is_refused_with_74(refused, world):
    code, line = refused("train", TINY / "vae.yaml", *world.overrides("vae", Path("/proc/run")))
    assert code == 74
    assert "/proc" in line


def test_an_error_of_the_disk_anywhere_is_74(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")

    monkeypatch.setattr("opensora.cli.inspect.configs.read", fail)
    assert invoke(["config", "show", "x.yaml"]) == 74
    assert capsys.readouterr().err == "opensora: some/file: No space left on device\n"


def test_an_interrupted_command_is_75(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("opensora.cli.inspect.configs.read", fail)
    assert invoke(["config", "show", "x.yaml"]) == 75
    assert "run the same command to go on" in capsys.readouterr().err


def test_a_reader_that_closes_the_pipe_sees_no_traceback():
    code = (
        "import sys; from opensora.cli.main import invoke\n"
        "from opensora.cli import inspect\n"
        "inspect.configs.to_json = lambda config: 'x' * 10**6\n"
        f"sys.exit(invoke(['config', 'show', {str(TINY / 'scenes.yaml')!r}, '--kind', 'scenes']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (1, b"")


REFUSALS = (
    ["--help"],
    ["trian"],
    ["train", "none.yaml"],
    ["train", str(TINY / "vae.yaml"), "steps"],
    ["sample", "x"],
    ["eval", "x", "--config", "none.yaml"],
    ["report", "none"],
    ["config", "show", "none.yaml"],
)


def test_sampling_imports_neither_the_compiler_nor_training(tmp_path):
    save_run(build_pipeline(), tmp_path / "run", averages=1.0)
    words = ["sample", str(tmp_path / "run"), "a dog", "--steps", "1", "-o", str(tmp_path / "out")]
    code = (
        "import sys\nfrom opensora.cli.main import invoke\n"
        f"assert invoke({words!r}) == 0\n"
        "slow = ('torch._dynamo', 'torch.distributed.tensor', 'opensora.train.config', 'sympy')\n"
        "sys.exit(', '.join(name for name in slow if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refusals_that_need_no_torch_do_not_wait_for_it():
    code = (
        "import json, sys; from opensora.cli.main import invoke\n"
        f"codes = [invoke(arguments) for arguments in {REFUSALS!r}]\n"
        "loaded = [name for name in ('torch', 'av', 'numpy') if name in sys.modules]\n"
        "print(json.dumps([codes, loaded]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[0] + [64] * 7, []]


def test_a_config_is_checked_without_the_packages_of_media_and_text():
    heavy = ["av", "decord", "PIL", "transformers", "diffusers", "pyarrow", "rich.progress"]
    code = (
        "import json, sys; from opensora.cli.main import invoke\n"
        f"code = invoke(['train', {str(TINY / 'vae.yaml')!r}, 'stpes=1'])\n"
        f"print(json.dumps([code, [name for name in {heavy!r} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [64, []]


def test_a_config_is_shown_whole_and_as_what_it_is(capsys):
    for name, key in (
        ("vae", "task"),
        ("encode", "vae_from"),
        ("arena", "scenes"),
        ("scenes", "ground"),
    ):
        shown = json.loads(tell(capsys, "config", "show", TINY / f"{name}.yaml"))
        assert key in shown
    shown = json.loads(tell(capsys, "config", "show", TINY / "vae.yaml", "optim.lr=1e-3"))
    assert shown["optim"]["lr"] == 0.001
    assert shown["optim"]["adamw"]["betas"] == [0.9, 0.99]


def test_the_doctor_looks_and_does_not_break(capsys, tmp_path):
    text = tell(capsys, "doctor", "--folder", tmp_path)
    for name in ("python", "torch", "processor", "video", "collectives", "disk", "sdpa"):
        assert any(line.startswith("ok") and name in line for line in text.splitlines()), name
    assert "flash3         no attention by it: it runs on cuda, and this is cpu" in text
    assert "Traceback" not in text


def test_the_doctor_tells_what_is_broken(capsys, tmp_path):
    assert invoke(["doctor", "--folder", str(tmp_path / "none")]) == 64
    assert "BROKEN  disk" in capsys.readouterr().out


def test_the_doctor_lets_two_ranks_add_and_writes_to_the_disk(capsys, tmp_path):
    text = tell(capsys, "doctor", "--folder", tmp_path)
    assert re.search(r"two gloo ranks added up .* in \d+ ms", text)
    assert re.search(r"GiB free in .*, \d+ MB/s synced", text)
    assert not list(tmp_path.iterdir())


def test_the_doctor_tells_of_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    finding = next(f for f in doctor.examine(Path()) if f.name == "collectives")
    assert finding.state == "broken"
    assert "none0" in finding.text


def test_the_doctor_tells_how_to_mend_a_torchvision_that_does_not_load(tmp_path, monkeypatch):
    """As a torchvision of another torch does, it is installed and raises when it is imported."""
    package, facts = tmp_path / "torchvision", tmp_path / "torchvision-0.0.1.dist-info"
    package.mkdir()
    facts.mkdir()
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor._torchvision()
    assert finding.state == "broken"
    for part in ("0.0.1", "pip uninstall torchvision", "torchvision::nms does not exist"):
        assert part in finding.text


def test_a_plan_says_what_a_run_takes_and_refuses_what_does_not_fit(capsys):
    synthetic = "data={kind: synthetic, buckets: {resolutions: {32px: {5: {batch_size: 6}}}}}"
    given = ["plan", TINY / "stdit.yaml", synthetic, "task.vae_from=null", "--gpus", 2]
    text = tell(capsys, *given, "--rate", 1, "--price", 2)
    assert "parameters on 2 h200 (dp_replicate 2)" in text
    assert "1 TFLOP/s a device, as given" in text
    assert "20 steps" in text and "at 2 an hour" in text
    shared = tell(capsys, *given, "parallel.ulysses=2", "engine.kind=fsdp")
    assert "(ulysses 2)" in shared
    assert invoke([str(a) for a in (*given, "--gpu", "h20")]) == 64
    assert "Did you mean 'h200'?" in capsys.readouterr().err
    assert invoke([str(a) for a in (*given, "parallel.ring=3")]) == 64
