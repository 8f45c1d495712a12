"""What a plan says is what a run does: parameters, FLOPs, memory."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from train_support import fresh_task, latents, tiny

from opensora.data.buckets import Bucket
from opensora.engine import planner
from opensora.engine.flops import FlopCounter
from opensora.engine.footprint import rehearse
from opensora.engine.planner import Device
from opensora.engine.recompute import RecomputeConfig
from opensora.errors import UsageError
from opensora.train import forecast as forecasts
from opensora.train import optim
from opensora.train.forecast import forecast, need_of
from opensora.train.suggestion import WAYS, at_least, fitting, search

H200 = planner.device("h200")
LARGER = "data.buckets.resolutions={128px: {17: {batch_size: 3}}}"
"""Where activations are most of the memory, as in all that is worth planning."""


def planned(output: Path, *overrides: str):
    """A tiny run on synthetic latents of 2 x 4 x 4, which are those of `train_support.latents`."""
    data = "data={kind: synthetic, buckets: {resolutions: {32px: {5: {batch_size: 3}}}, "
    data += 'aspect_ratios: ["1:1"]}}'
    vae = tiny("vae", output).task.vae.model_dump_json()
    return tiny("stdit", output, data, f"task.vae={vae}", *overrides)


def test_parameters_are_exact_and_flops_those_of_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(forecasts, "TEXT_TOKENS", 8)
    config = planned(tmp_path)
    found = forecast(config, 1, H200, rate=1e12)
    task = fresh_task(config)
    assert found.parameters == sum(p.numel() for p in task.parameters())
    batch = latents([0, 1, 2])
    cond = task.condition(batch, [False] * 3)
    assert cond.tokens.shape[1] <= 8
    cond = type(cond)(
        torch.zeros(3, 8, cond.tokens.shape[2]),
        torch.ones(3, 8, dtype=torch.bool),
        cond.pooled.detach(),
        cond.fps,
        cond.size,
    )
    with FlopCounter() as counter:
        noise = torch.randn_like(batch.latents)
        task.loss_at(batch.latents, noise, torch.rand(3, 2), cond, 1).sum().backward()
    (row,) = found.rows
    assert row.flops == row.model_flops == counter.total
    assert row.seconds == pytest.approx(counter.total / 1e12)


@pytest.mark.parametrize("policy", ["none", "block", "pair"])
def test_depth_beyond_three_follows_from_two_and_three(policy, tmp_path):
    config = planned(tmp_path, "task.model.depth=6", f"recompute.policy={policy}", LARGER)
    quick = forecast(config, 1, H200, rate=1e12)
    # The whole model, rehearsed.
    whole = whole_model(config, quick)
    assert quick.parameters == whole.parameters
    assert quick.rows[0].flops == whole.flops
    assert quick.rows[0].memory.activations == pytest.approx(whole.activations, rel=0.01)


@pytest.mark.parametrize(
    "saving",
    ["policy: block", "policy: block, tiles: 2", "policy: pair, tiles: 3", "policy: selective"],
)
def test_what_is_computed_again_is_no_work_of_the_model(saving, tmp_path):
    plain = forecast(planned(tmp_path, LARGER), 1, H200, rate=1e12).rows[0]
    config = planned(tmp_path, LARGER, f"recompute={{{saving}}}")
    (row,) = forecast(config, 1, H200, rate=1e12).rows
    assert plain.model_flops == plain.flops == row.model_flops
    assert 1.1 * plain.flops < row.flops < 1.6 * plain.flops


def test_so_does_an_mmdit_of_which_both_kinds_of_blocks_are_deep(tmp_path):
    depths = ["task.model.depth=7", "task.model.single_depth=12"]
    config = tiny("mmdit", tmp_path, LARGER, "recompute.policy=pair", *depths)
    quick = forecast(config, 1, H200, rate=1e12)
    whole = whole_model(config, quick)
    assert quick.parameters == whole.parameters
    assert quick.rows[0].flops == whole.flops
    assert quick.rows[0].memory.activations == pytest.approx(whole.activations, rel=0.01)


def whole_model(config, quick):
    make = partial(
        forecasts.loss_of, config.task, quick.layout, quick.rows[0].bucket, 1, 3, config.recompute
    )
    build = partial(optim.build, config.optim)
    return rehearse(make, build, precision=torch.float32, keeps_gradients=True)


MEASURED = """
import sys
from functools import partial
from pathlib import Path
import torch
from opensora.engine import recompute
from opensora.engine.recompute import RecomputeConfig
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.types import Condition

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
config = STDiTConfig(width=384, depth=3, num_heads=6, text_channels=64)
model = STDiT(config, in_channels=4)
recompute.apply(model, RecomputeConfig(policy=sys.argv[1], tiles=int(sys.argv[2])))
x, t = torch.zeros(2, 4, 5, 32, 32), torch.zeros(2, 5)
cond = Condition(torch.zeros(2, 256, 64), torch.ones(2, 256, dtype=torch.bool))
model(x, t, cond).square().sum().backward()  # after it libraries have their buffers
model.zero_grad()
Path("/proc/self/clear_refs").write_text("5")
before = peak()
model(x, t, cond).square().sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("policy", "tiles"), [("none", 1), ("block", 1), ("pair", 5)])
def test_peak_memory_is_within_5_percent_of_a_real_step(policy, tiles, tmp_path):
    # Large blocks go back to the system when they are freed, so that what is resident is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, policy, str(tiles)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    model = "task.model={kind: stdit, width: 384, depth: 3, num_heads: 6, text_channels: 64}"
    text = "task.text={kind: words, channels: 64, buckets: 64}"
    data = "data={kind: synthetic, buckets: {resolutions: {256px: {17: {batch_size: 2}}}, "
    data += 'aspect_ratios: ["1:1"]}}'
    vae = "task.vae={kind: causal, latent_channels: 4}"
    saving = f"recompute={{policy: {policy}, tiles: {tiles}}}"
    # Muon's own step would be the worst moment where so little is kept.
    adamw = "optim={kind: adamw}"
    config = tiny("stdit", tmp_path, model, text, data, vae, saving, adamw)
    (row,) = forecast(config, 1, H200, rate=1e12).rows
    assert row.memory.activations == pytest.approx(int(done.stdout), rel=0.05)


