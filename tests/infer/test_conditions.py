"""Given frames: coded for the place they go to, kept or changed, and never the whole of a video."""

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.data.transforms import fit
from opensora.errors import DataError, UsageError
from opensora.infer.conditions import Given, Reference, begin
from opensora.infer.pipeline import SamplingConfig, Shape
from opensora.media.write import write_video

QUICK = SamplingConfig.model_validate({"schedule": {"num_steps": 4}, "guidance": {"scale": 2.0}})
LONG = Shape(num_frames=17, height=32, width=32, fps=8.0)
PROMPT = "a red circle moving right"


def moving(num_frames: int, size: int = 32) -> np.ndarray:
    """A bright square that moves over a dark ground."""
    frames = np.full((num_frames, size, size, 3), 40, np.uint8)
    for k in range(num_frames):
        frames[k, 8:20, k : k + 12] = (200, 90, 30)
    return frames


def latents_of(pipeline, frames: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.vae.encode(fit(frames, (32, 32))[None])[0]


def laid(pipeline, *given: Given, num_frames: int = 17):
    shape = pipeline.vae.latent_shape(num_frames, 32, 32)
    return begin(pipeline.vae, [given], shape, torch.device("cpu"))


def test_frames_at_the_head_are_coded_as_a_clip_that_begins_there(pipeline):
    video = moving(17)
    start = laid(pipeline, Given(video, count=3))
    torch.testing.assert_close(start.latents[0, :, :3], latents_of(pipeline, video[:9]))
    assert start.levels.tolist() == [[0, 0, 0, 1, 1]]
    assert start.given.tolist() == [[True, True, True, False, False]]


def test_the_end_of_a_clip_can_begin_another(pipeline):
    """9 pixel frames are 3 latent frames at a head, so the last 9 are taken."""
    video = moving(16)
    start = laid(pipeline, Given(video, start=-3, count=3))
    torch.testing.assert_close(start.latents[0, :, :3], latents_of(pipeline, video[-9:]))


def test_frames_at_the_tail_are_coded_with_a_past(pipeline):
    video = moving(33)
    start = laid(pipeline, Given(video, at=-2, start=4, count=2))
    truth = latents_of(pipeline, video[: 1 + 4 * 5])[:, 4:6]  # the same frames in their own clip
    alone = latents_of(pipeline, video[13 : 13 + 5])
    error = (start.latents[0, :, 3:] - truth).square().mean()
    assert error < 0.05 * (alone - truth).square().mean()


def test_a_picture_within_a_video_stands_still_over_its_latent_frame(pipeline):
    picture = moving(1)
    start = laid(pipeline, Given(picture, at=2))
    still = latents_of(pipeline, picture.repeat(17, axis=0))
    torch.testing.assert_close(start.latents[0, :, 2], still[:, 3], atol=0.02, rtol=0.02)
    assert start.levels.tolist() == [[1, 1, 0, 1, 1]]


def test_more_frames_than_fit_are_left_out_and_later_ones_cover_earlier_ones(pipeline):
    start = laid(pipeline, Given(moving(41), at=3, level=0.5), Given(moving(1), at=-1))
    assert start.levels.tolist() == [[1, 1, 1, 0.5, 0]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda: Given(moving(1), at=5), "given at 5 of a video of 5 latent frames"),
        (lambda: Given(moving(1), at=-6), "given at -6"),
        (lambda: Given(moving(5), start=2), "from 2 on are given of 2 latent frames"),
        (lambda: Given(moving(5), start=-3), r"the last 3 .* \(5 frames"),
        (lambda: Given(moving(17)), "every frame of a video is given"),
        (lambda: Given(moving(1)[0]), "give uint8"),
        (lambda: Given(moving(1).astype(np.float32)), "give uint8"),
        (lambda: Given(moving(1), level=1.5), r"lies in \[0, 1\]"),
        (lambda: Given(moving(1), count=0), "at least 1"),
    ],
)
def test_frames_that_do_not_fit_are_refused(given, told, pipeline):
    with pytest.raises(UsageError, match=told):
        laid(pipeline, given())


