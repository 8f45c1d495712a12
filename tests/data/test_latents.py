"""The latent cache: what is written is what is read, whatever died in between."""

import hashlib
import json
import os
import random

import pytest
import torch
from data_support import (
    CACHED,
    IDENTITY,
    PATCH,
    STRIDE,
    FakeRead,
    assign,
    buckets,
    encode_text,
    encode_video,
    make_job,
    make_manifest,
)

from opensora import store
from opensora.data import encode as encoding
from opensora.data.clips import ClipDataset, ClipReader, ClipsConfig, Quarantine
from opensora.data.encode import EncodeConfig, EncodeJob, encode, publish
from opensora.data.latents import CachedAssigner, LatentDataset, open_cache
from opensora.data.loading import batches
from opensora.data.plan import Plan
from opensora.errors import DataError, StorageError


def shards(job) -> list[str]:
    return sorted(p.name for p in job.directory.glob("shard-*"))


def expected(row: int) -> torch.Tensor:
    frames = 1 if row % 4 == 3 else 5
    return torch.full((3, frames, 8, 8), 2 * (row / 127.5 - 1))


def check_whole(job, num_rows=11) -> None:
    cache = open_cache(job.directory, identity=IDENTITY)
    assert sorted(cache.entries) == list(range(num_rows))
    for row in cache.entries:
        torch.testing.assert_close(cache.latents(row), expected(row), rtol=0, atol=1e-6)
    assert cache.verify() == []


def test_what_was_encoded_is_read_back_in_several_shards(tmp_path):
    job = make_job(tmp_path)
    told = []
    assert encode(job, progress=lambda done, total: told.append((done, total))) == 11
    assert publish(job) == 11
    assert told[-1] == (11, 11)
    assert len(shards(job)) > 2
    check_whole(job)
    cache = open_cache(job.directory)
    features = cache.features(7)
    assert features.tokens.shape == (1, 2, 5)  # 1 + 7 % 3 real tokens, the padding left out
    assert features.mask.tolist() == [[True, True]]
    assert features.pooled.tolist() == [[7.0]]
    assert cache.entries[7].text == "clip 7"
    assert cache.entries[7].fps == 8.0
    assert cache.unreadable == []


def test_batches_of_latents_follow_the_plan_of_the_videos(tmp_path):
    job = make_job(tmp_path)
    encode(job)
    publish(job)
    cache = open_cache(job.directory)
    plan = Plan(CachedAssigner(cache, CACHED, stride=STRIDE, patch=PATCH), seed=0)
    pixels_plan = Plan(job.assigner, seed=0)
    dataset, pixels = LatentDataset(cache), ClipDataset(job.reader, Quarantine(11, 0))
    for step in range(12):
        request = plan.batch(step)
        assert request.rows.tolist() == pixels_plan.batch(step).rows.tolist()
        batch, videos = dataset[request], pixels[request]
        torch.testing.assert_close(batch.latents, encode_video(videos.pixels))
        assert batch.texts == videos.texts
        assert torch.equal(batch.sample_ids, videos.sample_ids)
        assert torch.equal(batch.fps, videos.fps)
        wanted = encode_text(list(batch.texts))
        longest = batch.features.mask.shape[1]
        assert torch.equal(batch.features.mask, wanted.mask[:, :longest])
        assert torch.equal(batch.features.tokens, wanted.tokens[:, :longest])
        assert not wanted.mask[:, longest:].any()
    alone = list(batches(dataset, plan, 3, num_steps=4))
    for workers in (1, 2):
        got = list(batches(dataset, plan, 3, num_steps=4, num_workers=workers))
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(got, alone, strict=True))


def test_a_second_run_encodes_only_what_changed(tmp_path):
    job = make_job(tmp_path)
    encode(job)
    publish(job)
    before = shards(job)
    read = FakeRead()
    again = make_job(tmp_path, read=read)
    assert encode(again) == 0
    assert read.calls == []
    assert publish(again) == 11
    assert shards(job) == before
    file = again.reader.manifest.location(5)
    os.utime(file, (1, 1))  # a copied file has another date and the same content
    assert encode(make_job(tmp_path)) == 0
    file.write_bytes(b"FILE 5")
    changed = make_job(tmp_path, read=read)
    assert encode(changed) == 1
    assert [row for row, *_ in read.calls] == [5]
    assert publish(changed) == 11
    check_whole(changed)


def test_a_changed_recipe_or_caption_is_encoded_again_and_the_old_shards_go(tmp_path):
    job = make_job(tmp_path)
    encode(job)
    publish(job)
    first = set(shards(job))
    for change in (
        {"identity": {**IDENTITY, "weights": "def"}},
        {"clips": ClipsConfig(start="random", max_bad_fraction=0.5)},
        {"config": EncodeConfig(dtype="float16", shard_bytes=6000)},
    ):
        other = make_job(tmp_path, **change)
        with pytest.raises(DataError, match="11 of 11 clips are not in"):
            publish(other)  # the entries of the old recipe do not count
        assert encode(other) == 11
        assert publish(other) == 11
        assert not first & set(shards(other))
        first = set(shards(other))


def test_another_encoder_is_refused_with_both_identities_and_the_mend(tmp_path):
    job = make_job(tmp_path)
    encode(job)
    publish(job)
    open_cache(job.directory, identity=json.loads(json.dumps(IDENTITY)))
    open_cache(job.directory, identity={**IDENTITY, "text": ("words", 3)})
    with pytest.raises(DataError) as caught:
        open_cache(job.directory, identity={**IDENTITY, "weights": "def"})
    for part in ('"weights": "abc"', '"weights": "def"', "opensora encode"):
        assert part in str(caught.value)


