"""Every kind of module that can be adapted, against float64 autograd with the update materialised."""

import copy
import functools

import increlora_rs
import pytest
import torch
from growing import growing
from increlora_rs import RESERVE_E, IncreLoraConfig, attach
from increlora_rs.gauges import Sensitivity
from increlora_rs.layers import AdaptedLayer
from increlora_rs.layers.found import adapted_layers
from increlora_rs.methods.lora_mini import LoraMiniConfig
from increlora_rs.ops.linear import add_low_rank, fits_linear, low_rank_linear
from increlora_rs.ops.probe import Probe
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

BUDGET = 4
ALPHA = 8.0

IDS = torch.tensor([[3, 1, 3, 8], [0, 3, 5, 1]])
SIGNAL = functools.partial(torch.randn, dtype=torch.float64)

# Module, and an input for it: the first dimension is the batch of 2.
CASES = {
    "linear": (lambda: nn.Linear(6, 9), lambda: SIGNAL(2, 3, 6)),
    "Conv1D": (lambda: Conv1D(9, 6), lambda: SIGNAL(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(12, 7), lambda: IDS),
    "padded embedding": (lambda: nn.Embedding(12, 7, padding_idx=3), lambda: IDS),
    "scaled embedding": (lambda: Gemma3TextScaledWordEmbedding(12, 7, 0, 3.0), lambda: IDS),
    "conv1d": (lambda: nn.Conv1d(3, 7, 4, stride=2, padding=1), lambda: SIGNAL(2, 3, 11)),
    "conv1d reflect": (
        lambda: nn.Conv1d(3, 7, 3, padding=2, padding_mode="reflect"),
        lambda: SIGNAL(2, 3, 11),
    ),
    "conv2d": (lambda: nn.Conv2d(3, 8, (3, 2), padding=(1, 0), bias=False), lambda: SIGNAL(2, 3, 6, 5)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1), lambda: SIGNAL(2, 6, 4, 3)),
    "conv2d dilated": (lambda: nn.Conv2d(3, 8, 3, stride=2, dilation=2), lambda: SIGNAL(2, 3, 9, 8)),
    "conv2d same": (lambda: nn.Conv2d(3, 8, (2, 3), padding="same"), lambda: SIGNAL(2, 3, 6, 5)),
    "conv2d valid": (lambda: nn.Conv2d(3, 8, (2, 3), padding="valid"), lambda: SIGNAL(2, 3, 6, 5)),
    "conv2d circular": (
        lambda: nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular"),
        lambda: SIGNAL(2, 3, 6, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 7, 2, padding=1), lambda: SIGNAL(2, 2, 3, 4, 3)),
}
CONVOLUTIONS = [case for case in CASES if case.startswith("conv")]
EMBEDDINGS = [case for case in CASES if "embedding" in case]
# One of each class.
KINDS = ["linear", "Conv1D", "embedding", "conv1d", "conv2d", "conv3d"]
INITS = [True, "gaussian", "svd", False]


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def configure(**kwargs):
    return growing(**({"r": BUDGET, "lora_alpha": ALPHA, "target_modules": ["layer"]} | kwargs))


def adapted(case, *, dtype=torch.float64, seed=3, **kwargs):
    torch.manual_seed(seed)
    model = get_peft_model(One(CASES[case][0]()).to(dtype), configure(**kwargs))
    (layer,) = adapted_layers(model, "default").values()
    return model, layer


def input_of(case):
    torch.manual_seed(5)
    return CASES[case][1]()


def filled(case, rank=3, reserve=0, **kwargs):
    """A layer of rank ``rank`` with numbers in all its factors."""
    model, layer = adapted(case, **kwargs)
    fill(layer, "default", rank, reserve)
    return model, layer


def fill(layer, name, rank, reserve=0):
    generator = torch.Generator().manual_seed(11)
    layer.structure.grow(layer, name, rank - layer.r[name], generator)
    layer.structure.set_reserve(layer, name, reserve, generator)
    with torch.no_grad():
        a, b, e = layer.factors(name)
        a.normal_(0.0, 0.5, generator=generator)
        b.normal_(0.0, 0.5, generator=generator)
        e.uniform_(0.5, 1.5, generator=generator)
        padding = getattr(layer.get_base_layer(), "padding_idx", None)
        if padding is not None:
            a[:, padding] = 0.0


