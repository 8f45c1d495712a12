"""DeepSpeed behind our five verbs, on one rank: refusals, steps, state that goes round."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from opensora import config as configs
from opensora.engine import deepspeed as own
from opensora.engine import engines
from opensora.engine.ema import EMA, FixedEMAConfig
from opensora.engine.interface import Update
from opensora.engine.local import LocalConfig
from opensora.engine.zero import DeepspeedConfig, settings
from opensora.errors import CheckpointError, MissingPackageError, UsageError
from opensora.runtime import Runtime
from opensora.train import optim
from opensora.train.config import TrainConfig

ALONE = Runtime(0, 1, 0, torch.device("cpu"))
TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "stdit.yaml"
ADAM = optim.AdamWConfig(lr=0.1, weight_decay=0.1)


def tiny(*overrides: str) -> TrainConfig:
    return configs.load(TrainConfig, TINY, ["output=x", "optim={kind: adamw}", *overrides])


@pytest.fixture(autouse=True)
def linear_stays():
    """Stage 3 puts a linear of its own in the place of torch's, for the whole process; what other
    tests multiply, such as weights in 8 bits, it does not know."""
    before = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = before


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optim={kind: muon}"], "optim.kind=muon needs whole matrices"),
        (["optim.state_dtype=bf16"], "optim.state_dtype and optim.offload are not for"),
        (["optim.offload=true"], "set engine.offload_optimizer=true"),
        (["parallel.dp_replicate=2"], "parallel.dp_replicate=2: DeepSpeed shards over all ranks"),
        (["engine.stage=3", "compile=always"], "compile=always cannot see the parameters"),
        (["engine.stage=0", "engine.offload_optimizer=true"], "needs sharded state"),
        (["engine.stage=4"], "engine.stage"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_config(overrides, told):
    tiny("engine.kind=deepspeed")
    with pytest.raises(UsageError, match=told):
        tiny("engine.kind=deepspeed", *overrides)


def test_muon_is_allowed_where_nothing_is_sharded():
    config = tiny("engine.kind=deepspeed", "engine.stage=0", "optim={kind: muon}")
    assert not engines.shards(config.engine)
    assert engines.shards(tiny("engine.kind=deepspeed").engine)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(MissingPackageError, match=r"opensora\[deepspeed\]"):
        engines.find(DeepspeedConfig(), torch.device("cpu"))
    engines.find(LocalConfig(), torch.device("cpu"))


def test_buckets_are_no_larger_than_the_model_and_hold_its_largest_parameter():
    module = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 1))  # 100 10 10 1
    sizes = [
        settings(DeepspeedConfig(bucket=bucket), module, "cpu")["zero_optimization"][
            "reduce_bucket_size"
        ]
        for bucket in (1, 110, 10**9)
    ]
    assert sizes == [100, 110, 122]


def test_settings_are_a_config_that_deepspeed_accepts():
    pytest.importorskip("deepspeed")
    own.load(torch.device("cpu"))
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (0, 1, 2, 3):
        config = DeepspeedConfig(stage=stage, offload_optimizer=stage > 0)
        found = settings(config, nn.Linear(2, 2), "cuda")
        json.dumps(found)
        zero = DeepSpeedZeroConfig(**found["zero_optimization"])
        assert zero.stage == stage
        assert (zero.offload_optimizer is not None) == (stage > 0)
    with pytest.raises(ValueError, match="no_such_key"):
        DeepSpeedZeroConfig(stage=1, no_such_key=1)


@pytest.fixture(scope="module")
def _group():
    """DeepSpeed's process group of one, gone after these tests."""
    pytest.importorskip("deepspeed")
    yield
    torch.distributed.destroy_process_group()


@dataclass
class Output:
    total: torch.Tensor


