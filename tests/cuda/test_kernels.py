"""The kernels and the Rust code that launches them, against float64."""

import ctypes

import numpy as np
import pytest
import torch
from guarded import Guarded
from increlora_rs import _core
from philox import kept, philox

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the largest entry: float32 sums, rounded once to the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
# (tokens, features, ranks)
SHAPES = [
    (1, 8, 1),
    (5, 72, 2),
    (33, 768, 8),
    (17, 264, 16),
    (3, 1032, 32),
    (5, 520, 33),
    (2, 72, 64),
    (5, 130, 3),
]


@pytest.fixture
def numbers():
    generator = torch.Generator().manual_seed(1)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture
def guarded(device):
    guarded = Guarded(device)
    yield guarded
    guarded.check()


def close(got, want, tolerance):
    """Is ``got`` within ``tolerance`` of the largest entry of ``want``?"""
    want = torch.as_tensor(want, dtype=torch.float64)
    scale = want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got.double().cpu(), want, rtol=0.0, atol=tolerance * scale)


def bits(mask, elements):
    return np.unpackbits(mask.cpu().numpy(), bitorder="little")[:elements].astype(bool)


def packed(mask):
    return torch.from_numpy(np.packbits(mask, bitorder="little"))


def test_an_access_past_a_tensor_fails_the_launch(emulated):
    guarded = Guarded("cpu")
    x, short = guarded.put(torch.ones(4096)), guarded.put(torch.ones(16, dtype=torch.uint8))
    arguments = [
        ctypes.c_uint64(x.data_ptr()),
        ctypes.c_uint64(x.data_ptr()),
        ctypes.c_uint64(short.data_ptr()),
    ]
    arguments.append(ctypes.c_int64(4096))
    addresses = (ctypes.c_void_p * 4)(*(ctypes.addressof(argument) for argument in arguments))
    assert emulated.emulator_launch(b"apply_mask_f32", 2, 1, 256, addresses) == 3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(emulator, counter, key, words):
    counted, got = np.array(counter, np.uint32), np.zeros(4, np.uint32)
    emulator.emulator_philox(key, counted.ctypes.data, got.ctypes.data)
    assert got.tolist() == words
    assert philox(counter, (key & 0xFFFFFFFF, key >> 32)).tolist() == words


def test_the_emulator_rounds_as_torch_does(emulator):
    values = torch.randn(200, generator=torch.Generator().manual_seed(3)) * 10.0 ** torch.arange(
        -9, 11
    ).repeat(10)
    values = torch.cat(
        [values, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1 + 2**-8, 1 + 3 * 2**-8])]
    )
    half, bfloat = ctypes.c_ushort(), ctypes.c_ushort()
    for value in values:
        emulator.emulator_round(value.item(), ctypes.byref(half), ctypes.byref(bfloat))
        assert half.value == value.half().view(torch.int16).item() & 0xFFFF
        assert bfloat.value == value.bfloat16().view(torch.int16).item() & 0xFFFF


@pytest.mark.parametrize("elements", [1, 8, 127, 128, 129, 300, 5 * 768, 20000])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("offset", [0, 7, 2**64 - 9])
def test_a_mask_is_the_one_of_the_cpu_bit_for_bit(device, stream, elements, p, offset):
    mask = _core.cuda_draw_mask(torch.ones(elements, device=device), p, 42, offset, stream)
    assert torch.equal(mask.cpu(), _core.dropout_mask(elements, p, 42, offset))


@pytest.mark.parametrize("offset", [0, 16, 7, 2**32 - 5, 2**64 - 9])
def test_a_mask_follows_its_description(device, stream, offset):
    seed = 0x0123_4567_89AB_CDEF
    mask = _core.cuda_draw_mask(torch.ones(1000, device=device), 0.3, seed, offset, stream)
    assert np.array_equal(bits(mask, 1000), kept(1000, 0.3, seed, offset))