def delta_of(layer, a, b, e):
    """s B diag(E) A with the reserve's constant E, shaped as the base weight."""
    e = torch.cat([e.view(-1), e.new_full((a.shape[0] - e.shape[0],), RESERVE_E)])
    matrix = ALPHA / BUDGET * b @ torch.diag(e) @ a
    base = layer.get_base_layer()
    if isinstance(base, (Conv1D, nn.Embedding)):
        return matrix.t()
    return matrix.reshape(base.weight.shape)


def factors_of(layer, name="default"):
    return [factor.detach().clone() for factor in layer.factors(name)]


def with_weight(base, x, weight):
    return torch.func.functional_call(base, {"weight": weight}, (x,))


def loss_of(y):
    return (y * torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape).sin()).sum() + y.square().sum()


def reference(layer, x):
    """Output, gradients of A, B, E and x, and importance, with dW as a matrix of its own."""
    a, b, e = (t.requires_grad_() for t in factors_of(layer))
    x = x.detach().clone()
    if x.is_floating_point():
        x.requires_grad_()
    delta = delta_of(layer, a, b, e)
    delta.retain_grad()
    base = layer.get_base_layer()
    y = with_weight(base, x, base.weight.detach() + delta)
    loss_of(y).backward()
    return y.detach(), [a.grad, b.grad, e.grad, x.grad], (delta * delta.grad).abs().sum().item()


def run(layer, x):
    """The same of the layer."""
    layer.zero_grad()
    x = x.detach().clone()
    if x.is_floating_point():
        x.requires_grad_()
    probe = layer.probes["default"]
    probe.attach(Sensitivity.of(3))
    probe.arm(True)
    layer.slots["default"] = 1
    y = layer(x)
    loss_of(y).backward()
    importance = probe.gauge.total
    probe.detach()
    assert importance[[0, 2]].tolist() == [0.0, 0.0]
    grads = [factor.grad for factor in layer.factors("default")]
    return y.detach(), [*grads, x.grad], importance[1].item()


