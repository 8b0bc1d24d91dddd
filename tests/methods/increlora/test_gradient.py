"""importance="gradient": scores, directions and what they survive, against the
gradients of the weights themselves."""

import io
import itertools

import numpy as np
import peft
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, attach, export_lora
from increlora_rs.training import checkpoint as saved_state
from increlora_rs.training.checkpoint import KEY as STATE_KEY
from increlora_rs.training.modules import adapted_modules
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

# No wider than the sketch is deep, so that it is exact.
WIDTHS = (6, 8, 7, 5)
GRADIENT = {"importance": "gradient", "tinit": 4, "deltaT": 5, "top_h": 1, "importance_window": 3}
GROWTH = 5


class Chain(nn.Module):
    """Linear maps with tanh between them, of the given widths."""

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(widths))

    def forward(self, x):
        for layer in self.maps[:-1]:
            x = torch.tanh(layer(x))
        return self.maps[-1](x)


class Kinds(nn.Module):
    """A module of each kind that can be adapted; takes token numbers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 6, padding_idx=0, scale_grad_by_freq=True)
        self.signal = nn.Conv1d(6, 5, 3, padding=1)
        self.transposed = Conv1D(7, 5)
        self.plain = nn.Linear(7, 5)

    def forward(self, ids):
        x = self.signal(self.words(ids).transpose(1, 2)).transpose(1, 2)
        return self.plain(torch.tanh(self.transposed(torch.tanh(x).contiguous())))


def of_kinds(dtype=torch.float64, **kwargs):
    targets = ["words", "signal", "transposed", "plain"]
    return adapted(Kinds, target_modules=targets, dtype=dtype, **kwargs)


def adapted(build=Chain, dtype=torch.float64, seed=3, **kwargs):
    torch.manual_seed(seed)
    targets = [f"maps.{i}" for i in range(len(WIDTHS) - 1)]
    options = {"r": 3, "lora_alpha": 6, "target_modules": targets} | GRADIENT | kwargs
    return peft.get_peft_model(build(), growing(**options)).to(dtype)


def adamw(model, **kwargs):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **kwargs)


def batch(t, model, n=12):
    generator = torch.Generator().manual_seed(t)
    if isinstance(model.get_base_model(), Kinds):
        x = torch.randint(0, 9, (n, 4), generator=generator)
        return x, torch.randn(n, 4, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(n, WIDTHS[0], generator=generator, dtype=torch.float64)
    return x, torch.sin(3 * x[:, : WIDTHS[-1]])


def loss_of(model, t, rows=slice(None)):
    x, y = batch(t, model)
    dtype = next(model.parameters()).dtype
    x = x.to(dtype) if x.is_floating_point() else x
    return nn.functional.mse_loss(model(x[rows]), y[rows].to(dtype))


def train(model, optimizer, first, last):
    for t in range(first, last + 1):
        loss_of(model, t).backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def outside_the_factors(module, gradient, rank=1):
    """``(1 - P_B) G (1 - P_A)`` of the first ``rank`` components, by pseudo-inverses."""
    a, b = module.factors[0].detach()[:rank], module.factors[1].detach()[:, :rank]
    left = torch.eye(len(b), dtype=b.dtype) - b @ torch.linalg.pinv(b)
    right = torch.eye(a.shape[1], dtype=a.dtype) - torch.linalg.pinv(a) @ a
    return left @ gradient @ right


def weight_gradients(model, modules, t, seed):
    """The gradient (out, in) of each module's weight, by autograd on the weight itself."""
    torch.manual_seed(seed)
    bases = [module.layer.get_base_layer() for module in modules]
    for base in bases:
        base.weight.requires_grad_(True)
    loss_of(model, t).backward()
    found = []
    for module, base in zip(modules, bases, strict=True):
        gradient = base.weight.grad
        turned = module.layer.kind in ("embedding", "transposed")
        found.append(gradient.t() if turned else gradient.flatten(1))
        base.weight.requires_grad_(False)
        base.weight.grad = None
    model.zero_grad()
    return found


