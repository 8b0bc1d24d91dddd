"""The arithmetic of SoRA's gates (src/policies/gate.rs): the proximal step against its formulas, taken number
by number in float64, and the gradient of the L1 term against autograd's."""

import math

import pytest
import torch
from increlora_rs import _core
from table_ids import describe

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, FP16]
NAN, INF = math.nan, math.inf

VALUES = [-3.0, -1.5, -0.5, 0.5, 1.1, 1.9, 2.0, 3.0]
TABLE = {
    False: [-2.0, -0.5, 0.0, 0.0, 0.1, 0.9, 1.0, 2.0],
    True: [-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0],
}


def soft(v, xi):
    return math.copysign(max(abs(v) - xi, 0.0), v)


def official(v, xi):
    if v > xi:
        v -= xi
    if v < -xi:
        v += xi
    return 0.0 if abs(v) < xi else v


def shrunk(gates, xi, official=False):
    gates = [gate.clone() for gate in gates]
    _core.shrink_gates_(gates, xi, official=official)
    return gates


def draw(*shapes, dtype=F32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def strided(gate):
    """The same numbers with gaps between them."""
    return torch.stack([gate, torch.zeros_like(gate)], -1)[..., 0]


LAYOUTS = {"plain": torch.clone, "strided": strided}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [False, True], ids=["soft", "official"])
def test_the_table_at_xi_1(form, dtype, layout):
    gate = layout(torch.tensor(VALUES, dtype=dtype))
    _core.shrink_gates_([gate], 1.0, official=form)
    # Less one, a number above one is exact in its dtype.
    want = [float(v) for v in (torch.tensor(VALUES, dtype=dtype).to(F64))]
    want = [math.copysign(abs(v) - 1.0, v) if w else 0.0 for v, w in zip(want, TABLE[form], strict=True)]
    assert gate.tolist() == want
    assert want == pytest.approx(TABLE[form], abs=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "formula"), [(False, soft), (True, official)], ids=["soft", "official"])
@pytest.mark.parametrize("xi", [0.0, 1e-3, 0.3, 0.7])
def test_every_number_follows_the_formula(xi, form, formula, dtype, layout):
    gate = layout(draw((200, 1), dtype=dtype)[0])
    rounded = float(torch.tensor(xi, dtype=dtype))
    want = torch.tensor([formula(v, rounded) for v in gate.flatten().tolist()], dtype=F64).to(dtype)
    _core.shrink_gates_([gate], xi, official=form)
    assert torch.equal(gate.flatten(), want)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_of_exactly_xi_stays_in_the_official_form(dtype, layout):
    gate = layout(torch.tensor([0.3, -0.3, 0.0], dtype=dtype))
    before = gate.clone()
    _core.shrink_gates_([gate], 0.3, official=True)
    assert torch.equal(gate, before)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [False, True], ids=["soft", "official"])
@pytest.mark.parametrize("xi", [0.0, 0.5])
def test_a_zero_is_never_negative(xi, form, dtype, layout):
    gate = layout(torch.tensor([-0.0, 0.0, -0.5, -0.2, 0.2, -0.7], dtype=dtype))
    _core.shrink_gates_([gate], xi, official=form)
    assert not torch.signbit(gate[gate == 0]).any()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [False, True], ids=["soft", "official"])
def test_what_is_not_finite_stays(form, dtype, layout):
    gate = layout(torch.tensor([NAN, INF, -INF], dtype=dtype))
    _core.shrink_gates_([gate], 0.5, official=form)
    assert gate.isnan().tolist() == [True, False, False]
    assert gate[1:].tolist() == [INF, -INF]


def test_after_n_soft_steps_a_gate_is_n_xi_nearer_to_zero():
    (start,) = draw((50, 1), dtype=F64)
    gate = start.clone()
    for _ in range(20):
        _core.shrink_gates_([gate], 0.03125, official=False)
    torch.testing.assert_close(gate.abs(), (start.abs() - 20 * 0.03125).clamp(min=0), rtol=0, atol=1e-14)


def test_all_modules_are_shrunk_whatever_their_dtypes_shapes_and_strides():
    gates = [gate.to(dtype) for dtype in DTYPES for gate in draw((4, 1), (1, 3), (0, 1), (5,), ())]
    gates += [strided(gate) for gate in gates if gate.dim()]
    want = [shrunk([gate], 0.4)[0] for gate in gates]
    _core.shrink_gates_(gates, 0.4, official=False)
    assert all(torch.equal(gate, wanted) for gate, wanted in zip(gates, want, strict=True))