def assert_equal(found, wanted, tolerance=1e-10):
    assert (found is None) == (wanted is None)
    if wanted is not None:
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reserve", [0, 2])
@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_importance_are_those_of_the_materialised_update(case, reserve):
    _, layer = filled(case, reserve=reserve)
    layer.train()
    x = input_of(case)
    for found, wanted in zip(run(layer, x)[:1], reference(layer, x)[:1], strict=True):
        assert_equal(found, wanted)
    for found, wanted in zip(run(layer, x)[1], reference(layer, x)[1], strict=True):
        assert_equal(found, wanted)
    importance = reference(layer, x)[2]
    assert importance > 1e-3
    assert run(layer, x)[2] == pytest.approx(importance, rel=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_leaves_the_reserve_out(case):
    _, layer = filled(case, reserve=2)
    layer.eval()
    x, base = input_of(case), layer.get_base_layer()
    a, b, e = factors_of(layer)
    wanted = with_weight(base, x, base.weight.detach() + delta_of(layer, a[:3], b[:, :3], e))
    assert_equal(layer(x).detach(), wanted)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("case", KINDS)
def test_a_fresh_update_is_0_unless_asked_to_be_random(case, init):
    _, layer = adapted(case, init_lora_weights=init)
    x = input_of(case)
    difference = (layer(x) - layer.get_base_layer()(x)).abs().max()
    assert (difference > 1e-3) if init is False else (difference == 0.0)


@pytest.mark.parametrize("init", [True, "gaussian", "svd"])
@pytest.mark.parametrize("case", KINDS)
def test_a_fresh_update_learns(case, init):
    _, layer = adapted(case, init_lora_weights=init)
    _, (a, b, e, _), _ = run(layer, input_of(case))
    assert sum(g.abs().max().item() > 0.0 for g in (a, b, e)) == 1


@pytest.mark.parametrize("init", [True, "gaussian", "svd"])
@pytest.mark.parametrize("case", KINDS)
def test_growth_leaves_the_output_as_it_was(case, init):
    _, layer = filled(case, init_lora_weights=init)
    x = input_of(case)
    before = layer(x).detach()
    layer.structure.grow(layer, "default", 2, torch.Generator().manual_seed(1))
    assert layer.r["default"] == 5
    assert_equal(layer(x).detach(), before)


def test_gaussian_init_has_loras_spread_at_the_rank_of_the_budget():
    torch.manual_seed(0)
    config = configure(init_lora_weights="gaussian", init_r=4)
    model = get_peft_model(One(nn.Linear(3000, 50)), config)
    (layer,) = adapted_layers(model, "default").values()
    assert layer.lora_A["default"].weight.std().item() == pytest.approx(1 / BUDGET, rel=0.05)


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embeddings_start_as_loras_do(case):
    _, layer = adapted(case)
    a, b, e = factors_of(layer)
    assert (a.abs().max(), e.min(), e.max()) == (0.0, 1.0, 1.0)
    assert b.std().item() == pytest.approx(1.0, abs=0.6)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_start_as_loras_do(case):
    _, layer = adapted(case, init_r=2)
    a, b, _ = factors_of(layer)
    bound = 1 / a.shape[1] ** 0.5
    assert 0.5 * bound < a.abs().max() <= bound
    assert b.abs().max() == 0.0


@pytest.mark.parametrize("init", ["svd", False])
def test_the_padding_of_an_embedding_never_moves(init):
    model, layer = adapted("padded embedding", init_lora_weights=init, init_r=3)
    before = model(IDS).detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss_of(model(IDS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.structure.grow(layer, "default", 1, torch.Generator().manual_seed(0))
    after = model(IDS).detach()
    assert torch.equal(after[IDS == 3], before[IDS == 3])
    assert not torch.equal(after[IDS != 3], before[IDS != 3])


def test_scale_grad_by_freq_divides_the_gradient_of_a_by_the_counts():
    _, layer = filled("embedding")
    plain = run(layer, IDS)
    layer.get_base_layer().scale_grad_by_freq = True
    scaled = run(layer, IDS)
    counts = torch.bincount(IDS.flatten(), minlength=12).clamp(min=1)
    assert_equal(scaled[1][0], plain[1][0] / counts)
    assert_equal(scaled[1][1], plain[1][1])
    assert scaled[2] == pytest.approx(plain[2])


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (2, 3, 2)])
def test_ids_of_any_shape_are_taken(shape):
    _, layer = filled("embedding")
    ids = torch.randint(12, shape)
    y, _, importance = run(layer, ids)
    wanted, _, wanted_importance = reference(layer, ids)
    assert y.shape == (*shape, 7)
    assert_equal(y, wanted)
    assert importance == pytest.approx(wanted_importance)


@pytest.mark.parametrize("case", ["conv1d", "conv1d reflect", "conv2d", "conv2d same", "conv3d"])
def test_a_single_signal_without_batch_is_taken(case):
    _, layer = filled(case)
    x = input_of(case)[0]
    found, wanted = run(layer, x), reference(layer, x)
    assert_equal(found[0], wanted[0])
    assert_equal(found[1][0], wanted[1][0])
    assert found[2] == pytest.approx(wanted[2])


@pytest.mark.parametrize("case", ["Conv1D", *CONVOLUTIONS])
def test_dropout_drops_the_input_of_the_update(case):
    _, layer = filled(case, lora_dropout=0.5)
    layer.eval()
    x, whole = input_of(case), layer(input_of(case)).detach()
    layer.train()
    base = layer.get_base_layer()
    # The update is linear in what dropout leaves: over many draws its mean is the whole update.
    mean = torch.stack([layer(x).detach() - base(x).detach() for _ in range(400)]).mean(0)
    wanted = whole - base(x).detach()
    assert (mean - wanted).norm() < 0.2 * wanted.norm()
    assert (layer(x) - whole).abs().max() > 1e-2


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_gradients_and_importance_under_dropout_are_those_of_the_dropped_input(case):
    _, layer = filled(case, lora_dropout=0.5)
    layer.train()
    x, base = input_of(case), layer.get_base_layer()
    torch.manual_seed(9)
    found = run(layer, x)
    torch.manual_seed(9)
    dropped = functional.dropout(x, 0.5)
    a, b, e = (t.requires_grad_() for t in factors_of(layer))
    delta = delta_of(layer, a, b, e)
    delta.retain_grad()
    y = base(x).detach() + base._conv_forward(dropped, delta, None)
    loss_of(y).backward()
    assert_equal(found[0], y.detach())
    for mine, wanted in zip(found[1], (a.grad, b.grad, e.grad), strict=False):
        assert_equal(mine, wanted)
    assert found[2] == pytest.approx((delta * delta.grad).abs().sum().item())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", [case for case in KINDS if case != "embedding"])
def test_checkpointing_gives_the_same_gradients_and_counts_the_importance_once(case, reentrant):
    _, layer = filled(case, lora_dropout=0.3)
    layer.train()
    torch.manual_seed(9)
    plain = run(layer, input_of(case))
    forward = layer.forward
    layer.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    torch.manual_seed(9)
    found = run(layer, input_of(case))
    for mine, wanted in zip(found[1], plain[1], strict=True):
        assert_equal(mine, wanted)
    assert found[2] == pytest.approx(plain[2])


@pytest.mark.parametrize("case", KINDS)
def test_without_a_question_no_importance_is_computed_but_the_pass_is_counted(case):
    _, layer = filled(case)
    probe = layer.probes["default"] = Probe()
    probe.attach(Sensitivity.of(1))
    loss_of(layer(input_of(case))).backward()
    assert (probe.gauge.total.item(), probe.unattended) == (0.0, 1)


@pytest.mark.parametrize("case", KINDS)
def test_second_derivative_is_refused(case):
    _, layer = filled(case)
    a = layer.lora_A["default"].weight
    (gradient,) = torch.autograd.grad(loss_of(layer(input_of(case))), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


# Several adapters, merging.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_keeps_the_output_and_unmerging_gives_the_weight_back(case, safe_merge):
    _, layer = filled(case)
    layer.eval()
    x, weight = input_of(case), layer.get_base_layer().weight
    before, old = layer(x).detach(), weight.detach().clone()
    layer.merge(safe_merge=safe_merge)
    assert_equal(layer(x).detach(), before)
    assert_equal(weight.detach(), old + delta_of(layer, *factors_of(layer)))
    layer.unmerge()
    assert_equal(weight.detach(), old)


@pytest.mark.parametrize("case", KINDS)
def test_merge_and_unload_gives_the_plain_module(case):
    model, layer = filled(case)
    x = input_of(case)
    before = model.eval()(x).detach()
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(layer.get_base_layer())
    assert not any(isinstance(module, AdaptedLayer) for module in merged.modules())
    assert_equal(merged(x).detach(), before)


@pytest.mark.parametrize("case", KINDS)
def test_safe_merge_refuses_what_is_not_finite(case):
    _, layer = filled(case)
    old = layer.get_base_layer().weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, old)


@pytest.mark.parametrize("case", CASES)
def test_several_active_adapters_add_up(case):
    model, layer = filled(case)
    model.add_adapter("other", configure())
    fill(layer, "other", 2)
    model.base_model.set_adapter(["default", "other"])
    x, base = input_of(case), layer.get_base_layer()
    deltas = [delta_of(layer, *factors_of(layer, name)) for name in ("default", "other")]
    assert_equal(layer(x).detach(), with_weight(base, x, base.weight.detach() + sum(deltas)))


@pytest.mark.parametrize("case", CASES)
def test_mixed_batch_gives_each_row_its_adapter(case):
    model, layer = filled(case)
    model.add_adapter("other", configure())
    fill(layer, "other", 2)
    model.eval()
    x = torch.cat([input_of(case), input_of(case)[:1]])
    y = layer(x, adapter_names=["other", "__base__", "default"]).detach()
    base = layer.get_base_layer()
    assert_equal(y[1], base(x[1:2])[0].detach())
    for row, name in ((0, "other"), (2, "default")):
        delta = delta_of(layer, *factors_of(layer, name))
        assert_equal(y[row], with_weight(base, x[row : row + 1], base.weight.detach() + delta)[0])


@pytest.mark.parametrize("case", KINDS)
def test_disabled_adapter_gives_the_base_output(case):
    model, layer = filled(case)
    x = input_of(case)
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("case", KINDS)
def test_forward_hook_on_the_base_layer_sees_the_base_output(case):
    _, layer = filled(case)
    seen = []
    handle = layer.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(output))
    layer(input_of(case))
    handle.remove()
    assert torch.equal(seen[0], layer.get_base_layer()(input_of(case)))


