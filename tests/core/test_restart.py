"""The restart warm-up of new components (src/policies/restart.rs): row by row against the formulas, and a
grown parameter against a fresh one with an optimizer and a learning rate of its own.
"""

import math

import pytest
import torch
from increlora_rs import _core
from table_ids import describe
from torch import Tensor

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCES = [(F64, 1e-10), (F32, 1e-5), (BF16, 1e-2), (FP16, 2e-3)]
SETTINGS = [
    pytest.param({}, id="nothing"),
    pytest.param({"multiplier": 0.6, "lr_warmup": 10, "linear_until": 100}, id="linear"),
    pytest.param({"multiplier": 0.6, "lr_warmup": 0, "linear_until": 100}, id="linear without warm-up"),
    pytest.param({"multiplier": 0.6, "lr_warmup": 10, "linear_until": 32}, id="linear that ends too soon"),
    pytest.param({"multiplier": 0.6, "lr_warmup": 10}, id="other schedule"),
    pytest.param({"multiplier": 0.6, "lr_warmup": 0}, id="other schedule without warm-up"),
    pytest.param({"multiplier": 0.0, "lr_warmup": 10, "linear_until": 100}, id="stopped"),
    pytest.param({"betas": (0.9, 0.999)}, id="bias correction alone"),
    pytest.param({"betas": (0.0, 0.5), "adam_lead": 9}, id="bias correction after a lead"),
    pytest.param({"decay": 0.02}, id="decay alone"),
    pytest.param(
        {
            "multiplier": 0.6,
            "lr_warmup": 10,
            "linear_until": 100,
            "betas": (0.9, 0.99),
            "adam_lead": 3,
            "decay": 0.02,
        },
        id="all together",
    ),
]
STEP = 30
BIRTHS = [0, 1, 12, 19, 20, 21, 29, 30]


def new_multiplier(age, birth, multiplier, warmup, until) -> float:
    """m_new(j) of the spec."""
    if multiplier == 0:
        return 0.0
    if age < warmup:
        return age / warmup * (1.0 if until is not None else multiplier)
    if until is None:
        return multiplier
    whole = until - birth - warmup
    return (until - birth - age) / whole if whole > 0 else 0.0


def bias_ratio(age, count, beta1, beta2) -> float:
    if age == 0:
        return 1.0
    own = math.sqrt(1 - beta2**age) / (1 - beta1**age)
    return own * (1 - beta1**count) / math.sqrt(1 - beta2**count)


def corrected(
    new, old, birth, multiplier=None, lr_warmup=0, linear_until=None, betas=None, adam_lead=0, decay=0.0
):
    """A row born at `birth`, which the optimizer took from `old` to `new`."""
    if birth == 0:
        return new
    age = STEP - birth
    update = old * (1 - decay) - new
    rate = bias = 1.0
    if multiplier is not None:
        wanted = new_multiplier(age, birth, multiplier, lr_warmup, linear_until)
        rate = wanted / multiplier if multiplier > 0 else 0.0
    if betas is not None:
        bias = bias_ratio(age, STEP + adam_lead, *betas)
    return old * (1 - rate * decay) - rate * bias * update


def draw(rows, columns, dtype=F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(rows, columns, generator=generator, dtype=F64)
    new = old + 0.3 * torch.randn(rows, columns, generator=generator, dtype=F64)
    return new.to(dtype), old.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=describe)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("options", SETTINGS)
def test_each_row_follows_the_formula(options, dim, dtype, tolerance):
    new, old = draw(len(BIRTHS), 7, dtype)
    rows = [corrected(n, o, b, **options) for n, o, b in zip(new.to(F64), old.to(F64), BIRTHS, strict=True)]
    want = torch.stack(rows)
    parameter = new.clone() if dim == 0 else new.T.contiguous()
    before = old if dim == 0 else old.T.contiguous()
    _core.restart_([(parameter, before, BIRTHS, dim)], STEP, **options)
    got = (parameter if dim == 0 else parameter.T).to(F64)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, FP16])
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_from_the_start_keep_every_bit(dim, dtype):
    new, old = draw(40, 40, dtype)
    births = [0, 25] * 20
    parameter = new.clone()
    options = SETTINGS[-1].values[0]
    _core.restart_([(parameter, old, births, dim)], STEP, **options)
    assert torch.equal(parameter.movedim(dim, 0)[::2], new.movedim(dim, 0)[::2])