def test_leaves_with_gradients_are_shrunk_in_place():
    leaf = torch.nn.Parameter(torch.tensor([[2.0], [-0.5]]))
    _core.shrink_gates_([leaf], 1.0, official=False)
    assert leaf.tolist() == [[1.0], [0.0]]
    assert leaf.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_l1_gradient_is_autograds(layout, dtype):
    gates = [layout(gate) for gate in draw((4, 1), (3, 1), (1, 1), dtype=dtype)]
    gradients = [layout(gradient) for gradient in draw((4, 1), (3, 1), (1, 1), dtype=dtype)]
    leaves = [gate.to(F64).requires_grad_() for gate in gates]
    (0.8 * sum(leaf.abs().sum() for leaf in leaves) / 8).backward()
    want = [(g.to(F64) + leaf.grad).to(dtype) for g, leaf in zip(gradients, leaves, strict=True)]
    _core.add_l1_(gates, gradients, 0.8)
    eps = torch.finfo(dtype).eps
    for gradient, wanted in zip(gradients, want, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=eps, atol=eps)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_gate_of_zero_has_no_l1_gradient(layout):
    gradient = torch.tensor([[0.25], [0.25]])
    _core.add_l1_([layout(torch.tensor([[0.0], [-0.0]]))], [gradient], 3.0)
    assert gradient.tolist() == [[0.25], [0.25]]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("scale", [torch.tensor(8.0), torch.tensor([8.0], dtype=F64)], ids=describe)
def test_gradients_that_carry_a_loss_scale_are_added_to_with_it(scale, layout):
    gradient = torch.ones(2, 1)
    _core.add_l1_([layout(torch.tensor([[2.0], [-2.0]]))], [gradient], 0.5, grad_scale=scale)
    assert gradient.tolist() == [[3.0], [-1.0]]


def test_a_module_without_a_gradient_counts_all_the_same():
    gradient = torch.zeros(2, 1)
    _core.add_l1_([torch.ones(2, 1), torch.ones(6, 1)], [gradient, None], 4.0)
    assert gradient.tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize("gate_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_may_be_of_another_dtype_than_their_gates(dtype, gate_dtype):
    gradient = torch.ones(2, 1, dtype=dtype)
    _core.add_l1_([torch.tensor([[2.0], [-2.0]], dtype=gate_dtype)], [gradient], 1.0)
    assert gradient.dtype == dtype
    assert gradient.tolist() == [[1.5], [0.5]]


def test_gates_given_as_their_own_gradients_are_added_to():
    gate = torch.tensor([[2.0], [-2.0]])
    _core.add_l1_([gate], [gate], 1.0)
    assert gate.tolist() == [[2.5], [-2.5]]


ONE = torch.ones(2, 1)

BAD_SHRINKS = [
    ({"gates": []}, ValueError, "gates is empty; give those of one module or more"),
    ({"gates": [ONE, ONE.int()]}, TypeError, r"gates\[1\] has dtype Int; it must be float16, bfloat16"),
    ({"gates": [ONE, torch.ones(1), ONE]}, ValueError, r"gates\[2\] is gates\[0\] again; give each once"),
    ({"gates": [None]}, TypeError, "gates"),
    ({"xi": -0.5}, ValueError, "xi is -0.5; it must be finite and at least 0"),
    ({"xi": NAN}, ValueError, "xi is NaN; it must be finite and at least 0"),
    ({"xi": INF}, ValueError, "xi is inf; it must be finite and at least 0"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_SHRINKS, ids=describe)
def test_bad_arguments_of_the_proximal_step_are_named(changed, error, message):
    arguments = {"gates": [ONE], "xi": 0.5, "official": False} | changed
    with pytest.raises(error, match=message):
        _core.shrink_gates_(**arguments)


BAD_L1 = [
    ({"gates": [], "gradients": []}, ValueError, "gates is empty; give those of one module or more"),
    ({"gates": [ONE.long()]}, TypeError, r"gates\[0\] has dtype Int64; it must be float16, bfloat16"),
    ({"gradients": []}, ValueError, "gradients has 0 entries; it must have 1, one a module"),
    ({"gradients": [ONE.bool()]}, TypeError, r"gradients\[0\] has dtype Bool; it must be float16, bfloat16"),
    ({"gradients": [torch.ones(2)]}, ValueError, r"gradients\[0\] has shape \[2\]; it must be \[2, 1\]"),
    ({"weight": NAN}, ValueError, "weight is NaN; it must be finite"),
    ({"grad_scale": torch.ones(2)}, ValueError, r"grad_scale has shape \[2\]; it must hold one number"),
    ({"grad_scale": torch.tensor(1)}, TypeError, "grad_scale has dtype Int64; it must be float16"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_L1, ids=describe)
def test_bad_arguments_of_the_l1_term_are_named(changed, error, message):
    arguments = {"gates": [ONE], "gradients": [torch.ones(2, 1)], "weight": 0.5} | changed
    with pytest.raises(error, match=message):
        _core.add_l1_(**arguments)


def test_a_refused_call_leaves_every_gate_alone():
    gate = ONE.clone()
    with pytest.raises(TypeError):
        _core.shrink_gates_([gate, ONE.int()], 0.5, official=False)
    assert torch.equal(gate, ONE)
