"""The forward and backward of a low-rank update (src/ops/low_rank.rs), by `_core` and by `ops`, against a
reference that builds dW whole and leaves the gradients to autograd, in float64.
"""

from dataclasses import dataclass

import extension
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from increlora_rs import _core
from increlora_rs.gauges import Sensitivity
from increlora_rs.ops import linear as ops
from increlora_rs.ops.probe import Probe
from table_ids import describe
from torch import Tensor
from torch.utils.checkpoint import checkpoint

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAMES = ("y", "x", "a", "b", "e")

# tokens, in, out, active, reserve
SHAPES = [
    (1, 1, 1, 1, 0),
    (1, 8, 8, 1, 0),
    (1, 13, 7, 2, 1),
    (3, 5, 7, 1, 1),
    (17, 33, 65, 3, 2),
    (31, 20, 9, 0, 3),
    (64, 96, 200, 64, 3),
    (128, 768, 320, 8, 1),
    (257, 100, 515, 16, 0),
    (3001, 40, 24, 4, 3),
]
TOLERANCES = [
    pytest.param(F64, 1e-10, id="float64"),
    pytest.param(F32, 1e-5, id="float32"),
]
HALF_TOLERANCES = [pytest.param(BF16, 2e-2, id="bfloat16"), pytest.param(FP16, 3e-3, id="float16")]


@dataclass
class Case:
    """Arguments of one call: the output of the base layer, its input, the adapter, the gradient of y."""

    y: Tensor
    x: Tensor
    a: Tensor
    b: Tensor
    e: Tensor
    gy: Tensor
    scale: float = 1.7

    @property
    def active(self) -> int:
        return self.e.shape[0]


def make_case(shape, dtype=F64, parameter_dtype=None, leading=None, seed=0) -> Case:
    tokens, features, out, active, reserve = shape
    generator = torch.Generator().manual_seed(seed)
    leading = (tokens,) if leading is None else leading

    def draw(*size, kind=dtype):
        return torch.randn(*size, generator=generator, dtype=F64).to(kind)

    parameter_dtype = parameter_dtype or dtype
    rows = active + reserve
    return Case(
        y=draw(*leading, out),
        x=draw(*leading, features),
        a=draw(rows, features, kind=parameter_dtype),
        b=draw(out, rows, kind=parameter_dtype),
        e=draw(active, 1, kind=parameter_dtype),
        gy=draw(*leading, out),
    )


def reference(case: Case, kept: Tensor | None = None, keep: float = 1.0) -> dict[str, Tensor]:
    """y, the gradients of sum(y * gy) and sum |dW * G|; `kept` is 1 where dropout leaves x alone."""
    leaves = {name: getattr(case, name).detach().to(F64).requires_grad_() for name in NAMES}
    y, x, a, b, e = leaves.values()
    reserve = torch.full((a.shape[0] - case.active, 1), 1e-5, dtype=F64)
    dw = case.scale * b @ torch.diag(torch.cat([e, reserve])[:, 0]) @ a
    dropped = x if kept is None else (x * kept / keep if keep > 0 else x * 0)
    update = dropped @ dw.T
    gy = case.gy.to(F64)
    gradients = torch.autograd.grad(y + update, list(leaves.values()), gy)
    g = gy.reshape(-1, gy.shape[-1]).T @ dropped.reshape(-1, dropped.shape[-1])
    found = {"out": y + update, "update": update, "importance": (dw * g).abs().sum()}
    found |= {f"grad_{name}": grad for name, grad in zip(NAMES, gradients, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def by_core(case: Case, p: float = 0.0, seed: int = 0) -> tuple[dict[str, Tensor], Tensor | None]:
    """What the two functions of `_core` give, and the mask."""
    y = case.y.clone()
    parameters = (case.a, case.b, case.e, case.scale)
    t, kept = _core.adapter_forward(y, case.x, *parameters, p, seed)
    assert kept is None
    mask = _core.dropout_mask(case.x.numel(), p, seed) if p > 0 else None
    importance = torch.zeros(1, dtype=F64)
    gx, ga, gb, ge = _core.adapter_backward(
        case.gy, case.x, t, *parameters, None, p, importance=importance, seed=seed
    )
    update = y.to(F64) - case.y.to(F64)
    found = {"out": y, "update": update, "importance": importance[0]}
    return found | {"grad_x": gx, "grad_a": ga, "grad_b": gb, "grad_e": ge}, mask


def armed_probe() -> Probe:
    probe = Probe()
    probe.attach(Sensitivity.of(2))
    probe.arm(True)
    return probe


def by_ops(case: Case, **options) -> dict[str, Tensor]:
    """What `ops.add_low_rank` and its backward pass give."""
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in NAMES}
    probe = armed_probe()
    y, *rest = leaves.values()
    base = y * 1 if options.get("inplace") else y
    out = ops.add_low_rank(base, *rest, scale=case.scale, probe=probe, slot=1, **options)
    out.backward(case.gy)
    found = {"out": out.detach(), "importance": probe.gauge.total[1]}
    return found | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}