@pytest.mark.parametrize("elements", [0, 1, 7, 8, 13, 2048, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_applying_a_mask_keeps_what_it_keeps(device, stream, guarded, numbers, elements, dtype):
    x = numbers(elements, dtype=dtype)
    mask = np.random.default_rng(1).random(elements) < 0.5
    got = _core.cuda_apply_mask(guarded.put(x), guarded.put(packed(mask)), stream)
    assert torch.equal(got.cpu(), torch.where(torch.from_numpy(mask), x, torch.zeros_like(x)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_down_is_the_product_with_the_dropped_x(device, stream, guarded, numbers, shape, dtype):
    tokens, features, ranks = shape
    x, a = numbers(tokens, features, dtype=dtype), numbers(ranks, features, dtype=dtype)
    t, mask = _core.cuda_down(guarded.put(x), guarded.put(a), 1.25, 0.2, 7, 48, stream)
    keeps = kept(x.numel(), 0.2, 7, 48)
    assert np.array_equal(bits(mask, x.numel()), keeps)
    dropped = x.double() * torch.from_numpy(keeps).view(x.shape)
    assert t.dtype == dtype
    # Composed of library calls where it is not fused: there the sum is rounded before the gain, too.
    close(t, 1.25 * dropped @ a.double().T, 2 * TOLERANCE[dtype])


def test_down_takes_an_x_that_is_not_aligned(device, stream, numbers):
    wide = numbers(5, 81).to(device)
    x, a = wide[:, 1:73], numbers(3, 72)
    t, mask = _core.cuda_down(x, a.to(device), 1.0, 0.5, 9, 0, stream)
    keeps = torch.from_numpy(kept(5 * 72, 0.5, 9)).view(5, 72)
    assert np.array_equal(bits(mask, 5 * 72), keeps.flatten())
    close(t, (x.cpu().double() * keeps) @ a.double().T, 4e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
def test_the_gradient_of_x_is_added_where_it_is_kept(
    device, stream, guarded, numbers, shape, dtype, masked, accumulate
):
    tokens, features, ranks = shape
    u, a = numbers(tokens, ranks, dtype=dtype), numbers(ranks, features, dtype=dtype)
    before = numbers(tokens, features, dtype=dtype)
    keeps = np.random.default_rng(1).random(before.numel()) < 0.7
    gx = guarded.put(before if accumulate else before * float("nan"))
    mask = guarded.put(packed(keeps)) if masked else None
    assert _core.cuda_add_grad_x(gx, accumulate, guarded.put(u), guarded.put(a), mask, 1.5, stream)
    want = 1.5 * u.double() @ a.double()
    if masked:
        want *= torch.from_numpy(keeps).view(want.shape)
    if accumulate:
        want += before.double()
    close(gx, want, 2 * TOLERANCE[dtype])


def close_by_part(got, want, active, tolerance):
    """:func:`close` of the first ``active`` columns and of the others, in reserve, whose entries are tiny."""
    close(got[:, :active], want[:, :active], tolerance)
    # Of float16's subnormal numbers a few bits are left there.
    rough = 0.03 if got.dtype == torch.float16 else tolerance
    close(got[:, active:], want[:, active:], rough)


# (features, out, ranks, active)
FACTORS = [(8, 3, 1, 1), (72, 40, 5, 4), (300, 1030, 8, 8), (2100, 17, 33, 20)]
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]


@pytest.fixture
def parameters(numbers):
    """``parameters(shape, dtype)``: A, B, E, and E with the reserve in float64."""

    def make(shape, dtype):
        features, out, ranks, active = shape
        a, b, e = (numbers(*size, dtype=dtype) for size in [(ranks, features), (out, ranks), (active, 1)])
        reserve = torch.full((ranks - active,), _core.RESERVE_E, dtype=torch.float64)
        return a, b, e, torch.cat([e.double().flatten(), reserve])

    return make


@pytest.mark.parametrize("shape", FACTORS)
@pytest.mark.parametrize(("stored", "wanted"), PAIRS)
def test_the_factors_are_scaled_and_cast(device, stream, guarded, parameters, shape, stored, wanted):
    a, b, e, values = parameters(shape, stored)
    like = torch.empty(0, dtype=wanted, device=device)
    put = guarded.put
    cast, p = _core.cuda_factors(put(a), put(b), put(e), 1.5, like, stream)
    assert torch.equal(cast.cpu(), a.to(wanted))
    assert p.dtype == wanted
    close_by_part(p, 1.5 * b.double() * values, shape[-1], TOLERANCE[wanted])


@pytest.mark.parametrize("shape", FACTORS)
@pytest.mark.parametrize(("stored", "wanted"), PAIRS)
def test_the_gradients_of_the_parameters_follow_from_those_of_the_factors(
    device, stream, guarded, numbers, parameters, shape, stored, wanted
):
    (features, out, ranks, active), put = shape, guarded.put
    a, b, e, values = parameters(shape, stored)
    right, left = numbers(ranks, features, dtype=wanted), numbers(ranks, out, dtype=wanted)
    got = _core.cuda_gradients(put(a), put(b), put(e), 1.5, put(right), put(left), 1.25, stream)
    of_e = 1.5 * (left.double() * b.double().T).sum(1, keepdim=True)[:active]
    want = [1.25 * right.double(), 1.5 * values * left.double().T, of_e]
    for value, expected, parameter in zip(got, want, (a, b, e), strict=True):
        assert value.shape == parameter.shape and value.dtype == stored and value.is_contiguous()
        part = active if parameter is b else value.shape[1]
        close_by_part(value, expected, part, 2 * TOLERANCE[stored])


def test_parameters_that_do_not_go_together_are_refused_by_name(device, stream, numbers):
    a, b, e = numbers(2, 8).to(device), numbers(4, 2).to(device), numbers(2, 1).to(device)
    with pytest.raises(TypeError, match="B has dtype"):
        _core.cuda_factors(a, b.half(), e, 1.0, a, stream)
    with pytest.raises(TypeError, match="E has dtype"):
        _core.cuda_factors(a, b, e.double(), 1.0, a, stream)
    with pytest.raises(ValueError, match="E has shape"):
        _core.cuda_factors(a, b, numbers(3, 1).to(device), 1.0, a, stream)
    with pytest.raises(ValueError, match="E has shape"):
        _core.cuda_factors(a, b, e[:, :0], 1.0, a, stream)
    with pytest.raises(ValueError, match="left has shape"):
        _core.cuda_gradients(a, b, e, 1.0, a, a, 1.0, stream)
    with pytest.raises(TypeError, match="left has dtype"):
        _core.cuda_gradients(a, b, e, 1.0, a, b.T.half(), 1.0, stream)


def test_pairs_of_dtypes_without_kernels_are_not_taken(device, stream, numbers):
    a, b, e = numbers(2, 8).to(device), numbers(4, 2).to(device), numbers(2, 1).to(device)
    half = [factor.half() for factor in (a, b, e)]
    assert _core.cuda_factors(*half, 1.0, a, stream) is None
    assert _core.cuda_factors(a, b, e, 1.0, a.double(), stream) is None
    assert _core.cuda_factors(a[:, ::2], b, e, 1.0, a, stream) is None
    assert _core.cuda_gradients(*half, 1.0, a, b.T, 1.0, stream) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across", [1, 72, 5000])
def test_newborn_rows_are_mixed_with_what_they_were(device, stream, guarded, numbers, dtype, across):
    births = {0: [0, 3, 3, 9], 1: [0, 0, 9], 2: [5]}
    before = {0: numbers(4, across), 1: numbers(across, 3), 2: numbers(across, 1)}
    before = {k: value.to(dtype) for k, value in before.items()}
    here = {k: guarded.put(value) for k, value in before.items()}
    newborns = _core.Newborns([(here[k], births[k], 0 if k == 0 else 1) for k in here])
    newborns.keep(stream)
    after = {k: numbers(*value.shape, dtype=dtype) for k, value in before.items()}
    for k, value in here.items():
        value.copy_(after[k])
    settings = {"multiplier": 0.75, "lr_warmup": 10, "betas": (0.9, 0.999), "decay": 0.01}
    newborns.correct(12, **settings, stream=stream)
    for k, value in here.items():
        # The loops of the CPU, which have tests of their own, in float64.
        want = after[k].double()
        _core.restart_([(want, before[k].double(), births[k], 0 if k == 0 else 1)], 12, **settings)
        assert not torch.equal(want, after[k].double())
        close(value, want, 2 * TOLERANCE[dtype])


def test_a_parameter_that_lost_its_newborn_rows_is_not_written_past_its_end(device, stream):
    parameter = torch.ones(4, 8, device=device)
    newborns = _core.Newborns([(parameter, [0, 1, 1, 2], 0)])
    parameter.set_(torch.ones(2, 8, device=device))
    with pytest.raises(RuntimeError, match=r"narrow|start"):
        newborns.keep(stream)


def test_more_parts_than_a_launch_takes_go_in_several(device, stream, numbers):
    # 600 parts to mix: the second launch begins among them.
    before = [numbers(3, 8) for _ in range(300)]
    here = [matrix.to(device, copy=True) for matrix in before]
    newborns = _core.Newborns([(matrix, [0, 1, 2], 0) for matrix in here])
    newborns.keep(stream)
    for matrix in here:
        matrix.add_(1.0)
    newborns.correct(3, betas=(0.9, 0.999), stream=stream)
    for matrix, old in zip(here, before, strict=True):
        want = old.double() + 1.0
        _core.restart_([(want, old.double(), [0, 1, 2], 0)], 3, betas=(0.9, 0.999))
        close(matrix, want, 2e-6)


def test_a_parameter_that_is_given_twice_is_corrected_twice(device, stream, numbers):
    old = numbers(2, 8)
    here = (old + 1.0).to(device)
    entry = (here, old.to(device), [0, 1], 0)
    _core.restart_([entry, entry], 3, betas=(0.9, 0.999), stream=stream)
    want = old.double() + 1.0
    for _ in range(2):
        _core.restart_([(want, old.double(), [0, 1], 0)], 3, betas=(0.9, 0.999))
    close(here, want, 2e-6)


def test_all_newborns_take_one_launch_each(emulated, numbers):
    parameters = [(numbers(4, 72), [0, 1, 2, 2], 0) for _ in range(100)]
    newborns = _core.Newborns(parameters)
    newborns.keep()
    newborns.correct(3, betas=(0.9, 0.999))
    assert emulated.emulator_launched().decode().split() == ["keep_newborns_f32", "mix_newborns_f32"]


# (out, features, ranks); the last one is two blocks of G.
SCORES = [(1, 8, 1), (70, 72, 2), (130, 264, 16), (64, 520, 33), (40, 72, 70), (1100, 16, 2)]
# Here a block of G is cut short by its bytes, at 64 rows.
WIDE = pytest.param((70, 16392, 1), torch.float32, id="wide")


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, dtype) for shape in SCORES for dtype in DTYPES), WIDE]
)
def test_the_importance_is_the_sum_over_the_whole(device, stream, guarded, numbers, shape, dtype):
    out, features, ranks = shape
    gy, x = numbers(3, out, dtype=dtype), numbers(3, features, dtype=dtype)
    p, a = numbers(out, ranks), numbers(ranks, features)
    vector = guarded.put(torch.tensor([5.0, 7.0, 9.0], dtype=torch.float64))
    put = guarded.put
    assert _core.cuda_importance_(vector, 1, put(p), put(a), put(gy), put(x), 0.5, stream)
    # G is rounded to the dtype before it is summed; what is left of that is the noise of a sum.
    want = 0.5 * ((p.double() @ a.double()) * (gy.double().T @ x.double())).abs().sum()
    assert vector.tolist()[::2] == [5.0, 9.0]
    noise = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]
    assert abs((vector[1].item() - 7.0) / want.item() - 1.0) < noise


