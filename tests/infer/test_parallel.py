"""Ranks that draw together draw what one rank draws."""

from copy import copy

import pytest
import torch

from opensora.dist.mesh import Layout
from opensora.engine.sequence import SequenceParallel
from opensora.errors import UsageError
from opensora.infer.conditions import Given
from opensora.infer.parallel import Team, team_of
from opensora.infer.pipeline import SamplingConfig, Shape
from opensora.runtime import ALONE, Runtime
from tests.dist.dist_support import ThreadMesh, ends, groups, run
from tests.infer.conftest import build_pipeline
from tests.infer.test_conditions import moving

WINDOW = Shape(num_frames=17, height=32, width=32, fps=8.0)
SETTINGS = {"schedule": {"num_steps": 3}, "guidance": {"scale": 2.0}}
PROMPTS = ["a red circle moving right", "a blue square"]


def latents(team, *, frames_scale: float = 1.0, given: bool = False, pipeline=None):
    """Latents that one rank draws."""
    pipeline = copy(pipeline or build_pipeline())  # the weights are shared
    pipeline.team = team
    settings = {**SETTINGS, "guidance": {"scale": 2.0, "frames_scale": frames_scale}}
    sampling = SamplingConfig.model_validate(settings)
    shape = pipeline.latent_shape(WINDOW)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    frames = [[Given(moving(1))], []] if given else [(), ()]
    with torch.no_grad():
        return pipeline.draw_latents(noise, PROMPTS, WINDOW, sampling, given=frames)


def teams(sequence: int, branches: int) -> list[Team]:
    """Of sequence x branches ranks, sequence ranks being neighbours."""
    layout = Layout(dp_replicate=branches, ulysses=sequence)
    flat = [ends(sequence, 1) for _ in range(branches)]
    across = [groups(branches) for _ in range(sequence)]
    found = []
    for branch in range(branches):
        for rank in range(sequence):
            mesh = ThreadMesh(layout, flat[branch], rank) if sequence > 1 else None
            share = SequenceParallel(mesh)  # type: ignore[arg-type]
            found.append(Team(share, across[rank][branch] if branches > 1 else None))
    return found


MMDIT = {
    "model": {
        "kind": "mmdit", "width": 32, "depth": 1, "single_depth": 1, "num_heads": 2,
        "rope": [4, 6, 6], "text_channels": 16, "pooled_channels": 16,
    }
}  # fmt: skip


@pytest.mark.parametrize(("sequence", "branches"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 3)])
def test_a_team_draws_what_one_rank_draws(sequence, branches):
    pipeline = build_pipeline()
    alone = latents(None, pipeline=pipeline)
    every = teams(sequence, branches)
    for found in run(len(every), lambda rank: latents(every[rank], pipeline=pipeline)):
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("branches", [2, 3])
def test_three_branches_are_dealt_to_ranks(branches):
    options = {"frames_scale": 3.0, "given": True, "pipeline": build_pipeline()}
    alone = latents(None, **options)
    every = teams(1, branches)
    for found in run(branches, lambda rank: latents(every[rank], **options)):
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_a_team_draws_with_full_attention_as_well():
    pipeline = build_pipeline(**MMDIT)
    alone = latents(None, pipeline=pipeline)
    every = teams(2, 1)
    for found in run(2, lambda rank: latents(every[rank], pipeline=pipeline)):
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_ranks_that_cannot_be_divided_are_refused(pipeline):
    assert team_of("sequence", ALONE, pipeline.model) is None
    four = Runtime(0, 4, 0, torch.device("cpu"))
    assert team_of("prompts", four, pipeline.model) is None
    with pytest.raises(UsageError, match="2 or 3 ranks"):
        team_of("guidance", four, pipeline.model)
    with pytest.raises(UsageError, match="an even number"):
        team_of("both", Runtime(0, 3, 0, torch.device("cpu")), pipeline.model)
