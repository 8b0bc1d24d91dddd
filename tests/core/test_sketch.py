"""The sketch of a module's gradient (src/gauges/sketch.rs) against the gradient itself and its SVD."""

import pytest
import torch
from increlora_rs import _core
from increlora_rs.gauges.sketch import Sketch

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
K, ROWS = 8, 33
NOTHING = {"a": torch.zeros(0, 40), "b": torch.zeros(60, 0)}


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def new_sketch(out=60, features=40, dtype=F32, seed=1):
    return {
        "left": torch.zeros(K, out, dtype=dtype),
        "right": torch.zeros(ROWS, features, dtype=dtype),
        "omega": normal(K, features, seed=seed, dtype=dtype),
        "psi": normal(ROWS, out, seed=seed + 1, dtype=dtype),
    }


def sketch_of(g, **kwargs):
    """A sketch of G (out, in), as that of as many tokens as G has columns."""
    sketch = new_sketch(*g.shape, **kwargs)
    _core.add_to_sketch_(**sketch, gy=g.t().contiguous(), x=torch.eye(g.shape[1], dtype=g.dtype))
    return sketch


def triples_of(sketch, count=1, a=NOTHING["a"], b=NOTHING["b"]):
    return _core.sketched_triples(sketch["left"], sketch["right"], sketch["psi"], a, b, count)


def of_rank(rank, seed=5):
    return normal(60, rank, seed=seed) @ normal(rank, 40, seed=seed + 1)


def test_both_halves_are_products_with_the_gradient():
    gy, x, sketch = normal(31, 60, seed=3), normal(31, 40, seed=4), new_sketch(dtype=F64)
    _core.add_to_sketch_(**sketch, gy=gy, x=x)
    g = gy.T @ x
    assert torch.allclose(sketch["left"], (g @ sketch["omega"].T).T, atol=1e-10)
    assert torch.allclose(sketch["right"], sketch["psi"] @ g, atol=1e-10)


def test_sketches_of_micro_batches_add_up_to_that_of_the_batch():
    gy, x = normal(64, 60, seed=3, dtype=F32), normal(64, 40, seed=4, dtype=F32)
    whole, parts = new_sketch(), new_sketch()
    _core.add_to_sketch_(**whole, gy=gy, x=x)
    for rows in (slice(0, 10), slice(10, 50), slice(50, 64)):
        _core.add_to_sketch_(**parts, gy=gy[rows], x=x[rows])
    for half in ("left", "right"):
        assert torch.allclose(parts[half], whole[half], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (torch.float16, F32), (F64, F64), (F32, BF16)])
def test_any_dtype_is_added_as_the_sketchs_own(dtypes):
    gy, x = normal(33, 60, seed=3, dtype=dtypes[0]), normal(33, 40, seed=4, dtype=dtypes[1])
    sketch, wide = new_sketch(), new_sketch()
    _core.add_to_sketch_(**sketch, gy=gy, x=x)
    _core.add_to_sketch_(**wide, gy=gy.float(), x=x.float())
    assert torch.equal(sketch["left"], wide["left"])
    assert torch.equal(sketch["right"], wide["right"])


def as_sketch(parts):
    return Sketch(**parts)


def by_tokens(parts):
    _core.add_to_sketch_(**parts, gy=normal(31, 60, seed=3, dtype=F32), x=normal(31, 40, seed=4, dtype=F32))


def by_tokens_in_columns(parts):
    gy, x = normal(31, 60, seed=3, dtype=F32), normal(31, 40, seed=4, dtype=F32)
    _core.add_to_sketch_(**parts, gy=gy.T.contiguous().T, x=x.T.contiguous().T)


def by_blocks_of_tokens(parts):
    # Of another dtype than the sketch's, and more than one block of them.
    gy, x = (normal(30_000, n, seed=3, dtype=BF16) for n in (60, 40))
    _core.add_to_sketch_(**parts, gy=gy, x=x)


def by_lookup(parts):
    ids = torch.arange(31) * 7 % 40
    as_sketch(parts).add_lookup(normal(31, 60, seed=3, dtype=F32), ids)


def by_matrix(parts):
    as_sketch(parts).add_matrix(normal(60, 40, seed=3, dtype=F32))


ADDITIONS = [by_tokens, by_blocks_of_tokens, by_lookup, by_matrix]


@pytest.mark.parametrize("add", ADDITIONS)
def test_what_a_sketch_holds_has_no_part_in_what_is_added(add):
    once, twice = new_sketch(), new_sketch()
    add(once)
    add(twice)
    add(twice)
    for half in ("left", "right"):
        assert torch.equal(twice[half], 2 * once[half])


def test_strides_change_no_bit_of_a_sketch():
    rows, columns = new_sketch(), new_sketch()
    by_tokens(rows)
    by_tokens_in_columns(columns)
    for half in ("left", "right"):
        assert torch.equal(columns[half], rows[half])


