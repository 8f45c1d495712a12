"""DeepSpeed's ZeRO behind the same five verbs: state, gradients and parameters sharded by stage.

DeepSpeed owns gradients, norm, clipping and the update; the loss stays a sum over ranks, and the
verdict about a step is given where DeepSpeed looks whether the norm is a number. Checkpoints hold
whole tensors by parameter name, so runs go on under any engine.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from opensora.engine import interface
from opensora.engine.ema import EMA, Averages, EMAConfig
from opensora.engine.interface import Engine, Optimizers, State, Update
from opensora.engine.partitions import PartitionedEMA
from opensora.engine.zero import DeepspeedConfig, settings
from opensora.errors import CheckpointError, require
from opensora.runtime import Runtime
from opensora.types import Condition


class Pass(nn.Module):
    """What DeepSpeed calls: the loss of a micro-batch as one tensor, in our precision.

    DeepSpeed switches autocast off around the module it runs, so it is switched on inside.
    """

    def __init__(self, module: nn.Module, autocast: Callable[[], torch.autocast]):
        super().__init__()
        self.module, self._autocast = module, autocast
        self.output: Any = None

    def forward(self, inputs: tuple[Any, ...], weight: float) -> Tensor:
        with self._autocast():
            self.output = self.module(*inputs)
        return self.output.total * weight


class DeepspeedEngine(Engine):
    """ZeRO; from stage 2 on every rank takes part in every backward pass, from 3 in every call."""

    def __init__(self, runtime: Runtime, config: DeepspeedConfig, *, precision: torch.dtype):
        self.runtime, self.config, self.precision = runtime, config, precision
        self.collective = config.stage >= 2
        self.optimizers: Optimizers = []
        self._deepspeed: Any = load(runtime.device)
        self._engine: Any = None
        self._pass: Pass

    def wrap(self, module: nn.Module, build: Callable[[nn.Module], Optimizers]) -> None:
        self.module, self.optimizers = module, build(module)
        deepspeed = self._deepspeed
        _join(self.runtime, deepspeed)
        encoders = [part for part in module.children() if hasattr(part, "encode")]
        if self.config.stage == 3:
            deepspeed.utils.set_z3_leaf_modules_by_name(module, _names_of_blocks(module))
            for encoder in encoders:
                _show_tensors(encoder)
        self._pass = Pass(module, self.autocast)
        self._engine, *_ = deepspeed.initialize(
            model=self._pass,
            optimizer=self.optimizers[0],
            config=settings(self.config, module, self.runtime.device.type),
            dist_init_required=False,
        )
        self._names = {id(p): name for name, p in module.named_parameters()}
        if self.config.stage:
            self._begin_state()
        for encoder in encoders if self.config.stage == 3 else ():
            for parameter in encoder.parameters():
                deepspeed.zero.register_external_parameter(encoder, parameter)

    def _begin_state(self) -> None:
        """Let the state be there before the first step: DeepSpeed finds that of the first group of
        parameters only, where groups get theirs one after the other."""
        zero = self._engine.optimizer
        for _, flat in self._groups():
            zero.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }
        if self.config.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def backward(self, *inputs: Any, last: bool = True, weight: float = 1.0) -> Any:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(self._engine(inputs, weight))
        output, self._pass.output = self._pass.output, None
        return output

    def autocast(self) -> torch.autocast:
        device = self.runtime.device.type
        return torch.autocast(device, self.precision, self.precision != torch.float32)

    def step(
        self, *, scale: float, max_norm: float, factor: float, accept: Callable[[float], bool]
    ) -> Update:
        scale = scale * self.runtime.world_size  # DeepSpeed divides by the number of ranks
        if self.config.stage == 0:
            return interface.update(
                self.module,
                self.optimizers,
                scale=scale,
                max_norm=max_norm,
                factor=factor,
                accept=accept,
            )
        zero, norms = self._engine.optimizer, []
        for group in zero.param_groups:
            group["lr"] = group["initial_lr"] * factor

        def verdict(scaled: Tensor) -> Tensor:
            """The norm, or where the step is refused what DeepSpeed takes for no number."""
            found = float(scaled) * scale
            norms.append(found if found >= 0 else float("nan"))
            return scaled if accept(norms[0]) else torch.full_like(scaled, -1.0)

        # DeepSpeed divides gradients by its loss scale, and by the excess of their norm.
        zero.clip_grad, zero.loss_scale = max_norm, 1 / scale
        try:
            with _asked(zero, verdict, self._deepspeed):
                self._engine.step()
        finally:
            zero.loss_scale = 1.0
        return Update(norms[0], accepted=not zero.overflow)

    def averages(self, config: EMAConfig) -> Averages:
        if self.config.stage < 3:
            return EMA(self.module, config)
        zero = self._engine.optimizer
        return PartitionedEMA(self.module, config, release=zero._partition_all_parameters)

    def state_dict(self) -> State:
        if self.config.stage == 0:
            return interface.collect(self.module, self.optimizers)
        tools = self._deepspeed.utils
        state: State = {"weights": {}, "optimizer": {}}
        parameters = dict(self.module.named_parameters())
        for name, value in self.module.state_dict().items():
            if self.config.stage == 3 and name in parameters:
                value = tools.safe_get_full_fp32_param(parameters[name])
            self._keep(state["weights"], name, value)
        kept = self._engine.optimizer.optimizer.state
        for group, flat in self._groups():
            for key, value in kept[flat].items():
                for parameter in group:
                    if value.dim():
                        value = tools.safe_get_full_optimizer_state(parameter, key)
                    name = f"{self._names[id(parameter)]}/{key}"
                    self._keep(state["optimizer"], name, value)
        return state

    def _keep(self, table: dict[str, Tensor], name: str, value: Tensor) -> None:
        if self.runtime.is_main:
            table[name] = value.detach().cpu()

    def load_state_dict(self, state: State) -> None:
        if self.config.stage == 0:
            interface.restore(self.module, self.optimizers, state)
            return
        self._load_weights(state["weights"])
        if state["optimizer"]:
            self._load_optimizer(state["optimizer"])

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        parameters = dict(self.module.named_parameters())
        if self.config.stage < 3:
            interface.load_weights(self.module, weights)
        else:
            own = self.module.state_dict()
            shapes = {n: getattr(parameters.get(n), "ds_shape", v.shape) for n, v in own.items()}
            interface.check_weights(shapes, weights)
        for name, parameter in parameters.items():
            value = weights[name].to(parameter.device)
            if self.config.stage == 3:
                whole = self._deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)
                with whole, torch.no_grad():
                    parameter.copy_(value)
            self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)

    def _load_optimizer(self, saved: dict[str, Tensor]) -> None:
        put = self._deepspeed.utils.safe_set_full_optimizer_state
        zero = self._engine.optimizer
        strangers = {name.rpartition("/")[0] for name in saved} - set(self._names.values())
        if strangers:
            raise CheckpointError(interface.not_trained(min(strangers)))
        for group, flat in self._groups():
            names = [self._names[id(p)] for p in group]
            zero.optimizer.state[flat]["step"].copy_(_common_step(saved, names))
            for parameter in group:
                for key in ("exp_avg", "exp_avg_sq"):
                    value = saved[f"{self._names[id(parameter)]}/{key}"].to(parameter.device)
                    put(parameter, value, key)

    def _groups(self) -> Iterable[tuple[list[nn.Parameter], Tensor]]:
        """Parameters, and the flat tensor in which this rank has its part of them."""
        zero = self._engine.optimizer
        if self.config.stage == 3:
            return zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
        return zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)


def _common_step(saved: dict[str, Tensor], names: list[str]) -> Tensor:
    """The count of updates that parameters of a group share."""
    counts = {float(saved.get(f"{name}/step", 0)) for name in names}
    if len(counts) != 1:
        raise CheckpointError(
            f"DeepSpeed counts steps for many parameters together, and {names[0]} and others have "
            f"made {sorted(counts)}: resume with engine.kind=local or fsdp"
        )
    return torch.tensor(counts.pop())


def load(device: torch.device) -> Any:
    """The package, told which device it is for.

    Raises:
        MissingPackageError: it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed: Any = require("deepspeed", extra="deepspeed", purpose="engine.kind=deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch 2.13 has newer ones for.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # No operator is compiled: what runs here needs none, and gloo does the exchanges.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _join(runtime: Runtime, deepspeed: Any) -> None:
    """Let DeepSpeed use the group of all ranks; for one rank it wants one as well."""
    backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    if runtime.world_size == 1 and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))
    deepspeed.comm.init_distributed(dist_backend=backend)