def test_the_value_before_the_step_stays():
    new, old = draw(2, 3)
    _core.restart_([(new, old, [0, 25], 0)], STEP, multiplier=0.5, lr_warmup=10)
    assert torch.equal(old, draw(2, 3)[1])


def test_several_parameters_are_corrected_each_by_its_own():
    (first, first_old), (second, second_old) = draw(2, 3), draw(4, 2)
    entries = [(first, first_old, [0, 25], 0), (second, second_old, [0, 25], 1)]
    _core.restart_(entries, STEP, multiplier=0.5, lr_warmup=10)
    torch.testing.assert_close(first[1], (draw(2, 3)[0][1] + first_old[1]) / 2)
    torch.testing.assert_close(second[:, 1], (draw(4, 2)[0][:, 1] + second_old[:, 1]) / 2)


def test_strided_parameters_are_corrected_in_place():
    new, old = draw(2, 3)
    storage = torch.zeros(3, 4, dtype=F64)
    view = storage.T[::2]
    view.copy_(new)
    _core.restart_([(view, old, [0, 25], 0)], STEP, multiplier=0.5, lr_warmup=10)
    torch.testing.assert_close(storage[:, 2], (new[1] + old[1]) / 2)


def test_leaves_that_require_gradients_are_corrected():
    new, old = draw(2, 3)
    parameter = torch.nn.Parameter(new.clone())
    _core.restart_([(parameter, old, [0, 25], 0)], STEP, multiplier=0.5, lr_warmup=10)
    torch.testing.assert_close(parameter.detach()[1], (new[1] + old[1]) / 2)


def test_no_parameters_are_no_error():
    assert _core.restart_([], STEP, multiplier=0.5, lr_warmup=10) is None


LAST, BORN, WARMUP, RATE = 60, 20, 8, 0.05


def linear(step) -> float:
    return step / WARMUP if step < WARMUP else (LAST - step) / (LAST - WARMUP)


def linear_of_newborns(age) -> float:
    return age / WARMUP if age < WARMUP else (LAST - BORN - age) / (LAST - BORN - WARMUP)


def cosine(step) -> float:
    return step / WARMUP if step < WARMUP else 0.5 + 0.5 * math.cos(math.pi * step / LAST)


def cosine_of_newborns(age) -> float:
    return min(1.0, age / WARMUP) * cosine(BORN + age)


def adam(kind, **options):
    betas = options.pop("betas", (0.9, 0.999))

    def make(parameters):
        return kind(parameters, lr=RATE, betas=betas, eps=1e-30, **options)

    return make, betas


def sgd(**options):
    return lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9, **options), None


OPTIMIZERS = {
    "AdamW": (*adam(torch.optim.AdamW, weight_decay=0.3), 0.3),
    "AdamW, other betas": (*adam(torch.optim.AdamW, weight_decay=0.3, betas=(0.5, 0.8)), 0.3),
    "AdamW, amsgrad": (*adam(torch.optim.AdamW, weight_decay=0.3, amsgrad=True), 0.3),
    "Adam": (*adam(torch.optim.Adam), 0.0),
    "Adam, weight decay in the gradient": (*adam(torch.optim.Adam, weight_decay=0.3), 0.0),
    "SGD": (*sgd(), 0.0),
    "SGD, weight decay in the gradient": (*sgd(weight_decay=0.3), 0.0),
    "SGD, Nesterov": (*sgd(nesterov=True), 0.0),
}
SCHEDULES = {
    "linear": (linear, linear_of_newborns, {"linear_until": LAST}),
    "cosine": (cosine, cosine_of_newborns, {}),
}