def test_an_absent_or_unfinished_cache_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; run `opensora encode`"):
        open_cache(tmp_path / "cache")
    job = make_job(tmp_path)
    encode(job)
    with pytest.raises(DataError, match="was not finished; run `opensora encode`"):
        open_cache(job.directory)


def test_ranks_share_the_work_and_publishing_too_early_is_refused(tmp_path):
    job = make_job(tmp_path, clips=ClipsConfig(start="first", max_bad_fraction=0.1))
    first = encode(job, rank=0, world_size=2)
    with pytest.raises(DataError, match=r"clips are not in .* yet"):
        publish(job)
    assert first + encode(job, rank=1, world_size=2) == 11
    assert publish(job) == 11
    assert {name[-3:] for name in shards(job)} == {"000", "001"}
    check_whole(job)
    assert encode(job, rank=2, world_size=3) == 0


def test_unreadable_files_are_left_out_by_name(tmp_path):
    job = make_job(tmp_path, read=FakeRead(frozenset({2, 3})))
    assert encode(job) == 9
    assert publish(job) == 9
    cache = open_cache(job.directory)
    assert cache.unreadable == [2, 3]
    assert "0003.mp4' is bad" in (job.directory / "quarantine.csv").read_text()
    assigner = CachedAssigner(cache, CACHED, stride=STRIDE, patch=PATCH)
    assert assigner(0).census.left_out == {"not in the cache": 2}
    strict = make_job(
        tmp_path,
        read=FakeRead(frozenset({2, 3})),
        clips=ClipsConfig(start="first", max_bad_fraction=0.1),
    )
    with pytest.raises(DataError, match="2 of 11 rows are unreadable"):
        encode(strict)


def test_a_config_without_the_cached_shapes_is_refused_with_a_census(tmp_path):
    job = make_job(tmp_path)
    encode(job)
    publish(job)
    other = buckets({"64px": {5: [1, 4]}}, aspect_ratios=["1:1"])
    with pytest.raises(DataError, match="no bucket 17x64x64 in the config: 9"):
        CachedAssigner(open_cache(job.directory), other, stride=STRIDE, patch=PATCH)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_flipped_byte_of_a_shard_is_detected_and_the_clip_named(tmp_path, dtype):
    job = make_job(tmp_path, num_rows=6, config=EncodeConfig(dtype=dtype))
    encode(job)
    publish(job)
    (name,) = shards(job)
    file = job.directory / name / "latents.safetensors"
    genuine = file.read_bytes()
    generator = random.Random(1)
    for _ in range(60):
        damaged = bytearray(genuine)
        damaged[generator.randrange(len(genuine))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        cache = open_cache(job.directory)

        def read_all(cache=cache):
            for row in cache.entries:
                assert cache.latents(row).shape[0] == 3
                cache.features(row)

        with pytest.raises(DataError, match=r"is damaged.*remove that folder"):
            read_all()
        assert len(cache.verify()) == 1
    start = genuine.index(
        torch.full((8,), expected(4)[0, 0, 0, 0].item())
        .to(getattr(torch, dtype))
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )
    damaged = bytearray(genuine)
    damaged[start] ^= 1
    file.write_bytes(damaged)
    cache = open_cache(job.directory)
    assert cache.latents(2).shape == (3, 5, 8, 8)
    with pytest.raises(DataError, match="tensor '00000004' changed"):
        cache.latents(4)
    # The mend that the message names: without the folder only its clips are encoded again.
    store.remove(job.directory / name)
    assert encode(job) == 6
    assert publish(job) == 6
    assert open_cache(job.directory).verify() == []


def test_encoders_that_give_nonsense_are_refused(tmp_path):
    job = make_job(tmp_path, latents=lambda pixels: pixels.mean(dim=1))
    with pytest.raises(DataError, match="it must give"):
        encode(job)
    job = make_job(tmp_path, latents=lambda pixels: encode_video(pixels) / 0)
    with pytest.raises(DataError, match=r"latents of rows \[.*\] are not finite"):
        encode(job)
    assert shards(job) == []


def test_too_little_space_is_told_after_the_first_batch(tmp_path, monkeypatch):
    asked = []

    def refuse(folder, *, num_bytes=0):
        asked.append(num_bytes)
        raise StorageError("planned")

    monkeypatch.setattr(encoding, "preflight", refuse)
    with pytest.raises(StorageError, match="planned"):
        encode(make_job(tmp_path))
    # Nine clips of 5 latent frames and two of 1 are 3 KB and 0.6 KB each, plus some text.
    assert asked[0] == pytest.approx(11 * 3 * 5 * 64 * 4, rel=0.1)


def test_real_videos_go_through_the_cache(tmp_path, videos):
    manifest = make_manifest(videos, 6)
    reader = ClipReader(manifest, CACHED, ClipsConfig(start="first"), seed=0)
    job = EncodeJob(
        tmp_path / "cache",
        assign(manifest, CACHED),
        reader,
        encode_video,
        None,
        IDENTITY,
        EncodeConfig(),
    )
    assert encode(job, num_workers=1) == 6
    publish(job)
    cache = open_cache(job.directory)
    plan = Plan(CachedAssigner(cache, CACHED, stride=STRIDE, patch=PATCH), seed=0)
    batch = LatentDataset(cache)[plan.batch(0)]
    assert batch.features is None
    videos_batch = ClipDataset(reader, Quarantine(6, 0))[plan.batch(0)]
    assert torch.equal(batch.latents, encode_video(videos_batch.pixels))
    content = (videos / "0003.mp4").read_bytes()
    assert cache.entries[3].file_sha256 == hashlib.sha256(content).hexdigest()