def test_what_does_not_fit_gets_a_suggestion_that_does(tmp_path):
    config = planned(tmp_path, "task.model.depth=3", LARGER)
    (row,) = forecast(config, 1, Device(1e12, 1e12, 0), rate=1e12).rows
    small = Device(0.7 * row.memory.total, 1e12, 0)
    better = fitting(search(config, 1, small, row.bucket), small)
    assert better is not None and better.recompute != RecomputeConfig()
    assert forecast(better, 1, small, rate=1e12).peak.memory.total <= small.memory
    tiny_device = Device(1e3, 1e12, 0)
    nothing = search(config, 1, tiny_device, row.bucket)
    assert fitting(nothing, tiny_device) is None
    assert not any(attempt.rehearsed for attempt in nothing)  # arithmetic said so


@pytest.mark.parametrize("way", [0, 1, 3, 4])
def test_what_rules_a_change_out_is_a_lower_bound_of_its_rehearsal(way, tmp_path):
    saving = RecomputeConfig(**WAYS[way])
    config = planned(tmp_path, LARGER).model_copy(update={"recompute": saving})
    (bucket,) = forecasts._largest(config)
    least = at_least(config, 1, bucket, H200)
    assert 0 < least - H200.reserved < need_of(config, 1, bucket, H200).memory.total - H200.reserved


