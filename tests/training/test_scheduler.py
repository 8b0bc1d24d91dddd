"""The scheduler in a loop written by hand: when and where ranks grow, and that nothing else changes."""

import copy
import itertools
import warnings

import increlora_rs
import numpy as np
import peft
import pytest
import torch
import transformers
from growing import growing
from increlora_rs import IncreLoraConfig, attach
from increlora_rs.training import checkpoint as saved_state
from increlora_rs.training.checkpoint import KEY as STATE_KEY
from increlora_rs.training.modules import adapted_modules
from torch import nn


class Chain(nn.Module):
    """Linear maps with tanh between them, of the given widths."""

    def __init__(self, widths):
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.maps = nn.ModuleList(nn.Linear(n, m) for n, m in pairs)

    def forward(self, x):
        for layer in self.maps[:-1]:
            x = torch.tanh(layer(x))
        return self.maps[-1](x)


WIDTHS = (10, 16, 12, 14, 6)
TARGETS = ["maps.0", "maps.1", "maps.2", "maps.3"]
FORMS = {"default": growing, "paper": IncreLoraConfig.paper}


def adapted(form="default", widths=WIDTHS, seed=3, **kwargs):
    torch.manual_seed(seed)
    targets = [f"maps.{i}" for i in range(len(widths) - 1)]
    # Late, so that ranks grow through most of a training, and after a resume.
    values = {"r": 3, "lora_alpha": 8, "target_modules": targets, "growth_end": 0.6} | kwargs
    config = FORMS[form](**values)
    return peft.get_peft_model(Chain(widths), config)


def adamw(model, **kwargs):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **kwargs)


def batch(t, widths=WIDTHS, n=12):
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(n, widths[0], generator=generator)
    return x, torch.sin(3 * x[:, : widths[-1]])


def train(model, optimizer, first, last, widths=WIDTHS):
    for t in range(first, last + 1):
        x, y = batch(t, widths)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("r", "steps"), [(1, 20), (2, 1), (2, 5), (3, 40), (4, 100), (5, 33), (6, 300)])
def test_budget_is_met_exactly(form, r, steps):
    model = adapted(form, r=r, widths=(10, 16, 12, 14, 8))
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*importance of every module is 0")
        train(model, optimizer, 1, steps, (10, 16, 12, 14, 8))
    assert scheduler.total_rank == scheduler.budget == 4 * r


@pytest.mark.parametrize(
    ("growth_end", "first", "last"), [(growing().growth_end, 20, 40), (0.6, 40, 240), (0.3, 40, 120)]
)
def test_ranks_stay_during_the_warm_up_and_are_full_at_growth_end(growth_end, first, last):
    model = adapted(growth_end=growth_end)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=400)
    train(model, optimizer, 1, first)
    assert scheduler.total_rank == 4
    train(model, optimizer, first + 1, last)
    assert scheduler.total_rank == 12


def test_history_has_a_row_for_each_growth():
    model = adapted()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 60)
    history = scheduler.history
    assert history.dtype.names == ("step", "module", "rank", "importance")
    assert len(history) == 8
    last = {str(row["module"]): int(row["rank"]) for row in history}
    assert last == {name: rank for name, rank in scheduler.ranks.items() if rank > 1}
    assert (np.diff(history["step"]) >= 0).all()


def test_history_is_empty_before_the_first_growth():
    model = adapted()
    assert len(attach(model, adamw(model), total_steps=60).history) == 0


def test_fixed_values_of_the_schedule_are_kept():
    model = adapted(tinit=7, deltaT=5, top_h=2, add_r=1)
    schedule = attach(model, adamw(model), total_steps=100).schedule
    assert (schedule.tinit, schedule.deltaT, schedule.top_h, schedule.add_r) == (7, 5, 2, 1)


def test_exactly_top_h_modules_grow_at_an_event():
    model = adapted(tinit=5, deltaT=5, top_h=3)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, 10)
    assert sorted(scheduler.ranks.values()) == [1, 2, 2, 2]


