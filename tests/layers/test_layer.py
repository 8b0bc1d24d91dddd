"""One adapted layer: forward against a materialised update, merging, growing, reserve, dtypes, loading."""

import copy
import io
import pickle

import pytest
import torch
from growing import growing
from increlora_rs import RESERVE_E, IncreLoraConfig
from increlora_rs.layers.found import adapted_layers
from peft import get_peft_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from torch.utils.checkpoint import checkpoint

IN, OUT = 12, 20
ALPHA = 16.0
BUDGET = 4

INITS = ["default", "svd", "paper"]


def config_of(kind="default", **kwargs):
    values = {"r": BUDGET, "lora_alpha": ALPHA, "target_modules": ["lin0"]} | kwargs
    if kind == "paper":
        return IncreLoraConfig.paper(**values)
    if kind == "svd":
        return growing(init_lora_weights="svd", **values)
    return growing(**values)


@pytest.fixture
def build(make_plain):
    """``build(config)``: the peft model of the two-layer model in float64 and its one adapted layer."""

    def run(config=None, dtype=torch.float64, **kwargs):
        model = get_peft_model(make_plain().to(dtype), config or config_of(), **kwargs)
        return model, adapted_layers(model, "default")["base_model.model.lin0"]

    return run


@pytest.fixture
def x():
    return torch.randn(5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def generator(seed=11):
    return torch.Generator().manual_seed(seed)


def scale_of(config, rank, alpha=ALPHA):
    divisor = config.r if config.scaling == "budget" else rank
    return alpha / divisor


def update_of(layer, name="default", rows=None):
    """s B diag(E) A from the parameters, with the reserve's E where ``rows`` counts it in."""
    rank = layer.r[name]
    rows = rows or rank
    a, b, e = (factor.detach() for factor in layer.factors(name))
    a, b, e = a[:rows], b[:, :rows], e.view(-1)
    e = torch.cat([e, e.new_full((rows - rank,), RESERVE_E)])
    return scale_of(layer.configs[name], rank) * (b @ torch.diag(e) @ a)


def expected(layer, x, *updates):
    base = layer.get_base_layer()
    return x @ (base.weight.detach() + sum(updates)).T + base.bias.detach()


def assert_equal(left, right, tolerance=1e-12):
    torch.testing.assert_close(left, right, rtol=0.0, atol=tolerance)


# Forward.


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("training", [False, True])
def test_fresh_layer_is_the_base_layer(build, x, kind, training):
    model, layer = build(config_of(kind))
    model.train(training)
    assert_equal(layer(x), layer.get_base_layer()(x))


def test_random_init_is_not_the_base_layer(build, x):
    _, layer = build(config_of(init_lora_weights=False))
    assert (layer(x) - layer.get_base_layer()(x)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("rank", [1, 2, 5, IN])
@pytest.mark.parametrize("training", [False, True])
def test_output_is_base_plus_materialised_update(build, grow, x, kind, rank, training):
    model, layer = build(config_of(kind))
    grow(model, {"lin0": rank})
    model.train(training)
    assert_equal(layer(x), expected(layer, x, update_of(layer)))


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("reserve", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_reserve_counts_in_training_only(build, grow, x, kind, reserve, training):
    model, layer = build(config_of(kind))
    grow(model, {"lin0": 2}, reserve=reserve)
    with torch.no_grad():
        layer.lora_A["default"].weight[2:] *= 1e4
    model.train(training)
    assert_equal(layer(x), expected(layer, x, update_of(layer, rows=2 + reserve if training else 2)))


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (3, 4, IN), (2, 3, 4, IN), (2, 0, IN)])
def test_any_leading_shape_is_taken(build, grow, shape):
    model, layer = build()
    grow(model, {"lin0": 3})
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    assert_equal(y, expected(layer, x, update_of(layer)))


def test_non_contiguous_input_is_taken(build, grow):
    model, layer = build()
    grow(model, {"lin0": 3})
    x = torch.randn(IN, 4, 5, dtype=torch.float64).permute(2, 1, 0)
    assert_equal(layer(x), expected(layer, x, update_of(layer)))


def test_input_of_wrong_width_is_refused(build):
    _, layer = build()
    with pytest.raises((ValueError, RuntimeError), match=str(IN)):
        layer(torch.zeros(2, IN + 1, dtype=torch.float64))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_output_without_autograd_is_the_same(build, grow, x, context):
    model, layer = build()
    grow(model, {"lin0": 3})
    with context():
        y = layer(x)
    assert_equal(y, expected(layer, x, update_of(layer)))
    assert not y.requires_grad


def test_several_active_adapters_add_up(build, grow, x):
    model, layer = build()
    model.add_adapter("other", config_of("paper"))
    grow(model, {"lin0": 3})
    grow(model, {"lin0": 2}, adapter_name="other", seed=1)
    model.base_model.set_adapter(["default", "other"])
    assert_equal(layer(x), expected(layer, x, update_of(layer), update_of(layer, "other")))


@pytest.mark.parametrize("names", [["default", "other", "__base__", "default", "other"], ["other"] * 5])
def test_mixed_batch_gives_each_row_its_adapter(build, grow, x, names):
    model, layer = build()
    model.add_adapter("other", config_of("paper"))
    grow(model, {"lin0": 3})
    grow(model, {"lin0": 2}, adapter_name="other", seed=1)
    model.eval()
    y = layer(x, adapter_names=names)
    updates = {"default": update_of(layer), "other": update_of(layer, "other"), "__base__": torch.zeros(())}
    for row, name in enumerate(names):
        assert_equal(y[row], expected(layer, x[row], updates[name]))


def test_mixed_batch_of_wrong_length_is_refused(build, x):
    _, layer = build()
    with pytest.raises(ValueError, match="adapter_names"):
        layer(x, adapter_names=["default"] * 4)


def test_mixed_batch_of_a_merged_layer_is_refused(build, x):
    _, layer = build()
    layer.merge()
    with pytest.raises(ValueError, match="unmerge"):
        layer(x, adapter_names=["default"] * 5)


def test_disabled_adapter_gives_the_base_output(build, grow, x):
    model, layer = build()
    grow(model, {"lin0": 3})
    with model.disable_adapter():
        assert_equal(layer(x), layer.get_base_layer()(x))
    assert_equal(layer(x), expected(layer, x, update_of(layer)))


def test_disabling_a_merged_adapter_gives_the_base_output(build, grow, x):
    model, layer = build()
    before = layer.get_base_layer()(x)
    grow(model, {"lin0": 3})
    layer.merge()
    with model.disable_adapter():
        assert_equal(layer(x), before)


def test_forward_hook_on_the_base_layer_sees_the_base_output(build, grow, x):
    model, layer = build()
    grow(model, {"lin0": 3})
    seen = []
    layer.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(output))
    layer(x)
    assert_equal(seen[0], expected(layer, x, torch.zeros(())))


