"""Ranks that share a video spare what one rank spares: step caches beside `--share`."""

from copy import deepcopy

import pytest
import torch

from opensora.infer.caching.skipping import relative_change
from opensora.infer.conditions import Given
from opensora.infer.pipeline import SamplingConfig, Shape
from tests.dist.dist_support import groups, run
from tests.infer.conftest import build_pipeline
from tests.infer.test_conditions import moving
from tests.infer.test_parallel import PROMPTS, teams

WINDOW = Shape(num_frames=17, height=32, width=32, fps=8.0)
EVERY = {"every": 2, "levels": [0, 1]}
CACHES = {
    "teacache": {"kind": "teacache", "threshold": 0.3, "levels": [0, 1]},
    "first_block": {"kind": "first_block", "threshold": 0.3},
    "pab": {"kind": "pab", **dict.fromkeys(("spatial", "temporal", "cross", "joint"), EVERY)},
}
MODELS = {
    "stdit": {"kind": "stdit", "width": 32, "depth": 2, "num_heads": 2, "text_channels": 16},
    "mmdit": {
        "kind": "mmdit", "width": 32, "depth": 2, "single_depth": 2, "num_heads": 2,
        "rope": [4, 6, 6], "text_channels": 16, "pooled_channels": 0,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def pipeline(request):
    torch.set_num_threads(1)
    return build_pipeline(model=MODELS[request.param])


def latents(pipeline, team, cache, *, given=False):
    """What one rank draws, and how much its cache computed and used again."""
    pipeline = deepcopy(pipeline)  # a cache is on a model of its own
    pipeline.team = team
    tree = {"schedule": {"num_steps": 6}, "guidance": {"scale": 2.0}, "cache": cache}
    sampling = SamplingConfig.model_validate(tree)
    shape = pipeline.latent_shape(WINDOW)
    scales = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)  # so that the videos decide differently
    noise = scales * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    for block in pipeline.model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    frames = [[Given(moving(1))], []] if given else [(), ()]
    with torch.no_grad():
        drawn = pipeline.draw_latents(noise, PROMPTS, WINDOW, sampling, given=frames)
    return drawn, calls


@pytest.mark.parametrize(("sequence", "branches"), [(2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("kind", CACHES)
def test_a_team_with_a_cache_draws_what_one_rank_with_it_draws(kind, sequence, branches, pipeline):
    """Four ranks share five latent frames; two of them have one each."""
    alone, computed = latents(pipeline, None, CACHES[kind])
    every = teams(sequence, branches)
    each = run(len(every), lambda r: latents(pipeline, every[r], CACHES[kind]))
    for found, _ in each:
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
    rows = [sum(calls) for _, calls in each]  # ranks of one branch are neighbours
    assert all(rows[r] == rows[r - r % sequence] for r in range(len(every)))
    assert sum(rows) == sequence * sum(computed)


@pytest.mark.parametrize("kind", CACHES)
def test_given_frames_on_one_rank_and_moving_ones_on_another_decide_alike(kind, pipeline):
    plain, _ = latents(pipeline, None, None, given=True)
    alone, _ = latents(pipeline, None, CACHES[kind], given=True)
    assert not torch.allclose(alone, plain, atol=1e-3)
    every = teams(4, 1)
    for found, _ in run(4, lambda r: latents(pipeline, every[r], CACHES[kind], given=True)):
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_more_ranks_than_latent_frames_decide_alike(pipeline):
    every, cache = teams(8, 1), CACHES["teacache"]
    alone, _ = latents(pipeline, None, cache)
    for found, _ in run(8, lambda rank: latents(pipeline, every[rank], cache)):
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_the_change_of_a_clip_is_found_from_its_parts_on_every_rank():
    old = torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(0))
    new = old + torch.arange(5.0).view(5, 1, 1)
    frames = torch.tensor([[True] * 5, [False] * 4 + [True], [True] + [False] * 4])
    whole = relative_change(new, old, frames)
    parts = [slice(0, 3), slice(3, 5)]
    ends = groups(2)

    def part(rank):
        mine = parts[rank]
        return relative_change(new[:, mine], old[:, mine], frames[:, mine], ends[rank])

    first, second = run(2, part)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole)