def kept_by(mask: Tensor, like: Tensor) -> Tensor:
    """The packed bits as a tensor of 0 and 1."""
    bits = np.unpackbits(mask.numpy(), bitorder="little")[: like.numel()]
    return torch.from_numpy(bits).reshape(like.shape).to(F64)


def keep_probability(p: float) -> float:
    return round((1 - p) * 65536) / 65536


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str) -> None:
    assert got.shape == want.shape, name
    error, size = torch.linalg.norm(got.to(F64) - want), torch.linalg.norm(want)
    assert error <= tolerance * size, f"{name}: {float(error)} off, norm {float(size)}"


def assert_all_close(got, want, tolerance, names) -> None:
    for name in names:
        assert_close(got[name], want[name], tolerance, name)


GRADIENTS = ("grad_x", "grad_a", "grad_b", "grad_e")


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_core_forward_adds_the_update(shape, dtype, tolerance):
    case = make_case(shape, dtype)
    assert_close(by_core(case)[0]["out"], reference(case)["out"], tolerance, "out")


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_core_backward_gives_autograds_gradients(shape, dtype, tolerance):
    case = make_case(shape, dtype)
    assert_all_close(by_core(case)[0], reference(case), tolerance, GRADIENTS)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_core_backward_adds_up_the_importance(shape, dtype, tolerance):
    case = make_case(shape, dtype)
    assert_close(by_core(case)[0]["importance"], reference(case)["importance"], tolerance, "importance")


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ops_agrees_with_autograd(shape, dtype, tolerance):
    case = make_case(shape, dtype)
    got, want = by_ops(case), reference(case)
    assert_all_close(got, want, tolerance, ("out", "importance", "grad_y", *GRADIENTS))


@pytest.mark.parametrize(("dtype", "tolerance"), HALF_TOLERANCES)
@pytest.mark.parametrize("parameter_dtype", [F32, None], ids=["float32_parameters", "same_parameters"])
@pytest.mark.parametrize("shape", SHAPES[1:5] + SHAPES[6:])
def test_half_precision_agrees_as_far_as_it_reaches(shape, parameter_dtype, dtype, tolerance):
    case = make_case(shape, dtype, parameter_dtype)
    got, want = by_core(case)[0], reference(case)
    assert_all_close(got, want, tolerance, ("out", "importance", *GRADIENTS))


@pytest.mark.parametrize("parameter_dtype", [BF16, F32, F64])
def test_gradients_have_the_dtype_of_their_tensors(parameter_dtype):
    got = by_core(make_case((5, 6, 7, 2, 1), BF16, parameter_dtype))[0]
    kinds = [got[name].dtype for name in GRADIENTS]
    assert kinds == [BF16, parameter_dtype, parameter_dtype, parameter_dtype]


@pytest.mark.parametrize("y_dtype", [F32, F64, BF16])
def test_y_keeps_its_dtype(y_dtype):
    case = make_case((5, 6, 7, 2, 1), F32)
    case.y = case.y.to(y_dtype)
    assert by_core(case)[0]["out"].dtype == y_dtype


@pytest.mark.parametrize(("y_dtype", "tolerance"), [(F64, 1e-5), (BF16, 1e-2)], ids=str)
def test_y_may_have_another_dtype_than_x(y_dtype, tolerance):
    case = make_case((5, 6, 7, 2, 1), F32)
    case.y = case.y.to(y_dtype)
    assert_close(by_core(case)[0]["out"], reference(case)["out"], tolerance, "out")


