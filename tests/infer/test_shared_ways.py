"""Ranks that share a video draw what one rank draws, in every way of drawing and with a cache."""

import pytest
import torch

from opensora.infer.conditions import Given
from opensora.infer.long import PyramidWindowConfig, WindowsConfig, stream
from opensora.infer.pipeline import SamplingConfig, Shape
from opensora.infer.placing import place
from opensora.infer.savings import SavingsConfig
from tests.dist.dist_support import run
from tests.infer.conftest import build_pipeline
from tests.infer.test_conditions import moving
from tests.infer.test_parallel import teams

MODEL = {"kind": "stdit", "width": 32, "depth": 2, "num_heads": 2, "text_channels": 16}
WINDOW = Shape(num_frames=13, height=32, width=32, fps=8.0)  # four latent frames
CACHE = {"kind": "teacache", "threshold": 0.3, "levels": [0, 1]}
PROMPTS = ["a red circle moving right", "a blue square"]

SAVINGS = {
    "offload": {"offload": True},
    "int8": {"quantize": "int8"},
    "int8 offload": {"quantize": "int8", "offload": True},
}
WAYS = ["prompts", "given", "frames scale", "weaker", "windows", "pyramid", *SAVINGS]


def pipeline_of(way, team):
    """One rank's; weights are drawn from torch's own generator, so no thread does this."""
    pipeline = build_pipeline(model=MODEL)
    if way == "weaker":
        pipeline.weaker = build_pipeline(seed=1, model={**MODEL, "depth": 1})
    place(pipeline, SavingsConfig.model_validate(SAVINGS.get(way, {})), "cpu")
    pipeline.team = team
    return pipeline


def drawn(way, pipeline, cache):
    """All latents that a walk of a pipeline gave."""
    guidance = {"scale": 2.0, "frames_scale": 3.0 if way == "frames scale" else 1.0}
    tree = {"schedule": {"num_steps": 4}, "guidance": guidance, "cache": cache}
    sampling = SamplingConfig.model_validate(tree)
    found, walk = [], pipeline.walk

    def recorded(*args, **options):
        found.append(walk(*args, **options))
        return found[-1]

    pipeline.walk = recorded  # type: ignore[method-assign]
    if way in ("windows", "pyramid"):
        long = WindowsConfig(overlap=1) if way == "windows" else PyramidWindowConfig()
        options = {"num_frames": 25, "seed": 3, "shape": WINDOW, "sampling": sampling}
        assert sum(map(len, stream(pipeline, PROMPTS[:1], long=long, **options))) == 25
    else:
        frames = [[Given(moving(1))], []] if way == "given" else None
        frames = [[Given(moving(5))], [Given(moving(1), at=-1)]] if "scale" in way else frames
        pipeline(PROMPTS, shape=WINDOW, sampling=sampling, given=frames)
    return torch.cat([x.flatten() for x in found])


@pytest.fixture(scope="module")
def alone():
    """What one rank draws; each once."""
    known = {}

    def found(way, cache):
        key = (way, cache is None)
        if key not in known:
            known[key] = drawn(way, pipeline_of(way, None), cache)
        return known[key]

    return found


@pytest.mark.parametrize("cache", [None, CACHE], ids=["", "teacache"])
@pytest.mark.parametrize(("sequence", "branches"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_a_team_draws_what_one_rank_draws(way, sequence, branches, cache, alone):
    torch.set_num_threads(1)
    if "int8" in way:
        pytest.importorskip("torchao", exc_type=ImportError)
    expected = alone(way, cache)
    every = [pipeline_of(way, team) for team in teams(sequence, branches)]
    for found in run(len(every), lambda rank: drawn(way, every[rank], cache)):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_is_compared_is_not_the_same_everywhere(alone):
    """Ways and caches differ, so that equality above means something."""
    ways = [alone(way, cache) for way in ("prompts", "weaker") for cache in (None, CACHE)]
    for number, one in enumerate(ways):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in ways[:number])


def test_ranks_with_more_memory_and_with_less_call_the_model_as_often(alone):
    """Otherwise one would wait in an exchange that the other has not come to."""
    every = [pipeline_of("prompts", team) for team in teams(2, 1)]
    every[0].budget = 0.0
    calls = [[], []]
    for pipeline, seen in zip(every, calls, strict=True):
        pipeline.model.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
    for found in run(2, lambda rank: drawn("prompts", every[rank], None)):
        torch.testing.assert_close(found, alone("prompts", None), atol=1e-4, rtol=1e-4)
    assert len(calls[0]) == len(calls[1]) == 8  # four steps, two branches each
