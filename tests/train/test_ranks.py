"""Two ranks are one rank: the same samples, losses and weights, and one will.

Sums over ranks are taken in another order than sums over a batch. A step rounds each of them by
about 1e-7 of its size and the runs are a few steps long, so losses agree to 1e-5 and weights, which
are of size 1 and less, to 1e-5 (a wrong factor of the gradient shows at 1e-2).
"""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.testing import assert_close
from train_support import ALONE, losses, tensors, train_records

from opensora.engine import checkpoint
from opensora.train.tracking import read_records

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("train-ranks")]

CLOSE = 1e-5

WITHOUT_GRADIENT = {"vae.encoder.layers.7.conv.bias", "vae.latent_mean"}
"""Standardising takes the encoder's last bias out again, so its gradient is what rounding left of
zero, and Adam makes steps of full size of it; the measured mean follows the bias."""


def launch(script: Path, *arguments: str, count: int = 2, python: str = sys.executable) -> None:
    """Run a script as `count` ranks, as torchrun does, and wait for all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [python, "-W", "error::UserWarning", str(script), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(errors)


class Outcome:
    """What the ranks of one launch left."""

    def __init__(self, folder: Path, count: int = 2):
        self.folder, self.count = folder, count

    def of(self, scenario: str) -> list:
        files = [self.folder / f"{scenario}-{rank}.json" for rank in range(self.count)]
        return [json.loads(file.read_text()) for file in files]

    def run(self, scenario: str) -> Path:
        return self.folder / scenario


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Outcome:
    """All scenarios on two ranks, in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    for name in ("on_other_ranks", "fsdp_goes_on"):
        ranks.training(folder / name, ALONE, "stdit")
    ranks.training(folder / "layers_go_on", ALONE, "mmdit")
    launch(Path(ranks.__file__), str(folder))
    return Outcome(folder)


@pytest.fixture(scope="module")
def four(two, tmp_path_factory) -> Outcome:
    """The scenarios of shared clips on four ranks."""
    folder = tmp_path_factory.mktemp("four-ranks")
    shutil.copytree(two.run("fsdp_goes_on"), folder / "fsdp_goes_on_in_copies")
    torch.set_num_threads(1)
    ranks.training(folder / "layers_go_on", ALONE, "mmdit")
    launch(Path(ranks.__file__), str(folder), count=4)
    return Outcome(folder, 4)


def merged(parts: list) -> list:
    """(step, rows) over the ranks, which hand out in one order."""
    return [
        (seen[0][0], list(itertools.chain(*(rows for _, rows in seen))))
        for seen in zip(*parts, strict=True)
    ]


