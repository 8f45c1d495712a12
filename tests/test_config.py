"""Configs: what YAML means, how files inherit, and what a user is told when a key is wrong."""

import json
from typing import Annotated, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora import config
from opensora.errors import UsageError


class Adam(config.Config):
    kind: Literal["adam"] = "adam"
    lr: float = pydantic.Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Muon(config.Config):
    kind: Literal["muon"] = "muon"
    lr: float = 0.02
    momentum: float = 0.95


class Data(config.Config):
    path: str
    buckets: dict[str, dict[int, float]] = pydantic.Field(default_factory=dict)
    fps: float | None = None


class Run(config.Config):
    data: Data
    optimizer: Annotated[Adam | Muon, pydantic.Field(discriminator="kind")] = Adam()
    stages: list[Data] = pydantic.Field(default_factory=list)
    steps: int = 10
    guidance_scale: float = 4.0

    @pydantic.model_validator(mode="after")
    def check_steps(self):
        if self.steps == 13:
            raise ValueError("steps is 13, which is unlucky; use 12")
        return self


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


def refusal(tree) -> str:
    with pytest.raises(UsageError) as caught:
        config.validate(Run, tree, where="run.yaml")
    assert caught.value.exit_code == 64
    assert str(caught.value).startswith("run.yaml: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E3", -2000.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("12", 12),
        ("-12", -12),
        ("+3", 3),
        ("010", 10),
        ("08", 8),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("16:9", "16:9"),
        ("1_000", "1_000"),
        ("2026-01-02", "2026-01-02"),
        ("1.2.3", "1.2.3"),
        ("'12'", "12"),
        ("[1, 2.5]", [1, 2.5]),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text, value):
    found = config.parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none())
def test_every_number_written_as_python_prints_it_reads_back(value):
    text = json.dumps(value).replace("Infinity", ".inf")
    assert config.parse_yaml(text, "here") == value


def test_yaml_that_runs_code_or_repeats_a_key_is_refused():
    with pytest.raises(UsageError, match="not valid YAML"):
        config.parse_yaml("!!python/object/apply:os.system ['true']", "here")
    with pytest.raises(UsageError, match=r"here is not valid YAML.*'lr' is given twice.*line 3"):
        config.parse_yaml("lr: 1\nsteps: 2\nlr: 3", "here")
    merged = config.parse_yaml("a: &a {x: 1}\nb:\n  <<: *a\n  x: 2", "here")
    assert merged["b"] == {"x": 2}


def test_files_inherit_and_the_later_base_wins(tmp_path):
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "a.yaml", "steps: 1\ndata: {path: a, fps: 8}")
    write(tmp_path / "parts" / "b.yaml", "steps: 2")
    run = write(
        tmp_path / "run.yaml",
        "base: [parts/a.yaml, parts/b.yaml]\ndata:\n  path: mine",
        "utf-8-sig",
    )
    assert config.read(run) == {"steps": 2, "data": {"path": "mine", "fps": 8}}
    child = write(tmp_path / "child.yaml", "base: run.yaml")
    assert config.load(Run, child).data == Data(path="mine", fps=8)