def test_no_module_passes_max_r():
    model = adapted(max_r=3, tinit=5, deltaT=5, top_h=2)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, 100)
    assert list(scheduler.ranks.values()) == [3, 3, 3, 3]


def test_a_schedule_that_cannot_reach_its_budget_is_announced_with_the_numbers():
    model = adapted(tinit=0, deltaT=50, top_h=1)
    with pytest.warns(UserWarning, match=r"make 12, but from 4 only 6 are sure to be reached in 100 steps"):
        attach(model, adamw(model), total_steps=100)


def test_a_budget_above_the_modules_sizes_is_announced():
    model = adapted(r=11)
    with pytest.warns(UserWarning, match=r"make 44, but their sizes and max_r=None allow 40\. Lower r"):
        attach(model, adamw(model), total_steps=100)


def test_without_a_number_of_steps_the_warning_has_none():
    model = adapted(tinit=0, deltaT=2**61, top_h=1)
    with pytest.warns(UserWarning, match=r"only 6 are sure to be reached with Schedule"):
        attach(model, adamw(model))


@pytest.mark.parametrize(
    ("given", "end"),
    [({"deltaT": 30}, 30), ({"top_h": 1}, 90)],
    ids=["an interval longer than the end", "too few modules a growth"],
)
def test_growth_that_goes_on_past_growth_end_is_announced(given, end):
    model = adapted(growth_end=0.2, **given)
    optimizer = adamw(model)
    ((name, value),) = given.items()
    with pytest.warns(
        UserWarning, match=rf"growth_end=0\.2 is step 20 of 100, but {name}={value} .* to step {end}: "
    ):
        scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, 100)
    assert (scheduler.total_rank, scheduler.history["step"][-1]) == (12, end)


def test_a_warm_up_past_growth_end_moves_it():
    model = adapted(growth_end=0.2, tinit=50)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    assert scheduler.schedule.end == 60
    train(model, optimizer, 1, 60)
    assert scheduler.total_rank == scheduler.budget


def test_ranks_above_the_budget_are_announced_and_stay():
    model = adapted(r=2, rank_pattern={"maps.0": 9})
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match="add up to 12 already, more than the budget of 8"):
        scheduler = attach(model, optimizer, total_steps=30)
    train(model, optimizer, 1, 30)
    assert scheduler.total_rank == 12


def test_two_different_numbers_of_steps_are_told():
    model = adapted(total_step=80)
    with pytest.warns(UserWarning, match="total_step=80 in IncreLoraConfig, but the training has 60 steps"):
        scheduler = attach(model, adamw(model), total_steps=60)
    assert scheduler.schedule.tinit == 6


def test_growth_logs_one_line(caplog):
    model = adapted(tinit=5, deltaT=5, top_h=2)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=100)
    with caplog.at_level("INFO", logger="increlora_rs"):
        train(model, optimizer, 1, 10)
    assert caplog.messages == ["step 10: 2 modules grew, total rank 6 of 12"]


OPTIMIZERS = {
    "adamw_fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "adamw_foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-2, foreach=True),
    "adamw_loop": lambda ps: torch.optim.AdamW(ps, lr=1e-2, foreach=False, amsgrad=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=1e-2),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-2),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_torch_go_on_after_growth(name, form):
    model = adapted(form)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    scheduler = attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 60)
    assert scheduler.total_rank == scheduler.budget
    assert all(torch.isfinite(p).all() for p in parameters(model).values())
    for parameter in parameters(model):
        state = optimizer.state[model.get_parameter(parameter)]
        sized = [v for v in state.values() if isinstance(v, torch.Tensor) and v.dim() == 2]
        assert all(v.shape == model.get_parameter(parameter).shape for v in sized)


FACTORED = {
    "torch": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "transformers": lambda ps: transformers.Adafactor(
        ps, lr=1e-2, relative_step=False, scale_parameter=False
    ),
}


