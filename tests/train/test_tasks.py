"""What the two tasks compute, on the tiny models."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from train_support import ALONE, clips, fresh_task, latents, tiny

from opensora.engine import checkpoint
from opensora.engine.flops import FlopCounter
from opensora.errors import UsageError
from opensora.train.autoencoder import Autoencoder
from opensora.train.text_to_video import TextToVideo
from opensora.train.validation import averaged
from opensora.types import Condition, concatenate


@pytest.fixture
def autoencoder(tmp_path) -> Autoencoder:
    task = fresh_task(tiny("vae", tmp_path))
    assert isinstance(task, Autoencoder)
    return task


@pytest.fixture
def generator(tmp_path) -> TextToVideo:
    task = fresh_task(tiny("stdit", tmp_path))
    assert isinstance(task, TextToVideo)
    nn.init.normal_(task.model.final_layer.linear.weight, std=0.1)
    return task


def test_the_first_weights_depend_on_the_seed_alone(tmp_path):
    torch.manual_seed(5)
    one = fresh_task(tiny("stdit", tmp_path)).state_dict()
    state = torch.get_rng_state()
    again = fresh_task(tiny("stdit", tmp_path)).state_dict()
    other = fresh_task(tiny("stdit", tmp_path, "seed=1")).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["model.x_embedder.weight"], other["model.x_embedder.weight"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["vae", "stdit"])
def test_a_loss_depends_on_step_and_sample_and_not_on_torchs_generator(name, tmp_path):
    task = fresh_task(tiny(name, tmp_path))
    batch = clips([0, 1, 2]) if name == "vae" else latents([0, 1, 2])
    torch.manual_seed(0)
    first = task(batch, 3)
    torch.manual_seed(1)
    again = task(batch, 3)
    assert torch.equal(first.total, again.total)
    assert torch.equal(first.per_sample, again.per_sample)
    assert not torch.equal(first.total, task(batch, 4).total)
    other = task(replace(batch, sample_ids=torch.tensor([5, 6, 7])), 3)
    assert not torch.equal(first.total, other.total)


def test_losses_of_parts_add_up(generator):
    batch = latents([0, 1, 2, 3, 4])
    whole = generator(batch, 2)
    parts = [generator(batch[:2], 2), generator(batch[2:], 2)]
    # Five sums of 128 squares in float32.
    assert_close(sum(p.total for p in parts), whole.total, rtol=1e-6, atol=0)
    assert sum(float(p.count) for p in parts) == float(whole.count)
    assert_close(torch.cat([p.per_sample for p in parts]), whole.per_sample, rtol=1e-5, atol=0)


def test_given_frames_are_not_counted(generator, tmp_path):
    assert float(generator(latents(list(range(12))), 0).count) < 12 * 2
    everything = fresh_task(tiny("stdit", tmp_path, "task.masks.ratios={}"))
    assert float(everything(latents(list(range(12))), 0).count) == 12 * 2
    given = fresh_task(tiny("stdit", tmp_path, "task.masks.ratios={image_head: 1.0}"))
    assert float(given(latents(list(range(12))), 0).count) == 12


def test_validation_has_fixed_noise_and_a_bin_for_every_level(generator):
    batch = latents([0, 1, 2])
    first, again = generator.validation(batch), generator.validation(batch)
    bins = {name: pair for name, pair in first.items() if name != "loss"}
    assert list(bins) == [f"loss/level_0.{k}5" for k in range(10)]
    assert all(torch.equal(first[name][0], again[name][0]) for name in first)
    assert_close(sum(pair[0] for pair in bins.values()), first["loss"][0])
    assert float(first["loss"][1]) == 10 * 3 * 2
    alone = [generator.validation(batch[k : k + 1]) for k in range(3)]
    for name in first:
        assert_close(sum(a[name][0] for a in alone), first[name][0], rtol=1e-5, atol=0)


def test_captions_are_dropped_by_the_configs_share(tmp_path):
    for share, expected in ((0.0, 0), (1.0, 12)):
        task = fresh_task(tiny("stdit", tmp_path, f"task.caption_dropout={share}"))
        seen = []
        encode = task.text.encode
        task.text.encode = lambda texts, encode=encode, seen=seen: (
            seen.extend(texts) or encode(texts)
        )
        task(latents(list(range(12))), 0)
        assert sum(text is None for text in seen) == expected


class Frozen(nn.Module):
    """A text encoder that is never trained: the length of a prompt, on as many tokens."""

    trainable = False
    channels = pooled_channels = 16

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1), requires_grad=False)
        self.calls: list[str | None] = []

    def encode(self, prompts) -> Condition:
        self.calls.extend(prompts)
        rows = []
        for prompt in prompts:
            words = (prompt or "").split() or [""]
            tokens = torch.tensor([[float(len(w))] * 16 for w in words])[None] * self.scale
            mask = torch.ones(1, len(words), dtype=torch.bool)
            rows.append(Condition(tokens, mask, tokens.mean(1)))
        return concatenate(rows)

    def identity(self) -> str:
        return f"frozen {self.scale.item():.3f}"


@pytest.fixture
def with_frozen_text(tmp_path) -> tuple[TextToVideo, Frozen]:
    config = tiny("stdit", tmp_path, "task.caption_dropout=0.3")
    vae = fresh_task(config).vae
    text = Frozen()
    torch.manual_seed(0)
    task = TextToVideo(config.task, vae=vae, text=text, seed=0)
    nn.init.normal_(task.model.final_layer.linear.weight, std=0.1)
    return task, text


def test_frozen_parts_are_used_but_not_trained_and_not_saved(with_frozen_text):
    task, text = with_frozen_text
    names = [name for name, _ in task.named_parameters()]
    assert all(name.startswith("model.") for name in names)
    assert set(task.frozen()) == {f"vae.{name}" for name in task.vae.state_dict()}
    task(latents([0, 1, 2]), 0).total.backward()
    assert text.scale.grad is None
    assert all(p.grad is None for p in task.vae.parameters())


def test_frozen_parts_follow_the_task_to_its_device(with_frozen_text):
    task, text = with_frozen_text
    task.to("meta")
    assert next(task.model.parameters()).device.type == "meta"
    assert task.vae.latent_mean.device.type == "meta"
    assert text.scale.device.type == "meta"


def test_a_frozen_encoder_encodes_a_caption_once(with_frozen_text):
    task, text = with_frozen_text
    for step in range(3):
        task(latents([0, 1, 2, 3]), step)
    assert len(text.calls) == len(set(text.calls)) <= 5


def test_cached_text_features_are_the_encoders(with_frozen_text):
    task, text = with_frozen_text
    batch = latents([0, 1, 2, 3, 4, 5])
    expected = task(batch, 1)
    features = text.encode(list(batch.texts))
    text.calls.clear()
    found = task(replace(batch, features=features), 1)
    # Longer padding changes the order of sums within attention.
    assert_close(found.per_sample, expected.per_sample, rtol=1e-5, atol=0)
    assert text.calls == []
    changed = features.map(lambda t: t + 1 if t.is_floating_point() else t)
    assert not torch.allclose(task(replace(batch, features=changed), 1).total, expected.total)


def test_a_trained_encoder_ignores_cached_features(generator):
    batch = latents([0, 1])
    strange = Condition(torch.ones(2, 3, 16), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 16))
    expected = generator(batch, 1).total
    assert torch.equal(generator(replace(batch, features=strange), 1).total, expected)


def test_the_identity_of_latents_names_the_vae_and_the_frozen_text(generator, with_frozen_text):
    task, _ = with_frozen_text
    vae = {"vae": checkpoint.identity(task.vae.state_dict())}
    assert task.latent_identity({}) == vae
    assert task.latent_identity({"text": "anything"}) == {**vae, "text": "frozen 0.100"}
    # Features that this run will not use do not matter.
    cached = {"text": "anything"}
    assert generator.latent_identity(cached)["text"] == "anything"


@pytest.mark.parametrize("frozen_text", [True, False])
@pytest.mark.parametrize("pixels", [True, False])
def test_rehearsed_flops_are_those_of_the_step(pixels, frozen_text, generator, with_frozen_text):
    task = with_frozen_text[0] if frozen_text else generator
    task.config = task.config.model_copy(update={"caption_dropout": 0.0})
    batch = clips([0, 1, 2]) if pixels else latents([0, 1, 2])
    task.condition(batch, [False] * 3)  # so that a frozen encoder has seen the captions
    state = torch.get_rng_state()
    rehearsed = task.flops(batch)
    assert torch.equal(torch.get_rng_state(), state)
    with FlopCounter() as counter:
        task(batch, 0).total.backward()
    # The text's backward is taken as twice its forward; its attention costs a little more.
    assert rehearsed == pytest.approx(counter.total, rel=0.01)
    assert all(p.device.type == "cpu" for p in task.parameters())


def test_pixels_and_their_latents_are_the_same_step(tmp_path):
    config = tiny("stdit", tmp_path)
    task = fresh_task(config)
    nn.init.normal_(task.model.final_layer.linear.weight, std=0.1)
    batch = clips([0, 1, 2])
    cached = replace(latents([0, 1, 2]), latents=task.vae.encode(batch.pixels))
    assert_close(task(batch, 1).total, task(cached, 1).total, rtol=1e-6, atol=0)
    assert task.shape(batch) == task.shape(cached)
    assert task.shape(batch) == {"num_frames": 5, "height": 32, "width": 32, "fps": 8.0}
    assert task.tokens(batch) == task.tokens(cached) == 3 * 2 * 2 * 2


def test_a_text_encoder_of_other_widths_is_refused_by_key(tmp_path):
    with pytest.raises(UsageError, match=r"model\.text_channels is 8.*gives 16"):
        fresh_task(tiny("stdit", tmp_path, "task.model.text_channels=8"))


def test_the_decoder_sees_latents_under_noise_of_the_configs_strength(autoencoder, tmp_path):
    seen = {}
    for strength in (0.0, 0.6):
        task = fresh_task(tiny("vae", tmp_path, f"task.latent_noise={strength}"))
        task.vae.reconstruct = lambda z, task=task, strength=strength: (
            seen.__setitem__(strength, z.detach()),
            type(task.vae).reconstruct(task.vae, z),
        )[1]
        task(clips(list(range(12))), 0)
    noise = (seen[0.6] - seen[0.0]).flatten(1).std(1)
    # Strengths are uniform in [0, 0.6]; the deviation of 128 draws is within a quarter of theirs.
    assert float(noise.max()) < 0.6 * 1.25
    assert float(noise.mean()) == pytest.approx(0.3, abs=5 * 0.6 / (12 * 12) ** 0.5)


def test_windows_of_clips_move_with_step_and_sample(tmp_path):
    task = fresh_task(tiny("vae", tmp_path, "task.clip_frames=1"))
    batch = clips([0, 1, 2, 3, 4, 5])
    starts = []
    for step in range(4):
        window = task._window(batch, step)  # B 3 1 H W
        assert window.shape == (6, 3, 1, 32, 32)
        match = (window == batch.pixels).all(dim=(1, 3, 4)).float()
        starts.append(match.argmax(1).tolist())
    assert len({tuple(s) for s in starts}) == 4
    assert len({start for row in starts for start in row}) > 2


def test_running_statistics_move_only_when_the_step_is_made(autoencoder):
    before = autoencoder.vae.latent_std.clone()
    autoencoder(clips([0, 1]), 0)
    assert torch.equal(autoencoder.vae.latent_std, before)
    autoencoder.decided(accepted=False)
    autoencoder.decided(accepted=True)  # nothing is left of the refused step
    assert torch.equal(autoencoder.vae.latent_std, before)
    autoencoder(clips([0, 1]), 0)
    autoencoder.decided(accepted=True)
    assert not torch.equal(autoencoder.vae.latent_std, before)


def test_the_last_measurement_makes_latents_standard(autoencoder):
    batches = [clips([0, 1, 2]), clips([3, 4])]
    autoencoder.finish(batches, ALONE)
    encoded = torch.cat([autoencoder.vae.encode(batch.pixels) for batch in batches])
    dims = (0, 2, 3, 4)
    # Means of 5 x 32 numbers of size one; sums are taken in float64, the encoder in float32.
    assert_close(encoded.mean(dims), torch.zeros(4), rtol=0, atol=1e-4)
    assert_close(encoded.std(dims, correction=0), torch.ones(4), rtol=1e-3, atol=0)


def test_the_validation_of_a_perfect_vae_is_a_high_psnr(autoencoder):
    batch = clips([0, 1])
    autoencoder.vae.encode = lambda pixels: pixels
    autoencoder.vae.decode = lambda pixels: pixels + 0.02
    sums = autoencoder.validation(batch)
    # An error of 0.02 in [-1, 1] is 0.01 of the range: 40 dB.
    assert float(sums["psnr"][0] / sums["psnr"][1]) == pytest.approx(40, abs=1e-3)
    assert float(sums["l1"][0] / sums["l1"][1]) == pytest.approx(0.02, abs=1e-5)


def test_measuring_leaves_the_task_training_even_after_an_error(autoencoder):
    def fail():
        with averaged(autoencoder, None):
            assert not autoencoder.training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert autoencoder.training