def test_a_circle_of_bases_is_told_with_its_path(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml")
    write(tmp_path / "b.yaml", "base: a.yaml")
    with pytest.raises(UsageError, match=r"circle.*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        config.read(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "mapping of keys, found list"),
        ("", "found NoneType"),
        ("base: {a: 1}", "path or a list of paths"),
        ("base: [1]", "path or a list of paths"),
        ("base:", "path or a list of paths"),
        ("a: [", "not valid YAML"),
    ],
)
def test_files_that_are_no_config_are_refused(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        config.read(write(tmp_path / "a.yaml", content))


def test_unreadable_files_are_refused_with_the_nearest_name(tmp_path):
    write(tmp_path / "quickstart.yaml", "steps: 1")
    with pytest.raises(UsageError, match=r"No such file.*Did you mean 'quickstart\.yaml'"):
        config.read(tmp_path / "quickstrat.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        config.read(tmp_path / "latin.yaml")


def test_a_changed_kind_replaces_the_whole_mapping():
    base = {"optimizer": {"kind": "adam", "betas": [0.9, 0.99]}}
    change = {"optimizer": {"kind": "muon", "momentum": 0.9}}
    assert config.merge(base, change) == change
    kept = config.merge(base, {"optimizer": {"kind": "adam", "lr": 1}})
    assert kept["optimizer"] == {"kind": "adam", "betas": [0.9, 0.99], "lr": 1}
    assert base == {"optimizer": {"kind": "adam", "betas": [0.9, 0.99]}}


def test_overrides_reach_into_mappings_lists_and_numbered_keys():
    tree = {"stages": [{"fps": 1}, {"fps": 2}], "buckets": {"256px": {17: 0.5}}}
    found = config.override(
        tree,
        ["stages.1.fps=3", "--optimizer.lr=1e-3", "buckets.256px.17=1.0", "note=", "x=[1, 2]"],
    )
    assert found == {
        "stages": [{"fps": 1}, {"fps": 3}],
        "optimizer": {"lr": 1e-3},
        "buckets": {"256px": {17: 1.0}},
        "note": "",
        "x": [1, 2],
    }
    assert tree["stages"][1] == {"fps": 2}


def test_an_overridden_kind_drops_the_keys_of_the_old_kind():
    tree = {"optimizer": {"kind": "adam", "betas": [0.9, 0.99]}}
    assert config.override(tree, ["optimizer.kind=muon"]) == {"optimizer": {"kind": "muon"}}
    assert config.override(tree, ["optimizer.kind=adam"]) == tree


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "not an override"),
        ("=3", "not an override"),
        ("steps.x=3", "below a value"),
        ("stages.7.fps=3", "not one of the 1 list entries"),
        ("stages.x=3", "not one of the 1 list entries"),
        ("steps=[", "value of 'steps' is not valid YAML"),
    ],
)
def test_impossible_overrides_are_refused(assignment, message):
    with pytest.raises(UsageError, match=message):
        config.override({"steps": 1, "stages": [{}]}, [assignment])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"dta": {}}, "unknown key 'dta'. Did you mean 'data'?"),
        (
            {"optimizer": {"kind": "muon", "momentun": 1}},
            "unknown key 'optimizer.momentun'. Did you mean 'momentum'?",
        ),
        ({"guidance_scal": 1}, "unknown key 'guidance_scal'. Did you mean 'guidance_scale'?"),
        ({"lr": 1}, "unknown key 'lr'. Did you mean 'optimizer.lr'?"),
        ({"optimizer": {"kind": "muno"}}, "'optimizer.kind' is 'muno'. Did you mean 'muon'?"),
        ({"optimizer": {"lr": 1, "kind": "adam", "beta": 2}}, "unknown key 'optimizer.beta'."),
        ({"data": {}}, "key 'data.path' is missing"),
        ({}, "key 'data' is missing"),
        ({"stages": [{"path": "a"}, {"fps": 1}]}, "key 'stages.1.path' is missing"),
        ({"stages": [{"path": "a", "fbs": 1}]}, "unknown key 'stages.0.fbs'. Did you mean"),
        ({"optimizer": {"kind": "adam", "lr": -1}}, "'optimizer.lr': Input should be greater"),
        ({"steps": "many"}, "'steps': Input should be a valid integer"),
        ({"steps": 13}, "steps is 13, which is unlucky; use 12"),
        (
            {"data": {"path": "a", "buckets": {"256px": {17: "x"}}}},
            "'data.buckets.256px.17': Input should be a valid number",
        ),
        ({"data": {"path": "a", "fps": [1]}}, "'data.fps': Input should be a valid number"),
    ],
)
def test_every_wrong_key_or_value_is_named_with_its_mend(tree, message):
    tree = {"data": {"path": "x"}, **tree} if tree and "steps" in tree else tree
    assert message in refusal(tree)


def test_a_missing_kind_is_told_with_the_choice():
    class Needy(config.Config):
        part: Annotated[Adam | Muon, pydantic.Field(discriminator="kind")]

    with pytest.raises(UsageError, match=r"'part\.kind' is missing: adam or muon"):
        config.validate(Needy, {"part": {"lr": 1}}, where="x")


def test_one_key_of_a_default_part_keeps_its_other_keys():
    class Tuned(config.Config):
        part: Annotated[Adam | Muon, pydantic.Field(discriminator="kind")] = Adam(betas=(0.5, 0.6))

    assert config.validate(Tuned, {"part": {"lr": 1}}, where="x").part == Adam(
        lr=1, betas=(0.5, 0.6)
    )
    other = config.validate(Tuned, {"part": {"kind": "muon", "lr": 1}}, where="x").part
    assert other == Muon(lr=1)


def test_all_offences_are_told_at_once():
    message = refusal({"data": {"path": "a", "fsp": 1}, "steps": "x", "step": 1})
    assert "data.fsp" in message
    assert "'steps'" in message
    assert "unknown key 'step'" in message


def test_most_misspellings_of_one_letter_find_their_key():
    sections = {"": {}, "data": {}, "optimizer": {"kind": "muon"}}
    names = {
        "": ["guidance_scale", "optimizer", "stages", "steps", "data"],
        "data": ["buckets", "path"],
        "optimizer": ["momentum", "kind"],
    }
    typos = [
        (section, name, typo)
        for section, choices in names.items()
        for name in choices
        for i in range(len(name))
        for typo in (name[:i] + name[i + 1 :], name[:i] + "x" + name[i:])
    ]
    found = []
    for section, name, typo in typos:
        inner = {**sections[section], typo: 1}
        message = refusal({section: inner} if section else inner)
        found.append(f"Did you mean '{name}'?" in message)
    assert sum(found) >= 0.95 * len(found)


def test_a_config_is_frozen_and_survives_json(tmp_path):
    run = config.validate(
        Run,
        {"data": {"path": "größe", "buckets": {"256px": {17: 1}}}, "optimizer": {"kind": "muon"}},
        where="x",
    )
    with pytest.raises(pydantic.ValidationError):
        run.steps = 3
    text = config.to_json(run)
    assert json.loads(text)["steps"] == 10
    path = write(tmp_path / "run.json", text)
    assert config.from_json(Run, path) == run


def test_json_that_cannot_be_read_is_refused(tmp_path):
    for name, content in (("a.json", b"{"), ("b.json", b"\xff\xfe"), ("c.json", b'{"steps": 1}')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            config.from_json(Run, tmp_path / name)
    with pytest.raises(UsageError, match="cannot be read"):
        config.from_json(Run, tmp_path / "absent.json")