def test_the_importance_is_the_same_bit_for_bit_at_every_call(device, stream, numbers):
    p, a, gy, x = (numbers(*shape).to(device) for shape in [(300, 4), (4, 520), (6, 300), (6, 520)])
    vector = torch.zeros(3, dtype=torch.float64, device=device)
    for slot in range(3):
        assert _core.cuda_importance_(vector, slot, p, a, gy, x, 1.0, stream)
    assert vector[0] == vector[1] == vector[2] > 0


@pytest.mark.parametrize("modules", [1, 72, 700])
@pytest.mark.parametrize("spoiled", [None, float("inf"), float("nan")])
def test_the_smoothing_follows_the_formulas(device, stream, guarded, numbers, modules, spoiled):
    importance, factor, mean, uncertainty = (numbers(modules, dtype=torch.float64).abs() for _ in range(4))
    if spoiled is not None:
        importance[modules // 2] = spoiled
    tensors = [guarded.put(vector) for vector in (importance, factor, mean, uncertainty)]
    assert _core.cuda_smooth_(*tensors, 0.85, 0.7, stream)
    if spoiled is not None:
        assert torch.equal(tensors[2].cpu(), mean) and torch.equal(tensors[3].cpu(), uncertainty)
        return
    now = importance * factor
    smoothed = 0.85 * mean + 0.15 * now
    close(tensors[2], smoothed, 1e-15)
    close(tensors[3], 0.7 * uncertainty + 0.3 * (now - smoothed).abs(), 1e-15)


def orthogonality(a, b, factor):
    """The gradients and the value, by autograd in float64."""
    parameters = [matrix.double().requires_grad_() for matrix in [*a, *b]]
    norms = []
    for index, matrix in enumerate(parameters):
        gram = matrix @ matrix.T if index < len(a) else matrix.T @ matrix
        norms.append((gram - torch.eye(gram.shape[0], dtype=torch.float64)).norm())
    value = torch.stack(norms).mean()
    (factor * value).backward()
    return [parameter.grad for parameter in parameters], value.detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [[1], [2, 8, 16], [5, 33], [64]])