def only_reserve(dtype, reserve) -> Case:
    case = make_case((19, 12, 10, 3, reserve), dtype)
    case.e.zero_()
    case.y.zero_()
    return case


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("reserve", [1, 2, 3])
def test_the_reserve_counts_with_its_constant(reserve, dtype, tolerance):
    case = only_reserve(dtype, reserve)
    want = case.scale * 1e-5 * (case.x @ case.a[3:].T @ case.b[:, 3:].T).to(F64)
    assert_close(by_core(case)[0]["out"], want, tolerance, "out")


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("reserve", [1, 2, 3])
def test_the_reserve_learns_its_directions(reserve, dtype, tolerance):
    case = make_case((19, 12, 10, 3, reserve), dtype)
    got, want = by_core(case)[0], reference(case)
    assert_close(got["grad_a"][3:], want["grad_a"][3:], tolerance, "grad_a")
    assert_close(got["grad_b"][:, 3:], want["grad_b"][:, 3:], tolerance, "grad_b")


def test_e_of_the_reserve_gets_no_gradient():
    assert by_core(make_case((19, 12, 10, 3, 2)))[0]["grad_e"].shape == (3, 1)


def test_without_the_reserve_nothing_but_its_constant_is_missing():
    case = make_case((19, 12, 10, 3, 2))
    alone = Case(case.y, case.x, case.a[:3], case.b[:, :3], case.e, case.gy, case.scale)
    difference = by_core(case)[0]["out"] - by_core(alone)[0]["out"]
    want = case.scale * 1e-5 * case.x @ case.a[3:].T @ case.b[:, 3:].T
    torch.testing.assert_close(difference, want, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_strides_change_no_bit(dtype):
    # 40 rows of A: more than our loops take, so that float32 is multiplied by the BLAS too.
    for sizes in ((19, 12, 10, 3, 2), (70, 64, 48, 40, 0)):
        case = make_case(sizes, dtype)
        plain = by_core(case)[0]
        case.x, case.gy = case.x.T.contiguous().T, case.gy.T.contiguous().T
        strided = by_core(case)[0]
        assert all(torch.equal(strided[name], value) for name, value in plain.items())


def test_without_components_the_base_layer_remains():
    case = make_case((4, 5, 6, 0, 0))
    assert torch.equal(by_core(case)[0]["out"], case.y)


def test_without_components_x_gets_no_gradient_from_the_adapter():
    assert not by_core(make_case((4, 5, 6, 0, 0)))[0]["grad_x"].any()


@pytest.mark.parametrize(
    "leading", [(), (1,), (7,), (2, 3), (2, 3, 4), (0,), (2, 0), (2, 0, 3)], ids=lambda size: f"{size}"
)
def test_any_leading_dimensions_do(leading):
    case = make_case((1, 5, 6, 2, 1), leading=leading)
    got, want = by_ops(case), reference(case)
    assert_all_close(got, want, 1e-10, ("out", "importance", "grad_y", *GRADIENTS))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_no_tokens_give_gradients_of_zero(p):
    got = by_core(make_case((0, 5, 6, 2, 1)), p)[0]
    assert [int(got[name].count_nonzero()) for name in GRADIENTS] == [0, 0, 0, 0]


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_strides_of_x_do_not_matter(p):
    case = make_case((12, 9, 7, 2, 1))
    strided = Case(**vars(case) | {"x": case.x.T.contiguous().T})
    got, want = by_core(strided, p)[0], by_core(case, p)[0]
    assert_all_close(got, want, 1e-14, ("out", "importance", *GRADIENTS))


def test_strides_of_gy_do_not_matter():
    case = make_case((12, 9, 7, 2, 1))
    strided = Case(**vars(case) | {"gy": case.gy.T.contiguous().T})
    assert_all_close(by_core(strided)[0], by_core(case)[0], 1e-14, ("importance", *GRADIENTS))


def test_strides_of_the_parameters_do_not_matter():
    case = make_case((12, 9, 7, 2, 1))
    other = {"a": case.a.T.contiguous().T, "b": case.b.T.contiguous().T}
    got, want = by_core(Case(**vars(case) | other))[0], by_core(case)[0]
    assert_all_close(got, want, 1e-14, ("out", "importance", *GRADIENTS))


def test_strides_of_y_do_not_matter():
    case = make_case((12, 9, 7, 2, 1))
    y = case.y.T.contiguous().T
    _core.adapter_forward(y, case.x, case.a, case.b, case.e, case.scale)
    assert_close(y, reference(case)["out"], 1e-10, "y")


def test_slices_of_x_do_not_matter():
    case = make_case((12, 9, 7, 2, 1))
    wide = torch.full((24, 20), torch.nan, dtype=F64)
    wide[::2, 3:12] = case.x
    got = by_core(Case(**vars(case) | {"x": wide[::2, 3:12]}), 0.5)[0]
    assert_all_close(got, by_core(case, 0.5)[0], 1e-14, ("out", "importance", *GRADIENTS))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_expanded_gradients_are_taken(reduction):
    case = make_case((1, 9, 7, 2, 1), leading=(2, 6))
    weight = 1.0 if reduction == "sum" else 1 / case.y.numel()
    case.gy = torch.full_like(case.y, weight)
    leaves = [getattr(case, name).detach().requires_grad_() for name in NAMES]
    getattr(ops.add_low_rank(*leaves, scale=case.scale), reduction)().backward()
    got = {f"grad_{name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    assert_all_close(got, reference(case), 1e-10, ("grad_y", *GRADIENTS))


def test_the_gradient_of_x_is_left_out_where_nobody_needs_it():
    case = make_case((5, 6, 7, 2, 1))
    t = case.x @ case.a.T
    arguments = (case.gy, case.x, t, case.a, case.b, case.e, case.scale)
    assert _core.adapter_backward(*arguments, needs_x=False)[0] is None


def test_a_frozen_x_gets_no_gradient():
    case = make_case((5, 6, 7, 2, 1))
    a = case.a.requires_grad_()
    ops.add_low_rank(case.y, case.x, a, case.b, case.e, scale=case.scale).backward(case.gy)
    assert_close(a.grad, reference(case)["grad_a"], 1e-10, "grad_a")


def test_y_is_overwritten_where_it_may_be():
    case = make_case((5, 6, 7, 2, 1))
    with torch.no_grad():
        out = ops.add_low_rank(case.y, case.x, case.a, case.b, case.e, scale=case.scale, inplace=True)
    assert out.data_ptr() == case.y.data_ptr()


def test_y_is_left_alone_otherwise():
    case = make_case((5, 6, 7, 2, 1))
    before = case.y.clone()
    ops.add_low_rank(case.y, case.x, case.a, case.b, case.e, scale=case.scale)
    assert torch.equal(case.y, before)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_survive_writing_into_y(transposed):
    case = make_case((5, 6, 7, 2, 1))
    if transposed:
        case.y = case.y.T.contiguous().T
    got, want = by_ops(case, inplace=True), reference(case)
    assert_all_close(got, want, 1e-10, ("out", "grad_y", *GRADIENTS))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradcheck_passes(inplace, dropout):
    case = make_case((1, 4, 3, 2, 1), leading=(2, 3))

    def run(y, x, a, b, e):
        torch.manual_seed(3)
        base = y * 1.0
        return ops.add_low_rank(base, x, a, b, e, scale=case.scale, dropout=dropout, inplace=inplace)

    leaves = [getattr(case, name).requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_a_second_derivative_is_refused():
    case = make_case((3, 4, 5, 2, 1))
    x = case.x.requires_grad_()
    out = ops.add_low_rank(case.y, x, case.a.requires_grad_(), case.b, case.e, scale=case.scale)
    (gx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


def test_autocast_computes_in_its_dtype():
    case = make_case((12, 16, 24, 3, 1), F32)
    case.y = case.y.to(BF16)
    want = case.y.clone()
    _core.adapter_forward(want, case.x.to(BF16), case.a, case.b, case.e, case.scale)
    with torch.autocast("cpu", BF16):
        got = ops.add_low_rank(case.y, case.x, case.a, case.b, case.e, scale=case.scale)
    assert torch.equal(got, want)


def test_gradients_under_autocast_keep_the_dtypes_of_their_tensors():
    case = make_case((12, 16, 24, 3, 1), F32)
    case.y, case.gy = case.y.to(BF16), case.gy.to(BF16)
    with torch.autocast("cpu", BF16):
        got = by_ops(case)
    assert [got[name].dtype for name in ("grad_y", *GRADIENTS)] == [BF16, F32, F32, F32, F32]


def test_gradients_under_autocast_are_right():
    case = make_case((12, 16, 24, 3, 1), F32)
    case.y, case.gy = case.y.to(BF16), case.gy.to(BF16)
    with torch.autocast("cpu", BF16):
        got = by_ops(case)
    assert_all_close(got, reference(case), 2e-2, ("out", "importance", *GRADIENTS))


def test_autocast_leaves_float64_alone():
    case = make_case((12, 16, 24, 3, 1), F64)
    with torch.autocast("cpu", BF16):
        got = by_ops(case)
    assert_all_close(got, reference(case), 1e-10, ("out", *GRADIENTS))


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1, 3, 2, 1, 0), (7, 9, 5, 2, 1), (100, 64, 31, 4, 2)])
def test_dropout_is_the_masked_formula(shape, p):
    case = make_case(shape)
    got, mask = by_core(case, p, seed=11)
    want = reference(case, kept_by(mask, case.x), keep_probability(p))
    assert_all_close(got, want, 1e-10, ("out", "importance", *GRADIENTS))


@pytest.mark.parametrize(("dtype", "tolerance"), [TOLERANCES[1], *HALF_TOLERANCES])
def test_dropout_serves_every_dtype(dtype, tolerance):
    case = make_case((65, 33, 17, 3, 1), dtype)
    got, mask = by_core(case, 0.25, seed=2)
    want = reference(case, kept_by(mask, case.x), keep_probability(0.25))
    assert_all_close(got, want, tolerance, ("out", "importance", *GRADIENTS))


def draw_mask(tokens: int, features: int, p: float, seed: int, offset: int = 0) -> Tensor:
    return _core.dropout_mask(tokens * features, p, seed, offset)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_a_mask_keeps_its_share(p):
    n = 1_000_000
    kept = float(np.unpackbits(draw_mask(1000, 1000, p, seed=5).numpy()).sum()) / n
    keep = keep_probability(p)
    assert abs(kept - keep) < 5 * (keep * (1 - keep) / n) ** 0.5


def test_neighbours_in_a_mask_are_independent():
    bits = np.unpackbits(draw_mask(1000, 1000, 0.5, seed=6).numpy(), bitorder="little").astype(float) - 0.5
    for distance in (1, 8, 16, 128, 1000):
        correlation = 4 * float(np.mean(bits[distance:] * bits[:-distance]))
        assert abs(correlation) < 5e-3, distance


def test_a_seed_fixes_its_mask():
    assert torch.equal(draw_mask(9, 31, 0.3, seed=8), draw_mask(9, 31, 0.3, seed=8))


@pytest.mark.parametrize("other", [9, 8 + 2**32, 2**63 + 8])
def test_another_seed_gives_another_mask(other):
    assert not torch.equal(draw_mask(9, 31, 0.3, seed=8), draw_mask(9, 31, 0.3, seed=other))


def test_a_mask_depends_on_the_position_only():
    short, long = draw_mask(40, 8, 0.3, seed=8), draw_mask(80, 8, 0.3, seed=8)
    assert torch.equal(long[:40], short)


def test_a_mask_takes_a_bit_an_element():
    assert draw_mask(3, 7, 0.5, seed=1).shape == (3,)


def test_an_offset_starts_later_in_the_stream():
    # 16 counters decide 128 elements.
    whole, later = draw_mask(1, 512, 0.3, seed=8), draw_mask(1, 384, 0.3, seed=8, offset=16)
    assert torch.equal(whole[16:], later)


def test_the_mask_is_the_same_at_any_number_of_threads():
    threads = torch.get_num_threads()
    masks = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        masks.append(draw_mask(1001, 333, 0.1, seed=4))
    torch.set_num_threads(threads)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


LINEAR_CASES = [
    (17, 33, 65, 3, 2),
    (128, 768, 320, 8, 1),
    (64, 96, 200, 64, 3),
    (0, 8, 8, 1, 0),
    (5, 7, 9, 2, 0),
]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [*TOLERANCES, *HALF_TOLERANCES])
@pytest.mark.parametrize("shape", LINEAR_CASES, ids=str)
def test_a_whole_layer_is_its_base_and_its_update(shape, dtype, tolerance, bias, p):
    case = make_case(shape, dtype)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape[2], shape[1], generator=generator, dtype=F64).div(shape[1] ** 0.5).to(dtype)
    offset = torch.randn(shape[2], generator=generator, dtype=F64).to(dtype) if bias else None
    parameters = (case.a, case.b, case.e, case.scale)
    y, t, kept = _core.linear_forward(case.x, weight, offset, *parameters, p, 21)
    assert kept is None
    importance = torch.zeros(1, dtype=F64)
    gx, ga, gb, ge = _core.adapter_backward(
        case.gy, case.x, t, *parameters, None, p, importance=importance, seed=21, weight=weight
    )
    base = torch.nn.functional.linear(
        case.x.to(F64), weight.to(F64), None if offset is None else offset.to(F64)
    )
    mask = kept_by(_core.dropout_mask(case.x.numel(), p, 21), case.x) if p else None
    want = reference(case, mask, keep_probability(p)) if p else reference(case)
    got = {"y": y, "x": gx, "a": ga, "b": gb, "e": ge}
    right = {"y": base + want["update"], "x": want["grad_x"] + case.gy.to(F64) @ weight.to(F64)}
    right |= {name: want[f"grad_{name}"] for name in "abe"}
    for name, value in got.items():
        assert value.shape == right[name].shape
        scale = float(right[name].abs().max()) if right[name].numel() else 1.0
        assert (
            float((value.to(F64) - right[name]).abs().max() if value.numel() else 0.0) <= tolerance * scale
        ), name
    assert abs(float(importance[0] - want["importance"])) <= tolerance * max(float(want["importance"]), 1e-9)