def gradients(rows, columns) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(LAST + 10, rows, columns, generator=generator, dtype=F64)


def take_step(optimizer, parameter, gradient, multiplier) -> None:
    optimizer.param_groups[0]["lr"] = RATE * multiplier
    parameter.grad = gradient.clone()
    optimizer.step()


def grow(optimizer, parameter, newborn, dim) -> torch.nn.Parameter:
    """A parameter longer by `newborn`, its moments by zeros."""
    grown = torch.nn.Parameter(torch.cat([parameter.detach(), newborn], dim))
    state = optimizer.state.pop(parameter)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[name] = torch.cat([value, torch.zeros_like(newborn)], dim)
    optimizer.state[grown] = state
    optimizer.param_groups[0]["params"] = [grown]
    return grown


def train_grown(make, betas, decay, schedule, dim, lead=0) -> Tensor:
    """The parameter after all steps: two rows from the start, one grown after step BORN."""
    multiplier, _, until = schedule
    gradient = gradients(3, 5)
    start = torch.ones(2, 5, dtype=F64)
    parameter = torch.nn.Parameter(start if dim == 0 else start.T.contiguous())
    optimizer = make([parameter])
    births = [0, 0]
    for step in range(1 - lead, LAST + 1):
        rows = gradient[step + lead - 1][: len(births)]
        m = multiplier(step) if step > 0 else 0.0
        before = parameter.detach().clone()
        take_step(optimizer, parameter, rows if dim == 0 else rows.T, m)
        if step > 0:
            options = {"multiplier": m, "lr_warmup": WARMUP, "betas": betas, "adam_lead": lead} | until
            _core.restart_(
                [(parameter.detach(), before, births, dim)], step, **options, decay=RATE * m * decay
            )
        if step == BORN:
            newborn = torch.full((1, 5), 0.7, dtype=F64)
            parameter = grow(optimizer, parameter, newborn if dim == 0 else newborn.T, dim)
            births = [0, 0, BORN]
    return parameter.detach() if dim == 0 else parameter.detach().T


def train_fresh(make, schedule, lead=0) -> Tensor:
    """The newborn row alone, with an optimizer and a learning rate of its own."""
    parameter = torch.nn.Parameter(torch.full((1, 5), 0.7, dtype=F64))
    optimizer = make([parameter])
    for age in range(1, LAST - BORN + 1):
        take_step(optimizer, parameter, gradients(3, 5)[BORN + lead + age - 1][2:], schedule[1](age))
    return parameter.detach()