def test_the_regulariser_and_its_gradient_are_those_of_autograd(
    device, stream, guarded, numbers, dtype, ranks
):
    a = [numbers(rank, [72, 1100, 130][k], dtype=dtype) for k, rank in enumerate(ranks)]
    b = [numbers([65, 40, 1030][k], rank, dtype=dtype) for k, rank in enumerate(ranks)]
    before = [numbers(*matrix.shape, dtype=dtype) for matrix in [*a, *b]]
    gradients = [guarded.put(gradient) for gradient in before]
    value = _core.cuda_add_orthogonality_gradient_(
        [guarded.put(matrix) for matrix in a],
        [guarded.put(matrix) for matrix in b],
        gradients[: len(a)],
        gradients[len(a) :],
        torch.tensor(3.0, dtype=torch.float64, device=device),
        stream,
    )
    added, want = orthogonality(a, b, 3.0)
    assert value.dtype == torch.float64
    assert abs(value.item() / want.item() - 1.0) < 1e-6
    for got, start, gradient in zip(gradients, before, added, strict=True):
        close(got, start.double() + gradient, 2 * TOLERANCE[dtype])


def test_an_orthonormal_matrix_has_gradient_0(device, stream):
    a, b = torch.eye(2, 8, device=device), torch.zeros(8, 2, device=device)
    grad_a, grad_b = torch.ones_like(a), torch.ones_like(b)
    factor = torch.tensor(1.0, device=device)
    value = _core.cuda_add_orthogonality_gradient_([a], [b], [grad_a], [grad_b], factor, stream)
    assert value.item() == pytest.approx(2**0.5 / 2)
    assert torch.equal(grad_a, torch.ones_like(a)) and torch.equal(grad_b, torch.ones_like(b))