@pytest.mark.parametrize("name", FACTORED)
def test_optimizer_state_that_cannot_follow_starts_anew_with_a_warning(name):
    model = adapted(tinit=5, deltaT=5, top_h=4, init_r=2, r=4)
    optimizer = FACTORED[name]([p for p in model.parameters() if p.requires_grad])
    scheduler = attach(model, optimizer, total_steps=60)
    with pytest.warns(UserWarning, match="optimizer state starts anew"):
        train(model, optimizer, 1, 60)
    assert scheduler.total_rank == scheduler.budget


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("widths", [WIDTHS, (8, 20, 20, 8), (16, 9, 30, 12, 16, 5)])
def test_the_automatic_window_chooses_as_scoring_at_every_step_does(widths, seed):
    chosen = {}
    for window in ("auto", None):
        model = adapted(
            widths=widths,
            seed=seed,
            importance="sensitivity",
            importance_window=window,
            tinit=50,
            deltaT=60,
            top_h=1,
        )
        optimizer = adamw(model)
        scheduler = attach(model, optimizer, total_steps=600)
        train(model, optimizer, 1, 600, widths)
        chosen[window] = scheduler.history[["step", "module"]].tolist()
    assert chosen["auto"] == chosen[None]


def test_importance_is_asked_for_in_the_window_only():
    model = adapted(tinit=99, deltaT=100, top_h=8, importance="sensitivity", importance_window=20)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=300)
    probe = adapted_modules(model, "default")[0].layer.probes["default"]
    asked = []
    for t in range(1, 131):
        asked.append(probe.armed)
        train(model, optimizer, t, t)
    assert [t for t, was in enumerate(asked, 1) if was] == list(range(81, 101))


def test_accumulated_micro_batches_count_as_their_sum():
    scores = []
    for parts in (1, 4):
        model = adapted(importance="sensitivity", importance_window=None)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scheduler = attach(model, optimizer, total_steps=1000)
        x, y = batch(1)
        same = x[:3].repeat(4, 1), y[:3].repeat(4, 1)
        for _ in range(3):
            for part in range(parts):
                rows = slice(part * 12 // parts, (part + 1) * 12 // parts)
                (nn.functional.mse_loss(model(same[0][rows]), same[1][rows]) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        scores.append(list(scheduler.scores.values()))
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert all(score > 0 for score in scores[0])


def test_importance_norm_mean_divides_by_the_size_once_more():
    scores = {}
    for norm in ("sqrt", "mean"):
        model = adapted(importance="sensitivity", importance_window=None, importance_norm=norm)
        optimizer = adamw(model)
        scheduler = attach(model, optimizer, total_steps=1000)
        train(model, optimizer, 1, 5)
        scores[norm] = np.array(list(scheduler.scores.values()))
    sizes = np.array([n * m for n, m in itertools.pairwise(WIDTHS)])
    np.testing.assert_allclose(scores["mean"], scores["sqrt"] / sizes, rtol=1e-6)


def test_a_step_whose_importance_is_not_finite_changes_no_score():
    model = adapted(importance="sensitivity", importance_window=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = attach(model, optimizer, total_steps=1000)
    train(model, optimizer, 1, 5)
    before = scheduler.scores
    x, y = batch(6)
    (nn.functional.mse_loss(model(x), y) * float("inf")).backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert scheduler.scores == before
    train(model, optimizer, 7, 7)
    assert all(np.isfinite(list(scheduler.scores.values())))
    assert scheduler.scores != before


def test_the_regulariser_is_added_after_clipping():
    model = adapted("paper", orth_reg_weight=0.5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    attach(model, optimizer, total_steps=100)
    module = adapted_modules(model, "default")[0]
    expected = module.factors[0].detach().clone().requires_grad_()
    eye = torch.eye(expected.shape[0])
    (0.5 / 8 * torch.linalg.norm(expected @ expected.t() - eye)).backward()
    before = module.factors[0].detach().clone()
    x, y = batch(1)
    (nn.functional.mse_loss(model(x), y) * 0.0).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-12)
    optimizer.step()
    torch.testing.assert_close(before - module.factors[0].detach(), expected.grad)


def test_orth_reg_is_the_value_of_the_spec():
    model = adapted("paper")
    scheduler = attach(model, adamw(model), total_steps=100)
    norms = []
    for module in adapted_modules(model, "default"):
        eye = torch.eye(module.rows)
        norms += [
            torch.linalg.norm(module.factors[0] @ module.factors[0].t() - eye),
            torch.linalg.norm(module.factors[1].t() @ module.factors[1] - eye),
        ]
    assert scheduler.orth_reg == pytest.approx(torch.stack(norms).mean().item(), rel=1e-5)


def test_a_module_that_no_step_uses_keeps_its_parameters():
    model = adapted("paper", importance_window=None)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=100)
    base = model.base_model.model
    unused = adapted_modules(model, "default")[3]
    before = unused.factors[0].detach().clone()
    for t in range(1, 6):
        x, _ = batch(t)
        torch.tanh(base.maps[0](x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(unused.factors[0], before)


def test_a_used_up_importance_is_announced():
    model = adapted(importance="sensitivity", tinit=0, deltaT=1, top_h=1)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=100)
    with pytest.warns(UserWarning, match="importance of every module is 0"):
        train(model, optimizer, 1, 1)


def test_reserve_is_dropped_when_the_budget_is_reached():
    model = adapted("paper")
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=60)
    assert [module.rows for module in adapted_modules(model, "default")] == [2, 2, 2, 2]
    train(model, optimizer, 1, 60)
    rows = {module.name: module.rows for module in adapted_modules(model, "default")}
    assert rows == scheduler.ranks


def test_config_rank_pattern_is_up_to_date_after_growth():
    model = adapted()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 60)
    pattern = model.peft_config["default"].rank_pattern
    assert pattern == {f"^{name}": rank for name, rank in scheduler.ranks.items()}


def test_detach_stops_growth_and_leaves_no_hook():
    model = adapted("paper")
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 25)
    ranks = scheduler.ranks
    scheduler.detach()
    scheduler.detach()
    train(model, optimizer, 26, 60)
    assert scheduler.ranks == ranks
    assert scheduler.step == 25
    assert [module.rows for module in adapted_modules(model, "default")] == list(ranks.values())
    assert STATE_KEY not in optimizer.state_dict()["param_groups"][0]


