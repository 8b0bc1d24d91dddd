"""A layer whose adapter has no component is its base layer: forward, merged, mixed, beside others."""

import copy
import itertools

import peft
import pytest
import torch
from growing import growing
from increlora_rs.gauges import Sketches
from increlora_rs.layers.found import adapted_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

TARGETS = ["words", "signal", "transposed", "plain"]


class Kinds(nn.Module):
    """A module of each kind that can be adapted; takes token numbers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 6, padding_idx=0, scale_grad_by_freq=True)
        self.signal = nn.Conv1d(6, 5, 3, padding="same", padding_mode="circular", dilation=2)
        self.transposed = Conv1D(7, 5)
        self.plain = nn.Linear(7, 5)

    def forward(self, ids):
        x = self.signal(self.words(ids).transpose(1, 2)).transpose(1, 2)
        return self.plain(torch.tanh(self.transposed(torch.tanh(x).contiguous())))


@pytest.fixture
def base():
    return Kinds().double()


@pytest.fixture
def ids():
    return torch.randint(0, 9, (3, 4), generator=torch.Generator().manual_seed(1))


def config(**options):
    return growing(**{"r": 3, "init_r": 0, "target_modules": TARGETS, **options})


def adapted(base, **options):
    return peft.get_peft_model(copy.deepcopy(base), config(**options)).double()


def random_factors(model, adapter="default"):
    generator = torch.Generator().manual_seed(2)
    for layer in adapted_layers(model, adapter).values():
        for parameter in layer.factors(adapter):
            parameter.data.normal_(generator=generator)


@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_the_base_models_bit_for_bit(base, ids, training):
    model = adapted(base, lora_dropout=0.5).train(training)
    assert torch.equal(model(ids), base(ids))


def test_nothing_enters_the_graph(base, ids):
    assert not adapted(base).train()(ids).requires_grad


def test_merging_leaves_the_weights_as_they_are(base, ids):
    model = adapted(base)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(ids), base(ids))
    model.unmerge_adapter()
    assert torch.equal(model(ids), base(ids))
    assert torch.equal(model.merge_and_unload()(ids), base(ids))


def test_the_update_as_a_weight_is_zero(base):
    for layer in adapted_layers(adapted(base), "default").values():
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.get_base_layer().weight.shape
        assert not delta.any()


@pytest.mark.parametrize("order", [("default", "other"), ("other", "default")])
def test_beside_another_active_adapter_the_other_alone_acts(base, ids, order):
    model = adapted(base)
    model.add_adapter("other", config(init_r=2))
    model.double()
    random_factors(model, "other")
    model.set_adapter("other")
    wanted = model(ids)
    model.base_model.set_adapter(list(order))
    torch.testing.assert_close(model(ids), wanted)


def test_an_output_that_somebody_keeps_is_not_written_into(base, ids):
    model = adapted(base)
    model.add_adapter("other", config(init_r=2))
    model.double()
    random_factors(model, "other")
    kept = []
    model.base_model.set_adapter(["default", "other"])
    plain = model.get_base_model().plain.get_base_layer()
    plain.register_forward_hook(lambda _, args, out: kept.append((out, out.detach().clone())))
    with torch.no_grad():
        model(ids)
    ((out, copied),) = kept
    assert torch.equal(out, copied)


def test_rows_of_a_mixed_batch_are_those_of_their_adapter(base, ids):
    model = adapted(base, target_modules=["signal", "transposed", "plain"])
    model.add_adapter("other", config(init_r=2, target_modules=["signal", "transposed", "plain"]))
    model.double()
    random_factors(model, "other")
    model.eval()
    mixed = model(ids, adapter_names=["default", "other", "__base__"])
    model.set_adapter("other")
    other = model(ids)
    torch.testing.assert_close(mixed, torch.stack([base(ids)[0], other[1], base(ids)[2]]))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_gauge_gets_the_gradient_of_the_weight(base, ids, autocast):
    model = adapted(base).train()
    layers = list(adapted_layers(model, "default").values())
    sizes = [(layer.out_features, layer.in_features) for layer in layers]
    gauge = Sketches(torch.zeros(0, dtype=torch.float64), sizes)
    # As deep as the matrices are wide, so that Psi tells all of a gradient.
    gauge.draw((4, 20), seed=0)
    for slot, layer in enumerate(layers):
        probe = layer.probes["default"]
        layer.slots["default"] = slot
    for layer in layers:
        layer.probes["default"] = probe
    probe.attach(gauge)
    probe.arm(True)
    bases = [layer.get_base_layer().weight.requires_grad_(True) for layer in layers]
    with torch.autocast("cpu", enabled=autocast):
        model(ids).sin().sum().backward()
    for (left, right), slot, layer, weight in zip(
        gauge.pairs(gauge.total), itertools.count(), layers, bases, strict=False
    ):
        turned = layer.kind in ("embedding", "transposed")
        gradient = weight.grad.t() if turned else weight.grad.flatten(1)
        omega, psi = gauge.given(slot)
        torch.testing.assert_close(left, omega @ gradient.t())
        torch.testing.assert_close(right, psi @ gradient)


def test_the_factors_get_gradients_of_their_shape_where_several_processes_may_wait(base, ids, group_of_one):
    model = adapted(base).train()
    model(ids).sum().backward()
    for layer in adapted_layers(model, "default").values():
        assert [p.grad.shape for p in layer.factors("default")] == [p.shape for p in layer.factors("default")]


def test_a_sum_of_adapters_with_nothing_has_nothing(base, ids):
    model = adapted(base)
    model.add_adapter("other", config())
    for k, how in enumerate(["cat", "svd", "ties_svd"]):
        model.add_weighted_adapter(["default", "other"], [1.0, 2.0], f"sum{k}", how, density=0.5)
        model.set_adapter(f"sum{k}")
        assert torch.equal(model(ids), base(ids))


def test_a_sum_with_an_adapter_that_has_something_is_that_one(base, ids):
    model = adapted(base)
    model.add_adapter("other", config(init_r=2))
    model.double()
    random_factors(model, "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "svd")
    model.double()
    model.set_adapter("other")
    wanted = model(ids)
    model.set_adapter("sum")
    torch.testing.assert_close(model(ids), wanted)
