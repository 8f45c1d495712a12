"""Suites on stand-ins whose answers are known: folders of videos, perfect and broken VAEs."""

from __future__ import annotations

import gc
import json
import math

import numpy as np
import pytest
import torch

from opensora.arena.dataset import write_dataset
from opensora.arena.draw import render
from opensora.arena.scenes import SceneConfig, sample
from opensora.errors import DataError, NumericsError, UsageError
from opensora.evaluate import fidelity, fvd, physics, physics_iq, validation_loss
from opensora.evaluate.clips import RealClipsConfig, open_clips
from opensora.evaluate.physics import PhysicsConfig, another_take
from opensora.evaluate.suite import Autoencoder, Row, Subject, write
from opensora.infer.pipeline import Sample, Shape
from opensora.media.write import write_video
from opensora.runtime import noise
from opensora.vae.perceptual import PerceptualDistance
from tests.infer.conftest import WHOLE, build_pipeline

SCENES = SceneConfig(height=32, width=32, frames=5)
SHAPE = Shape(5, 32, 32, 8.0)


def silent(*_: object) -> None:
    pass


class Mirror(torch.nn.Module):
    """A VAE that gives back what it is given, plus `error(frames)`."""

    stride = (4, 8, 8)

    def __init__(self, error=lambda frames: 0.0):
        super().__init__()
        self.error, self.weight = error, torch.nn.Parameter(torch.zeros(1))

    def encode(self, pixels):
        return pixels

    def decode(self, latents):
        return latents + self.error(latents.shape[2])


def judged(error=lambda frames: 0.0, **settings):
    vae = Autoencoder(Mirror(error), SHAPE, "mirror")  # type: ignore[arg-type]
    config = fidelity.FidelityConfig(clips=RealClipsConfig(scenes=SCENES, num=3), **settings)
    return Subject(alone=vae), config


def test_a_vae_that_loses_nothing_reaches_the_ceilings(tmp_path):
    found = fidelity.run(*judged(), tmp_path, silent)["vae"]
    assert found["psnr"]["mean"] == 100
    assert found["ssim"]["mean"] == pytest.approx(1)
    assert found["flicker_added"]["mean"] == 0
    assert "lpips" not in found


def test_a_blinking_vae_shows_in_the_flicker_and_in_the_curve(tmp_path):
    blink = lambda frames: -0.2 * (torch.arange(frames) % 2).view(-1, 1, 1)  # noqa: E731
    results = fidelity.run(*judged(blink), tmp_path, silent)
    # 0.2 of [-1, 1] is 25.5 grey levels; black would be clipped, and scenes have none.
    assert results["vae"]["flicker_added"]["mean"] == pytest.approx(25.5, abs=1.5)
    curve = results["curves"]["vae"]["psnr"]
    assert curve[0] == curve[2] == 100
    assert curve[1] == pytest.approx(20, abs=0.5)