def assert_equal_runs(one: Path, two: Path, rows: list, parts: list) -> None:
    assert merged(parts) == rows
    assert losses(two) == pytest.approx(losses(one), rel=CLOSE)
    norms = [[r["gradient_norm"] for r in train_records(path)] for path in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=CLOSE)
    last = [read_records(path / "metrics.jsonl")[-1] for path in (one, two)]
    names = [name for name in last[0] if name.startswith(("loss", "psnr", "l1"))]
    assert names
    for name in names:
        assert last[1][name] == pytest.approx(last[0][name], rel=CLOSE)
    whole, shared = tensors(one), tensors(two)
    assert whole.keys() == shared.keys()
    for name in set(whole) - WITHOUT_GRADIENT:
        assert_close(shared[name], whole[name], rtol=CLOSE, atol=CLOSE, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("scenario", ["autoencoder", "text_to_video", "adamw"])
def test_two_ranks_train_as_one(scenario, two, tmp_path):
    rows = getattr(ranks, scenario)(tmp_path / "one", ALONE)
    assert_equal_runs(tmp_path / "one", two.run(scenario), rows, two.of(scenario))


@pytest.mark.parametrize("scenario", ["fsdp", "fsdp_pieces"])
def test_two_ranks_that_shard_parameters_train_as_one(scenario, two, tmp_path):
    rows = getattr(ranks, scenario)(tmp_path / "one", ALONE)
    assert_equal_runs(tmp_path / "one", two.run(scenario), rows, two.of(scenario))


@pytest.mark.parametrize("scenario", ["tiles", "fsdp_tiles"])
def test_two_ranks_whose_blocks_run_in_tiles_train_as_one(scenario, two, tmp_path):
    whole = ranks.micro_batches if scenario == "tiles" else ranks.text_to_video
    rows = whole(tmp_path / "one", ALONE)
    parts = two.of(scenario)
    assert_equal_runs(
        tmp_path / "one", two.run(scenario), rows, parts if scenario == "tiles" else parts[:1]
    )


def test_sharded_optimizer_state_on_the_host_changes_nothing(two, tmp_path):
    rows = ranks.adamw(tmp_path / "one", ALONE)
    assert_equal_runs(tmp_path / "one", two.run("fsdp_offload"), rows, two.of("fsdp_offload"))


def test_sharded_optimizer_state_in_bfloat16_goes_on_bit_for_bit_where_it_was_saved(two, tmp_path):
    assert two.of("fsdp_bf16_state") == [True, True]
    # Other orders of sums round elsewhere, so two ranks are one up to a part in 256 of an update.
    ranks.fsdp_bf16_state(tmp_path / "one", ALONE)
    assert losses(two.run("fsdp_bf16_state")) == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_sharded_parameters_and_shared_clips_train_as_one(two, four, tmp_path):
    rows = ranks.fsdp_shared(tmp_path / "one", ALONE)
    assert_equal_runs(tmp_path / "one", two.run("fsdp_shared"), rows, two.of("fsdp_shared")[:1])
    assert_equal_runs(tmp_path / "one", four.run("fsdp_shared"), rows, four.of("fsdp_shared")[::2])


def test_copies_of_sharded_parameters_train_as_one(four, tmp_path):
    rows = ranks.fsdp(tmp_path / "one", ALONE)
    assert_equal_runs(tmp_path / "one", four.run("fsdp"), rows, four.of("fsdp"))


@pytest.mark.parametrize("scenario", ["ulysses", "ring"])
def test_two_ranks_that_share_every_clip_train_as_one(scenario, two, tmp_path):
    rows = getattr(ranks, scenario)(tmp_path / "one", ALONE)
    first, second = two.of(scenario)
    assert first == second
    assert_equal_runs(tmp_path / "one", two.run(scenario), rows, [first])


@pytest.mark.parametrize("scenario", ["mmdit", "mmdit_ring"])
def test_two_ranks_that_share_all_attention_train_as_one(scenario, two, tmp_path):
    rows = getattr(ranks, scenario)(tmp_path / "one", ALONE)
    assert_equal_runs(tmp_path / "one", two.run(scenario), rows, two.of(scenario)[:1])


@pytest.mark.parametrize("scenario", ["layers", "layers_adamw"])
def test_two_ranks_that_share_layers_train_as_one(scenario, two, tmp_path):
    rows = getattr(ranks, scenario)(tmp_path / "one", ALONE)
    first, second = two.of(scenario)
    assert first == second
    assert_equal_runs(tmp_path / "one", two.run(scenario), rows, [first])


@pytest.mark.parametrize("scenario", ["layers", "layers_sharded", "layers_and_clips"])
def test_two_pairs_that_share_layers_train_as_one(scenario, four, tmp_path):
    """On different clips; the same with each part sharded; and both pairs on the same clips."""
    rows = getattr(ranks, scenario)(tmp_path / "one", ALONE)
    seen = four.of(scenario)
    assert seen[0] == seen[1] and seen[2] == seen[3]
    parts = seen[:1] if scenario == "layers_and_clips" else seen[::2]
    assert_equal_runs(tmp_path / "one", four.run(scenario), rows, parts)


def test_a_run_goes_on_with_shared_layers_and_whole_again(two, four, tmp_path):
    alone, again = tmp_path / "one", tmp_path / "again"
    ranks.training(alone, ALONE, "mmdit")
    rows = ranks.training(alone, ALONE, "mmdit", "steps=8", "resume_despite=[steps]")
    assert_equal_runs(alone, two.run("layers_go_on"), rows, two.of("layers_go_on")[:1])
    assert_equal_runs(alone, four.run("layers_go_on"), rows, four.of("layers_go_on")[::2])
    shutil.copytree(two.run("layers_go_on"), again)
    for run in (alone, again):
        ranks.training(run, ALONE, "mmdit", "steps=11", "resume_despite=[steps]")
    assert losses(again) == pytest.approx(losses(alone), rel=CLOSE)


@pytest.mark.parametrize("degree", [2, 4])
def test_short_clips_are_not_shared(degree, two, four, tmp_path):
    rows = ranks.short_clips(tmp_path / "one", ALONE)
    found = two if degree == 2 else four
    assert_equal_runs(tmp_path / "one", found.run("short_clips"), rows, found.of("short_clips"))


@pytest.mark.parametrize("scenario", ["ulysses", "ring", "shards_of_data"])
def test_two_pairs_of_four_ranks_train_as_one(scenario, four, tmp_path):
    rows = getattr(ranks, scenario)(tmp_path / "one", ALONE)
    seen = four.of(scenario)
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert_equal_runs(tmp_path / "one", four.run(scenario), rows, seen[::2])


def test_four_ranks_that_share_two_frames_train_as_one(four, tmp_path):
    rows = ranks.both(tmp_path / "one", ALONE)
    seen = four.of("both")
    assert all(part == seen[0] for part in seen)
    assert_equal_runs(tmp_path / "one", four.run("both"), rows, seen[:1])


def test_micro_batches_of_uneven_ranks_are_the_whole_batch(two, tmp_path):
    rows = ranks.text_to_video(tmp_path / "one", ALONE)
    assert_equal_runs(tmp_path / "one", two.run("micro_batches"), rows, two.of("micro_batches"))


def test_micro_batches_on_one_rank_are_the_whole_batch(tmp_path):
    rows = ranks.text_to_video(tmp_path / "whole", ALONE)
    again = ranks.micro_batches(tmp_path / "pieces", ALONE)
    assert again == rows
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "whole"), rel=CLOSE)
    whole, pieces = tensors(tmp_path / "whole"), tensors(tmp_path / "pieces")
    for name in whole:
        assert_close(pieces[name], whole[name], rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in ranks.MIXED])
