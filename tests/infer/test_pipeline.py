"""Prompts to frames: a video is a function of weights, prompt, seed and settings, and no more."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from opensora.data.transforms import to_uint8
from opensora.engine import checkpoint, saving
from opensora.errors import CheckpointError, NumericsError, UsageError
from opensora.infer.pipeline import SamplingConfig, Shape, VideoPipeline
from opensora.infer.placing import place
from opensora.infer.savings import SavingsConfig
from tests.infer.conftest import SHAPE, build_pipeline

PROMPTS = ["a red circle moving right", "a blue square", "two green triangles moving up slowly"]
QUICK = SamplingConfig.model_validate({"schedule": {"num_steps": 3}, "guidance": {"scale": 2.0}})


def frames(pipeline, prompts, seeds, **options) -> np.ndarray:
    options = {"sampling": QUICK, **options}
    return np.stack([s.frames for s in pipeline(prompts, seeds=seeds, **options)])


def test_a_sample_is_upright_uint8_with_its_prompt_and_seed(pipeline):
    first, second, third = pipeline(PROMPTS, seeds=[5, 6, 7], sampling=QUICK)
    assert first.frames.shape == (5, 32, 32, 3)
    assert first.frames.dtype == np.uint8
    assert (second.prompt, second.seed, third.fps) == (PROMPTS[1], 6, 8.0)
    assert first.frames.std() > 1


def test_a_sample_depends_on_its_seed_and_prompt(pipeline):
    base = frames(pipeline, PROMPTS[:1], [0])
    assert np.array_equal(frames(pipeline, PROMPTS[:1], [0]), base)
    assert not np.array_equal(frames(pipeline, PROMPTS[:1], [1]), base)
    assert not np.array_equal(frames(pipeline, PROMPTS[1:2], [0]), base)
    torch.manual_seed(17)  # torch's own generator has no say
    assert np.array_equal(frames(pipeline, PROMPTS[:1], [0]), base)


def test_a_sample_does_not_depend_on_its_batch(pipeline):
    """Products over a batch of another size, and text padded to another length, round elsewhere.

    Latents are of size one and three steps round them by less than 1e-5; the decoder stretches
    that by less than 10, under a hundredth of a level, so a pixel changes by a level at most, and
    only where it lies within that hundredth of the border of two.
    """
    seeds = [10, 11, 12]
    together = frames(pipeline, PROMPTS, seeds).astype(int)
    for k in range(3):
        alone = frames(pipeline, PROMPTS[k : k + 1], seeds[k : k + 1])[0]
        assert np.abs(together[k] - alone).max() <= 1
        assert (together[k] != alone).mean() < 0.01
    order = [2, 0, 1]
    turned = frames(pipeline, [PROMPTS[k] for k in order], [seeds[k] for k in order])
    assert np.abs(together[order] - turned).max() <= 1


def test_every_sampler_and_schedule_draws(pipeline):
    found = []
    for sampler in ("euler", "heun", "dpmpp_2m", "ddim", "ancestral", "renoise"):
        sampling = QUICK.model_copy(update={"sampler": sampler})
        found.append(frames(pipeline, PROMPTS[:1], [0], sampling=sampling))
    for kind in ("autoregressive", "pyramid"):
        sampling = SamplingConfig.model_validate({"schedule": {"kind": kind, "num_steps": 3}})
        found.append(frames(pipeline, PROMPTS[:1], [0], sampling=sampling))
    assert all(video.shape == found[0].shape for video in found)
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[4])


def test_guidance_and_the_negative_prompt_count(pipeline):
    def drawn(scale, **options):
        sampling = SamplingConfig.model_validate(
            {"schedule": {"num_steps": 2}, "guidance": {"scale": scale}}
        )
        return frames(pipeline, PROMPTS[:1], [0], sampling=sampling, **options)

    assert not np.array_equal(drawn(1.0), drawn(4.0))
    assert not np.array_equal(drawn(4.0), drawn(4.0, negative_prompt="a grey cloud"))
    assert np.array_equal(drawn(1.0), drawn(1.0, negative_prompt="a grey cloud"))


def test_a_generator_may_stand_for_a_seed_and_one_prompt_for_a_list(pipeline):
    draw = lambda seed: pipeline(  # noqa: E731
        PROMPTS[0], seeds=[torch.Generator().manual_seed(seed)], sampling=QUICK
    )[0]
    assert np.array_equal(draw(4).frames, draw(4).frames)
    assert not np.array_equal(draw(4).frames, draw(5).frames)
    assert draw(4).seed == 4


def test_arguments_may_have_the_names_that_diffusers_gives_them(pipeline):
    shape = Shape(num_frames=9, height=48, width=32, fps=4.0)
    own = pipeline(
        PROMPTS[0], seeds=[torch.Generator().manual_seed(4)], shape=shape, sampling=QUICK
    )
    names = {"num_frames": 9, "height": 48, "width": 32, "fps": 4.0, "guidance_scale": 2.0}
    theirs = pipeline(
        PROMPTS[0], num_inference_steps=3, generator=torch.Generator().manual_seed(4), **names
    )
    assert np.array_equal(own[0].frames, theirs[0].frames)
    with pytest.raises(TypeError, match="Did you mean 'num_inference_steps'"):
        pipeline(PROMPTS[0], num_inference_step=3)
    with pytest.raises(UsageError, match="guidance"):
        pipeline(PROMPTS[0], guidance_scale=-1.0)


def test_videos_of_one_prompt_and_a_generator_for_all(pipeline):
    def drawn(**names):
        return pipeline(PROMPTS[0], sampling=QUICK, **names)

    one, two = drawn(num_videos_per_prompt=2)
    assert (one.seed, two.seed) == (0, 1) and not np.array_equal(one.frames, two.frames)
    generator = torch.Generator().manual_seed(4)
    first, second = drawn(num_videos_per_prompt=2, generator=generator)
    alone = drawn(generator=torch.Generator().manual_seed(4))[0].frames.astype(int)
    assert np.abs(first.frames - alone).max() <= 1
    assert not np.array_equal(first.frames, second.frames)
    several = drawn(num_videos_per_prompt=2, generator=[torch.Generator().manual_seed(4)] * 2)
    assert np.array_equal(several.frames[0], first.frames)


def test_frames_come_in_the_form_that_is_asked_for(pipeline):
    def drawn(output_type):
        return pipeline(prompt=PROMPTS[:2], sampling=QUICK, output_type=output_type).frames

    plain = np.stack(drawn("uint8"))
    assert np.abs(np.stack(drawn("np")) * 255 - plain).max() <= 0.5 + 1e-3
    tensors = torch.stack(drawn("pt"))
    assert tensors.shape == (2, 5, 3, 32, 32)
    assert np.abs(tensors.permute(0, 1, 3, 4, 2).numpy() * 255 - plain).max() <= 0.5 + 1e-3
    assert np.array_equal(np.stack([[np.asarray(f) for f in v] for v in drawn("pil")]), plain)
    latents = torch.stack(drawn("latent"))
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents)
    assert np.array_equal(to_uint8(decoded), plain)


def test_latents_and_features_of_texts_may_be_given(pipeline):
    plain = frames(pipeline, PROMPTS[:1], [3], negative_prompt="a grey cloud")
    embeds = {
        "prompt_embeds": pipeline.encode_prompt(PROMPTS[0]),
        "negative_prompt_embeds": pipeline.encode_prompt("a grey cloud"),
    }
    assert np.array_equal(frames(pipeline, None, [3], **embeds), plain)
    size = (1, *pipeline.latent_shape(SHAPE))
    latents = torch.randn(size, generator=torch.Generator().manual_seed(9))
    given = frames(pipeline, PROMPTS[:1], [3], latents=latents)
    assert np.array_equal(frames(pipeline, PROMPTS[:1], [8], latents=latents), given)
    assert not np.array_equal(frames(pipeline, PROMPTS[:1], [3], latents=-latents), given)
    with pytest.raises(UsageError, match="and a pooled vector: use `encode_prompt`"):
        pipeline(prompt_embeds=embeds["prompt_embeds"].tokens, sampling=QUICK)
    with pytest.raises(UsageError, match=r"latents are \(1, 4, 2, 4, 4\); they are \(2,"):
        pipeline(PROMPTS[:2], latents=latents)


def test_each_video_may_have_a_negative_prompt_of_its_own(pipeline):
    both = frames(pipeline, PROMPTS[:2], [0, 1], negative_prompt=["a cloud", ""]).astype(int)
    alone = frames(pipeline, PROMPTS[:1], [0], negative_prompt="a cloud")
    assert np.abs(both[0] - alone[0]).max() <= 1
    with pytest.raises(UsageError, match="one negative prompt or as many"):
        pipeline(PROMPTS, negative_prompt=["a cloud", ""])


def test_a_callback_in_diffusers_form_may_change_latents_and_interrupt(pipeline):
    levels, estimates = [], []

    def zero(pipe, step, level, tensors):
        assert pipe is pipeline and set(tensors) == {"latents"}
        levels.append(float(level))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipeline(
        PROMPTS[0], sampling=QUICK, callback_on_step_end=zero, output_type="latent"
    ).frames
    assert not latents[0].any() and levels == sorted(levels, reverse=True) and levels[0] == 1

    def stop(pipe, step, level, tensors):
        estimates.append(tensors["data"])
        pipe._interrupt = step == 1
        return tensors

    (found,) = pipeline(
        PROMPTS[0], sampling=QUICK, callback_on_step_end=stop, output_type="latent",
        callback_on_step_end_tensor_inputs=["data"],
    ).frames  # fmt: skip
    assert len(estimates) == 2 and torch.equal(found, estimates[1][0])
    assert np.array_equal(frames(pipeline, PROMPTS[:1], [0]), frames(pipeline, PROMPTS[:1], [0]))
    with pytest.raises(UsageError, match="Did you mean 'latents'"):
        pipeline("a", callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["latent"])
    with pytest.raises(ValueError, match="callback gave"):
        pipeline("a", sampling=QUICK, callback=lambda *_: torch.zeros(1))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"seed": 3}, "Did you mean 'seeds'"),
        ({"prompt": "b"}, "one of them"),
        ({"seeds": [1], "generator": torch.Generator()}, "not both"),
        ({"output_type": "pill"}, "Did you mean 'pil'"),
        ({"num_videos_per_prompt": 0}, "at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "needs callback_on_step_end"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(names, told, pipeline):
    with pytest.raises((TypeError, UsageError), match=told):
        pipeline("a", **names)


def test_a_pipeline_moves_as_diffusers_do():
    pipe = build_pipeline()
    assert pipe.to(torch.bfloat16).dtype == torch.bfloat16
    assert pipe.to("cpu").dtype == torch.bfloat16
    assert pipe.to(dtype=torch.float32).device == torch.device("cpu")
    place(pipe, SavingsConfig(offload=True), "cpu")
    with pytest.raises(UsageError, match="wait on the host"):
        pipe.to("cpu")


@pytest.mark.parametrize("sampler", ["ancestral", "renoise"])
def test_fresh_noise_is_addressed_by_seed_and_step(sampler, pipeline):
    sampling = QUICK.model_copy(update={"sampler": sampler})
    together = frames(pipeline, PROMPTS[:2], [3, 4], sampling=sampling).astype(int)
    alone = frames(pipeline, PROMPTS[1:2], [4], sampling=sampling)[0]
    assert np.abs(together[1] - alone).max() <= 1


def test_another_shape_and_rate_may_be_asked(pipeline):
    shape = Shape(num_frames=9, height=48, width=32, fps=4.0)
    (sample,) = pipeline(PROMPTS[:1], shape=shape, sampling=QUICK)
    assert sample.frames.shape == (9, 48, 32, 3)
    assert sample.fps == 4.0
    faster = frames(pipeline, PROMPTS[:1], [0], shape=replace(SHAPE, fps=24.0))
    assert not np.array_equal(faster, frames(pipeline, PROMPTS[:1], [0]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_frames": 6}, r"1 \+ 4 k: give num_frames=5 or 9$"),
        ({"num_frames": 0}, r"give num_frames=1 or 5$"),
        ({"height": 36}, "give height=32, width=32$"),
        ({"width": 40}, "multiples of 16 and 16: give height=32, width=32$"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(change, told, pipeline):
    with pytest.raises(UsageError, match=told):
        pipeline(PROMPTS[:1], shape=replace(SHAPE, **change))


def test_a_model_that_has_diverged_is_told_and_not_drawn():
    pipeline = build_pipeline()
    with torch.no_grad():
        next(iter(pipeline.model.parameters())).fill_(torch.nan)
    with pytest.raises(NumericsError, match=r"1 of 1 videos .* have diverged"):
        pipeline(PROMPTS[:1])


def test_seeds_and_a_generator_exclude_each_other(pipeline):
    with pytest.raises(TypeError, match="seeds or a generator, not both"):
        pipeline(["a"], seeds=[1], generator=torch.Generator())


def test_every_prompt_needs_a_seed(pipeline):
    with pytest.raises(UsageError, match="3 prompts need as many seeds, found 2"):
        pipeline(PROMPTS, seeds=[1, 2])


def test_a_callback_sees_every_step_and_may_end_it(pipeline):
    seen = []

    class Cancelled(Exception):
        pass

    def callback(step, x, data):
        seen.append((step, tuple(x.shape), tuple(data.shape)))
        if step == 1 and len(seen) > 3:
            raise Cancelled

    pipeline(PROMPTS[:2], sampling=QUICK, callback=callback)
    assert seen == [(step, (2, 4, 2, 4, 4), (2, 4, 2, 4, 4)) for step in range(3)]
    with pytest.raises(Cancelled):
        pipeline(PROMPTS[:2], sampling=QUICK, callback=callback)
    assert len(seen) == 5


def test_training_levels_shift_sampling_levels(pipeline):
    other = build_pipeline(
        timesteps={"kind": "uniform", "shift": {"kind": "constant", "value": 1.0}}
    )
    assert not np.array_equal(frames(other, PROMPTS[:1], [0]), frames(pipeline, PROMPTS[:1], [0]))


def test_bfloat16_draws_nearly_the_same(pipeline):
    half = build_pipeline().to("cpu", torch.bfloat16)
    exact = frames(pipeline, PROMPTS[:1], [0]).astype(int)
    found = frames(half, PROMPTS[:1], [0])
    assert 0 < np.abs(found - exact).mean() < 8


def save_run(pipeline: VideoPipeline, path, *, averages: float, **model_changes) -> None:
    """A checkpoint as training writes it, with averages that are the weights times a factor."""
    parts = {"model": pipeline.model, "text": pipeline.text}
    weights = {f"{k}.{n}": v for k, part in parts.items() for n, v in part.state_dict().items()}
    trained = {f"{k}.{n}" for k, part in parts.items() for n, _ in part.named_parameters()}
    task = {"kind": "text_to_video", "masks": {}, **pipeline.config.model_dump(mode="json")}
    task["model"] |= model_changes
    snapshot = checkpoint.Snapshot(
        step=3,
        config=json.dumps({"task": task}),
        weights=weights,
        ema={name: weights[name] * averages for name in trained},
        frozen={f"vae.{n}": v for n, v in pipeline.vae.state_dict().items()},
        progress={"shape": vars(SHAPE)},
    )
    saving.save(path / "checkpoints", snapshot, keep=1)


def test_a_checkpoint_draws_what_its_model_drew(pipeline, tmp_path):
    save_run(pipeline, tmp_path, averages=1.0)
    loaded = VideoPipeline.from_pretrained(tmp_path)
    assert loaded.shape == SHAPE
    assert np.array_equal(frames(loaded, PROMPTS[:1], [0]), frames(pipeline, PROMPTS[:1], [0]))
    assert not loaded.model.training


def test_averaged_and_raw_weights_are_different_models(pipeline, tmp_path):
    save_run(pipeline, tmp_path, averages=0.5)
    averaged = VideoPipeline.from_pretrained(tmp_path)
    raw = VideoPipeline.from_pretrained(tmp_path, averaged=False)
    assert averaged.fingerprint != raw.fingerprint
    assert np.array_equal(frames(raw, PROMPTS[:1], [0]), frames(pipeline, PROMPTS[:1], [0]))
    assert not np.array_equal(frames(averaged, PROMPTS[:1], [0]), frames(raw, PROMPTS[:1], [0]))
    name = "x_embedder.weight"
    half = pipeline.model.state_dict()[name] * 0.5
    assert torch.equal(averaged.model.state_dict()[name], half)


def test_a_checkpoint_of_another_version_is_refused(pipeline, tmp_path):
    save_run(pipeline, tmp_path, averages=1.0, depht=3)
    with pytest.raises(CheckpointError, match=r"this version.*unknown key 'model\.depht'.*'depth'"):
        VideoPipeline.from_pretrained(tmp_path)
    save_run(pipeline, tmp_path, averages=1.0, depth=2)
    with pytest.raises(CheckpointError, match=r"do not fit.*missing spatial_blocks\.1"):
        VideoPipeline.from_pretrained(tmp_path)