def train_to_the_growth(model, optimizer):
    """Trains to the first growth; the mean gradient of each module's weight over the window before it."""
    modules = adapted_modules(model, "default")
    probe = modules[0].layer.probes["default"]
    sums = [0.0] * len(modules)
    for t in range(1, GROWTH + 1):
        if t > GROWTH - GRADIENT["importance_window"]:
            # The scheduler must not see the pass beside the training.
            probe.arm(False)
            sums = [s + g for s, g in zip(sums, weight_gradients(model, modules, t, t), strict=True)]
            probe.arm(True)
        torch.manual_seed(t)
        train(model, optimizer, t, t)
    return list(zip(modules, [total / GRADIENT["importance_window"] for total in sums], strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("make", [adapted, of_kinds])
def test_scores_are_the_leading_singular_values_of_the_windows_mean_gradient(make, dropout):
    model = make(lora_dropout=dropout)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    for module, gradient in train_to_the_growth(model, optimizer):
        want = torch.linalg.svdvals(outside_the_factors(module, gradient))[0]
        assert scheduler.scores[module.name] == pytest.approx(float(want), rel=1e-6), module.name
    assert scheduler.history["importance"][0] == max(scheduler.scores.values())


def test_scores_are_zero_before_the_first_growth_and_stay_until_the_next():
    model = adapted()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, GROWTH - 1)
    assert list(scheduler.scores.values()) == [0.0] * 3
    train(model, optimizer, GROWTH, GROWTH)
    scores = scheduler.scores
    assert all(score > 0 for score in scores.values())
    train(model, optimizer, GROWTH + 1, 2 * GROWTH - 1)
    assert scheduler.scores == scores
    train(model, optimizer, 2 * GROWTH, 2 * GROWTH)
    assert scheduler.scores != scores


@pytest.mark.parametrize(
    ("window", "asked"), [(3, [3, 4, 5, 8, 9, 10]), (None, range(1, 11)), ("auto", range(1, 11))]
)
def test_sketches_are_of_the_window_only(window, asked):
    model = adapted(importance_window=window)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=100)
    probe = adapted_modules(model, "default")[0].layer.probes["default"]
    seen = []
    for t in range(1, 11):
        if probe.armed:
            seen.append(t)
        train(model, optimizer, t, t)
    assert seen == list(asked)


def test_the_scores_choose_who_grows():
    model = adapted(top_h=2)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, GROWTH)
    best = sorted(scheduler.scores, key=scheduler.scores.get)[-2:]
    assert set(scheduler.history["module"]) == set(best)


@pytest.mark.parametrize("make", [adapted, of_kinds])
def test_the_budget_is_met(make):
    model = make(importance_window="auto", top_h=None, dtype=torch.float32)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, 100)
    assert scheduler.total_rank == scheduler.budget
    assert all(torch.isfinite(p).all() for p in parameters(model).values())


def test_the_paper_form_grows_by_the_gradient_too():
    torch.manual_seed(3)
    targets = ["maps.0", "maps.1", "maps.2"]
    config = IncreLoraConfig.paper(r=3, target_modules=targets, importance="gradient")
    model = peft.get_peft_model(Chain(), config)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, 100)
    assert scheduler.total_rank == scheduler.budget
    assert (scheduler.history["importance"] > 0).all()