def test_what_waits_on_the_host_is_not_on_the_device(tmp_path):
    saving = ("recompute={policy: block, tiles: 2, offload: true}", LARGER)
    adamw = "optim={kind: adamw, state_dtype: %s, offload: %s}"
    found = {
        choice: forecast(planned(tmp_path, *saving, adamw % choice), 1, H200, rate=1e12).peak.memory
        for choice in (("fp32", "false"), ("bf16", "false"), ("fp32", "true"))
    }
    plain, narrow, away = found.values()
    counters = plain.optimizer - 2 * plain.weights  # a step number for each parameter
    assert 0 <= counters < 0.01 * plain.optimizer
    assert narrow.optimizer == plain.weights + counters
    assert away.optimizer == counters
    assert away.host == plain.host + 2 * plain.weights
    assert plain.host == 2 * 3 * 320 * 32 * 4  # two blocks' inputs: 3 clips of 320 tokens


def test_shared_clips_and_sharded_parameters_take_less(tmp_path):
    alone = forecast(planned(tmp_path), 1, H200, rate=1e12).peak
    pair = planned(tmp_path, "parallel.ulysses=2", "engine.kind=fsdp")
    shared = forecast(pair, 2, H200, rate=1e12).peak
    assert shared.memory.weights == alone.memory.weights / 2
    assert shared.memory.activations < alone.memory.activations
    assert shared.degree == 2
    # Levels and text are embedded on both, tokens on one.
    assert alone.model_flops <= shared.model_flops < 2 * alone.model_flops


def test_shared_layers_take_less_and_parameters_are_counted_once(tmp_path):
    mmdit = partial(tiny, "mmdit", tmp_path, LARGER, "recompute.policy=block")
    alone = forecast(mmdit(), 1, H200, rate=1e12)
    shared = forecast(mmdit("parallel.tp=2"), 2, H200, rate=1e12)
    assert shared.parameters == alone.parameters
    weights = shared.peak.memory.weights / alone.peak.memory.weights
    assert 0.5 < weights < 0.7
    assert 0.3 < shared.peak.memory.activations / alone.peak.memory.activations < 1
    assert alone.peak.model_flops <= shared.peak.model_flops < 1.3 * alone.peak.model_flops


def test_every_stage_of_deepspeed_takes_less_than_the_one_before(tmp_path):
    pair = ["parallel.ulysses=2", "optim={kind: adamw}"]
    peaks = []
    for engine in ("stage: 1", "stage: 2", "stage: 3", "stage: 3, offload_optimizer: true"):
        config = planned(tmp_path, *pair, f"engine={{kind: deepspeed, bucket: 1000, {engine}}}")
        peaks.append(forecast(config, 2, H200, rate=1e12).peak.memory)
    totals = [memory.total for memory in peaks]
    assert sorted(totals, reverse=True) == totals and len(set(totals)) == 4
    parameters = forecast(config, 2, H200, rate=1e12).parameters
    assert peaks[0].weights == 4 * 1.5 * parameters  # what is updated is a copy of half of them
    assert peaks[0].optimizer == peaks[2].optimizer
    assert peaks[0].optimizer == pytest.approx(4 * parameters, rel=1e-2)  # and counters
    assert peaks[3].optimizer == 0


def test_an_engine_that_shards_nothing_is_planned_as_the_local_one(tmp_path):
    pair = ["parallel.ulysses=2"]
    local, colossal, nothing = (
        forecast(planned(tmp_path, *pair, f"engine={engine}"), 2, H200, rate=1e12).peak.memory
        for engine in ("{kind: local}", "{kind: colossal}", "{kind: deepspeed, stage: 0}")
    )
    assert local == colossal == nothing


def test_too_few_clips_and_unknown_devices_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"batch size of 3, too few for 4.*parallel\.ulysses=2$"):
        forecast(planned(tmp_path), 4, H200, rate=1e12)
    with pytest.raises(UsageError, match="--gpu h20 is unknown"):
        planner.device("h20")
    with pytest.raises(UsageError, match="text_to_video only"):
        forecast(tiny("vae", tmp_path), 1, H200, rate=1e12)
    assert isinstance(forecasts._largest(planned(tmp_path))[0], Bucket)