def test_a_scheduler_can_be_attached_again_after_detach():
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=60).detach()
    assert attach(model, optimizer, total_steps=60).step == 0


# Mistakes.


def test_attaching_twice_raises():
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=60)
    with pytest.raises(ValueError, match=r"attached to this adapter already.*detach"):
        attach(model, optimizer, total_steps=60)


def test_an_unknown_number_of_steps_raises():
    model = adapted()
    with pytest.raises(ValueError, match="total_steps=None"):
        attach(model, adamw(model))


def test_the_number_of_steps_may_stand_in_the_config():
    model = adapted(total_step=60)
    assert attach(model, adamw(model)).schedule.tinit == 6


def test_a_complete_schedule_needs_no_number_of_steps():
    model = adapted(tinit=5, deltaT=5, top_h=4)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer)
    train(model, optimizer, 1, 20)
    assert scheduler.total_rank == scheduler.budget


def test_an_optimizer_without_the_adapters_parameters_raises():
    model = adapted()
    optimizer = torch.optim.AdamW(model.base_model.model.maps[0].base_layer.parameters())
    with pytest.raises(ValueError, match=r"optimizer: it does not hold .*'maps.0'"):
        attach(model, optimizer, total_steps=60)


def test_a_model_without_an_adapter_raises():
    model = Chain(WIDTHS)
    with pytest.raises(ValueError, match="0 trainable adapters of increlora_rs"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=60)