def test_no_tokens_add_nothing():
    sketch = new_sketch()
    _core.add_to_sketch_(**sketch, gy=torch.zeros(0, 60), x=torch.zeros(0, 40))
    assert not sketch["left"].any() and not sketch["right"].any()


@pytest.mark.parametrize("rank", [1, 3, K])
def test_a_gradient_of_low_rank_comes_back_whole(rank):
    g = of_rank(rank)
    sigma, u, v = triples_of(sketch_of(g.float()), count=rank)
    want_u, want, want_v = torch.linalg.svd(g, full_matrices=False)
    assert torch.allclose(sigma, want[:rank], rtol=1e-5)
    for j in range(rank):
        sign = torch.sign(u[:, j] @ want_u[:, j])
        assert torch.allclose(sign * u[:, j], want_u[:, j], atol=1e-5)
        assert torch.allclose(sign * v[j], want_v[j], atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_of_the_largest_entries_of_v_is_positive(sign):
    # The rows of v are (1, -1, 0, ...) and (0, 0, 2, -2, 1, 0, ...), to rounding.
    v = torch.zeros(2, 40)
    v[0, 0], v[0, 1], v[1, 2], v[1, 3], v[1, 4] = 1.0, -1.0, 2.0, -2.0, 1.0
    u = torch.zeros(60, 2)
    u[0, 0], u[1, 1] = 5.0, 1.0
    _, found_u, found_v = triples_of(sketch_of(sign * u @ v), count=2)
    want = v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found_v.float(), want, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(found_u[[0, 1]].float(), sign * torch.eye(2), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_gradient_is_met_within_its_noise(seed):
    # Singular values 10 and 6 over noise of a norm of 1 (Frobenius): the error is at most that of what lies
    # beyond the sketch's rank.
    signal = torch.linalg.qr(normal(60, 2, seed=7)).Q @ torch.diag(torch.tensor([10.0, 6.0], dtype=F64))
    noise = normal(60, 40, seed=20 + seed)
    g = signal @ torch.linalg.qr(normal(40, 2, seed=8)).Q.T + noise / noise.norm()
    sigma, u, v = triples_of(sketch_of(g.float(), seed=30 + 2 * seed), count=2)
    want_u, want, want_v = torch.linalg.svd(g)
    tail = float(want[K:].norm())
    assert float((sigma - want[:2]).abs().max()) < tail / 3
    # By Wedin, the sine of the angle is at most the error over the gap.
    assert float((u[:, 0] @ want_u[:, 0]).abs()) > (1 - (tail / 4) ** 2) ** 0.5
    assert float((v[0] @ want_v[0]).abs()) > (1 - (tail / 4) ** 2) ** 0.5
    assert 0.7 < tail < 1


def test_the_score_of_a_slowly_falling_spectrum_is_near():
    # Singular values 1 / j of a module of 128 x 128: how far the scheduler's sketch is off, over 20 draws.
    left, right = (torch.linalg.qr(normal(128, 128, seed=s)).Q for s in (7, 8))
    g = (left / torch.arange(1, 129, dtype=F64)) @ right.T
    nothing = {"a": torch.zeros(0, 128), "b": torch.zeros(128, 0)}
    found = [float(triples_of(sketch_of(g, dtype=F64, seed=2 * s + 40), **nothing)[0]) for s in range(20)]
    assert max(found) < 1.15
    assert min(found) > 0.8
    assert sum(found) / 20 == pytest.approx(1.0, abs=0.05)


def test_the_span_of_both_factors_is_left_out():
    g, a, b = of_rank(5), normal(3, 40, seed=11), normal(60, 2, seed=12)
    b = torch.cat([b, b[:, :1] * 1e-6, torch.zeros(60, 1, dtype=F64)], 1)
    left = torch.eye(60, dtype=F64) - b[:, :2] @ torch.linalg.pinv(b[:, :2])
    right = torch.eye(40, dtype=F64) - torch.linalg.pinv(a) @ a
    want = torch.linalg.svdvals(left @ g @ right)
    sigma, u, v = triples_of(sketch_of(g, dtype=F64), count=6, a=a, b=b)
    assert torch.allclose(sigma[:5], want[:5], rtol=1e-9)
    assert sigma[5] == 0
    assert torch.allclose((u * sigma) @ v, left @ g @ right, atol=1e-9)
    assert float((a @ v[:5].T).abs().max()) < 1e-10
    assert float((b.T @ u[:, :5]).abs().max()) < 1e-10


def test_a_gradient_inside_the_span_is_worth_nothing():
    g = of_rank(2)
    u, _, v = torch.linalg.svd(g)
    sigma, _, _ = triples_of(sketch_of(g.float()), count=2, a=v[:2].float(), b=u[:, :2].float())
    assert not sigma.any()


def test_a_module_smaller_than_the_sketch_is_exact():
    g = normal(3, 5, seed=2)
    sketch = sketch_of(g, dtype=F64)
    a, b = torch.zeros(1, 5, dtype=F64), torch.zeros(3, 1, dtype=F64)
    sigma, _, _ = triples_of(sketch, count=4, a=a, b=b)
    assert torch.allclose(sigma[:3], torch.linalg.svdvals(g), rtol=1e-9)
    assert sigma[3] == 0


def test_nothing_in_the_sketch_is_worth_nothing():
    sigma, u, v = triples_of(new_sketch(), count=2)
    assert not sigma.any()
    assert u.isfinite().all() and v.isfinite().all()


@pytest.mark.parametrize("where", ["left", "right"])
def test_what_is_not_finite_is_worth_nan(where):
    sketch = sketch_of(of_rank(2).float())
    sketch[where][0, 0] = float("inf")
    assert triples_of(sketch)[0].isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"left": torch.zeros(K, 59)}, ValueError, r"left has shape \[8, 59\]; it must be \[8, 60\]"),
        ({"right": torch.zeros(ROWS)}, ValueError, r"right has shape \[33\]; it must be a matrix"),
        ({"psi": torch.zeros(ROWS, 60, dtype=F64)}, TypeError, "psi has dtype Double; it must be Float"),
        ({"gy": torch.zeros(2, 61)}, ValueError, r"gy has shape \[2, 61\]; it must be \[2, 60\]"),
        ({"x": torch.zeros(2, 41)}, ValueError, r"x has shape \[2, 41\]; it must be \[2, 40\]"),
        ({"x": torch.zeros(2, 40, dtype=torch.int64)}, TypeError, "x has dtype Int64"),
    ],
)
def test_a_wrong_tensor_is_named(change, error, message):
    with pytest.raises(error, match=message):
        _core.add_to_sketch_(**(new_sketch() | {"gy": torch.zeros(2, 60), "x": torch.zeros(2, 40)} | change))