def test_more_modules_than_a_launch_takes_go_in_several(device, stream, numbers):
    # 600 matrices: the second launch begins among the B.
    a = [numbers(1, 8).to(device) for _ in range(300)]
    b = [numbers(4, 1).to(device) for _ in range(300)]
    gradients = [torch.zeros_like(matrix) for matrix in [*a, *b]]
    factor = torch.tensor(1.0, dtype=torch.float64, device=device)
    value = _core.cuda_add_orthogonality_gradient_(a, b, gradients[:300], gradients[300:], factor, stream)
    added, want = orthogonality([m.cpu() for m in a], [m.cpu() for m in b], 1.0)
    assert abs(value.item() / want.item() - 1.0) < 1e-6
    for got, gradient in zip(gradients, added, strict=True):
        close(got, gradient, 1e-5)


def test_a_step_takes_four_launches_for_72_modules(emulated, numbers):
    vectors = [torch.ones(72, dtype=torch.float64) for _ in range(4)]
    assert _core.cuda_smooth_(*vectors, 0.85, 0.85)
    a, b = ([numbers(2, 8) for _ in range(72)], [numbers(8, 2) for _ in range(72)])
    _core.cuda_add_orthogonality_gradient_(a, b, a, b, torch.tensor(1.0))
    assert emulated.emulator_launched().decode().split() == [
        "smooth",
        "orthogonality_gram_f32",
        "orthogonality_residual",
        "orthogonality_gradient_f32",
    ]