def test_a_weight_that_does_not_fit_is_named():
    case = make_case((5, 7, 9, 2, 0))
    parameters = (case.a, case.b, case.e, case.scale)
    with pytest.raises(ValueError, match="weight"):
        _core.linear_forward(case.x, torch.zeros(9, 8, dtype=F64), None, *parameters)
    with pytest.raises(ValueError, match="bias"):
        _core.linear_forward(case.x, torch.zeros(9, 7, dtype=F64), torch.zeros(8, dtype=F64), *parameters)
    with pytest.raises(TypeError, match="weight"):
        _core.linear_forward(case.x, torch.zeros(9, 7), None, *parameters)


def test_dropout_too_small_for_16_bits_keeps_everything():
    case = make_case((50, 20, 6, 2, 0))
    assert_all_close(by_core(case, 1e-6)[0], by_core(case)[0], 1e-14, ("out", *GRADIENTS))


def test_dropout_of_one_leaves_the_base_layer():
    case = make_case((50, 20, 6, 2, 1))
    assert torch.equal(by_core(case, 1.0)[0]["out"], case.y)


def test_dropout_of_one_leaves_no_gradient():
    got = by_core(make_case((50, 20, 6, 2, 1)), 1.0)[0]
    assert [int(got[name].count_nonzero()) for name in GRADIENTS] == [0, 0, 0, 0]


