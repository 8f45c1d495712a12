"""Long videos: piece by piece, of the length that was asked, in memory that does not grow."""

from copy import copy

import numpy as np
import pytest
import torch

from opensora.errors import UsageError
from opensora.infer.conditions import Given
from opensora.infer.long import PyramidWindowConfig, WindowsConfig, _warn, stream
from opensora.infer.pipeline import SamplingConfig, Shape
from opensora.infer.savings import DecodeConfig, SavingsConfig
from tests.infer.conftest import build_pipeline
from tests.infer.test_conditions import moving

QUICK = SamplingConfig.model_validate({"schedule": {"num_steps": 4}, "guidance": {"scale": 2.0}})
WINDOW = Shape(num_frames=17, height=32, width=32, fps=8.0)  # 5 latent frames
PROMPT = "a red circle moving right"


def pieces(pipeline, num_frames, long, prompts=(PROMPT,), **options) -> list[np.ndarray]:
    settings = {"seed": 3, "shape": WINDOW, "sampling": QUICK, **options}
    return list(stream(pipeline, list(prompts), num_frames=num_frames, long=long, **settings))


@pytest.mark.parametrize("num_frames", [1, 17, 18, 68])
@pytest.mark.parametrize(
    "long", [WindowsConfig(overlap=2), PyramidWindowConfig(), PyramidWindowConfig(chunk=2)]
)
def test_a_video_has_as_many_frames_as_were_asked(num_frames, long, pipeline):
    video = np.concatenate(pieces(pipeline, num_frames, long))
    assert video.shape == (num_frames, 32, 32, 3)
    assert video.dtype == np.uint8


def test_the_first_window_is_the_short_video_and_the_next_begins_with_its_end(pipeline):
    first, second = pieces(pipeline, 29, WindowsConfig(overlap=2))
    (short,) = pipeline(PROMPT, seeds=[3], shape=WINDOW, sampling=QUICK)
    assert np.array_equal(first, short.frames)
    assert len(second) == 12  # a window of 17 gives 5 frames again that were there
    given = [[Given(first[-5:], count=2)]]
    from opensora import runtime

    seed = runtime.address(3, "window", 1)
    (again,) = pipeline(PROMPT, seeds=[seed], shape=WINDOW, sampling=QUICK, given=given)
    assert np.array_equal(second, again.frames[5:])


def test_windows_have_their_own_prompts_and_frames(pipeline):
    plain = pieces(pipeline, 29, WindowsConfig())
    other = pieces(pipeline, 29, WindowsConfig(), prompts=(PROMPT, "a blue square"))
    assert np.array_equal(plain[0], other[0])
    assert not np.array_equal(plain[1], other[1])
    given = [[], [Given(moving(1), at=-1)]]
    ended = pieces(pipeline, 29, WindowsConfig(), given=given)
    assert np.array_equal(plain[0], ended[0])
    assert not np.array_equal(plain[1], ended[1])


def test_frames_are_there_before_the_video_is_finished(pipeline):
    calls = []
    count = lambda step, x, data: calls.append(step)  # noqa: E731
    for long in (WindowsConfig(), PyramidWindowConfig()):
        calls.clear()
        made = stream(
            pipeline, [PROMPT], num_frames=400, seed=0, long=long, shape=WINDOW, sampling=QUICK,
            callback=count,
        )  # fmt: skip
        assert len(next(made)) > 0
        assert len(calls) == 4


def test_the_network_never_sees_more_than_a_window(pipeline, monkeypatch):
    seen = []
    model = pipeline.model.forward

    def forward(x, t, cond):
        seen.append(x.shape[2])
        return model(x, t, cond)

    monkeypatch.setattr(pipeline.model, "forward", forward)
    for long in (WindowsConfig(), PyramidWindowConfig(context=2)):
        pieces(pipeline, 68, long)
    assert max(seen) == 5