def test_two_trainable_adapters_raise():
    model = adapted()
    model.add_adapter("second", growing(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 trainable adapters of increlora_rs"):
        attach(model, adamw(model), total_steps=60)


def test_a_named_adapter_is_taken_among_several():
    model = adapted()
    model.add_adapter("second", growing(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "second"])
    assert attach(model, adamw(model), total_steps=60, adapter_name="second").budget == 8


def test_an_unknown_adapter_name_raises():
    model = adapted()
    with pytest.raises(ValueError, match="adapter_name='other'"):
        attach(model, adamw(model), total_steps=60, adapter_name="other")


def test_a_merged_adapter_raises():
    model = adapted()
    optimizer = adamw(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        attach(model, optimizer, total_steps=60)


def test_what_is_no_optimizer_raises():
    with pytest.raises(TypeError, match="optimizer: a list"):
        attach(adapted(), [1], total_steps=60)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("total_steps", 0), ("total_steps", -3), ("lr_warmup_steps", -1), ("lr_schedule", "cosine")],
)
def test_a_wrong_argument_is_named(argument, value):
    model = adapted()
    arguments = {"total_steps": 60} | {argument: value}
    with pytest.raises(ValueError, match=f"{argument}={value!r}"):
        attach(model, adamw(model), **arguments)


def test_a_failed_attach_leaves_the_model_attachable():
    model = adapted()
    with pytest.raises(ValueError, match="total_steps"):
        attach(model, adamw(model), total_steps=0)
    assert attach(model, adamw(model), total_steps=60).budget == 12


def test_forgetting_the_scheduler_gives_one_warning_after_50_backward_passes():
    model = adapted()
    optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1, 49)
    with pytest.warns(UserWarning, match="no scheduler attached") as caught:
        train(model, optimizer, 50, 120)
    assert len(caught) == 1


def test_an_attached_scheduler_gives_no_warning():
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=120)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1, 120)


# Resume.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stop", [1, 9, 10, 11, 20, 30, 31, 50])
@pytest.mark.parametrize("order", ["attach first", "load first"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(form, stop, order, tmp_path):
    def begin():
        model = adapted(form, lora_dropout=0.2, deltaT=10, tinit=9, top_h=3)
        return model, adamw(model, weight_decay=0.1)

    def run(model, optimizer, first, last):
        for t in range(first, last + 1):
            torch.manual_seed(1000 + t)
            train(model, optimizer, t, t)

    whole, optimizer = begin()
    uninterrupted = attach(whole, optimizer, total_steps=60, lr_warmup_steps=4)
    run(whole, optimizer, 1, 60)

    model, optimizer = begin()
    attach(model, optimizer, total_steps=60, lr_warmup_steps=4)
    run(model, optimizer, 1, stop)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")

    model, optimizer = begin()
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    if order == "attach first":
        scheduler = attach(model, optimizer, total_steps=60, lr_warmup_steps=4)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if order == "load first":
        scheduler = attach(model, optimizer, total_steps=60, lr_warmup_steps=4)
    run(model, optimizer, stop + 1, 60)

    assert_same(parameters(model), parameters(whole))
    assert scheduler.ranks == uninterrupted.ranks
    assert scheduler.history.tolist() == uninterrupted.history.tolist()


@pytest.mark.filterwarnings("ignore:the state .* of AdamW has shape")
def test_an_optimizer_state_of_other_ranks_than_the_model_raises_at_the_next_step():
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 40)
    state = optimizer.state_dict()
    fresh = adapted()
    optimizer = adamw(fresh)
    attach(fresh, optimizer, total_steps=60)
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="load the adapter of the same checkpoint"):
        train(fresh, optimizer, 41, 41)


@pytest.mark.parametrize(("name", "value"), [("tinit", 7), ("deltaT", 3), ("top_h", 4)])
def test_another_schedule_on_resume_is_told(name, value):
    model = adapted()
    optimizer = adamw(model)
    planned = attach(model, optimizer, total_steps=60).schedule
    state = optimizer.state_dict()
    other = adapted(**{name: value})
    optimizer = adamw(other)
    resumed = attach(other, optimizer, total_steps=60)
    had = getattr(planned, name)
    with pytest.warns(
        UserWarning, match=f"{name}={value}, but the run that is resumed was planned with {had}"
    ):
        optimizer.load_state_dict(state)
    assert getattr(resumed.schedule, name) == had


def test_a_scaler_that_is_none_is_refused():
    model = adapted()
    with pytest.raises(TypeError, match=r"scaler=2\.0 must be a GradScaler or None"):
        attach(model, adamw(model), total_steps=60, scaler=2.0)


def rename_first_module(group, name):
    state = saved_state.unpack(group[STATE_KEY])
    state["modules"][0] = name
    group[STATE_KEY] = saved_state.pack(state)