def test_the_fused_kernels_are_taken_where_they_can(emulated, numbers):
    x, a = numbers(3, 72), numbers(9, 72)
    _, mask = _core.cuda_down(x, a, 1.0, 0.5, 1)
    _core.cuda_add_grad_x(x.clone(), True, numbers(3, 9), a, mask, 1.0)
    assert emulated.emulator_launched().decode().split() == ["down_16_f32", "add_grad_x_f32"]


@pytest.mark.parametrize("ranks", [(65, 2), (2, 65)])
def test_a_rank_that_is_too_large_is_not_taken_and_changes_nothing(device, stream, ranks):
    a, b = [torch.ones(ranks[0], 8, device=device)], [torch.ones(8, ranks[1], device=device)]
    gradients = [torch.zeros_like(a[0])], [torch.zeros_like(b[0])]
    factor = torch.tensor(1.0, device=device)
    assert _core.cuda_add_orthogonality_gradient_(a, b, *gradients, factor, stream) is None
    assert not gradients[0][0].any() and not gradients[1][0].any()


def test_float64_is_not_taken(device, stream):
    x = torch.ones(2, 8, dtype=torch.float64, device=device)
    assert _core.cuda_draw_mask(x, 0.5, 1, stream=stream) is None
    assert _core.cuda_down(x, x, 1.0, 0.5, 1, stream=stream) is None
    assert _core.cuda_add_grad_x(x, True, x, x, None, 1.0, stream) is False


def test_arguments_that_do_not_fit_are_refused_by_name(device, stream):
    x, a = torch.ones(2, 8, device=device), torch.ones(3, 8, device=device)
    mask = torch.zeros(2, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="A has shape"):
        _core.cuda_down(x, a[:, :4], 1.0, 0.5, 1, stream=stream)
    with pytest.raises(TypeError, match="A has dtype"):
        _core.cuda_down(x, a.half(), 1.0, 0.5, 1, stream=stream)
    with pytest.raises(ValueError, match="mask has shape"):
        _core.cuda_apply_mask(x, mask[:1], stream)
    with pytest.raises(ValueError, match="u has shape"):
        _core.cuda_add_grad_x(x, True, a, a, mask, 1.0, stream)
    with pytest.raises(ValueError, match="slot is 2"):
        vector = torch.zeros(2, dtype=torch.float64, device=device)
        _core.cuda_importance_(
            vector, 2, torch.ones(4, 3, device=device), a, torch.ones(2, 4, device=device), x, 1.0
        )
    with pytest.raises(TypeError, match="mean has dtype"):
        vector = torch.zeros(2, dtype=torch.float64, device=device)
        _core.cuda_smooth_(vector, vector, vector.float(), vector, 0.5, 0.5, stream)
    with pytest.raises(ValueError, match="grad_b has 0 entries"):
        _core.cuda_add_orthogonality_gradient_([a], [x], [a], [], torch.tensor(1.0, device=device), stream)
