"""The arena suite on painters that show what a prompt promises, a still, noise, or nothing new."""

import json
import math

import numpy as np
import pytest
import torch

from opensora.arena.draw import render
from opensora.arena.grammar import promise
from opensora.arena.scenes import SceneConfig, sample
from opensora.errors import NumericsError, UsageError
from opensora.evaluate import arena, fidelity
from opensora.evaluate.arena import TARGETS, ArenaConfig
from opensora.evaluate.clips import RealClipsConfig
from opensora.evaluate.suite import Autoencoder, Subject
from opensora.infer.pipeline import Sample, Shape
from opensora.infer.records import read_records
from tests.infer.conftest import WHOLE

SCENES = SceneConfig(num_objects={1: 0.7, 2: 0.3}, alike=0.0)
CONFIG = ArenaConfig(scenes=SCENES, num_prompts={1: 12, 2: 4}, batch_size=8)


def truth_of(prompt: str) -> np.ndarray:
    """A scene that shows what a prompt says: the first one of a look that the prompt has."""
    wanted = promise(prompt)
    count = len(wanted.objects)
    only = SCENES.model_copy(update={"num_objects": {count: 1.0}, "held_out": ()})
    colours = tuple(dict.fromkeys(thing.colour for thing in wanted.objects))
    shapes = tuple(dict.fromkeys(thing.shape for thing in wanted.objects))
    motions = {thing.motion: 1.0 for thing in wanted.objects}
    only = only.model_copy(update={"motions": motions, "shapes": shapes, "colours": colours})
    for index in range(20_000):
        scene = sample(only, 7, index)
        if scene.caption == prompt:
            return render(scene)
    raise AssertionError(f"no scene of {prompt!r}")


class Painter:
    """Stands in for a pipeline; `paint(prompt, seed)` gives the frames.

    Its VAE returns what it is given, so the reconstruction is the truth.
    """

    team = None
    stride = (4, 8, 8)
    savings, weaker = WHOLE, None

    def __init__(self, paint, *, fingerprint="painter", frames=17):
        self.paint, self.fingerprint = paint, fingerprint
        self.shape = Shape(frames, 64, 64, 8.0)
        self.device = torch.device("cpu")
        self.drawn = 0

    @property
    def vae(self):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, pixels):
        return pixels

    decode = encode

    def latent_shape(self, shape):
        return (8, 5, 8, 8)

    def __call__(self, prompts, *, seeds, shape, sampling, negative_prompt):
        self.drawn += len(prompts)
        pairs = zip(prompts, seeds, strict=True)
        return [Sample(p, s, self.paint(p, s), shape.fps) for p, s in pairs]


def still(prompt: str, seed: int) -> np.ndarray:
    return np.repeat(truth_of(prompt)[:1], 17, axis=0)