def test_a_state_of_other_modules_raises():
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=60)
    state = optimizer.state_dict()
    rename_first_module(state["param_groups"][0], "elsewhere")
    fresh = adapted()
    optimizer = adamw(fresh)
    attach(fresh, optimizer, total_steps=60)
    with pytest.raises(ValueError, match="resume with the model and target_modules"):
        optimizer.load_state_dict(state)


def test_a_state_without_a_schedulers_is_announced():
    model = adapted()
    optimizer = adamw(model)
    state = optimizer.state_dict()
    attach(model, optimizer, total_steps=60)
    with pytest.warns(UserWarning, match="holds none of a scheduler"):
        optimizer.load_state_dict(state)


# What counts as a step.


def no_gradients(model, optimizer):
    optimizer.step()


def no_gradients_by_a_closure(model, optimizer):
    optimizer.step(lambda: torch.tensor(0.0))


def a_dropped_batch(model, optimizer):
    x, y = batch(99)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.zero_grad()
    optimizer.step()


def zeros_at_learning_rate_0(model, optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.zero_grad()


IDLE = [no_gradients, no_gradients_by_a_closure, a_dropped_batch, zeros_at_learning_rate_0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("idle", IDLE)
def test_a_step_that_moves_nothing_does_not_count_and_changes_nothing(idle, form):
    def trained(between):
        model = adapted(form)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scheduler = attach(model, optimizer, total_steps=60)
        for t in range(1, 41):
            train(model, optimizer, t, t)
            if between:
                idle(model, optimizer)
        return parameters(model), scheduler.step, scheduler.history.tolist()

    with_idle, without = trained(True), trained(False)
    assert with_idle[1:] == without[1:]
    assert_same(with_idle[0], without[0])


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_the_first_step_of_a_warm_up_counts_though_its_learning_rate_is_0(lr):
    model = adapted()
    optimizer = adamw(model, foreach=False)
    scheduler = attach(model, optimizer, total_steps=60)
    optimizer.param_groups[0]["lr"] = lr
    train(model, optimizer, 1, 1)
    assert scheduler.step == 1


def test_a_step_that_trains_other_parameters_of_the_optimizer_counts():
    model = adapted()
    head = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW([*(p for p in model.parameters() if p.requires_grad), *head.parameters()])
    scheduler = attach(model, optimizer, total_steps=60)
    head(torch.ones(2)).sum().backward()
    optimizer.step()
    assert scheduler.step == 1


def test_a_closure_that_is_called_twice_is_one_step():
    class Twice(torch.optim.Optimizer):
        def step(self, closure):
            closure()
            closure()
            for parameter in self.param_groups[0]["params"]:
                parameter.data.sub_(parameter.grad, alpha=0.1)

    model = adapted()
    optimizer = Twice([p for p in model.parameters() if p.requires_grad], {"lr": 0.1})
    scheduler = attach(model, optimizer, total_steps=60)

    def closure():
        optimizer.zero_grad()
        x, y = batch(1)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert scheduler.step == 1


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflowed_step_does_not_count(fused):
    model = adapted()
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    scheduler = attach(model, optimizer, total_steps=1000, scaler=scaler)
    for factor in (1.0, 1e38, 1.0):
        x, y = batch(1)
        scaler.scale(nn.functional.mse_loss(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scheduler.step == 2


def test_an_overflowed_step_at_a_growth_does_not_grow_again():
    model = adapted(tinit=2, deltaT=3, top_h=1)
    optimizer = adamw(model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    scheduler = attach(model, optimizer, total_steps=1000, scaler=scaler)
    while not len(scheduler.history):
        x, y = batch(scheduler.step)
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    scaler.scale(nn.functional.mse_loss(model(x), y) * 1e38).backward()
    scaler.step(optimizer)
    assert len(scheduler.history) == 1


def test_overflowed_steps_that_a_linear_schedule_counted_leave_it_linear():
    model = adapted()
    optimizer = adamw(model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    steps = 60
    linear = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 - t / steps)
    scheduler = attach(model, optimizer, total_steps=steps, scaler=scaler)
    for t in range(40):
        x, y = batch(t)
        scaler.scale(nn.functional.mse_loss(model(x), y) * (1e38 if t < 8 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        linear.step()
        optimizer.zero_grad()
    assert scheduler.step == 32
    assert scheduler.policy.warmup.was_linear


# The state in the optimizer.


def test_a_printed_optimizer_stays_short():
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 20)
    optimizer.state_dict()
    assert len(str(optimizer)) < 1000


def test_detach_gives_an_optimizer_of_its_own_loading_that_back():
    class Own(torch.optim.SGD):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)

    model = adapted()
    optimizer = Own([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(model, optimizer, total_steps=60).detach()
    assert "load_state_dict" not in vars(optimizer)


def test_the_state_is_one_value_from_the_beginning():
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=60)
    assert isinstance(optimizer.param_groups[0][STATE_KEY], str)
    assert isinstance(optimizer.state_dict()["param_groups"][0][STATE_KEY], str)


def test_a_state_loaded_without_calling_hooks_resumes():
    class Hookless(torch.optim.SGD):
        """Loads as the optimizers of bitsandbytes do."""

        def load_state_dict(self, state_dict):
            groups = [
                new | {"params": old["params"]}
                for old, new in zip(self.param_groups, state_dict["param_groups"], strict=True)
            ]
            self.__setstate__({"state": self.state, "param_groups": groups})

    def begin():
        model = adapted()
        optimizer = Hookless([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return model, optimizer, attach(model, optimizer, total_steps=60)

    whole, optimizer, uninterrupted = begin()
    train(whole, optimizer, 1, 60)
    model, optimizer, _ = begin()
    train(model, optimizer, 1, 20)
    state = model.state_dict(), optimizer.state_dict()
    model, optimizer, scheduler = begin()
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(model, optimizer, 21, 60)
    assert scheduler.history.tolist() == uninterrupted.history.tolist()
    assert_same(parameters(model), parameters(whole))


# Loss scaling.


@pytest.mark.parametrize("fused", [True, False])
def test_scores_and_regulariser_do_not_depend_on_the_loss_scale(fused):
    results = []
    for scale in (1.0, 4096.0):
        model = adapted("paper")
        optimizer = adamw(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        scheduler = attach(model, optimizer, total_steps=1000, scaler=scaler)
        for t in range(1, 9):
            x, y = batch(t)
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((list(scheduler.scores.values()), parameters(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name in results[0][1]:
        torch.testing.assert_close(results[0][1][name], results[1][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflowed_step_changes_no_score_then_or_later(fused):
    def run(overflow):
        model = adapted(importance_window=None)
        optimizer = adamw(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000, backoff_factor=0.5)
        scheduler = attach(model, optimizer, total_steps=1000, scaler=scaler)
        for t in range(1, 9):
            if t == 5 and overflow:
                before = scheduler.scores
                x, y = batch(99)
                scaler.scale(nn.functional.mse_loss(model(x), y) * 1e38).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert scheduler.scores == before
            x, y = batch(t)
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return list(scheduler.scores.values())

    assert run(True) == pytest.approx(run(False), rel=1e-4)


def test_detach_gives_the_scaler_its_update_back():
    model = adapted()
    scaler = torch.amp.GradScaler("cpu")
    attach(model, adamw(model), total_steps=60, scaler=scaler).detach()
    assert "update" not in vars(scaler)


def test_the_package_names_its_version():
    assert increlora_rs.__version__ == "0.1.0"


# The net under optimizers that no scheduler looks after.


@pytest.mark.parametrize("name", ["adamw_fused", "adamw_foreach", "adamw_loop", "sgd"])
def test_state_of_another_shape_is_dropped_with_a_warning_before_the_step(name):
    model = adapted()
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1, 3)
    adapted_modules(model, "default")[1].grow(3, torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="changed its rank without the optimizer"):
        train(model, optimizer, 4, 6)
    assert all(torch.isfinite(p).all() for p in parameters(model).values())


def test_a_smaller_adapter_loaded_under_a_live_optimizer_starts_its_state_anew(tmp_path):
    model = adapted(tinit=5, deltaT=5, top_h=4)
    optimizer = adamw(model, fused=True)
    model.save_pretrained(tmp_path)
    attach(model, optimizer, total_steps=40)
    train(model, optimizer, 1, 20)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.warns(UserWarning, match="changed its rank without the optimizer"):
        train(model, optimizer, 21, 30)
    assert all(torch.isfinite(p).all() for p in parameters(model).values())


def test_a_state_that_was_refused_is_still_there_for_the_right_model():
    model = adapted()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 5)
    checkpoint = optimizer.state_dict()
    scheduler.detach()
    optimizer.load_state_dict(checkpoint)
    rename_first_module(optimizer.param_groups[0], "elsewhere")
    with pytest.raises(ValueError, match="resume with the model and target_modules"):
        attach(model, optimizer, total_steps=60)
    rename_first_module(optimizer.param_groups[0], "maps.0")
    assert attach(model, optimizer, total_steps=60).step == 5


def test_a_second_scheduler_on_one_optimizer_raises():
    first, second = adapted(), adapted(seed=4)
    both = [p for model in (first, second) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(both, lr=1e-2)
    attach(first, optimizer, total_steps=60)
    with pytest.raises(ValueError, match="optimizer: a scheduler is attached to it already"):
        attach(second, optimizer, total_steps=60)


def test_a_larger_r_under_the_old_scale_raises(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(Chain(WIDTHS), tmp_path, is_trainable=True)
    model.peft_config["default"].r = 6
    with pytest.raises(ValueError, match=r"has the scale 2.66667, but r=6 .* make 1.33333"):
        attach(model, adamw(model), total_steps=60)


def test_a_saved_adapter_goes_on_growing_under_a_new_configuration(tmp_path):
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 60)
    model.save_pretrained(tmp_path)
    config = growing(r=5, lora_alpha=40 / 3, target_modules=TARGETS)
    torch.manual_seed(3)
    again = peft.PeftModel.from_pretrained(Chain(WIDTHS), tmp_path, is_trainable=True, config=config)
    x, _ = batch(1)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))
    optimizer = adamw(again.train())
    scheduler = attach(again, optimizer, total_steps=60)
    train(again, optimizer, 1, 60)
    assert scheduler.total_rank == 20


@pytest.mark.parametrize(
    ("argument", "value"),
    [("total_steps", "40"), ("total_steps", True), ("lr_warmup_steps", 4.0), ("lr_warmup_steps", "4")],
)
def test_an_argument_of_a_wrong_type_is_named(argument, value):
    model = adapted()
    with pytest.raises(TypeError, match=f"{argument}={value!r}"):
        attach(model, adamw(model), **({"total_steps": 60} | {argument: value}))


def test_a_copy_of_a_model_in_training_can_be_attached():
    model = adapted()
    attach(model, adamw(model), total_steps=60)
    copied = copy.deepcopy(model)
    assert attach(copied, adamw(copied), total_steps=60).step == 0


def test_a_compiled_model_keeps_its_module_names():
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    assert list(attach(compiled, adamw(model), total_steps=60).ranks) == TARGETS


def test_one_scaler_may_serve_two_schedulers():
    scaler = torch.amp.GradScaler("cpu")
    models = [adapted(), adapted(seed=4)]
    schedulers = [attach(m, adamw(m), total_steps=60, scaler=scaler) for m in models]
    for scheduler in schedulers:
        scheduler.detach()
    scaler.scale(torch.ones(1))
    scaler.update(2.0)
    assert scaler.get_scale() == 2.0


def test_one_configuration_may_serve_several_models():
    config = growing(r=3, target_modules=TARGETS)
    for _ in range(2):
        model = peft.get_peft_model(Chain(WIDTHS), config)
        optimizer = adamw(model)
        scheduler = attach(model, optimizer, total_steps=60)
        assert scheduler.total_rank == 4
        train(model, optimizer, 1, 60)
        assert scheduler.total_rank == 12
    assert config.rank_pattern == {}