# Dtypes.


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", KINDS)
def test_lower_precision_gives_outputs_gradients_and_importance_near_the_exact_ones(case, dtype, autocast):
    _, layer = filled(case, dtype=dtype)
    x = input_of(case)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted_dtype = layer.get_base_layer()(x).dtype
        y, grads, importance = run(layer, x)
    assert y.dtype == wanted_dtype
    exact = copy.deepcopy(layer).double()
    wanted = reference(exact, x.double() if x.is_floating_point() else x)
    near = 1e-4 if (dtype, autocast) == (torch.float32, False) else 0.05
    assert (y.double() - wanted[0]).norm() < near * wanted[0].norm()
    for found, gradient in zip(grads[:3], wanted[1], strict=False):
        assert found.dtype == torch.float32
        assert (found - gradient).norm() < near * gradient.norm()
    assert importance == pytest.approx(wanted[2], rel=near)


# Copies, state, growth during training.


@pytest.mark.parametrize("case", KINDS)
def test_a_copy_gives_the_same_output_and_grows_by_itself(case):
    model, layer = filled(case)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_of(case)), model(input_of(case)))
    (other,) = adapted_layers(twin, "default").values()
    other.structure.grow(other, "default", 1, torch.Generator().manual_seed(0))
    assert (layer.r["default"], other.r["default"]) == (3, 4)