def test_lpips_is_measured_where_its_weights_are_given(tmp_path, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PerceptualDistance()
    asked = []

    def load(**files):
        asked.append(files)
        return network

    monkeypatch.setattr(fidelity, "load_perceptual", load)
    files = {"vgg": "vgg.pth", "heads": "heads.pth"}
    subject, config = judged(lambda frames: 0.3, lpips=files)
    found = fidelity.run(subject, config, tmp_path, silent)["vae"]
    assert asked == [files]
    assert found["lpips"]["mean"] > 0


def test_clips_that_the_vae_cannot_take_are_refused(tmp_path):
    subject, _ = judged()
    scenes = SCENES.model_copy(update={"frames": 6})
    clips = RealClipsConfig(scenes=scenes, num=1, frames=6)
    with pytest.raises(UsageError, match=r"frames are 1 \+ k\*4"):
        fidelity.run(subject, fidelity.FidelityConfig(clips=clips), tmp_path, silent)
    with pytest.raises(UsageError, match=r"the scenes are 17x64x64 at 8 fps: set clips\.scenes"):
        fidelity.run(subject, fidelity.FidelityConfig(), tmp_path, silent)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of scenes that move alike, one of stills, one of scenes run backwards."""
    root = tmp_path_factory.mktemp("videos")
    for index in range(24):
        frames = render(sample(SCENES, 0, index))
        other = render(sample(SCENES, 1, index))
        for name, video in (
            ("real", frames), ("alike", other), ("still", np.repeat(other[:1], 5, axis=0)),
        ):  # fmt: skip
            write_video(root / name / f"{index:03d}.mp4", video, fps=8)
    return root


def rfvd(folders, name, output, **settings):
    config = fvd.FvdConfig.model_validate(
        {
            "clips": {"path": folders / "real", "frames": 5, "height": 32, "width": 32, "fps": 8},
            "extractor": {"side": 32, "channels": 8},
            "allow_small_n": True,
            **settings,
        }
    )
    return fvd.run(Subject(videos=folders / name), config, output, silent)


def test_the_set_itself_is_at_zero_and_stills_are_farther_than_what_moves_alike(folders, tmp_path):
    same, alike, still = (rfvd(folders, name, tmp_path) for name in ("real", "alike", "still"))
    assert same["generated"]["rfvd"]["mean"] == pytest.approx(0, abs=1e-9)
    figures = [r["generated"]["rfvd"]["mean"] for r in (alike, still)]
    assert 0 < figures[0] < figures[1]
    assert alike["real"]["rfvd"]["n"] == 12  # halves of the real ones, beside it
    told = alike["settings"]
    assert (told["n_real"], told["n_generated"], told["frames"], told["fps"]) == (24, 24, 5, 8.0)
    assert (told["metric"], told["covariance"]) == ("rfvd", "N")


def test_rendered_scenes_are_at_zero_from_files_of_themselves(tmp_path):
    """A file has half the resolution of colour, so the real clips go through one as well."""
    for index in range(8):
        video = render(sample(SCENES, 0, index, "heldout"))
        write_video(tmp_path / "same" / f"{index:03d}.mp4", video, fps=8)
    clips = {"num": 8, "scenes": SCENES.model_dump()}
    found = rfvd(tmp_path, "same", tmp_path / "out", clips=clips)
    assert found["settings"]["codec"] == "mp4"
    assert found["generated"]["rfvd"]["mean"] == pytest.approx(0, abs=1e-9)


def test_the_mean_of_the_values_is_the_mmd_that_the_scores_hold(folders, tmp_path):
    found = rfvd(folders, "alike", tmp_path)["generated"]["mmd"]
    lines = [json.loads(line) for line in (tmp_path / "values.jsonl").read_text().splitlines()]
    values = [line["values"]["mmd"] for line in lines if line["group"] == "generated"]
    assert np.mean(values) == pytest.approx(found["mean"])


def test_features_that_are_no_numbers_are_refused(folders, tmp_path, monkeypatch):
    broken = lambda videos: torch.full((len(videos), 4), float("nan"))  # noqa: E731
    monkeypatch.setattr(fvd.features, "build", lambda *_: broken)
    with pytest.raises(DataError, match="no numbers for 24 of the real videos"):
        rfvd(folders, "alike", tmp_path)


def test_an_unbiased_covariance_is_said_and_changes_the_number(folders, tmp_path):
    biased, other = (rfvd(folders, "alike", tmp_path, biased=b) for b in (True, False))
    assert other["settings"]["covariance"] == "N - 1"
    assert other["generated"]["rfvd"]["mean"] != biased["generated"]["rfvd"]["mean"]


def test_few_videos_on_either_side_are_refused(folders, tmp_path):
    with pytest.raises(UsageError, match="24 real clips are too few"):
        rfvd(folders, "alike", tmp_path, allow_small_n=False)


def test_a_folder_of_videos_that_says_no_shape_is_refused(folders, tmp_path):
    with pytest.raises(UsageError, match=r"set clips\.frames, clips\.height"):
        rfvd(folders, "alike", tmp_path, clips={"path": folders / "real"})


def test_clips_that_are_too_short_are_counted(folders):
    write = folders.parent / "mixed"
    write_video(write / "short.mp4", np.zeros((2, 32, 32, 3), np.uint8), fps=8)
    write_video(write / "long.mp4", np.zeros((9, 32, 32, 3), np.uint8), fps=8)
    clips = open_clips(RealClipsConfig(path=write), SHAPE)
    assert (len(clips), clips.too_short) == (1, 1)
    assert clips.read(0).shape == (5, 32, 32, 3)
    with pytest.raises(DataError, match=r"none of the 2 clips .* has 20 frames"):
        open_clips(RealClipsConfig(path=write, frames=20), SHAPE)


def test_random_starts_are_the_same_every_time_and_differ_from_the_first(tmp_path):
    video = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.full((40, 32, 32, 3), 5, "u1")
    for index in range(6):
        write_video(tmp_path / f"{index}.mp4", video, fps=8)
    config = RealClipsConfig(path=tmp_path, start="random")
    first = [open_clips(config, SHAPE).read(i)[0, 0, 0, 0] for i in range(6)]
    again = [open_clips(config, SHAPE).read(i)[0, 0, 0, 0] for i in range(6)]
    assert first == again
    assert len(set(first)) > 1


def test_physics_of_folders_pairs_by_name(folders, tmp_path):
    config = PhysicsConfig(real=folders / "real", take_two=folders / "real")
    found = physics.run(Subject(videos=folders / "real"), config, tmp_path, silent)
    assert found["generated"]["score"]["mean"] == pytest.approx(100)
    assert found["still"]["score"]["mean"] < 80  # slow scenes have no motion either
    without = PhysicsConfig(real=folders / "real")
    other = physics.run(Subject(videos=folders / "alike"), without, tmp_path, silent)
    assert "score" not in other["generated"]
    assert other["generated"]["mse"]["n"] == 24


def test_physics_of_folders_refuses_what_is_missing(folders, tmp_path):
    subject = Subject(videos=folders / "alike")
    with pytest.raises(UsageError, match="needs real=FOLDER"):
        physics.run(subject, PhysicsConfig(), tmp_path, silent)
    fewer = tmp_path / "fewer"
    write_video(fewer / "000.mp4", np.zeros((5, 32, 32, 3), np.uint8), fps=8)
    with pytest.raises(DataError, match=r"lacks 23 of the 24 videos .* such as 001"):
        physics.run(Subject(videos=fewer), PhysicsConfig(real=folders / "real"), tmp_path, silent)
    config = PhysicsConfig(real=folders / "real", take_two=fewer)
    with pytest.raises(DataError, match="lacks 23 of the second takes"):
        physics.run(subject, config, tmp_path, silent)


def test_another_take_begins_alike_and_moves_a_little_otherwise():
    config = PhysicsConfig(scenes=SceneConfig(), take_variation=0.1)
    for index in range(8):
        scene = sample(config.scenes, 0, index)
        take = another_take(scene, config)
        np.testing.assert_array_equal(render(take)[0], render(scene)[0])
        way = np.abs(scene.positions[-1] - scene.positions[0]).max()
        off = np.abs(take.positions - scene.positions).max()
        assert 0 < off < 0.15 * way + 1e-6


class Continuing:
    """Stands in for a pipeline: shows the frames that it is given, then another colour."""

    team = None
    savings, weaker = WHOLE, None
    fingerprint = "continuing"
    device = torch.device("cpu")
    shape = Shape(9, 32, 32, 8.0)

    def __init__(self, vae):
        self.vae, self.seen = vae, []

    def latent_shape(self, shape):
        return self.vae.latent_shape(shape.num_frames, shape.height, shape.width)

    def __call__(self, prompts, *, seeds, given, **options):
        self.seen += given
        videos = []
        for prompt, seed, (beginning,) in zip(prompts, seeds, given, strict=True):
            video = np.full((9, 32, 32, 3), 90, np.uint8)
            video[: len(beginning.frames)] = beginning.frames
            videos.append(Sample(prompt, seed, video, 8.0))
        return videos


@pytest.mark.parametrize("given", [1, 5])
def test_a_model_is_given_the_beginning_and_judged_on_the_rest(given, pipeline, tmp_path):
    scenes = SCENES.model_copy(update={"frames": 9})
    model = Continuing(pipeline.vae)
    config = PhysicsConfig(scenes=scenes, num=2, given=given)
    found = physics.run(Subject(model), config, tmp_path, silent)
    assert len(model.seen) == 2
    for index, (beginning,) in enumerate(model.seen):
        truth = render(sample(scenes, 1, index, "heldout"))[:given]
        assert beginning.frames.shape == truth.shape
        error = np.abs(beginning.frames.astype(int) - truth).mean()
        assert error == 0 if given == 1 else error < 6  # of the chroma of a video
    # Only frames after the given ones count, so what is drawn there alone decides the error.
    errors = []
    for index in range(2):
        rest = render(sample(scenes, 1, index, "heldout"))[given:].astype(float)
        errors.append(np.mean((rest / 255 - 90 / 255) ** 2))
    assert found["generated"]["mse"]["mean"] == pytest.approx(np.mean(errors), rel=0.05)


class Oracle(Continuing):
    """Draws what a scene shows, as `show` makes it of the scene."""

    def __init__(self, vae, scenes, show):
        super().__init__(vae)
        self.scenes, self.show = scenes, show

    def __call__(self, prompts, *, seeds, **options):
        drawn = [sample(self.scenes, 1, seed - 1_000_000, "heldout") for seed in seeds]
        trios = zip(prompts, seeds, drawn, strict=True)
        return [Sample(p, seed, self.show(scene), scene.fps) for p, seed, scene in trios]


def test_who_draws_what_a_group_shows_is_where_that_group_is(pipeline, tmp_path):
    """Its videos are files, which lose colour; so everything beside them comes out of a file."""
    scenes = SCENES.model_copy(update={"frames": 9, "speed": (2.0, 3.0)})
    config = PhysicsConfig(scenes=scenes, num=3)

    def found(name, show):
        model = Oracle(pipeline.vae, scenes, show)
        return physics.run(Subject(model), config, tmp_path / name, silent)

    exact = found("exact", render)
    measures = {name: exact["generated"][name]["mean"] for name in physics_iq.METRICS}
    assert measures == dict.fromkeys(physics_iq.METRICS, 1.0) | {"mse": 0.0}
    take = found("take", lambda scene: render(another_take(scene, config)))
    assert take["generated"] == take["truth"]
    still = found("still", lambda scene: np.repeat(render(scene)[:1], 9, axis=0))
    assert still["generated"] == still["still"]
    assert still["still"]["score"]["mean"] < still["truth"]["score"]["mean"]
    assert take["settings"]["codec"] == "mp4"


def test_frames_given_are_those_of_whole_latents(pipeline, tmp_path):
    config = PhysicsConfig(scenes=SCENES, num=2, given=2)
    with pytest.raises(UsageError, match=r"1 \+ k\*4"):
        physics.run(Subject(pipeline), config, tmp_path, silent)


def test_the_loss_is_the_one_of_training_on_the_same_noise(pipeline, tmp_path):
    """Of a process with velocity noise - data the loss is the mean square of the difference."""
    clips = RealClipsConfig(scenes=SCENES, num=2)
    config = validation_loss.LossConfig(clips=clips, levels=2, batch_size=1)
    found = validation_loss.run(Subject(pipeline), config, tmp_path, silent)["all"]
    bigger = config.model_copy(update={"batch_size": 4})
    again = validation_loss.run(Subject(pipeline), bigger, tmp_path, silent)["all"]
    assert again["loss"]["mean"] == pytest.approx(found["loss"]["mean"], rel=1e-5)
    total = 0.0
    with torch.no_grad():
        for index in range(2):
            scene = sample(SCENES, 0, index, "heldout")
            pixels = torch.from_numpy(render(scene)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            data = pipeline.vae.encode(pixels)
            drawn = noise(data.shape[1:], [index], 0, "evaluation noise")
            condition = pipeline._condition([scene.caption], Shape(5, 32, 32, 8.0))
            noisy = 0.75 * drawn + 0.25 * data
            t = torch.full((1, data.shape[2]), 0.75)
            total += (pipeline.model(noisy, t, condition) - (drawn - data)).square().mean().item()
    assert found["loss_0.75"]["mean"] == pytest.approx(total / 2, rel=1e-4)


def test_a_model_that_diverged_is_refused_and_nothing_is_written(world, tmp_path):
    diverged = build_pipeline()
    with torch.no_grad():
        for weight in diverged.model.parameters():
            weight.fill_(float("nan"))
    config = validation_loss.LossConfig(clips=RealClipsConfig(scenes=SCENES, num=2), levels=2)
    first = r"loss of group 'all' is no finite number for 2 of 2 samples, the first 'scene-000000'"
    with pytest.raises(NumericsError, match=first):
        validation_loss.run(Subject(diverged), config, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_values_and_estimates_that_are_no_numbers_are_counted_and_named(tmp_path):
    values = (1.0, math.inf, 2.0, math.nan)
    rows = [Row("vae", f"clip {i}", {"ssim": 1.0, "psnr": v}) for i, v in enumerate(values)]
    told = r"psnr of group 'vae' .* 2 of 4 samples, the first 'clip 1' \(inf\); scores"
    with pytest.raises(NumericsError, match=told):
        write(tmp_path, rows, settings={})
    estimates = {"generated": {"fvd": {"mean": 3.0, "low": math.nan, "high": 4.0, "n": 8}}}
    with pytest.raises(NumericsError, match="fvd of group 'generated'"):
        write(tmp_path, rows[::2], settings={}, estimates=estimates)
    assert not list(tmp_path.iterdir())
    assert write(tmp_path, rows[::2], settings={})["vae"]["psnr"]["n"] == 2


def test_clips_of_several_shapes_are_told_apart(pipeline, world, tmp_path):
    rules = {"32px": {9: {"batch_size": 2}, 5: {"batch_size": 2}}}
    buckets = {"resolutions": rules, "aspect_ratios": ["1:1"], "fps": 8}
    config = validation_loss.LossConfig.model_validate(
        {"clips": {"path": world.heldout}, "buckets": buckets, "levels": 2}
    )
    found = validation_loss.run(Subject(pipeline), config, tmp_path, silent)
    assert found["all"]["loss"]["n"] == 7
    assert found["settings"]["clips"] == 7
    whole = validation_loss.LossConfig(clips=RealClipsConfig(path=world.heldout), levels=2)
    one_shape = validation_loss.run(Subject(pipeline), whole, tmp_path, silent)
    assert found["all"] == one_shape["all"]  # all of them are 5x32x32
    mixed = tmp_path / "mixed"
    write_video(mixed / "long.mp4", np.zeros((9, 32, 32, 3), np.uint8), fps=8)
    write_video(mixed / "short.mp4", render(sample(SCENES, 0, 1)), fps=8)
    config = validation_loss.LossConfig.model_validate(
        {"clips": {"path": mixed}, "buckets": buckets, "levels": 2}
    )
    both = validation_loss.run(Subject(pipeline), config, tmp_path, silent)
    assert set(both) == {"all", "9x32x32", "5x32x32", "settings"}
    losses = [both[group]["loss"]["mean"] for group in ("all", "9x32x32", "5x32x32")]
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2)


def test_latents_of_another_vae_are_refused(world, tmp_path):
    config = validation_loss.LossConfig(cache=world.latents / "heldout")
    with pytest.raises(DataError, match="made by another encoder"):
        validation_loss.run(Subject(build_pipeline(seed=7)), config, tmp_path, silent)


def test_suites_leave_no_tensor_behind(pipeline, tmp_path):
    """As they run between two steps of training."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    clips = {"scenes": SCENES, "num": 2}
    runs = (
        (validation_loss.SUITE, {"clips": clips, "levels": 2}),
        (fidelity.SUITE, {"clips": clips}),
        (
            fvd.SUITE,
            {
                "clips": {**clips, "num": 3},
                "allow_small_n": True,
                "extractor": {"side": 32, "channels": 8},
                "sampling": {"schedule": {"kind": "full_sequence", "num_steps": 1}},
            },
        ),
    )
    for number, (suite, settings) in enumerate(runs):
        config = suite.config.model_validate(settings)
        suite.run(Subject(pipeline), config, tmp_path / f"warm {number}", silent)
        before = alive()
        suite.run(Subject(pipeline), config, tmp_path / f"again {number}", silent)
        assert alive() <= before


def test_scenes_on_disk_and_rendered_ones_are_read_alike(tmp_path):
    path = write_dataset(tmp_path, SCENES, seed=0, count=3, split="heldout")
    disk = open_clips(RealClipsConfig(path=path), SHAPE)
    rendered = open_clips(RealClipsConfig(scenes=SCENES, num=3), SHAPE)
    assert disk.texts == rendered.texts
    for index in range(3):
        error = disk.read(index).astype(float) - rendered.read(index)
        assert np.abs(error).mean() < 8  # of H.264 with halved colour
