"""The paired comparison: known answers, power, and what cannot be compared."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from opensora.errors import DataError, UsageError
from opensora.evaluate import compare, results
from opensora.evaluate.suite import Row, write


def result(folder, values, *, metric="psnr", suite="vae", **settings):
    rows = [Row("vae", f"clip {i}", {metric: float(v)}) for i, v in enumerate(values)]
    write(folder, rows, settings={"suite": suite, "weights": folder.name, **settings})
    return results.read(folder)


def test_few_differences_are_flipped_in_every_way():
    differences = np.array([1.0, 2.0, -0.5, 3.0])
    signs = itertools.product((1, -1), repeat=4)
    means = [abs(np.dot(s, differences)) for s in signs]
    expected = np.mean([m >= abs(differences.sum()) - 1e-9 for m in means])
    assert compare.sign_flip(differences) == expected
    assert compare.sign_flip(np.ones(5)) == 2 / 32
    assert compare.sign_flip(np.zeros(5)) == 1.0


def test_many_differences_are_flipped_at_random_to_the_same_answer(monkeypatch):
    differences = np.random.default_rng(0).normal(0.5, 1, 12)
    exact = compare.sign_flip(differences)
    monkeypatch.setattr(compare, "_EXACT", 0)
    drawn = compare.sign_flip(differences)
    # Four standard errors of a share of 10,000 draws.
    assert drawn == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 10_000) ** 0.5 + 1e-3)
    assert compare.sign_flip(np.ones(40)) > 0


def test_a_shared_difficulty_cancels_and_the_better_one_is_named(tmp_path):
    chance = np.random.default_rng(0)
    difficulty = chance.normal(30, 8, 40)
    a = result(tmp_path / "a", difficulty)
    b = result(tmp_path / "b", difficulty + 0.5 + chance.normal(0, 0.5, 40))
    (found,) = compare.compare(a, b)
    assert found.verdict == "B better"
    assert (found.n, found.p < 0.001) == (40, True)
    assert 0 < found.low < found.mean < found.high < 1
    separate = [r.groups["vae"]["psnr"] for r in (a, b)]
    assert separate[0]["high"] > separate[1]["low"]  # the intervals side by side overlap
    (turned,) = compare.compare(b, a)
    assert turned.verdict == "A better"
    assert turned.mean == pytest.approx(-found.mean)


def test_of_losses_the_smaller_is_better(tmp_path):
    values = np.linspace(1, 2, 20)
    a = result(tmp_path / "a", values, metric="loss_0.05")
    b = result(tmp_path / "b", values - 0.3, metric="loss_0.05")
    assert compare.compare(a, b)[0].verdict == "B better"


def test_noise_shows_no_difference_in_words(tmp_path):
    chance = np.random.default_rng(1)
    a, b = (result(tmp_path / n, chance.normal(30, 8, 20)) for n in "ab")
    (found,) = compare.compare(a, b)
    assert found.verdict == "no difference that n=20 can show"
    text = compare.text(a, b, [found])
    assert "vae psnr" in text
    assert text.endswith(found.verdict)
    tree = json.loads(compare.as_json(a, b, [found]))
    assert tree["differences"][0]["metric"] == "psnr"


def test_under_no_difference_one_p_value_in_twenty_is_below_005():
    chance = np.random.default_rng(2)
    below = [compare.sign_flip(chance.normal(0, 1, 10)) < 0.05 for _ in range(400)]
    assert 0.02 < np.mean(below) < 0.08  # 0.05 +- 2.8 standard errors


def test_the_interval_covers_the_truth_about_95_times_in_100(monkeypatch):
    monkeypatch.setattr(compare, "RESAMPLES", 500)
    chance = np.random.default_rng(3)
    covered = []
    for _ in range(300):
        low, high = compare.paired_bootstrap(chance.normal(1, 2, 40))
        covered.append(low <= 1 <= high)
    assert 0.89 < np.mean(covered) < 0.98


def test_other_suites_settings_or_samples_are_refused_with_their_keys(tmp_path):
    a = result(tmp_path / "a", [1, 2], clips={"fps": 8.0, "seed": 0})
    other = result(tmp_path / "suite", [1, 2], suite="fvd")
    with pytest.raises(UsageError, match=r"of the suite 'vae'.*of 'fvd'"):
        compare.compare(a, other)
    setting = result(tmp_path / "setting", [1, 2], clips={"fps": 9.0, "seed": 0}, lpips=True)
    with pytest.raises(UsageError, match=r"clips\.fps, lpips differ"):
        compare.compare(a, setting)
    shorter = result(tmp_path / "shorter", [1], clips={"fps": 8.0, "seed": 0})
    with pytest.raises(UsageError, match="1 are in one of them only, such as vae clip 1"):
        compare.compare(a, shorter)
    batched = result(tmp_path / "b", [1, 2], clips={"fps": 8.0, "seed": 0}, batch_size=4)
    assert compare.compare(a, batched)[0].p == 1.0


def test_the_arenas_scores_are_read_from_its_records(tmp_path):
    folder = tmp_path / "arena"
    (folder / "samples").mkdir(parents=True)
    lines = [
        {"index": i, "seed": i, "prompt": "a dot", "scores": {"colour": float(i)}} for i in range(2)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples" / "samples.jsonl").write_text(text)
    settings = {"suite": "arena", "num_prompts": {"2": 1, "1": 1}}
    (folder / "scores.json").write_text(json.dumps({"settings": settings}))
    found = results.values(results.read(folder))
    assert found == {  # the groups of scores.json: prompts with fewest objects come first
        ("trained", "0 0 a dot"): {"colour": 0.0},
        ("trained_two_objects", "1 1 a dot"): {"colour": 1.0},
    }
    settings["num_prompts"] = {"1": 1}
    (folder / "scores.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(DataError, match="more samples than prompts"):
        results.values(results.read(folder))


def test_a_model_that_gives_no_numbers_is_named_and_not_called_equal(tmp_path):
    sound, broken = result(tmp_path / "a", [1, 2]), result(tmp_path / "b", [1, 2])
    values = tmp_path / "b" / "values.jsonl"  # as results of older versions may be
    values.write_text(values.read_text().replace('"psnr": 2.0', '"psnr": NaN'))
    with pytest.raises(DataError, match=r"psnr of 'vae clip 1' in .*b is nan"):
        compare.compare(sound, broken)


def test_what_is_no_result_or_several_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"has no scores\.json"):
        results.only(tmp_path)
    for name in ("vae", "loss"):
        result(tmp_path / "eval" / name, [1, 2], suite=name)
    with pytest.raises(UsageError, match=r"2 suites \(loss, vae\): choose with --suite"):
        results.only(tmp_path)
    assert results.only(tmp_path, "vae").suite == "vae"
    assert results.only(tmp_path / "eval" / "vae" / "scores.json").suite == "vae"
    assert results.only(tmp_path / "checkpoints" / "step-000001", "vae").suite == "vae"
    with pytest.raises(UsageError, match="has no scores"):
        results.only(tmp_path / "another run")  # whose neighbour has scores
    (tmp_path / "eval" / "vae" / "values.jsonl").write_text("{torn\n")
    with pytest.raises(DataError, match="is damaged"):
        results.values(results.only(tmp_path, "vae"))
    (tmp_path / "eval" / "vae" / "values.jsonl").unlink()
    with pytest.raises(DataError, match="no values of samples"):
        results.values(results.only(tmp_path, "vae"))
    (tmp_path / "eval" / "vae" / "scores.json").write_text("[]")
    with pytest.raises(DataError, match="no scores of a suite"):
        results.only(tmp_path, "vae")