def ops_with_dropout(case: Case, p=0.5) -> Tensor:
    return ops.add_low_rank(case.y, case.x, case.a, case.b, case.e, scale=case.scale, dropout=p)


def test_manual_seed_fixes_the_dropout_of_ops():
    case = make_case((20, 30, 10, 2, 0))
    torch.manual_seed(1)
    first = ops_with_dropout(case)
    torch.manual_seed(1)
    assert torch.equal(first, ops_with_dropout(case))


def test_each_call_of_ops_drops_anew():
    case = make_case((20, 30, 10, 2, 0))
    assert not torch.equal(ops_with_dropout(case), ops_with_dropout(case))


def test_a_checkpoint_replays_its_dropout():
    case = make_case((20, 30, 10, 2, 0))
    x = case.x.requires_grad_()
    grads = []
    for run in (
        lambda: ops_with_dropout(case),
        lambda: checkpoint(ops_with_dropout, case, use_reentrant=False),
    ):
        torch.manual_seed(4)
        grads.append(torch.autograd.grad(run(), x, case.gy)[0])
    assert torch.equal(grads[0], grads[1])


@st.composite
def cases(draw):
    sizes = [st.integers(0, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 6), st.integers(0, 3)]
    dtype, tolerance = draw(st.sampled_from([(F64, 1e-12), (F32, 1e-5), (BF16, 3e-2)]))
    parameter_dtype = draw(st.sampled_from([None, F32])) if dtype == BF16 else None
    case = make_case([draw(size) for size in sizes], dtype, parameter_dtype, seed=draw(st.integers(0, 99)))
    return case, tolerance