def test_steps_that_mix_shapes_are_the_same_on_any_ranks(scenario, degree, two, four, tmp_path):
    rows = getattr(ranks, scenario)(tmp_path / "one", ALONE)
    found = two if degree == 2 else four
    parts = found.of(scenario)
    for number, (step, whole) in enumerate(rows):
        assert {part[number][0] for part in parts} == {step}
        assert {row for part in parts for row in part[number][1]} == set(whole)
    assert parts[0] != parts[1]
    assert_equal_runs(tmp_path / "one", found.run(scenario), rows, [rows])


def test_a_run_of_one_rank_goes_on_on_two(two, tmp_path):
    ranks.training(tmp_path / "one", ALONE, "stdit")
    rows = ranks.training(tmp_path / "one", ALONE, "stdit", "steps=8", "resume_despite=[steps]")
    assert [step for step, _ in rows] == [5, 6, 7]
    scenario = "on_other_ranks"
    assert_equal_runs(tmp_path / "one", two.run(scenario), rows, two.of(scenario))


def test_a_run_goes_on_in_every_layout_and_whole_again(two, four, tmp_path):
    """One rank; two that shard weights and clips; four in two copies; four that share clips;
    and one again."""

    def go_on(run, steps):
        return ranks.training(run, ALONE, "stdit", f"steps={steps}", "resume_despite=[steps]")

    alone, again = tmp_path / "one", tmp_path / "again"
    ranks.training(alone, ALONE, "stdit")
    rows = go_on(alone, 8)
    assert_equal_runs(alone, two.run("fsdp_goes_on"), rows, two.of("fsdp_goes_on")[:1])
    rows = go_on(alone, 10) + go_on(alone, 12)
    name = "fsdp_goes_on_in_copies"
    seen = four.of(name)
    assert [part[:2] for part in seen] == [seen[0][:2]] * 2 + [seen[2][:2]] * 2
    parts = [seen[0][:2], seen[2][:2]]
    assert merged(parts) + [tuple(pair) for pair in seen[0][2:]] == rows
    shutil.copytree(four.run(name), again)
    for run in (alone, again):
        go_on(run, 14)
    assert losses(again) == pytest.approx(losses(alone), rel=CLOSE)
    whole, wandered = tensors(alone), tensors(again)
    for name, value in whole.items():
        assert_close(wandered[name], value, rtol=CLOSE, atol=CLOSE)