@pytest.mark.parametrize("case", KINDS)
def test_a_saved_adapter_of_grown_rank_loads(case, tmp_path):
    model, _ = filled(case, reserve=2)
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(3)
    fresh = PeftModel.from_pretrained(One(CASES[case][0]()).double(), tmp_path).eval()
    (layer,) = adapted_layers(fresh, "default").values()
    assert (layer.r["default"], layer.structure.reserve(layer, "default")) == (3, 0)
    assert_equal(fresh(input_of(case)), model(input_of(case)).detach(), 1e-6)


@pytest.mark.parametrize("case", KINDS)
def test_a_state_dict_of_grown_rank_loads(case):
    model, _ = filled(case, reserve=2)
    fresh, layer = adapted(case)
    fresh.load_state_dict(model.state_dict())
    assert (layer.r["default"], layer.structure.reserve(layer, "default")) == (3, 2)
    assert torch.equal(fresh.train()(input_of(case)), model.train()(input_of(case)))


class Net(nn.Module):
    """One module of each kind."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 12, padding_idx=0)
        self.transposed = Conv1D(12, 12)
        self.conv1 = nn.Conv1d(12, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv3 = nn.Conv3d(1, 5, (1, 2, 3))
        self.head = nn.Linear(12, 4)

    def forward(self, ids):
        x = torch.tanh(self.transposed(self.embedding(ids)))
        x = torch.tanh(self.conv1(x.transpose(1, 2)))
        x = x + self.conv2(x.unsqueeze(1)).mean(1) + self.conv3(x[:, None, None]).mean()
        return self.head(x.mean(2))


TARGETS = ["embedding", "transposed", "conv1", "conv2", "conv3", "head"]


def net(form="default", **kwargs):
    torch.manual_seed(0)
    make = {"default": growing, "paper": IncreLoraConfig.paper}[form]
    # Late, so that ranks grow through most of a training, and after a resume.
    values = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "lora_dropout": 0.1, "growth_end": 0.6}
    values |= kwargs
    return get_peft_model(Net(), make(**values))


def train(model, optimizer, first, last):
    for t in range(first, last + 1):
        torch.manual_seed(t)
        ids = torch.randint(20, (6, 8))
        target = ids.float()[:, :4].sin()
        functional.mse_loss(model(ids), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


# Their gradient is the same for all output channels, so one component spans it and another gains nothing.
RANK_ONE = {"conv2", "conv3"}


@pytest.mark.parametrize(("form", "importance"), [("default", "gradient"), ("paper", "sensitivity")])
def test_modules_of_all_kinds_grow_to_the_budget_together(form, importance):
    model = net(form)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 60)
    assert scheduler.total_rank == scheduler.budget == 18
    assert set(scheduler.scores) == set(TARGETS)
    spent = RANK_ONE if importance == "gradient" else set()
    assert {name for name, score in scheduler.scores.items() if score == 0.0} == spent
    assert min(scheduler.scores.values()) >= 0.0
    assert len(set(scheduler.ranks.values())) > 1


@pytest.mark.parametrize("form", ["default", "paper"])
def test_a_resumed_training_of_all_kinds_is_the_uninterrupted_one(form):
    whole = net(form)
    optimizer = adamw(whole)
    attach(whole, optimizer, total_steps=60)
    train(whole, optimizer, 1, 30)
    model_state = copy.deepcopy(whole.state_dict())
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, 31, 60)

    resumed = net(form)
    optimizer = adamw(resumed)
    attach(resumed, optimizer, total_steps=60)
    resumed.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    train(resumed, optimizer, 31, 60)
    wanted = whole.state_dict()
    assert {k: v.shape for k, v in resumed.state_dict().items()} == {k: v.shape for k, v in wanted.items()}
    assert all(torch.equal(value, wanted[key]) for key, value in resumed.state_dict().items())


def test_a_trained_model_of_all_kinds_is_saved_and_loaded(tmp_path):
    model = net()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=40)
    train(model, optimizer, 1, 40)
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    ids = torch.randint(20, (3, 8))
    assert torch.equal(loaded(ids), model(ids))
    assert increlora_rs.rank_table(tmp_path) is not None


# What is refused.


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), "groups=2"),
        (nn.Embedding(9, 8, max_norm=1.0), "max_norm=1.0"),
        (nn.ConvTranspose1d(4, 8, 3), "ConvTranspose1d"),
        (nn.EmbeddingBag(9, 8), "EmbeddingBag"),
        (nn.Bilinear(4, 4, 8), "Bilinear"),
        (nn.LayerNorm(8), "LayerNorm"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_module_that_cannot_be_adapted_is_refused_by_name(module, reason):
    with pytest.raises(ValueError, match=reason) as error:
        get_peft_model(One(module), configure())
    assert "layer" in str(error.value)


def test_a_rank_above_the_size_of_a_kernel_is_refused():
    with pytest.raises(ValueError, match="rank 4 is more than 3"):
        get_peft_model(One(nn.Conv1d(1, 9, 3)), configure(init_r=4))


def test_a_rank_that_never_grows_may_be_above_the_size_of_a_module_as_in_lora():
    model = get_peft_model(One(nn.Linear(9, 3)), LoraMiniConfig(r=4, target_modules=["layer"]))
    assert model.base_model.model.layer.r["default"] == 4


def test_fan_in_fan_out_follows_the_modules():
    model, _ = adapted("Conv1D")
    assert model.peft_config["default"].fan_in_fan_out is True
    model, _ = adapted("Conv1D", fan_in_fan_out=True)
    assert model.peft_config["default"].fan_in_fan_out is True
    model, _ = adapted("linear")
    assert model.peft_config["default"].fan_in_fan_out is False


def test_fan_in_fan_out_without_a_conv1d_is_refused():
    with pytest.raises(ValueError, match="fan_in_fan_out=True is for Conv1D"):
        adapted("linear", fan_in_fan_out=True)


class Wrapped(torch.Tensor):
    """A tensor of another class, as quantised and sharded weights are."""


def test_only_tensors_of_torchs_own_classes_go_to_the_operation_that_reads_raw_memory():
    x, weight, bias = SIGNAL(2, 6), nn.Parameter(SIGNAL(9, 6), requires_grad=False), SIGNAL(9)
    assert fits_linear(x, weight, bias)
    assert fits_linear(x, weight.t(), bias, transposed=True)
    for index in range(3):
        tensors = [x, weight, bias]
        tensors[index] = tensors[index].detach().as_subclass(Wrapped)
        assert not fits_linear(*tensors)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_one_operation_gives_what_base_and_update_give_by_themselves(x_dtype, weight_dtype):
    found = {}
    for fused in (True, False):
        torch.manual_seed(5)
        weight, bias = SIGNAL(9, 6).to(weight_dtype), SIGNAL(9).to(weight_dtype)
        x = SIGNAL(4, 6).to(x_dtype).requires_grad_()
        factors = [nn.Parameter(SIGNAL(*shape).float()) for shape in ((2, 6), (9, 2), (2, 1))]
        with torch.autocast("cpu", torch.bfloat16):
            assert fits_linear(x, weight, bias)
            if fused:
                y = low_rank_linear(x, weight, bias, *factors, scale=0.5)
            else:
                y = add_low_rank(nn.functional.linear(x, weight, bias), x, *factors, scale=0.5)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert x.grad.dtype == x_dtype
        found[fused] = [y.detach().float(), *(p.grad.float() for p in (x, *factors))]
    for one, two in zip(found[True], found[False], strict=True):
        assert (one - two).norm() < 0.02 * two.norm()


def test_what_autocast_leaves_alone_is_left_alone():
    x, weight, bias = SIGNAL(4, 6).double(), SIGNAL(9, 6).double(), SIGNAL(9).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert fits_linear(x, weight, bias)
        assert not fits_linear(x.float(), weight, bias)
        assert not fits_linear(x.float(), weight.to(torch.int8), bias.float())