def magnitude(case: Case, kept: Tensor | None, keep: float) -> dict[str, Tensor]:
    """The reference without signs: what rounding errors are measured by where sums cancel."""
    sizes = {name: getattr(case, name).abs() for name in (*NAMES, "gy")}
    return reference(Case(**sizes, scale=case.scale), kept, keep)


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2**63))
def test_every_shape_and_dtype_follows_the_formulas(drawn, p, seed):
    case, tolerance = drawn
    got, mask = by_core(case, p, seed)
    kept = None if mask is None else kept_by(mask, case.x)
    want, size = (f(case, kept, keep_probability(p)) for f in (reference, magnitude))
    for name in ("out", "importance", *GRADIENTS):
        error = (got[name].to(F64) - want[name]).abs()
        assert bool((error <= tolerance * size[name]).all()), name


def forward_arguments() -> dict:
    case = make_case((3, 4, 5, 2, 1), F32)
    names = {name: getattr(case, name) for name in NAMES}
    return names | {"scale": 1.0}


def backward_arguments() -> dict:
    case = make_case((3, 4, 5, 2, 1), F32)
    names = {name: getattr(case, name) for name in ("gy", "x", "a", "b", "e")}
    rest = {"scale": 1.0, "importance": torch.zeros(2, dtype=F64), "slot": 0, "p": 0.5}
    return names | rest | {"t": torch.randn(3, 3), "mask": torch.full((2,), 255, dtype=torch.uint8)}