class Lines(nn.Module):
    """total = sum of second(first(x))."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 1, bias=False)

    def forward(self, x):
        return Output(self.second(self.first(x)).sum())


def engine_of(kind: int | str, **options) -> engines.Engine:
    config = LocalConfig() if kind == "local" else DeepspeedConfig(stage=kind, **options)
    engine = engines.build(config, ALONE, None, precision=torch.float32)
    engine.wrap(Lines(), lambda module: optim.build(ADAM, module))
    return engine


def step(engine: engines.Engine, *values: float, **options) -> Update:
    for number, value in enumerate(values, 1):
        engine.backward(torch.tensor([[value, 1.0, 2.0]]), last=number == len(values))
    given = {"scale": 0.5, "max_norm": 1.0, "factor": 0.5, "accept": lambda norm: True, **options}
    return engine.step(**given)


def assert_same_state(first: engines.Engine, second: engines.Engine) -> None:
    mine, theirs = first.state_dict(), second.state_dict()
    for part in ("weights", "optimizer"):
        assert mine[part].keys() == theirs[part].keys()
        for name, value in mine[part].items():
            # Adam divides by roots of squares near zero: a rounded gradient shows at 1e-6.
            assert_close(theirs[part][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_are_those_of_the_local_engine(stage):
    engines_ = [engine_of(kind) for kind in ("local", stage)]
    for values, options in (
        ((3.0,), {}),
        ((1.0, -2.0, 4.0), {}),  # micro-batches add
        ((0.01,), {"scale": 1e-3}),  # below the norm nothing is clipped
        ((5.0,), {"factor": 0.0}),
    ):
        updates = [step(engine, *values, **options) for engine in engines_]
        assert updates[0].gradient_norm == pytest.approx(updates[1].gradient_norm, rel=1e-5)
        assert updates[0].accepted and updates[1].accepted
    assert_same_state(*engines_)


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, True), (3, False), (3, True)])
def test_a_refused_step_leaves_no_trace(stage, offload):
    engines_ = [engine_of(kind) for kind in ("local", stage)]
    for engine in engines_:
        step(engine, 3.0)
        seen = []
        update = step(engine, 100.0, accept=lambda norm, seen=seen: bool(seen.append(norm)))
        assert not update.accepted
        assert seen == [update.gradient_norm]
        step(engine, 1.0, -1.0)
    assert_same_state(*engines_)


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_goes_between_engines(stage):
    first, second, third = engine_of("local"), engine_of(stage), engine_of("local")
    step(first, 3.0)
    second.load_state_dict(first.state_dict())
    for engine in (first, second):
        step(engine, -1.0, 2.0)
    third.load_state_dict(second.state_dict())
    for engine in (first, third):
        step(engine, 0.5)
    assert_same_state(first, third)


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("stage", [2, 3])
def test_averages_follow_the_weights_and_can_be_swapped_in(stage):
    config, x = FixedEMAConfig(decay=0.5), torch.tensor([[1.0, 2.0, 3.0]])
    local, engine = engine_of("local"), engine_of(stage)
    averages = [e.averages(config) for e in (local, engine)]
    assert isinstance(averages[0], EMA)
    for number in range(3):
        for e, average in zip((local, engine), averages, strict=True):
            step(e, 3.0)
            average.update(number)
    found = []
    for e, average in zip((local, engine), averages, strict=True):
        plain = e.module(x).total.item()
        for parameter in e.module.parameters():
            if hasattr(parameter, "ds_id"):  # what ZeRO-3 has at hand it would use as it is
                parameter.all_gather()
        with average.swapped(), torch.no_grad():
            found.append(e.module(x).total.item())
        with torch.no_grad():
            assert e.module(x).total.item() == plain != found[-1]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    mine, theirs = (average.state_dict() for average in averages)
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    averages[1].load_state_dict({name: value + 1 for name, value in mine.items()})
    for name, value in averages[1].state_dict().items():
        assert torch.equal(value, mine[name] + 1)
    with pytest.raises(CheckpointError, match="first"):
        averages[1].load_state_dict({})


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("stage", [2, 3])
def test_state_that_does_not_fit_is_refused(stage):
    engine = engine_of(stage)
    state = engine_of("local").state_dict()
    weights = {k: v for k, v in state["weights"].items() if k != "second.weight"}
    with pytest.raises(CheckpointError, match=r"missing second\.weight"):
        engine.load_state_dict({**state, "weights": weights})
    shape = torch.zeros(1, 4)
    with pytest.raises(CheckpointError, match=r"\(1, 4\)"):
        engine.load_state_dict({**state, "weights": {**state["weights"], "second.weight": shape}})
    local = engine_of("local")
    step(local, 1.0)
    saved = local.state_dict()
    saved["optimizer"]["first.bias/step"] = torch.tensor(7.0)
    saved["optimizer"]["second.weight/step"] = torch.tensor(8.0)
    with pytest.raises(CheckpointError, match="counts steps"):
        engine.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="stranger"):
        engine.load_state_dict({**state, "optimizer": {"stranger/step": torch.ones(())}})