def test_each_rank_writes_its_own_shards(two):
    newest = checkpoint.find(two.run("fsdp_goes_on"))
    files = sorted(path.name for path in newest.glob("weights*"))
    assert files == ["weights-00001-of-00002.safetensors", "weights-00002-of-00002.safetensors"]
    sizes = [(newest / name).stat().st_size for name in files]
    assert max(sizes) < 0.7 * sum(sizes)


@pytest.mark.parametrize(("name", "count"), [("whole", 1), ("copied", 2), ("pair", 2), ("both", 4)])
def test_nothing_is_written_twice(name, count, four):
    files = list((four.run("placements") / f"{name}-True/step-000001").glob("weights*"))
    assert len(files) == count
    assert sum(load_file(file).get("odd", torch.empty(0)).numel() for file in files) == 35


def test_torchs_own_reader_reads_the_shards(four, tmp_path):
    (tmp_path / "weights").mkdir()
    saved = four.run("placements") / "both-True/step-000001"
    for path in saved.glob("weights*"):
        shutil.copy(path, tmp_path / "weights" / path.name)
    read = {"odd": torch.empty(5, 7), "step": torch.tensor(0)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "weights")))
    assert torch.equal(read["odd"], torch.arange(35.0).view(5, 7))
    assert read["step"] == 3


def test_shards_are_read_in_every_other_placement(four):
    assert four.of("placements") == [[]] * 4
    for folder in four.run("placements").iterdir():
        snapshot = checkpoint.load(folder / "step-000001")
        for part in (snapshot.weights, snapshot.ema):
            assert torch.equal(part["odd"], torch.arange(35.0).view(5, 7))
            assert part["thin"].tolist() == [[0, 1, 2]]
            assert part["step"] == 3


def test_a_disk_that_refuses_one_ranks_shards_stops_every_rank(two):
    first, second = two.of("full_disk_of_the_last")
    assert first == second
    assert (first["error"], first["code"]) == ("StorageError", 74)
    assert list((two.run("full_disk_of_the_last") / "checkpoints").iterdir()) == []


def test_a_loss_that_is_no_number_on_one_rank_moves_no_rank(two):
    first, second = two.of("not_a_number")
    assert first["weights"] == second["weights"]
    accepted, values = zip(*first["weights"], strict=True)
    assert accepted == (True, False, True)
    assert values[0] == values[1] != values[2]
    (incident,) = read_records(two.run("not_a_number") / "incidents.jsonl")
    rows = merged([first["seen"], second["seen"]])[1][1]
    assert (9 in first["seen"][1][1], 9 in second["seen"][1][1]) == (False, True)
    assert incident["step"] == 2
    assert incident["samples"][0] == {"id": 9, "loss": "nan", "text": "row 9"}
    assert sorted(sample["id"] for sample in incident["samples"]) == sorted(rows)
    assert "loss is nan" in incident["reason"]


def test_all_ranks_give_up_together_after_bad_steps_in_a_row(two):
    first, second = two.of("gives_up")
    assert first == second
    assert (first["error"], first["code"]) == ("NumericsError", 70)
    assert "3 steps in a row" in first["message"]
    incidents = read_records(two.run("gives_up") / "incidents.jsonl")
    assert [incident["step"] for incident in incidents] == [3, 4, 5]


def test_what_one_rank_is_asked_all_ranks_do(two):
    first, second = two.of("signals")
    assert first == second
    assert (first["error"], first["code"], first["step"]) == ("Preempted", 75, 4)
    assert first["kept"] == ["step-000002", "step-000004"]


def test_a_disk_that_refuses_rank_0_stops_every_rank(two):
    first, second = two.of("full_disk")
    assert first == second
    assert (first["error"], first["code"], first["step"]) == ("StorageError", 74, 2)
