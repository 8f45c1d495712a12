"""The table of processes."""

import pydantic
import pytest

from opensora.config import Config, from_json, to_json, validate
from opensora.diffusion.flow import Flow
from opensora.diffusion.gaussian import Gaussian
from opensora.diffusion.objective import PROCESSES, ObjectiveConfig, build
from opensora.errors import UsageError


class _Holder(Config):
    objective: ObjectiveConfig


@pytest.mark.parametrize(
    ("kind", "process"), [("flow", Flow), ("ddpm", Gaussian), ("edm", Gaussian)]
)
def test_kind_chooses_the_process(kind, process):
    config = validate(_Holder, {"objective": {"kind": kind}}, where="test").objective
    assert type(build(config)) is process


def test_every_kind_of_the_config_is_in_the_table():
    schema = pydantic.TypeAdapter(ObjectiveConfig).json_schema()
    assert set(schema["discriminator"]["mapping"]) == set(PROCESSES)


def test_a_resolved_config_reads_back_as_itself(tmp_path):
    tree = {"objective": {"kind": "ddpm", "betas": {"kind": "cosine"}, "min_snr_gamma": 5.0}}
    config = validate(_Holder, tree, where="test")
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert from_json(_Holder, path) == config


def test_unknown_options_are_refused():
    with pytest.raises(UsageError, match="prediction"):
        validate(_Holder, {"objective": {"kind": "flow", "predicton": "data"}}, where="test")
    with pytest.raises(UsageError, match="flow"):
        validate(_Holder, {"objective": {"kind": "floww"}}, where="test")
