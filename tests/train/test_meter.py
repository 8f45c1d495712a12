"""Throughput: FLOPs that can be counted by hand, and time that counts."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from opensora.engine.flops import _BY_NAME, FlopCounter
from opensora.train.meter import Meter, headline

CPU = torch.device("cpu")


def test_the_flops_of_a_linear_layer_are_three_products():
    layer = nn.Linear(4, 6, bias=False)
    x = torch.ones(5, 4, requires_grad=True)
    with FlopCounter() as counter:
        layer(x).sum().backward()
    assert counter.total == 3 * 2 * 5 * 4 * 6


def test_counting_agrees_with_torch_but_for_its_gap_and_changes_no_bit():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv3d(4, 2, 1))
    x = torch.randn(2, 2, 4, 6, 6)
    q = torch.randn(2, 3, 8, 4, requires_grad=True)

    def work():
        attended = functional.scaled_dot_product_attention(q, q, q)
        total = layers(x).square().sum() + attended.square().sum()
        return torch.autograd.grad(total, [q, *layers.parameters()])

    plain = work()
    with FlopCounter() as counter:
        counted = work()
    with FlopCounterMode(display=False) as reference:
        work()
    product = 2 * (2 * 3) * 8 * 8 * 4  # Q K', for which torch's table lacks the CPU's kernel
    assert counter.total == reference.get_total_flops() + (2 + 5) * product
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))


def test_attention_of_xformers_is_counted_as_torch_counts_its_own():
    """With the arguments of xformers 0.0.35, of a batch and of packed sequences."""
    forward, backward = (_BY_NAME[f"xformers_flash.flash_{way}"] for way in ("fwd", "bwd"))
    product = 2 * 2 * (3 * 5 * 5) * 4  # of 3 sequences of 5, two heads of 4
    batch, packed = torch.empty(3, 5, 2, 4), torch.empty(15, 2, 4)
    ends = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    for x, cu in ((batch, None), (packed, ends)):
        rest = (0.0, 1.0, False, -1, -1)
        assert forward(x, x, x, cu, cu, None, 5, 5, *rest, False, None) == 2 * product
        assert backward(True, x, x, x, x, x, x, cu, cu, 5, 5, *rest, x) == 5 * product


def test_a_shape_is_counted_once():
    meter = Meter(0.0, CPU)
    calls = []

    def work():
        calls.append(torch.ones(3, 4) @ torch.ones(4, 5))
        return len(calls)

    assert meter.counted((3, 4), work) == (1, 120)
    assert meter.counted((3, 4), lambda: 7) == (7, 120)
    assert meter.counted((9, 9), work) == (2, 120)
    assert meter.counted((1, 1), work, rehearse=lambda: 5) == (3, 5)
    assert meter.counted((2, 2), work, rehearse=lambda: None) == (4, 120)


def test_figures_are_rates_since_the_last_reading_without_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter(1000.0, CPU)
    meter.read()
    for _ in range(4):
        meter.add(tokens=50, flops=2000)
    now[0] += 12
    meter.pause(2)
    figures = meter.read()
    assert figures["steps_per_second"] == pytest.approx(0.4)
    assert figures["tokens_per_second"] == pytest.approx(20)
    assert figures["flops_per_second"] == pytest.approx(800)
    assert figures["matmul_share"] == pytest.approx(0.8)
    assert figures["peak_memory_bytes"] > 10 * 2**20
    now[0] += 1
    meter.add(tokens=1, flops=1)
    assert meter.read()["tokens_per_second"] == pytest.approx(1)


def test_the_headline_is_short():
    figures = {
        "steps_per_second": 3.456,
        "tokens_per_second": 12345.0,
        "matmul_share": 0.314,
        "peak_memory_bytes": 1.5 * 2**30,
    }
    shown = headline(0.123456, figures)
    assert shown == "loss 0.1235 3.46 it/s 12.3k tok/s 31% of matmul 1.5 GiB"