def test_a_wrong_count_is_named():
    with pytest.raises(ValueError, match="count is -1; give 0 or more"):
        triples_of(new_sketch(), count=-1)


def take(step, **kwargs):
    step, total, steps = torch.tensor(step), torch.ones(2), torch.ones(1, dtype=F64)
    _core.take_sketches_(step, total, steps, **kwargs)
    assert not step.any()
    return total.tolist(), float(steps)


def test_a_step_is_taken_in_less_its_scale():
    assert take([4.0, 8.0], scale=torch.tensor(4.0), found_inf=torch.tensor([0.0])) == ([2.0, 3.0], 2.0)


@pytest.mark.parametrize("step", [[float("nan"), 1.0], [1.0, float("inf")]])
def test_a_step_that_is_not_finite_is_left_out(step):
    assert take(step) == ([1.0, 1.0], 1.0)


def test_a_step_that_overflowed_is_left_out():
    assert take([4.0, 8.0], found_inf=torch.tensor(1.0)) == ([1.0, 1.0], 1.0)


def test_scores_of_many_are_the_first_singular_values_of_each():
    sketches, factors = [], []
    for rank, rows in ((1, 0), (8, 3), (40, 4)):
        sketches.append(sketch_of(of_rank(rank), dtype=F64))
        factors.append((normal(rows, 40, seed=7), normal(60, rows, seed=8)))
    want = [triples_of(sketch, 1, *own)[0] for sketch, own in zip(sketches, factors, strict=True)]
    pairs = [(sketch["left"], sketch["right"]) for sketch in sketches]
    found = _core.sketch_scores(pairs, [sketch["psi"] for sketch in sketches], factors)
    torch.testing.assert_close(found, torch.cat(want), rtol=1e-9, atol=0.0)
    with pytest.raises(ValueError, match="3, 3 and 2"):
        _core.sketch_scores(pairs, [sketch["psi"] for sketch in sketches], factors[:2])


def test_what_was_taken_makes_room_in_the_sketch():
    parts, sums = new_sketch(dtype=F64), (torch.ones(K, 60, dtype=F64), torch.ones(ROWS, 40, dtype=F64))
    first, second = ((normal(5, 60, seed=s), normal(5, 40, seed=s + 1)) for s in (3, 5))
    assert _core.add_to_sketch_(**parts, gy=first[0], x=first[1])
    before = parts["left"].clone(), parts["right"].clone()
    assert _core.add_to_sketch_(**parts, gy=second[0], x=second[1], taken=sums)
    alone = new_sketch(dtype=F64)
    _core.add_to_sketch_(**alone, gy=second[0], x=second[1])
    for total, old, name in zip(sums, before, ("left", "right"), strict=True):
        assert torch.equal(total, old + 1.0)
        assert torch.equal(parts[name], alone[name])
    assert not _core.add_to_sketch_(**parts, gy=second[0] * float("nan"), x=second[1])