def _names_of_blocks(module: nn.Module) -> list[str]:
    """What ZeRO-3 gathers as a whole."""
    blocks = {id(b) for part in module.children() for b in getattr(part, "blocks", ())}
    return [name for name, part in module.named_modules() if id(part) in blocks]


def _show_tensors(encoder: nn.Module) -> None:
    """Let `encode` be a call of the module that gives a plain tuple: ZeRO-3 gathers for calls, and
    sees no tensors in classes of ours."""
    inner = encoder.forward

    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        found = inner(*inputs)
        return tuple(v for f in fields(found) if (v := getattr(found, f.name)) is not None)

    def encode(*inputs: Any) -> Condition:
        tokens, mask, *pooled = encoder(*inputs)
        return Condition(tokens, mask, *pooled)

    encoder.forward, encoder.encode = forward, encode  # type: ignore[assignment]


@contextmanager
def _asked(zero: Any, verdict: Callable[[Tensor], Tensor], deepspeed: Any) -> Iterator[None]:
    """Inside the block DeepSpeed's step asks about the norm of the gradients it has."""
    combine = deepspeed.runtime.utils.combine_grad_norm_groups
    if hasattr(zero, "scaled_global_norm"):
        norm = zero.scaled_global_norm
        zero.scaled_global_norm = lambda: verdict(norm())
        name = "scaled_global_norm"
    else:
        norms = zero._get_norm_groups
        zero._get_norm_groups = lambda: [verdict(combine(norms()))]
        name = "_get_norm_groups"
    try:
        yield
    finally:
        delattr(zero, name)
