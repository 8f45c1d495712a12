"""Ranks that share layers are one rank: prediction, gradients, their norm; and what is refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tensor_ranks
import torch
from torch.testing import assert_close

from opensora import config as configs
from opensora.engine import tensor
from opensora.errors import UsageError
from opensora.models.mmdit import MMDiTConfig
from opensora.models.stdit import STDiTConfig
from opensora.train.config import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("tensor")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", tensor_ranks.__file__, str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.dist
@pytest.mark.parametrize("policy", tensor_ranks.POLICIES)
def test_ranks_that_share_layers_compute_what_one_does(policy, two):
    out, gradients, total, flops = tensor_ranks.work(tensor_ranks.build())
    for rank in two:
        found, found_gradients, found_total, _ = rank["found"][policy]
        assert_close(found, out, rtol=1e-9, atol=1e-10)
        assert found_total == pytest.approx(total, rel=1e-9)
        assert found_gradients.keys() == gradients.keys()
        for name, value in gradients.items():
            scale = float(value.abs().max())
            assert_close(
                found_gradients[name],
                value,
                rtol=1e-8,
                atol=1e-10 * scale,
                msg=f"{name}: {{}}".format,
            )
    # What is replicated (embedders, the norms of text) is little work.
    shares = [rank["found"]["none"][3] / flops for rank in two]
    assert shares[0] == shares[1] and 0.5 <= shares[0] < 0.55


@pytest.mark.dist
def test_a_rank_holds_its_part_of_every_matrix(two):
    blocks = tensor_ranks.build(depth=0).single_blocks
    whole = sum(p.numel() for p in blocks.parameters())
    replicated = sum(
        p.numel()
        for name, p in blocks.named_parameters()
        if "norm" in name or name.endswith(("proj.bias", "fc2.bias"))
    )
    assert [rank["held"] for rank in two] == [(whole - replicated) // 2 + replicated] * 2


@pytest.mark.dist
def test_a_plan_imagines_what_a_rank_holds_and_does(two):
    """The plan's own way of cutting a model, on tensors without data."""
    with torch.device("meta"):
        blocks = tensor_ranks.build(depth=0)
        tensor.imagine(blocks, 2)
    held = sum(p.numel() for p in blocks.single_blocks.parameters())
    assert [rank["held"] for rank in two] == [held] * 2
    model = tensor_ranks.build()
    tensor.imagine(model, 2)
    flops = tensor_ranks.work(model.double())[3]
    assert [rank["found"]["none"][3] for rank in two] == [flops] * 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MMDiTConfig(), r"parallel\.tp=5 does not divide the model's num_heads, 24"),
        (
            MMDiTConfig(width=80, num_heads=5, rope=(4, 6, 6), mlp_ratio=0.0125),
            r"parallel\.tp=5 does not divide the model's width x mlp_ratio, 1",
        ),
        (STDiTConfig(), r"a model of kind 'stdit' has no plan .* or use mmdit"),
    ],
)
def test_what_cannot_be_shared_is_refused(config, message):
    tensor.check(config, 1)
    with pytest.raises(ValueError, match=message):
        tensor.check(config, 5)


def test_a_config_that_cannot_share_its_layers_is_refused_when_it_is_read():
    path = CONFIGS / "mmdit/tiny.yaml"
    assert configs.load(TrainConfig, path, ["parallel.tp=4"]).parallel.tp == 4
    for changes, message in (
        (["parallel.tp=3"], "does not divide the model's num_heads, 4"),
        (["parallel.tp=2", "compile=always"], "does not go with parallel.tp"),
    ):
        with pytest.raises(UsageError, match=message):
            configs.load(TrainConfig, path, changes)