def test_accumulated_micro_batches_count_as_their_sum():
    scores = []
    for parts in (1, 4):
        model = adapted()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scheduler = attach(model, optimizer, total_steps=100)
        for t in range(1, GROWTH + 1):
            for part in range(parts):
                (loss_of(model, t, slice(part * 12 // parts, (part + 1) * 12 // parts)) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        scores.append(list(scheduler.scores.values()))
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_a_pass_once(reentrant):
    scores = []
    for checkpointed in (False, True):
        model = adapted()
        optimizer = adamw(model)
        scheduler = attach(model, optimizer, total_steps=100)
        for t in range(1, GROWTH + 1):
            x, y = batch(t, model)
            x.requires_grad_()
            out = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            nn.functional.mse_loss(out, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        scores.append(scheduler.scores)
    assert scores[0] == scores[1]


def test_a_module_that_is_used_twice_gets_the_sum_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(6, 6)

        def forward(self, x):
            return self.plain(torch.tanh(self.plain(x)))[:, :5]

    model = adapted(Twice, target_modules=["plain"])
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    ((module, gradient),) = train_to_the_growth(model, optimizer)
    want = torch.linalg.svdvals(outside_the_factors(module, gradient))[0]
    assert scheduler.scores["plain"] == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("kind", ["bfloat16 base", "autocast"])
def test_lower_precision_gives_scores_near_those_of_float32(kind):
    scores = {}
    for narrow in (False, True):
        model = adapted(dtype=torch.float32)
        if narrow and kind == "bfloat16 base":
            for layer in model.get_base_model().maps:
                layer.get_base_layer().to(torch.bfloat16)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        scheduler = attach(model, optimizer, total_steps=100)
        for t in range(1, GROWTH + 1):
            x, y = batch(t, model)
            x = x.to(torch.bfloat16 if narrow and kind == "bfloat16 base" else torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow and kind == "autocast"):
                loss = nn.functional.mse_loss(model(x).float(), y.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        scores[narrow] = list(scheduler.scores.values())
    assert scores[True] == pytest.approx(scores[False], rel=0.05)


# Loss scaling.


def scaled_step(model, optimizer, scaler, t, factor=1.0):
    scaler.scale(loss_of(model, t) * factor).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
def test_scores_do_not_depend_on_the_loss_scale(fused):
    scores = []
    for scale in (1.0, 4096.0):
        model = adapted(dtype=torch.float32)
        optimizer = adamw(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        scheduler = attach(model, optimizer, total_steps=100, scaler=scaler)
        for t in range(1, GROWTH + 1):
            scaled_step(model, optimizer, scaler, t)
        scores.append(list(scheduler.scores.values()))
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert all(score > 0 for score in scores[0])


def test_a_step_that_the_scaler_leaves_out_is_in_no_sketch():
    def run(overflow):
        model = adapted(dtype=torch.float32)
        optimizer = adamw(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
        scheduler = attach(model, optimizer, total_steps=100, scaler=scaler)
        for t in range(1, GROWTH + 1):
            if t == GROWTH - 1 and overflow:
                scaled_step(model, optimizer, scaler, 99, 1e38)
            scaled_step(model, optimizer, scaler, t)
        return list(scheduler.scores.values())

    assert run(True) == pytest.approx(run(False), rel=1e-4)


def test_a_step_that_a_fused_optimizer_leaves_out_is_in_no_sketch():
    def run(steps):
        model = adapted(dtype=torch.float32)
        optimizer = adamw(model, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
        scheduler = attach(model, optimizer, total_steps=100, scaler=scaler)
        for t in steps:
            scaled_step(model, optimizer, scaler, t, 1e38 if t == 99 else 1.0)
        return list(scheduler.scores.values())

    without = run([1, 2, 3, 4, 5])
    assert run([1, 2, 3, 99, 4, 5]) == pytest.approx(without, rel=1e-4)
    assert all(score > 0 for score in without)


def test_a_step_that_is_not_finite_is_left_out_without_a_scaler():
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, GROWTH - 2)
    (loss_of(model, 99) * float("inf")).backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    train(model, optimizer, GROWTH, GROWTH)
    assert all(np.isfinite(score) and score > 0 for score in scheduler.scores.values())


# New components along the gradient.

INITS = {"LoRA's": {}, "svd": {"init_lora_weights": "svd", "advance_learning": False}}


def new_components(init, add_r=2):
    """A module that grew by two components along the gradient, and its mean gradient."""
    model = adapted(add_r=add_r, r=5, **INITS[init])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = attach(model, optimizer, total_steps=100)
    gradients = train_to_the_growth(model, optimizer)
    grown, gradient = next(pair for pair in gradients if pair[0].rank == 1 + add_r)
    assert str(scheduler.history["module"][0]) == grown.name
    return grown, gradient


def test_new_rows_of_a_are_the_right_singular_vectors_as_long_as_loras_random_ones():
    module, gradient = new_components("LoRA's")
    _, _, v = torch.linalg.svd(outside_the_factors(module, gradient))
    assert not module.factors[1][:, 1:].any()
    assert module.factors[2].detach()[1:].tolist() == [[1.0], [1.0]]
    for row, want in zip(module.factors[0].detach()[1:], v, strict=False):
        assert float((row / row.norm()) @ want) == pytest.approx(float(torch.sign(row @ want)), abs=1e-6)
        # Uniform within 1 / sqrt(in): of length 1 / sqrt(3), give or take the draw.
        assert 0.3 < row.norm() < 0.9


def test_new_columns_of_b_are_the_left_ones_and_point_downhill():
    module, gradient = new_components("svd")
    outside = outside_the_factors(module, gradient)
    sigma = torch.linalg.svdvals(outside)
    for j in range(2):
        a, b = module.factors[0].detach()[1 + j], module.factors[1].detach()[:, 1 + j]
        slope = float(b @ gradient @ a / (b.norm() * a.norm()))
        assert slope == pytest.approx(-float(sigma[j]), rel=1e-5)
        assert 0.005 < b.norm() / len(b) ** 0.5 < 0.05


def test_the_first_gradient_of_a_new_e_is_sigma_times_scale_and_norms():
    # At the step of the window itself, one step long: the gradient of E by autograd, before any update.
    model = adapted(importance_window=1, r=5, **INITS["svd"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, GROWTH)
    module = next(m for m in adapted_modules(model, "default") if m.rank == 2)
    loss_of(model, GROWTH).backward()
    scale = module.layer.scaling["default"]
    length = module.factors[0].detach()[1].norm() * module.factors[1].detach()[:, 1].norm()
    want = -scheduler.scores[module.name] * scale * float(length)
    assert float(module.factors[2].grad[1]) == pytest.approx(want, rel=1e-6)


def test_the_first_gradient_of_a_new_b_is_sigma_times_scale_and_norm_along_u():
    model = adapted(importance_window=1, r=5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, GROWTH)
    module = next(m for m in adapted_modules(model, "default") if m.rank == 2)
    loss_of(model, GROWTH).backward()
    want = (
        scheduler.scores[module.name]
        * module.layer.scaling["default"]
        * float(module.factors[0].detach()[1].norm())
    )
    assert float(module.factors[1].grad[:, 1].norm()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("init", INITS)
def test_growth_along_the_gradient_leaves_the_output_as_it_was(init):
    model = adapted(**INITS[init])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    scheduler = attach(model, optimizer, total_steps=100)
    x, _ = batch(1, model)
    before = model(x).detach()
    train(model, optimizer, 1, GROWTH)
    assert scheduler.total_rank == 4
    assert torch.allclose(model(x), before, atol=1e-12)


def test_components_without_a_direction_stay_random():
    # A loss of 0: no gradient has one.
    model = adapted()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    with pytest.warns(UserWarning, match="importance of every module is 0"):
        for _ in range(GROWTH):
            (model(batch(1, model)[0]).sum() * 0.0).backward()
            optimizer.step()
    module = adapted_modules(model, "default")[0]
    assert (module.rank, scheduler.total_rank) == (2, 4)
    assert module.factors[0].detach()[1].isfinite().all() and module.factors[0].detach()[1].norm() > 0.1


# Resuming.


@pytest.mark.parametrize("stop", [3, 4, 5, 13, 14])
@pytest.mark.parametrize("make", [adapted, of_kinds])
def test_a_resumed_training_is_the_uninterrupted_one(make, stop):
    options = {"dtype": torch.float32, "lora_dropout": 0.1}

    def start(seed):
        torch.manual_seed(seed)
        model = make(**options)
        return model, adamw(model)

    model, optimizer = start(1)
    torch.manual_seed(11)
    scheduler = attach(model, optimizer, total_steps=60)
    torch.manual_seed(7)
    for t in range(1, 31):
        train(model, optimizer, t, t)
        if t == stop:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved = {name: torch.load(_through_a_file(part)) for name, part in saved.items()}
            noise = torch.get_rng_state()
    again, optimizer = start(1)
    again.load_state_dict(saved["model"])
    torch.manual_seed(12)
    resumed = attach(again, optimizer, total_steps=60)
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(noise)
    train(again, optimizer, stop + 1, 30)
    assert resumed.history.tolist() == scheduler.history.tolist()
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, parameters(again)[name]), name


def _through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_a_state_saved_inside_an_accumulation_has_its_part_of_the_step():
    def run(stop):
        model = adapted()
        optimizer = adamw(model)
        scheduler = attach(model, optimizer, total_steps=60)
        train(model, optimizer, 1, GROWTH - 1)
        (loss_of(model, GROWTH, slice(0, 6)) / 2).backward()
        if stop:
            state = optimizer.state_dict()
            gradients = [p.grad for p in model.parameters() if p.requires_grad]
            scheduler.detach()
            optimizer = adamw(model)
            scheduler = attach(model, optimizer, total_steps=60)
            optimizer.load_state_dict(state)
            for p, gradient in zip(
                [p for p in model.parameters() if p.requires_grad], gradients, strict=True
            ):
                p.grad = gradient
        (loss_of(model, GROWTH, slice(6, 12)) / 2).backward()
        optimizer.step()
        return scheduler.scores

    assert run(True) == run(False)
    assert all(score > 0 for score in run(True).values())


def test_a_checkpoint_holds_no_empty_sketches():
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=60)
    held = []
    for t in range(1, GROWTH + 1):
        train(model, optimizer, t, t)
        state = saved_state.unpack(optimizer.state_dict()["param_groups"][0][STATE_KEY])
        held.append((state["gauge"] is not None, "sum" in state["policy"]["scores"]))
    assert held == [(False, has) for has in (False, False, True, True, False)]


@pytest.mark.parametrize(("first", "second"), [("sensitivity", "gradient"), ("gradient", "sensitivity")])
def test_a_state_of_the_other_importance_is_told_and_goes_on(first, second):
    def start(importance):
        model = adapted(importance=importance)
        return model, adamw(model)

    model, optimizer = start(first)
    attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 7)
    saved = model.state_dict(), optimizer.state_dict()
    model, optimizer = start(second)
    model.load_state_dict(saved[0])
    scheduler = attach(model, optimizer, total_steps=60)
    with pytest.warns(UserWarning, match=f"importance='{second}', but the run that is resumed had '{first}'"):
        optimizer.load_state_dict(saved[1])
    train(model, optimizer, 8, 60)
    assert scheduler.total_rank == scheduler.budget


# What a model that grew so is afterwards.


def test_the_export_is_a_plain_lora_as_ever(tmp_path):
    model = adapted(dtype=torch.float32, importance_window="auto", top_h=None)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 60)
    scheduler.detach()
    model.save_pretrained(tmp_path / "adapter")
    assert IncreLoraConfig.from_pretrained(str(tmp_path / "adapter")).importance == "gradient"
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    torch.manual_seed(3)
    plain = peft.PeftModel.from_pretrained(Chain(), tmp_path / "lora")
    assert plain.peft_config["default"].peft_type == "LORA"
    x = batch(1, model)[0].float()
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_detaching_lets_the_sketches_go():
    model = adapted()
    scheduler = attach(model, adamw(model), total_steps=60)
    probe = adapted_modules(model, "default")[0].layer.probes["default"]
    gauge = probe.gauge
    assert gauge.total.numel() > 0
    scheduler.detach()
    assert probe.gauge is None
    assert gauge.total.numel() == 0
