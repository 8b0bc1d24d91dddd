"""An update as an object: what it adds, and what merging and exporting read off it."""

import pytest
import torch
from increlora_rs import RESERVE_E
from increlora_rs.gauges import Sensitivity
from increlora_rs.ops.probe import Probe
from increlora_rs.ops.update import Call, LowRank
from torch import nn

F64 = torch.float64


@pytest.fixture
def update():
    """Three components, the last in reserve."""
    generator = torch.Generator().manual_seed(0)
    a, b, e = (torch.randn(*shape, generator=generator) for shape in ((3, 6), (5, 3), (2, 1)))
    return LowRank(a, b, e, 0.5)


@pytest.fixture
def x():
    return torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))


def delta_of(update: LowRank, reserve: bool) -> torch.Tensor:
    """s B diag(E) A in float64."""
    rows = 3 if reserve else 2
    e = torch.cat([update.e.view(-1).to(F64), torch.tensor([RESERVE_E], dtype=F64)])[:rows]
    return update.scale * update.b[:, :rows].to(F64) @ torch.diag(e) @ update.a[:rows].to(F64)


def test_it_is_added_with_the_reserve(update, x):
    y = torch.ones(4, 7, 5)
    want = y.to(F64) + x.to(F64) @ delta_of(update, reserve=True).t()
    torch.testing.assert_close(update.add(y, x, Call()).to(F64), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(y, torch.ones(4, 7, 5))


def test_a_call_may_let_y_be_overwritten(update, x):
    y = torch.ones(4, 7, 5)
    assert update.add(y, x, Call(inplace=True)).data_ptr() == y.data_ptr()


def test_base_and_update_in_one_are_the_two_of_them(update, x):
    weight, bias = torch.randn(5, 6), torch.randn(5)
    want = update.add(nn.functional.linear(x, weight, bias), x, Call())
    torch.testing.assert_close(update.with_base(x, weight, bias, Call()), want)


def test_dense_is_the_update_of_the_active_components(update):
    torch.testing.assert_close(update.dense().to(F64), delta_of(update, reserve=False), rtol=1e-5, atol=1e-6)


def test_the_lora_of_it_has_scale_1_and_no_reserve(update):
    a, b = update.lora()
    assert (a.shape, b.shape) == ((2, 6), (5, 2))
    torch.testing.assert_close((b @ a).to(F64), delta_of(update, reserve=False), rtol=1e-5, atol=1e-6)


def test_half_precision_is_merged_and_exported_in_float32(update):
    narrow = LowRank(*(part.bfloat16() for part in (update.a, update.b, update.e)), update.scale)
    assert {narrow.dense().dtype, *(part.dtype for part in narrow.lora())} == {torch.float32}


def test_updates_and_calls_are_made_within_one_graph(update, x):
    weight = torch.randn(5, 6)
    leaves = [part.requires_grad_() for part in (update.a, update.b, update.e)]
    probe = Probe()
    probe.attach(Sensitivity.of(2))

    def layer(x, a, b, e):
        made = LowRank(a, b, e, 0.5)
        y = made.with_base(x, weight, None, Call(0.0, probe, 0))
        return made.add(y, x, Call(0.3, probe, 1, True))

    found = []
    torch._dynamo.reset()
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        probe.gauge.total.zero_()
        probe.arm(True)
        torch.manual_seed(3)
        for leaf in leaves:
            leaf.grad = None
        y = run(x, *leaves)
        y.square().sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves), probe.gauge.total.clone()])
    torch._dynamo.reset()
    assert found[0][-1].min() > 0
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_what_is_merged_is_not_rounded_by_autocast(update):
    plain = update.dense()
    with torch.autocast("cpu", torch.bfloat16):
        around = update.dense()
    assert torch.equal(around, plain)