def test_given_frames_come_out_as_the_vae_shows_them(pipeline):
    video = moving(9)
    (sample,) = pipeline(PROMPT, shape=LONG, sampling=QUICK, given=[[Given(video, count=3)]])
    with torch.no_grad():
        shown = pipeline.vae.decode(latents_of(pipeline, video)[None])
    shown = ((shown[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 3, 0).numpy()
    assert np.abs(sample.frames[:9] - shown).max() <= 1
    (free,) = pipeline(PROMPT, shape=LONG, sampling=QUICK)
    assert not np.array_equal(free.frames[9:], sample.frames[9:])


def test_a_lower_level_of_editing_stays_closer_to_the_video(pipeline):
    video = moving(17)
    source = latents_of(pipeline, video)
    shape = pipeline.vae.latent_shape(17, 32, 32)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    far = []
    for level in (0.1, 0.4, 0.9, 1.0):
        given = [[Given(video, level=level)]]
        x = pipeline.draw_latents(noise, [PROMPT], LONG, QUICK, given=given)
        far.append((x[0] - source).square().mean().item())
    assert far == sorted(far)
    free = pipeline.draw_latents(noise, [PROMPT], LONG, QUICK)
    assert torch.equal(x, free)  # at level 1 nothing of the video is left


def test_a_sample_with_given_frames_does_not_change_its_neighbours(pipeline):
    given = [[Given(moving(1))], [], [Given(moving(17), level=0.5)]]
    together = pipeline([PROMPT] * 3, seeds=[1, 2, 3], shape=LONG, sampling=QUICK, given=given)
    for k, sample in enumerate(together):
        (alone,) = pipeline(
            PROMPT, seeds=[k + 1], shape=LONG, sampling=QUICK, given=given[k : k + 1]
        )
        assert np.abs(sample.frames.astype(int) - alone.frames).max() <= 1


@pytest.mark.parametrize("kind", ["full_sequence", "autoregressive", "pyramid"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_every_schedule_and_solver_keeps_given_frames(kind, sampler, pipeline):
    sampling = SamplingConfig.model_validate(
        {"schedule": {"kind": kind, "num_steps": 3}, "sampler": sampler}
    )
    given = [[Given(moving(1)), Given(moving(1), at=-1)]]
    shape = pipeline.vae.latent_shape(17, 32, 32)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    x = pipeline.draw_latents(noise, [PROMPT], LONG, sampling, given=given)
    start = begin(pipeline.vae, given, shape, torch.device("cpu"))
    assert torch.equal(x[:, :, [0, -1]], start.latents[:, :, [0, -1]])
    assert not torch.equal(x[:, :, 1:-1], start.latents[:, :, 1:-1])


def test_guidance_by_frames_needs_frames(pipeline):
    sampling = SamplingConfig.model_validate(
        {"schedule": {"num_steps": 2}, "guidance": {"scale": 2.0, "frames_scale": 3.0}}
    )
    plain = sampling.model_copy(update={"guidance": QUICK.guidance})
    given = [[Given(moving(1))]]
    guided = pipeline(PROMPT, shape=LONG, sampling=sampling, given=given)[0].frames
    assert not np.array_equal(
        guided, pipeline(PROMPT, shape=LONG, sampling=plain, given=given)[0].frames
    )
    with pytest.raises(UsageError, match="needs given frames"):
        pipeline(PROMPT, shape=LONG, sampling=sampling)


def test_a_reference_is_a_picture_or_a_video_at_the_rate_of_the_one_to_draw(tmp_path):
    Image.fromarray(moving(1)[0]).save(tmp_path / "a.jpg")
    write_video(tmp_path / "b.mp4", moving(17), fps=16)
    assert Reference(str(tmp_path / "a.jpg"), at=-1).load(fps=8).frames.shape == (1, 32, 32, 3)
    loaded = Reference(str(tmp_path / "b.mp4"), start=-2, count=2, level=0.3).load(fps=8)
    assert loaded.frames.shape[0] == 9
    assert (loaded.start, loaded.count, loaded.level) == (-2, 2, 0.3)
    (tmp_path / "c.png").write_text("no picture")
    for name in ("c.png", "missing.png", "missing.mp4"):
        with pytest.raises(DataError, match=name):
            Reference(str(tmp_path / name)).load(fps=8)