BAD_PARAMETERS = [
    ("x", torch.zeros(4), ValueError),
    ("x", torch.zeros(3, 5), ValueError),
    ("x", torch.zeros(2, 3, 4), ValueError),
    ("a", torch.zeros(4), ValueError),
    ("b", torch.zeros(5), ValueError),
    ("b", torch.zeros(5, 2), ValueError),
    ("e", torch.zeros(2), ValueError),
    ("e", torch.zeros(2, 2), ValueError),
    ("e", torch.zeros(4, 1), ValueError),
    ("a", torch.zeros(3, 4, dtype=torch.int64), TypeError),
    ("x", torch.zeros(3, 4, dtype=torch.complex64), TypeError),
    ("b", torch.zeros(5, 3, dtype=F64), TypeError),
    ("e", torch.zeros(2, 1, dtype=BF16), TypeError),
    ("e", torch.zeros(2, 1, dtype=torch.bool), TypeError),
    ("x", [[1.0]], TypeError),
    ("a", None, TypeError),
    ("x", torch.zeros(3, 4, device="meta"), ValueError),
    ("scale", float("nan"), ValueError),
    ("scale", float("inf"), ValueError),
    ("scale", "1", TypeError),
    ("p", -0.1, ValueError),
    ("p", 1.5, ValueError),
    ("p", float("nan"), ValueError),
    ("p", None, TypeError),
]
BAD_FORWARD = [
    *BAD_PARAMETERS,
    ("y", torch.zeros(3, 4), ValueError),
    ("y", torch.zeros(15), ValueError),
    ("y", torch.zeros(3, 5, dtype=torch.int32), TypeError),
    ("y", torch.zeros(3, 5, device="meta"), ValueError),
    ("seed", 1.5, TypeError),
]
BAD_BACKWARD = [
    *BAD_PARAMETERS,
    ("gy", torch.zeros(3, 4), ValueError),
    ("gy", torch.zeros(15), ValueError),
    ("gy", torch.zeros(3, 5, dtype=torch.int64), TypeError),
    ("gy", torch.zeros(3, 5, dtype=torch.complex64), TypeError),
    ("gy", torch.zeros(3, 5, device="meta"), ValueError),
    ("t", torch.zeros(3, 2), ValueError),
    ("t", torch.zeros(3, 3, dtype=torch.int64), TypeError),
    ("t", torch.zeros(3, 3, device="meta"), ValueError),
    ("mask", torch.zeros(1, dtype=torch.uint8), ValueError),
    ("mask", torch.zeros(3, dtype=torch.uint8), ValueError),
    ("mask", torch.zeros(1, dtype=torch.uint8).expand(2), ValueError),
    ("mask", torch.zeros(2, dtype=torch.int64), TypeError),
    ("mask", torch.zeros(2, dtype=F32), TypeError),
    ("importance", torch.zeros(2), TypeError),
    ("importance", torch.zeros(2, 1, dtype=F64), ValueError),
    ("importance", torch.zeros(0, dtype=F64), ValueError),
    ("slot", 2, ValueError),
    ("slot", -1, ValueError),
    ("slot", 0.5, TypeError),
    ("needs_x", "yes", TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_FORWARD, ids=describe)
def test_forward_refuses_by_name(name, value, error):
    with pytest.raises(error, match=rf"(?i)\b{name}\b"):
        _core.adapter_forward(**forward_arguments() | {name: value})


@pytest.mark.parametrize(("name", "value", "error"), BAD_BACKWARD, ids=describe)
def test_backward_refuses_by_name(name, value, error):
    with pytest.raises(error, match=rf"(?i)\b{name}\b"):
        _core.adapter_backward(**backward_arguments() | {name: value})


@pytest.mark.parametrize("name", ["x", "a", "gy"])
def test_dtypes_that_tch_does_not_know_are_a_type_error(name):
    bad = {name: backward_arguments()[name].to(torch.uint16)}
    with pytest.raises(TypeError, match=rf"(?i)\b{name}\b"):
        _core.adapter_backward(**backward_arguments() | bad)


def test_a_mask_on_another_device_is_no_crash():
    program = (
        "x, y, r = torch.ones(2, 4), torch.ones(2, 3), torch.ones(2, 1)\n"
        "mask = torch.ones(1, dtype=torch.uint8, device='meta')\n"
        "_core.adapter_backward(y, x, r, x[:1], torch.ones(3, 1), r[:1], 1.0, mask, 0.5)\n"
    )
    run = extension.run(program)
    assert "ValueError: mask" in run.stderr, run


def test_a_negative_seed_is_refused():
    with pytest.raises(OverflowError, match="negative"):
        _core.adapter_forward(**forward_arguments() | {"seed": -1})


def test_a_refused_call_leaves_y_alone():
    arguments = forward_arguments()
    before = arguments["y"].clone()
    with pytest.raises(ValueError, match="scale"):
        _core.adapter_forward(**arguments | {"scale": float("nan")})
    assert torch.equal(arguments["y"], before)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("x", torch.zeros(3, 5), ValueError),
        ("x", torch.tensor(1.0), ValueError),
        ("y", torch.zeros(2, 5), ValueError),
        ("y", torch.zeros(3, 4), ValueError),
        ("b", torch.zeros(5, 2), ValueError),
        ("e", torch.zeros(2, 1, dtype=torch.int64), TypeError),
        ("scale", float("nan"), ValueError),
    ],
    ids=describe,
)
def test_ops_refuses_by_name(name, value, error):
    with pytest.raises(error, match=rf"(?i)\b{name}\b"):
        ops.add_low_rank(**forward_arguments() | {name: value})


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan")])
def test_ops_refuses_a_dropout_that_is_no_probability(dropout):
    with pytest.raises(ValueError, match="dropout probability"):
        ops.add_low_rank(**forward_arguments(), dropout=dropout)


def test_ops_refuses_a_slot_that_its_probe_lacks():
    arguments = forward_arguments()
    arguments["a"].requires_grad_()
    out = ops.add_low_rank(**arguments, probe=armed_probe(), slot=2)
    with pytest.raises(ValueError, match="slot is 2"):
        out.sum().backward()