def test_a_pyramid_is_the_staircase_schedule_while_it_fits_the_window(pipeline):
    """With all frames in the window the moving one is the schedule of `pyramid` row by row."""
    long = PyramidWindowConfig(context=1)
    video = np.concatenate(pieces(pipeline, 13, long))  # 4 latent frames, all active at once
    sampling = QUICK.model_copy(
        update={"schedule": SamplingConfig.model_validate(
            {"schedule": {"kind": "pyramid", "num_steps": 4, "lag": 1}}
        ).schedule}
    )  # fmt: skip
    from opensora import runtime

    shape = pipeline.latent_shape(Shape(13, 32, 32, 8.0))
    noise = torch.cat(
        [
            torch.randn(1, shape[0], 1, *shape[2:], generator=runtime.generator(3, "sample", k))
            for k in range(4)
        ],
        dim=2,
    )
    x = pipeline.draw_latents(noise, [PROMPT], Shape(13, 32, 32, 8.0), sampling)
    with torch.no_grad():
        whole = ((pipeline.vae.decode(x)[0] + 1) * 127.5).round().clamp(0, 255)
    # Frame 0 is context and stays in the window, so all four see each other to the end.
    assert np.abs(video.astype(int) - whole.permute(1, 2, 3, 0).numpy()).mean() < 4


def test_oscillating_guidance_rests_as_in_a_short_video_along_a_pyramid(pipeline, monkeypatch):
    """Every other step after the tenth costs one branch, counted over the whole video."""
    rows = []
    model = pipeline.model.forward

    def forward(x, t, cond):
        rows.append(len(x))
        return model(x, t, cond)

    monkeypatch.setattr(pipeline.model, "forward", forward)
    sampling = SamplingConfig.model_validate(
        {"schedule": {"num_steps": 12}, "guidance": {"scale": 2.0, "oscillation": "text"}}
    )
    pieces(pipeline, 13, PyramidWindowConfig(context=1), sampling=sampling)
    assert len(rows) == 12 + 3 * 3
    assert rows == [1 if step > 10 and step % 2 else 2 for step in range(len(rows))]


def test_solvers_with_fresh_noise_draw_long_videos_too(pipeline):
    sampling = QUICK.model_copy(update={"sampler": "renoise"})
    for long in (WindowsConfig(), PyramidWindowConfig()):
        video = np.concatenate(pieces(pipeline, 29, long, sampling=sampling))
        again = np.concatenate(pieces(pipeline, 29, long, sampling=sampling))
        assert np.array_equal(video, again)


def test_settings_that_leave_nothing_to_draw_are_refused(pipeline):
    for long, told in (
        (WindowsConfig(overlap=5), "so at most one less"),
        (PyramidWindowConfig(context=5), "leave nothing of a window of 5"),
    ):
        with pytest.raises(UsageError, match=told):
            pieces(pipeline, 40, long)
    tiled = copy(pipeline)
    tiled.savings = SavingsConfig(decode=DecodeConfig(tile=True))
    with pytest.raises(UsageError, match="neither in tiles"):
        pieces(tiled, 40, PyramidWindowConfig())
    with pytest.raises(UsageError, match="one prompt and no given frames"):
        pieces(pipeline, 40, PyramidWindowConfig(), prompts=("a", "b"))
    other = SamplingConfig.model_validate({"schedule": {"kind": "autoregressive"}})
    with pytest.raises(UsageError, match=r"leave out schedule\.kind=autoregressive"):
        pieces(pipeline, 40, PyramidWindowConfig(), sampling=other)


def test_prompts_and_frames_for_windows_that_there_are_not_are_refused(pipeline):
    given = [[], [], [Given(moving(1))]]
    for options in ({"prompts": ("a", "b", "c")}, {"given": given}):
        with pytest.raises(UsageError, match="29 frames are 2 windows"):
            pieces(pipeline, 29, WindowsConfig(overlap=2), **options)
        assert sum(map(len, pieces(pipeline, 30, WindowsConfig(overlap=2), **options))) == 30


def test_a_pyramid_on_a_model_of_shared_levels_is_warned_of_once(pipeline, caplog):
    def told(drawn_by, kind) -> list[str]:
        caplog.clear()
        next(stream(drawn_by, ["a"], num_frames=5, seed=0, long=kind, sampling=QUICK))
        return [record.getMessage() for record in caplog.records]

    _warn.cache_clear()
    independent = {"kind": "uniform", "levels": "independent"}
    assert told(build_pipeline(timesteps=independent), PyramidWindowConfig()) == []
    assert told(pipeline, WindowsConfig(overlap=1)) == []
    (line,) = told(pipeline, PyramidWindowConfig())
    assert "timesteps.levels=shared" in line
    assert told(pipeline, PyramidWindowConfig()) == []
