"""A model that is built first and filled afterwards is the model that is built at once."""

import pytest
import torch
from torch import nn

from opensora.engine.deferred import recording
from opensora.models.stdit import STDiT, STDiTConfig

CONFIG = STDiTConfig(
    width=32, depth=2, num_heads=2, text_channels=8, pooled_channels=8, condition_on_size=True
)


class Odd(nn.Module):
    """Weights that come about in other ways than a layer's own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4) / 4**0.5)
        self.register_buffer("waves", torch.arange(6.0).view(2, 3).cos().t())
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.table
        self.part = nn.Linear(4, 4)
        nn.init.zeros_(self.part.weight[1:3])
        self.norm = nn.BatchNorm1d(3)
        self.attention = nn.MultiheadAttention(4, 2)


def built(make):
    torch.manual_seed(11)
    return make()


@pytest.mark.parametrize("make", [lambda: STDiT(CONFIG, in_channels=4), Odd], ids=["stdit", "odd"])
def test_every_tensor_is_bit_for_bit_that_of_a_model_built_at_once(make):
    at_once = built(make)
    after = torch.rand(1)
    torch.manual_seed(11)
    with recording() as recipe:
        model = make()
    recipe.serves(model)
    assert all(p.is_meta for p in model.parameters())
    torch.manual_seed(12)  # filling takes up the numbers of the building
    found = {}
    recipe.pour(lambda name, value: found.__setitem__(name, value.clone()))
    wanted = {**dict(at_once.named_parameters()), **dict(at_once.named_buffers())}
    assert found.keys() >= wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert not torch.equal(torch.rand(1), after)  # and leaves the generator alone


def test_no_more_than_a_few_tensors_are_there_at_a_time():
    torch.manual_seed(0)
    with recording() as recipe:
        model = STDiT(CONFIG.model_copy(update={"depth": 8}), in_channels=4)
    recipe.serves(model)
    largest = max(p.numel() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    most = 0
    run = recipe._run

    def watched(step, made):
        nonlocal most
        run(step, made)
        most = max(most, sum(value.numel() for value in made.values()))

    recipe._run = watched
    recipe.pour(lambda name, value: None)
    assert most < 3 * largest < total / 10