def noise(prompt: str, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Scores of a perfect painter beside one that paints noise."""
    folder = tmp_path_factory.mktemp("arena")
    told = []
    perfect = Painter(lambda prompt, seed: truth_of(prompt))
    fresh = Painter(noise, fingerprint="untrained")
    scores = arena.run(perfect, fresh, CONFIG, folder, progress=lambda *stage: told.append(stage))
    return scores, folder, told


def means(group: dict) -> dict[str, float]:
    return {name: value["mean"] for name, value in group.items()}


def test_truth_scores_one_and_noise_nothing(judged):
    scores, _, _ = judged
    for metric in ("colour", "direction", "count", "shape", "binding", "success"):
        assert scores["trained"][metric]["mean"] == 1.0, metric
        assert scores["truth"][metric]["mean"] == 1.0
        assert scores["vae"][metric]["mean"] == 1.0
        assert scores["trained_two_objects"][metric]["mean"] >= 0.9, metric
    for metric in ("count", "direction", "shape", "success"):
        assert scores["untrained"][metric]["mean"] <= 0.1, metric
    assert scores["vae"]["psnr"]["mean"] > 90


def test_other_prompts_are_answered_clearly_worse(judged):
    scores, _, _ = judged
    shuffled = means(scores["shuffled"])
    assert shuffled["success"] == 0
    assert shuffled["colour"] < 0.4
    assert shuffled["direction"] < 0.7
    assert shuffled["binding"] < 0.3


def test_a_still_has_the_look_and_not_the_motion(tmp_path):
    config = CONFIG.model_copy(update={"num_prompts": {1: 6}})
    scores = arena.run(Painter(still), None, config, tmp_path)
    trained = means(scores["trained"])
    assert (trained["colour"], trained["count"], trained["shape"]) == (1.0, 1.0, 1.0)
    assert (trained["direction"], trained["success"]) == (0.0, 0.0)
    assert "untrained" not in scores
    assert "trained_two_objects" not in scores


def test_the_file_holds_every_group_with_intervals(judged):
    scores, folder, _ = judged
    assert json.loads((folder / "scores.json").read_text()) == json.loads(json.dumps(scores))
    groups = {"trained", "trained_two_objects", "untrained", "shuffled", "vae", "truth"}
    assert groups == scores.keys() - {"targets", "settings"}
    for name in ("trained", "untrained", "shuffled", "vae"):
        for metric in ("colour", "direction", "count", "shape"):
            value = scores[name][metric]
            assert set(value) == {"mean", "low", "high", "n"}
            assert 0 <= value["low"] <= value["mean"] <= value["high"] <= 1
            assert value["n"] == 12
    assert scores["trained_two_objects"]["colour"]["n"] == 4
    assert scores["targets"] == TARGETS
    assert scores["settings"]["weights"] == "painter"
    assert scores["settings"]["suite"] == "arena"
    assert scores["settings"]["num_prompts"] in ({1: 12, 2: 4}, {"1": 12, "2": 4})


def test_every_video_lies_beside_its_scores(judged):
    _, folder, told = judged
    records = read_records(folder / "samples")
    assert len(records) == 16
    assert all((folder / "samples" / record["file"]).is_file() for record in records)
    assert all(record["scores"]["success"] == 1 for record in records[:12])
    assert all("scores" in record for record in read_records(folder / "samples_untrained"))
    assert {stage for stage, _, _ in told} == {
        *("trained", "judging trained", "untrained", "judging untrained", "vae")
    }
    assert ("trained", 16, 16) in told
    assert ("vae", 12, 12) in told


def test_prompts_are_held_out_and_seeds_differ(judged):
    _, folder, _ = judged
    records = read_records(folder / "samples")
    looks = set(SCENES.looks("heldout"))
    for record in records:
        assert all((t.colour, t.shape) in looks for t in promise(record["prompt"]).objects)
    assert len({record["seed"] for record in records}) == 16
    assert len({record["prompt"] for record in records}) == 16


def test_judging_again_draws_nothing_and_finds_the_same(judged):
    scores, folder, _ = judged
    painter = Painter(noise)
    again = arena.run(painter, None, CONFIG, folder)
    assert painter.drawn == 0
    assert again["trained"] == scores["trained"]
    assert again["shuffled"] == scores["shuffled"]


def test_other_weights_in_the_same_folder_are_refused(judged):
    _, folder, _ = judged
    with pytest.raises(UsageError, match=r"drawn differently \(weights\)"):
        arena.run(Painter(noise, fingerprint="other"), None, CONFIG, folder)


def test_a_single_prompt_has_no_shuffled_group(tmp_path):
    config = CONFIG.model_copy(update={"num_prompts": {1: 1}})
    scores = arena.run(Painter(noise), None, config, tmp_path)
    assert "shuffled" not in scores
    assert scores["trained"]["colour"]["n"] == 1


@pytest.mark.parametrize(("group", "has_truth"), [("trained", False), ("truth", True)])
def test_a_score_that_is_no_number_is_refused(group, has_truth, tmp_path, monkeypatch):
    config = CONFIG.model_copy(update={"num_prompts": {1: 3}})
    judged = arena.score

    def broken(*arguments, truth, **options):
        scores = judged(*arguments, truth=truth, **options)
        return {**scores, "colour": np.nan} if (truth is not None) == has_truth else scores

    monkeypatch.setattr(arena, "score", broken)
    told = f"colour of group '{group}' is no finite number for 3 of 3 samples"
    with pytest.raises(NumericsError, match=told):
        arena.run(Painter(noise), None, config, tmp_path)
    assert not (tmp_path / "scores.json").exists()
    assert all("NaN" not in path.read_text() for path in tmp_path.rglob("*.jsonl"))


def vae_suites(error, folder):
    """The arena, and the suite of VAEs, on the same scenes and a VAE of growing error."""
    painter = Painter(noise)
    painter.decode = lambda latents: latents - error * torch.linspace(0, 1, 17).view(-1, 1, 1)
    config = CONFIG.model_copy(update={"num_prompts": {1: 3}})
    only = SCENES.model_copy(update={"num_objects": {1: 1.0}})
    clips = RealClipsConfig(scenes=only, num=3, seed=config.seed)
    settings = fidelity.FidelityConfig(clips=clips)
    alone = Subject(alone=Autoencoder(painter, painter.shape, "painter"))  # type: ignore[arg-type]
    yield lambda: arena.run(painter, None, config, folder / "arena")
    yield lambda: fidelity.run(alone, settings, folder / "vae", lambda *_: None)


@pytest.mark.parametrize(("error", "lowest", "highest"), [(0.003, 100, 100), (0.2, 20, 45)])
def test_a_vae_has_the_psnr_that_its_own_suite_finds(error, lowest, highest, tmp_path):
    """Frame by frame, after rounding; 0.003 of [-1, 1] is less than half a level of grey."""
    first, second = (suite()["vae"]["psnr"] for suite in vae_suites(error, tmp_path))
    assert first == second
    assert lowest <= first["mean"] <= highest


def test_a_vae_that_gives_no_numbers_is_refused_where_8_bits_would_hide_it(tmp_path):
    for suite in vae_suites(math.nan, tmp_path):
        with pytest.raises(NumericsError, match="the VAE gives no finite number"):
            suite()
    assert not list(tmp_path.rglob("scores.json"))


def test_a_model_of_another_shape_is_refused_before_it_draws(tmp_path):
    painter = Painter(noise, frames=9)
    with pytest.raises(UsageError, match=r"9x64x64.*17x64x64.*scenes\.frames"):
        arena.run(painter, None, CONFIG, tmp_path)
    assert painter.drawn == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"), [("num_prompts", {4: 1}), ("num_prompts", {1: -1}), ("seed", 2**40)]
)
def test_impossible_protocols_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        ArenaConfig.model_validate({key: value})