def train_old(make, schedule, lead=0) -> Tensor:
    """The rows from the start, never grown."""
    parameter = torch.nn.Parameter(torch.ones(2, 5, dtype=F64))
    optimizer = make([parameter])
    for step in range(1 - lead, LAST + 1):
        rows = gradients(3, 5)[step + lead - 1][:2]
        take_step(optimizer, parameter, rows, schedule[0](step) if step > 0 else 0.0)
    return parameter.detach()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_newborn_row_trains_as_a_fresh_parameter(optimizer, schedule, dim):
    make, betas, decay = OPTIMIZERS[optimizer]
    grown = train_grown(make, betas, decay, SCHEDULES[schedule], dim)
    torch.testing.assert_close(grown[2:], train_fresh(make, SCHEDULES[schedule]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_old_rows_train_as_if_nothing_had_grown(optimizer):
    make, betas, decay = OPTIMIZERS[optimizer]
    grown = train_grown(make, betas, decay, SCHEDULES["linear"], 0)
    torch.testing.assert_close(grown[:2], train_old(make, SCHEDULES["linear"]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_steps_before_the_first_counted_one_do_not_matter_to_a_newborn_row(optimizer):
    make, betas, decay = OPTIMIZERS[optimizer]
    grown = train_grown(make, betas, decay, SCHEDULES["linear"], 0, lead=7)
    fresh = train_fresh(make, SCHEDULES["linear"], lead=7)
    torch.testing.assert_close(grown[2:], fresh, rtol=1e-10, atol=1e-12)


def test_without_the_correction_a_newborn_row_is_far_from_a_fresh_one():
    make, _, _ = OPTIMIZERS["AdamW"]
    schedule = SCHEDULES["linear"]
    uncorrected = train_grown(make, None, 0.0, (schedule[0], schedule[1], {}), 0)
    difference = (uncorrected[2:] - train_fresh(make, schedule)).abs().max()
    assert float(difference) > 1e-3


MATRIX = torch.zeros(2, 4)
GOOD = (MATRIX, MATRIX, [0, 3], 0)


@pytest.mark.parametrize(
    ("name", "entry", "error"),
    [
        ("parameter", (torch.zeros(4), torch.zeros(4), [0], 0), ValueError),
        ("parameter", (torch.zeros(1, 2, 4), MATRIX, [0, 3], 0), ValueError),
        ("parameter", (MATRIX.long(), MATRIX, [0, 3], 0), TypeError),
        ("parameter", (MATRIX.to(torch.complex64), MATRIX, [0, 3], 0), TypeError),
        ("old", (MATRIX, torch.zeros(1, 4), [0, 3], 0), ValueError),
        ("old", (MATRIX, torch.zeros(8), [0, 3], 0), ValueError),
        ("old", (MATRIX, MATRIX.long(), [0, 3], 0), TypeError),
        ("old", (MATRIX, MATRIX.to("meta"), [0, 3], 0), ValueError),
        ("births", (MATRIX, MATRIX, [0], 0), ValueError),
        ("births", (MATRIX, MATRIX, [0, 3], 1), ValueError),
        ("dim", (MATRIX, MATRIX, [0, 3], 2), ValueError),
        ("dim", (MATRIX, MATRIX, [0, 3], -1), ValueError),
        ("parameters", (None, MATRIX, [0, 3], 0), TypeError),
        ("parameters", (MATRIX, MATRIX, "ab", 0), TypeError),
        ("parameters", (MATRIX, MATRIX, [0.5, 3], 0), TypeError),
        ("parameters", (MATRIX, MATRIX, [0, 3]), (TypeError, ValueError)),
        ("parameters", [MATRIX, MATRIX, [0, 3], 0], TypeError),
        ("parameters", MATRIX, TypeError),
    ],
    ids=describe,
)
def test_a_bad_entry_is_refused_by_name(name, entry, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        _core.restart_([entry], STEP, multiplier=0.5, lr_warmup=10)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("step", 1.5, TypeError),
        ("step", None, TypeError),
        ("multiplier", math.nan, ValueError),
        ("multiplier", math.inf, ValueError),
        ("multiplier", "1", TypeError),
        ("lr_warmup", None, TypeError),
        ("linear_until", 1.5, TypeError),
        ("betas", (1.0, 0.999), ValueError),
        ("betas", (0.9, 1.0), ValueError),
        ("betas", (-0.1, 0.999), ValueError),
        ("betas", (0.9, math.nan), ValueError),
        ("betas", (0.9,), (TypeError, ValueError)),
        ("betas", 0.9, TypeError),
        ("decay", math.nan, ValueError),
        ("decay", math.inf, ValueError),
        ("decay", None, TypeError),
        ("adam_lead", 1.5, TypeError),
    ],
    ids=describe,
)
def test_a_bad_number_is_refused_by_name(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        _core.restart_(**{"parameters": [GOOD], "step": STEP, name: value})


@pytest.mark.parametrize("name", ["step", "lr_warmup", "linear_until", "adam_lead"])
def test_a_negative_count_is_an_overflow(name):
    with pytest.raises(OverflowError):
        _core.restart_(**{"parameters": [GOOD], "step": STEP, name: -1})


def test_a_negative_birth_is_an_overflow():
    with pytest.raises(OverflowError):
        _core.restart_([(MATRIX, MATRIX, [0, -1], 0)], STEP)


def test_a_refused_call_corrects_nothing():
    new, old = draw(2, 3)
    entries = [(new, old, [0, 25], 0), (torch.zeros(2, 3), old, [0], 0)]
    with pytest.raises(ValueError, match="births"):
        _core.restart_(entries, STEP, multiplier=0.5, lr_warmup=10)
    assert torch.equal(new, draw(2, 3)[0])


# Parameters that are held over the steps.


@pytest.mark.parametrize("dtype", [F64, F32, BF16, FP16])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("options", SETTINGS)
def test_newborn_rows_are_kept_and_corrected_as_with_their_old_values(options, dim, dtype):
    new, old = draw(len(BIRTHS), 7, dtype)
    if dim == 1:
        new, old = new.T.contiguous(), old.T.contiguous()
    parameter, want = torch.nn.Parameter(old.clone()), new.clone()
    newborns = _core.Newborns([(parameter, BIRTHS, dim)])
    newborns.keep()
    with torch.no_grad():
        parameter.copy_(new)
    newborns.correct(STEP, **options)
    _core.restart_([(want, old, BIRTHS, dim)], STEP, **options)
    assert torch.equal(parameter.detach(), want)


def test_each_step_is_corrected_from_what_was_kept_last():
    parameter = torch.zeros(2, 3)
    newborns = _core.Newborns([(parameter, [0, 25], 0)])
    for _ in range(3):
        newborns.keep()
        parameter += 1.0
        newborns.correct(STEP, multiplier=0.5, lr_warmup=10)
    assert parameter.tolist() == [[3.0] * 3, [1.5] * 3]


def test_strided_parameters_are_kept_and_corrected():
    storage = torch.zeros(3, 4)
    view = storage.T[::2]
    newborns = _core.Newborns([(view, [0, 25], 0)])
    newborns.keep()
    view += 1.0
    newborns.correct(STEP, multiplier=0.5, lr_warmup=10)
    assert storage.T.tolist() == [[1.0] * 3, [0.0] * 3, [0.5] * 3, [0.0] * 3]


def test_parameters_without_newborn_rows_are_left_alone():
    parameter = torch.zeros(2, 3)
    newborns = _core.Newborns([(parameter, [0, 0], 0)])
    newborns.keep()
    parameter += 1.0
    newborns.correct(STEP, multiplier=0.5, lr_warmup=10)
    assert torch.equal(parameter, torch.ones(2, 3))


def test_a_held_parameter_may_change_its_dtype():
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    newborns = _core.Newborns([(parameter, [0, 25], 0)])
    parameter.data = parameter.data.double()
    newborns.keep()
    parameter.data += 1.0
    newborns.correct(STEP, multiplier=0.5, lr_warmup=10)
    assert parameter.tolist() == [[1.0] * 3, [0.5] * 3]


def test_a_held_parameter_that_lost_its_newborn_rows_is_an_error():
    parameter = torch.zeros(4, 3)
    newborns = _core.Newborns([(parameter, [0, 25, 25, 25], 0)])
    parameter.set_(torch.zeros(2, 3))
    with pytest.raises((ValueError, RuntimeError)):
        newborns.keep()


@pytest.mark.parametrize(
    ("name", "entry", "error"),
    [
        ("parameter", (torch.zeros(4), [0], 0), ValueError),
        ("parameter", (MATRIX.long(), [0, 3], 0), TypeError),
        ("births", (MATRIX, [0], 0), ValueError),
        ("dim", (MATRIX, [0, 3], 2), ValueError),
        ("parameters", (MATRIX, "ab", 0), TypeError),
        ("parameters", (MATRIX, [0, 3]), (TypeError, ValueError)),
        ("parameters", MATRIX, TypeError),
    ],
    ids=describe,
)
def test_a_bad_newborn_is_refused_by_name(name, entry, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        _core.Newborns([entry])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("multiplier", math.nan, ValueError), ("betas", (0.9,), (TypeError, ValueError))],
)
def test_a_bad_correction_is_refused_by_name(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        _core.Newborns([(MATRIX, [0, 3], 0)]).correct(STEP, **{name: value})