def test_global_forward_hook_sees_the_base_output(build, grow, x):
    model, layer = build()
    grow(model, {"lin0": 3})
    seen = {}
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.setdefault(module, output)
    )
    try:
        layer(x)
    finally:
        handle.remove()
    assert_equal(seen[layer.get_base_layer()], expected(layer, x, torch.zeros(())))


def test_output_that_the_base_layer_keeps_is_left_alone(grow, x):
    class Keeping(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    model = get_peft_model(nn.ModuleDict({"lin0": Keeping(IN, OUT)}).double(), config_of())
    grow(model, {"lin0": 3})
    layer = model.base_model.model["lin0"]
    y = layer(x)
    assert_equal(layer.get_base_layer().kept, expected(layer, x, torch.zeros(())))
    assert_equal(y, expected(layer, x, update_of(layer)))


# Gradients.


def gradients(layer):
    return [factor.grad for factor in layer.factors("default")]


def autograd_of(layer, x, rows):
    """Gradients of A, B, E, x for the loss sum(y^2) by plain torch operations."""
    a, b, e, x = (t.detach().clone().requires_grad_() for t in (*layer.factors("default"), x))
    rank = layer.r["default"]
    lambdas = torch.cat([e.view(-1), e.new_full((rows - rank,), RESERVE_E)])
    base = layer.get_base_layer()
    update = scale_of(layer.configs["default"], rank) * (b * lambdas) @ a
    y = x @ (base.weight.detach() + update).T + base.bias.detach()
    return torch.autograd.grad((y * y).sum(), [a, b, e, x])


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("reserve", [0, 2])
def test_gradients_are_those_of_plain_torch(build, grow, x, kind, reserve):
    model, layer = build(config_of(kind))
    grow(model, {"lin0": 3}, reserve=reserve)
    layer.train()
    x.requires_grad_()
    layer(x).square().sum().backward()
    for found, wanted in zip([*gradients(layer), x.grad], autograd_of(layer, x, 3 + reserve), strict=True):
        assert_equal(found, wanted, 1e-9)


def test_input_without_gradient_leaves_the_others_right(build, grow, x):
    model, layer = build()
    grow(model, {"lin0": 3})
    layer(x).square().sum().backward()
    for found, wanted in zip(gradients(layer), autograd_of(layer, x, 3)[:3], strict=True):
        assert_equal(found, wanted, 1e-9)


def test_base_weight_gets_no_gradient(build, grow, x):
    model, layer = build()
    grow(model, {"lin0": 3})
    layer(x).sum().backward()
    assert layer.get_base_layer().weight.grad is None


def test_module_used_twice_gets_the_sum_of_both_gradients(build, grow, x):
    model, layer = build()
    grow(model, {"lin0": 3})
    (layer(x).square().sum() + layer(2 * x).square().sum()).backward()
    once, twice = autograd_of(layer, x, 3), autograd_of(layer, 2 * x, 3)
    for found, first, second in zip(gradients(layer), once, twice, strict=False):
        assert_equal(found, first + second, 1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_dropout_gives_the_same_gradients(build, grow, x, reentrant):
    model, layer = build(config_of(lora_dropout=0.5))
    grow(model, {"lin0": 3})
    layer.train()
    x.requires_grad_()
    torch.manual_seed(5)
    layer(x).square().sum().backward()
    plain = [g.clone() for g in [*gradients(layer), x.grad]]
    layer.zero_grad()
    x.grad = None
    torch.manual_seed(5)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for found, wanted in zip([*gradients(layer), x.grad], plain, strict=True):
        assert_equal(found, wanted, 0.0)


# Dropout.


def test_dropout_acts_in_training_only(build, grow, x):
    model, layer = build(config_of(lora_dropout=0.5))
    grow(model, {"lin0": 3})
    layer.eval()
    assert_equal(layer(x), expected(layer, x, update_of(layer)))
    layer.train()
    assert (layer(x) - expected(layer, x, update_of(layer))).abs().max() > 1e-2


def test_dropout_follows_the_seed(build, grow, x):
    model, layer = build(config_of(lora_dropout=0.5))
    grow(model, {"lin0": 3})
    layer.train()
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_dropout_keeps_the_mean(build, grow, x):
    model, layer = build(config_of(lora_dropout=0.5))
    grow(model, {"lin0": 3})
    layer.train()
    many = x[:1].expand(20000, IN).contiguous()
    wanted = expected(layer, x[:1], update_of(layer))[0]
    spread = (layer(many).std(0) / 20000**0.5).max()
    assert (layer(many).mean(0) - wanted).abs().max() < 6 * spread


# Merging.


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("safe", [False, True])
def test_merged_weight_holds_the_update(build, grow, x, kind, safe):
    model, layer = build(config_of(kind))
    grow(model, {"lin0": 3}, reserve=2)
    layer.eval()
    wanted = layer(x)
    layer.merge(safe_merge=safe)
    assert_equal(layer.get_base_layer()(x), wanted)
    assert_equal(layer(x), wanted)


def test_unmerging_gives_the_weight_back(build, grow):
    model, layer = build()
    before = layer.get_base_layer().weight.detach().clone()
    grow(model, {"lin0": 3})
    layer.merge()
    layer.unmerge()
    assert_equal(layer.get_base_layer().weight.detach(), before, 1e-14)
    assert not layer.merged


def test_merging_two_adapters_adds_both_updates(build, grow, x):
    model, layer = build()
    model.add_adapter("other", config_of("paper"))
    grow(model, {"lin0": 3})
    grow(model, {"lin0": 2}, adapter_name="other", seed=1)
    wanted = expected(layer, x, update_of(layer), update_of(layer, "other"))
    layer.merge(adapter_names=["default", "other"])
    assert_equal(layer(x), wanted)


def test_unmerging_nothing_warns(build):
    _, layer = build()
    with pytest.warns(UserWarning, match="no adapter is merged"):
        layer.unmerge()


@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "lora_E"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_weight(build, grow, factor, value):
    model, layer = build()
    grow(model, {"lin0": 3})
    before = layer.get_base_layer().weight.detach().clone()
    with torch.no_grad():
        getattr(layer, factor)["default"].weight[0, 0] = value
    with pytest.raises(ValueError, match=r"adapter default.*not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


def test_delta_weight_leaves_the_reserve_out(build, grow):
    model, layer = build()
    grow(model, {"lin0": 3}, reserve=4)
    assert_equal(layer.get_delta_weight("default"), update_of(layer))


# Growing.


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("reserve", [0, 1, 4])
def test_growth_keeps_the_parameter_objects(build, kind, reserve):
    _, layer = build(config_of(kind))
    layer.structure.set_reserve(layer, "default", reserve, generator())
    before = layer.factors("default")
    layer.structure.grow(layer, "default", 3, generator())
    after = layer.factors("default")
    assert all(old is new for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["default", "svd"])
def test_growth_keeps_the_old_values(build, grow, kind):
    model, layer = build(config_of(kind))
    grow(model, {"lin0": 2})
    a, b, e = (factor.detach().clone() for factor in layer.factors("default"))
    layer.structure.grow(layer, "default", 3, generator())
    assert torch.equal(layer.lora_A["default"].weight[:2], a)
    assert torch.equal(layer.lora_B["default"].weight[:, :2], b)
    assert torch.equal(layer.lora_E["default"].weight[:2], e)


@pytest.mark.parametrize(
    ("kind", "reserve", "active"), [("default", 0, 4), ("default", 2, 4), ("svd", 0, 4), ("svd", 3, 4)]
)
def test_growth_gives_the_asked_shapes(build, kind, reserve, active):
    _, layer = build(config_of(kind))
    layer.structure.set_reserve(layer, "default", reserve, generator())
    layer.structure.grow(layer, "default", 3, generator())
    rows = active + max(reserve - 3, 0)
    assert layer.r["default"] == active
    assert tuple(layer.lora_A["default"].weight.shape) == (rows, IN)
    assert tuple(layer.lora_B["default"].weight.shape) == (OUT, rows)
    assert tuple(layer.lora_E["default"].weight.shape) == (active, 1)


@pytest.mark.parametrize("kind", INITS)
def test_growth_drops_the_gradients_and_stays_trainable(build, x, kind):
    _, layer = build(config_of(kind))
    layer(x).sum().backward()
    layer.structure.grow(layer, "default", 2, generator())
    assert gradients(layer) == [None, None, None]
    layer(x).square().sum().backward()
    assert [tuple(g.shape) for g in gradients(layer)] == [(3, IN), (OUT, 3), (3, 1)]


def test_growth_with_an_old_loss_alive_leaves_the_next_backward_right(build, grow, x):
    model, layer = build()
    grow(model, {"lin0": 2})
    old_loss = layer(x).square().sum()
    old_loss.backward()
    layer.structure.grow(layer, "default", 1, generator())
    layer(x).square().sum().backward()
    assert_equal(gradients(layer)[0], autograd_of(layer, x, 3)[0], 1e-9)
    assert old_loss.grad_fn is not None


@pytest.mark.parametrize("kind", ["default", "svd"])
def test_new_components_change_nothing_by_themselves(build, grow, x, kind):
    model, layer = build(config_of(kind))
    grow(model, {"lin0": 2})
    before = layer(x)
    layer.structure.grow(layer, "default", 3, generator())
    assert_equal(layer(x), before)


@pytest.mark.parametrize(
    ("kind", "row_a", "row_b", "e"),
    [("default", True, False, 1.0), ("svd", True, True, 0.0)],
)
def test_new_components_are_drawn_by_the_init(build, kind, row_a, row_b, e):
    _, layer = build(config_of(kind))
    layer.structure.grow(layer, "default", 3, generator())
    assert bool(layer.lora_A["default"].weight[1:].abs().gt(0).all()) is row_a
    assert bool(layer.lora_B["default"].weight[:, 1:].abs().gt(0).all()) is row_b
    assert layer.lora_E["default"].weight[1:].flatten().tolist() == [e] * 3


def test_default_init_draws_a_as_lora_does(make_plain):
    model = get_peft_model(nn.ModuleDict({"lin0": nn.Linear(400, 300)}), config_of(init_r=4))
    a = model.base_model.model["lin0"].lora_A["default"].weight
    bound = 1.0 / 400**0.5
    assert 0.98 * bound < a.abs().max() <= bound
    assert abs(a.std() - bound / 3**0.5) < 0.05 * bound


def test_svd_init_draws_both_with_the_papers_spread():
    model = get_peft_model(nn.ModuleDict({"lin0": nn.Linear(400, 300)}), config_of("svd", init_r=4))
    layer = model.base_model.model["lin0"]
    assert abs(layer.lora_A["default"].weight.std() - 0.02) < 0.002
    assert abs(layer.lora_B["default"].weight.std() - 0.02) < 0.002
    assert layer.lora_E["default"].weight.flatten().tolist() == [0.0] * 4


def test_growth_follows_its_generator(build):
    grown = []
    for seed in (1, 1, 2):
        _, layer = build(config_of("svd"))
        layer.structure.grow(layer, "default", 2, generator(seed))
        grown.append((layer.lora_A["default"].weight[1:], layer.lora_B["default"].weight[:, 1:]))
    assert torch.equal(grown[0][0], grown[1][0])
    assert torch.equal(grown[0][1], grown[1][1])
    assert not torch.equal(grown[0][0], grown[2][0])


def test_reserve_turns_active_first(build):
    _, layer = build(config_of("svd"))
    layer.structure.set_reserve(layer, "default", 2, generator())
    a, b = layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()
    layer.structure.grow(layer, "default", 1, generator(1))
    assert (layer.r["default"], layer.structure.reserve(layer, "default")) == (2, 1)
    assert torch.equal(layer.lora_A["default"].weight, a)
    assert torch.equal(layer.lora_B["default"].weight, b)


def test_reserve_turned_active_starts_from_its_small_e(build):
    _, layer = build(config_of("svd"))
    layer.structure.set_reserve(layer, "default", 1, generator())
    layer.structure.grow(layer, "default", 3, generator(1))
    torch.testing.assert_close(
        layer.lora_E["default"].weight.flatten().tolist(), [0.0, RESERVE_E, 0.0, 0.0], rtol=1e-6, atol=0.0
    )


def test_training_output_is_continuous_when_the_reserve_turns_active(build, grow, x):
    model, layer = build(config_of("svd"))
    grow(model, {"lin0": 2}, reserve=2)
    layer.train()
    before = layer(x)
    layer.structure.grow(layer, "default", 2, generator())
    assert_equal(layer(x), before, 1e-12)


def test_dropped_reserve_leaves_the_active_components(build, grow):
    model, layer = build()
    grow(model, {"lin0": 3}, reserve=2)
    before = update_of(layer)
    parameter = layer.lora_A["default"].weight
    layer.structure.set_reserve(layer, "default", 0)
    assert layer.structure.reserve(layer, "default") == 0
    assert layer.lora_A["default"].weight is parameter
    assert_equal(update_of(layer), before, 0.0)


@pytest.mark.parametrize("init", [True, "svd"])
@pytest.mark.parametrize("rslora", [False, True])
def test_preserve_output_keeps_the_function_under_rank_scaling(build, grow, x, init, rslora):
    config = config_of(scaling="rank", init_lora_weights=init, preserve_output=True, use_rslora=rslora)
    model, layer = build(config)
    grow(model, {"lin0": 1})
    before = layer(x)
    layer.structure.grow(layer, "default", 2, generator())
    assert_equal(layer(x), before)


def test_without_preserve_output_growth_shrinks_the_update_as_in_the_paper(build, grow):
    model, layer = build(config_of("paper"))
    grow(model, {"lin0": 1})
    before = layer.get_delta_weight("default")
    layer.structure.grow(layer, "default", 1, generator())
    assert_equal(layer.get_delta_weight("default"), before / 2)


@pytest.mark.parametrize(("scaling", "scale"), [("budget", ALPHA / BUDGET), ("rank", ALPHA / 3)])
def test_growth_sets_the_scale(build, scaling, scale):
    _, layer = build(config_of(scaling=scaling))
    layer.structure.grow(layer, "default", 2, generator())
    assert layer.scaling["default"] == pytest.approx(scale)


def test_growth_while_merged_is_refused(build):
    _, layer = build()
    layer.merge()
    with pytest.raises(ValueError, match="'default' is merged"):
        layer.structure.grow(layer, "default", 1, generator())
    assert layer.r["default"] == 1


def test_growth_past_the_smaller_side_is_refused(build):
    _, layer = build()
    with pytest.raises(ValueError, match=f"rank {IN + 1} .*{IN}"):
        layer.structure.grow(layer, "default", IN, generator())
    assert (layer.r["default"], tuple(layer.lora_A["default"].weight.shape)) == (1, (1, IN))


def test_growth_to_the_smaller_side_is_granted(build):
    _, layer = build()
    layer.structure.grow(layer, "default", IN - 1, generator())
    assert layer.r["default"] == IN


def test_growth_of_one_adapter_leaves_the_other(build, grow):
    model, layer = build()
    model.add_adapter("other", config_of())
    layer.structure.grow(layer, "other", 3, generator())
    assert layer.r == {"default": 1, "other": 4}
    assert tuple(layer.lora_A["default"].weight.shape) == (1, IN)


def test_growth_under_another_default_device_draws_the_same(build):
    _, plain = build(config_of("svd"))
    _, moved = build(config_of("svd"))
    plain.structure.grow(plain, "default", 2, generator())
    with torch.device("meta"):
        moved.structure.grow(moved, "default", 2, generator())
    assert torch.equal(moved.lora_A["default"].weight[1:], plain.lora_A["default"].weight[1:])


def test_frozen_adapter_stays_frozen_when_it_grows(build):
    _, layer = build()
    layer.set_requires_grad("default", requires_grad=False)
    layer.structure.grow(layer, "default", 1, generator())
    assert [p.requires_grad for p in layer.parameters()] == [False] * 5


# Dtypes.


def test_adapter_of_a_bfloat16_base_is_float32(build):
    _, layer = build(dtype=torch.bfloat16)
    layer.structure.grow(layer, "default", 2, generator())
    dtypes = {factor.dtype for factor in layer.factors("default")}
    assert dtypes == {torch.float32}


def test_adapter_keeps_the_base_dtype_where_autocast_adapter_dtype_is_off(build):
    _, layer = build(dtype=torch.bfloat16, autocast_adapter_dtype=False)
    layer.structure.grow(layer, "default", 2, generator())
    dtypes = {factor.dtype for factor in layer.factors("default")}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_bfloat16_base_gives_bfloat16_output_near_the_exact_one(build, grow, x, autocast_adapter_dtype):
    model, layer = build(dtype=torch.bfloat16, autocast_adapter_dtype=autocast_adapter_dtype)
    grow(model, {"lin0": 3})
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    exact = copy.deepcopy(layer).double()
    wanted = expected(exact, x.bfloat16().double(), update_of(exact))
    torch.testing.assert_close(y.double(), wanted, rtol=0.03, atol=0.05)


def test_bfloat16_base_gives_float32_gradients(build, grow, x):
    model, layer = build(dtype=torch.bfloat16)
    grow(model, {"lin0": 3})
    layer(x.bfloat16()).square().sum().backward()
    assert {g.dtype for g in gradients(layer)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_its_dtype_near_the_exact_output(build, grow, x, dtype):
    model, layer = build(dtype=dtype)
    grow(model, {"lin0": 3})
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.to(dtype))
    assert y.dtype == torch.bfloat16
    exact = copy.deepcopy(layer).double()
    wanted = expected(exact, x.to(dtype).double(), update_of(exact))
    torch.testing.assert_close(y.double(), wanted, rtol=0.03, atol=0.05)


def test_autocast_gives_float32_gradients_near_the_exact_ones(build, grow, x):
    model, layer = build(dtype=torch.float32)
    grow(model, {"lin0": 3})
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    y.float().square().sum().backward()
    for found, wanted in zip(gradients(layer), autograd_of(layer, x.float(), 3)[:3], strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_second_derivative_is_refused(build, grow, x):
    model, layer = build()
    grow(model, {"lin0": 3})
    a = layer.lora_A["default"].weight
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_adapter_cast_later_grows_in_its_dtype(build):
    model, layer = build(dtype=torch.bfloat16, autocast_adapter_dtype=False)
    cast_adapter_dtype(model, "default", autocast_adapter_dtype=True)
    layer.structure.grow(layer, "default", 1, generator())
    assert layer.lora_A["default"].weight.dtype == torch.float32


# Scale.


@pytest.mark.parametrize("scaling", ["budget", "rank"])
def test_set_scale_is_a_multiple_of_the_configured_scale(build, scaling):
    _, layer = build(config_of(scaling=scaling))
    layer.structure.grow(layer, "default", 1, generator())
    configured = scale_of(layer.configs["default"], 2)
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == pytest.approx(0.5 * configured)


def test_scaled_layer_scales_its_update(build, grow, x):
    model, layer = build()
    grow(model, {"lin0": 3})
    layer.scale_layer(0.25)
    assert_equal(layer(x), expected(layer, x, 0.25 * update_of(layer)))


@pytest.mark.parametrize("argument", [0.25, None])
def test_unscaling_gives_the_configured_scale_back(build, argument):
    _, layer = build(config_of(scaling="rank"))
    layer.structure.grow(layer, "default", 1, generator())
    layer.scale_layer(0.25)
    layer.unscale_layer(argument)
    assert layer.scaling["default"] == pytest.approx(ALPHA / 2)


@pytest.mark.parametrize("scaling", ["budget", "rank"])
def test_growth_keeps_a_scale_set_by_hand(build, scaling):
    _, layer = build(config_of(scaling=scaling))
    layer.set_scale("default", 0.5)
    layer.structure.grow(layer, "default", 1, generator())
    assert layer.scaling["default"] == pytest.approx(0.5 * scale_of(layer.configs["default"], 2))


def test_set_scale_of_an_unknown_adapter_does_nothing(build):
    _, layer = build()
    layer.set_scale("nobody", 3.0)
    assert layer.scaling == {"default": ALPHA / BUDGET}


# Copies and state.


def test_repr_says_whose_layer_it_is(build):
    _, layer = build()
    assert repr(layer).startswith("increlora.Linear(")


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copy_gives_the_same_outputs(build, grow, x, duplicate):
    model, _ = build(config_of("paper"))
    grow(model, {"lin0": 3}, reserve=1)
    twin = duplicate(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copy_grows_by_itself(build, grow, x, duplicate):
    model, layer = build(config_of("paper"))
    grow(model, {"lin0": 3})
    twin = duplicate(model)
    own = adapted_layers(twin, "default")["base_model.model.lin0"]
    own.structure.grow(own, "default", 2, generator())
    assert layer.r["default"] == 3
    assert tuple(layer.lora_A["default"].weight.shape) == (3, IN)


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("reserve", [0, 2])
@pytest.mark.parametrize("training", [False, True])
def test_state_dict_loads_into_a_model_of_initial_rank(build, grow, x, kind, reserve, training):
    model, _ = build(config_of(kind))
    grow(model, {"lin0": 3}, reserve=reserve)
    fresh, layer = build(config_of(kind))
    fresh.load_state_dict(model.state_dict())
    assert (layer.r["default"], layer.structure.reserve(layer, "default")) == (3, reserve)
    assert torch.equal(fresh.train(training)(x), model.train(training)(x))


def test_state_dict_of_lower_rank_loads_into_a_grown_model(build, grow, x):
    model, _ = build(config_of("paper"))
    fresh, layer = build(config_of("paper"))
    grow(model, {"lin0": 2})
    grow(fresh, {"lin0": 5}, reserve=2, seed=1)
    fresh.load_state_dict(model.state_dict())
    assert (layer.r["default"], layer.structure.reserve(layer, "default")) == (2, 0)
    assert torch.equal(fresh(x), model(x))


def test_loading_a_state_dict_keeps_the_parameter_objects(build, grow):
    model, _ = build()
    grow(model, {"lin0": 3})
    fresh, layer = build()
    before = layer.lora_A["default"].weight
    fresh.load_state_dict(model.state_dict())
    assert layer.lora_A["default"].weight is before


def test_state_dict_loads_with_assign(build, grow, x):
    model, _ = build()
    grow(model, {"lin0": 3})
    fresh, _ = build()
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    ("factor", "shape"),
    [
        ("lora_A", (2, IN)),
        ("lora_A", (3, IN + 1)),
        ("lora_B", (OUT, 2)),
        ("lora_B", (OUT + 1, 3)),
        ("lora_E", (4, 1)),
        ("lora_E", (3, 2)),
    ],
)
def test_state_dict_of_factors_that_do_not_fit_is_refused_by_name(build, grow, factor, shape):
    model, _ = build()
    grow(model, {"lin0": 3})
    state = model.state_dict()
    state[f"base_model.model.lin0.{factor}.default.weight"] = torch.zeros(shape, dtype=torch.float64)
    fresh, _ = build()
    with pytest.raises((RuntimeError, ValueError), match=r"lin0.*lora_"):
        fresh.load_state_dict(state)


def test_refused_state_dict_leaves_the_adapter_as_it_was(build, grow, x):
    model, layer = build()
    grow(model, {"lin0": 3})
    before = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["base_model.model.lin0.lora_A.default.weight"] = torch.zeros(2, IN + 1, dtype=torch.float64)
    state["base_model.model.lin0.lora_E.default.weight"] = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError)):
        model.load_state_dict(state)
    assert layer.r["default"] == 3
    assert torch.equal(model(x), before)
