"""A gauge that the operations have never heard of: one class and one entry in GAUGES, and every kind of layer
adds to it, in eager mode and in a graph."""

from collections.abc import Sequence

import pytest
import torch
from growing import growing
from increlora_rs.gauges import GAUGES, Gauge
from increlora_rs.training.modules import adapted_modules
from peft import get_peft_model
from torch import nn


class Seen(Gauge):
    """Column sums of x, with what the class needs in a graph; of a convolution the column sums of G."""

    name = "seen"

    def __init__(self, total, sizes, factors, lengths=()):
        super().__init__(total, lengths)
        self._parts = total.split([features for _, features in sizes])
        self._factors = factors

    @classmethod
    def of(cls, sizes):
        lengths = [features for _, features in sizes]
        factors = [torch.tensor([2.0 + slot], dtype=torch.float64) for slot in range(len(sizes))]
        return cls(torch.zeros(sum(lengths), dtype=torch.float64), sizes, factors, lengths)

    def add(self, slot, gy, x):
        self._parts[slot].add_(self._factors[slot] * x.sum(0))

    def add_lookup(self, slot, gy, ids):
        self._parts[slot].index_add_(0, ids, self._factors[slot].expand(len(ids)))

    def add_gradient(self, slot, gradient):
        self._parts[slot].add_(self._factors[slot] * gradient.sum(0))

    def given(self, slot):
        return [self._factors[slot]]

    @classmethod
    def empty(cls, like, size, given: Sequence[torch.Tensor]):
        return given[0].new_empty(size[1])

    @classmethod
    def of_one(cls, total, size, given):
        return cls(total, [size], given)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 5, 3)
        self.lin = nn.Linear(5, 4)

    def forward(self, ids):
        self.seen = self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        return self.lin(self.seen)


IDS = torch.tensor([[1, 2, 2, 5, 0], [3, 3, 3, 6, 1]])


def one_pass(*, compiled, dropout, armed=True):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = growing(target_modules=["emb", "conv", "lin"], init_lora_weights=False, lora_dropout=dropout)
    model = get_peft_model(Chain().double(), config).double()
    modules = adapted_modules(model, "default")
    probe = modules[0].layer.probes["default"]
    probe.attach(Seen.of([(module.layer.out_features, module.layer.in_features) for module in modules]))
    probe.arm(armed)
    net = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    torch.manual_seed(1)
    net(IDS).square().sum().backward()
    slots = {module.name: module.layer.slots["default"] for module in modules}
    parts = probe.gauge.total.split([module.layer.in_features for module in modules])
    return {name: parts[slot] / (2.0 + slot) for name, slot in slots.items()}, model


@pytest.fixture(autouse=True)
def _listed(monkeypatch):
    monkeypatch.setitem(GAUGES, Seen.name, Seen)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_linear_layer_and_an_embedding_show_what_went_in_before_dropout(compiled):
    found, model = one_pass(compiled=compiled, dropout=0.0)
    torch.testing.assert_close(found["emb"], torch.bincount(IDS.flatten(), minlength=7).double())
    torch.testing.assert_close(found["lin"], model.base_model.model.seen.detach().sum((0, 1)))


def test_a_graph_adds_what_eager_mode_adds_with_dropout():
    eager, _ = one_pass(compiled=False, dropout=0.3)
    compiled, _ = one_pass(compiled=True, dropout=0.3)
    for name, value in eager.items():
        assert value.abs().sum() > 0
        torch.testing.assert_close(compiled[name], value)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nothing_is_added_that_is_not_asked_for(compiled):
    found, _ = one_pass(compiled=compiled, dropout=0.0, armed=False)
    assert not any(value.any() for value in found.values())
