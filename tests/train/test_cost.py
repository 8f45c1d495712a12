"""Costs by which clips are dealt are the FLOPs of the step."""

import pytest
from train_support import tiny

from opensora.data.buckets import levels
from opensora.dist.mesh import Layout
from opensora.engine import planner
from opensora.train.cost import clip_cost
from opensora.train.forecast import forecast

SHAPES = "{32px: {1: [1, 4], 5: [1, 3]}, 128px: {17: [1, 2]}}"


def config_of(output, *overrides: str):
    data = f'data={{kind: synthetic, buckets: {{resolutions: {SHAPES}, aspect_ratios: ["1:1"]}}}}'
    vae = f"task.vae={tiny('vae', output).task.vae.model_dump_json()}"
    return tiny("stdit", output, data, vae, *overrides)


@pytest.mark.parametrize("depth", [1, 5])
def test_a_clip_costs_what_the_forecast_of_its_step_says(tmp_path, depth):
    config = config_of(tmp_path, f"task.model.depth={depth}")
    cost = clip_cost(config)
    found = forecast(config, 1, planner.device("h200"), rate=1e12)
    assert found.layout == Layout()
    for row in found.rows:
        # Without a device, attention's backward pass is counted as four products, not five.
        wanted = row.model_flops / row.bucket.batch_size
        assert 0.9 * wanted < cost(row.bucket) <= wanted


def test_the_vae_counts_where_clips_are_decoded(tmp_path):
    config = config_of(tmp_path)
    clips = config_of(
        tmp_path, f"data={{kind: clips, manifest: none.csv, buckets: {{resolutions: {SHAPES}}}}}"
    )
    for level in levels(config.data.buckets, stride=(4, 8, 8), patch=(1, 2, 2)):
        for length in level.buckets:
            assert clip_cost(clips)(length[0]) > 1.5 * clip_cost(config)(length[0])
