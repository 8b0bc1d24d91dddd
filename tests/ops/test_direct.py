"""The one call of a linear layer with one adapter: bit for bit what the long way gives, and taken only where
nobody else has a part in it."""

import gc
import weakref

import pytest
import torch
from increlora_rs import IncreLoraConfig, _core
from increlora_rs.gauges import Sensitivity
from increlora_rs.gauges.gauge import Gauge
from increlora_rs.layers import Linear
from increlora_rs.methods import METHODS
from increlora_rs.ops.update import LowRank
from increlora_rs.training.modules import adapted_modules
from peft import get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.skipif(
    not _core.DIRECT, reason=f"{_core.BUILT_FOR} under torch {torch.__version__} nothing is called directly"
)
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.fixture
def adapted():
    """``adapted(...)``: an adapted layer whose update is not 0, 7 to 9 features unless told otherwise."""

    def build(base=None, dtypes=DTYPES[0], reserve=0, **config):
        torch.manual_seed(0)
        base = nn.Linear(7, 9) if base is None else base
        config = {"r": 3, "lora_alpha": 4, "target_modules": ["0"]} | config
        widen = dtypes[1] == torch.float32
        config = IncreLoraConfig(**config)
        model = get_peft_model(nn.Sequential(base.to(dtypes[0])), config, autocast_adapter_dtype=widen)
        (module,) = adapted_modules(model, "default")
        layer = module.layer.train()
        layer.structure.set_reserve(layer, "default", reserve, torch.Generator().manual_seed(2))
        with torch.no_grad():
            for factor in layer.factors("default"):
                factor.normal_()
        return layer

    return build


@pytest.fixture
def long_way(monkeypatch):
    """``long_way(function)``: what it gives without direct calls."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(Linear, "_direct", lambda *_: None)
            return function()

    return run


def is_direct(y):
    return y.grad_fn is not None and y.grad_fn.name() == "LowRankLinearBackward"


def x_of(layer, *shape, learns=True):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return x.to(layer.base_layer.weight.dtype).requires_grad_(learns)


def passes(layer, x, call=None):
    """y and all gradients of a pass whose random numbers are the same at every call."""
    torch.manual_seed(11)
    y = (layer if call is None else call)(x)
    wanted = [tensor for tensor in (x, *layer.factors("default")) if tensor.requires_grad]
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return y, [y.detach(), *torch.autograd.grad(y, wanted, gy)]


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7)], ids=str)
def test_it_gives_the_bits_of_the_long_way(adapted, long_way, dtypes, dropout, shape):
    layer = adapted(dtypes=dtypes, lora_dropout=dropout)
    x = x_of(layer, *shape)
    y, found = passes(layer, x)
    assert is_direct(y)
    other, wanted = long_way(lambda: passes(layer, x))
    assert not is_direct(other)
    same(found, wanted)


@pytest.mark.parametrize(
    "base",
    [lambda: nn.Linear(7, 9, bias=False), lambda: Conv1D(9, 7), lambda: nn.Linear(200, 170)],
    ids=["without a bias", "Conv1D", "wide"],
)
@pytest.mark.parametrize("reserve", [0, 2])
@pytest.mark.parametrize("rank", [3, 40])
def test_so_it_does_for_any_base_and_rank(adapted, long_way, base, reserve, rank):
    base = base()
    features = base.weight.shape[0] if isinstance(base, Conv1D) else base.in_features
    layer = adapted(base, reserve=reserve, r=min(rank, 7 if features == 7 else 40), lora_dropout=0.1)
    x = x_of(layer, 33, features)
    y, found = passes(layer, x)
    assert is_direct(y)
    same(found, long_way(lambda: passes(layer, x))[1])


def test_x_without_a_gradient_and_strides(adapted, long_way):
    layer = adapted()
    for x in (x_of(layer, 5, 7, learns=False), x_of(layer, 7, 5).t().detach().requires_grad_()):
        y, found = passes(layer, x)
        assert is_direct(y)
        same(found, long_way(lambda x=x: passes(layer, x))[1])


def test_random_numbers_are_drawn_as_the_long_way_draws_them(adapted, long_way):
    layer = adapted(lora_dropout=0.5)
    x = x_of(layer, 4, 7)

    def after():
        torch.manual_seed(4)
        layer(x)
        return torch.rand(3)

    assert torch.equal(after(), long_way(after))


def test_in_evaluation_the_reserve_is_left_out(adapted, long_way):
    layer = adapted(reserve=2).eval()
    x = x_of(layer, 5, 7)
    y, found = passes(layer, x)
    assert not is_direct(y)
    same(found, long_way(lambda: passes(layer, x))[1])
    without = adapted(reserve=0).eval()
    assert is_direct(without(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_no_graph(adapted, long_way, mode):
    layer = adapted()
    x = x_of(layer, 5, 7)
    with mode():
        y = layer(x)
        assert y.grad_fn is None and not y.requires_grad
        assert torch.equal(y, long_way(lambda: layer(x)))


class _Passive(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _PassiveFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Passive, _PassiveFunctions, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_mode_takes_the_long_way(adapted, mode):
    layer = adapted()
    with mode():
        assert not is_direct(layer(x_of(layer, 5, 7)))


def test_autocast_of_another_device_does_not(adapted):
    layer = adapted()
    x = x_of(layer, 5, 7)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert is_direct(layer(x))


class _Other(torch.Tensor):
    pass


def test_what_is_no_plain_tensor_takes_the_long_way(adapted):
    layer = adapted()
    wide = adapted(dtypes=(torch.float64, torch.float64))
    assert not is_direct(wide(x_of(wide, 5, 7)))
    assert not is_direct(layer(x_of(layer, 5, 7).as_subclass(_Other)))
    layer.base_layer.weight.requires_grad_()
    assert not is_direct(layer(x_of(layer, 5, 7)))


def test_what_does_not_fit_raises_as_the_base_layer_does(adapted):
    layer, x = adapted(), torch.randn(5, 6)
    with pytest.raises(RuntimeError) as wanted:
        layer.base_layer(x)
    with pytest.raises(RuntimeError) as raised:
        layer(x)
    assert str(raised.value) == str(wanted.value)


def test_transforms_and_dual_numbers_take_the_long_way(adapted, long_way):
    layer = adapted()
    x = x_of(layer, 5, 7).detach()
    mapped = torch.vmap(layer)(x)
    assert torch.equal(mapped, long_way(lambda: torch.vmap(layer)(x)))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))

        def refusal():
            with pytest.raises(RuntimeError) as raised:
                layer(dual)
            return str(raised.value)

        assert refusal() == long_way(refusal)


def test_what_is_put_on_the_base_layer_or_the_dropout_is_seen_at_once(adapted):
    layer = adapted(lora_dropout=0.1)
    x = x_of(layer, 5, 7)
    assert is_direct(layer(x))
    for module in (layer.base_layer, layer.lora_dropout["default"]):
        hook = module.register_forward_hook(lambda *_: None)
        assert not is_direct(layer(x))
        hook.remove()
        assert is_direct(layer(x))
    layer.enable_adapters(False)
    assert layer(x).grad_fn.name() == "AddmmBackward0"


def test_new_parameters_and_scales_count_at_once(adapted, long_way):
    layer = adapted()
    x = x_of(layer, 5, 7)
    before = layer(x).detach()
    layer.set_scale("default", 3.0)
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(3, 7))
    layer.lora_B["default"].weight.data = torch.randn(9, 3)
    y, found = passes(layer, x)
    assert is_direct(y) and not torch.equal(y, before)
    same(found, long_way(lambda: passes(layer, x))[1])


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method.structure.direct], ids=lambda method: method.name
)
def test_a_direct_structure_takes_its_parameters_as_they_are(method):
    a, b, e = torch.ones(3, 4), torch.ones(5, 3), torch.ones(2, 1)
    parameters = dict(zip(method.structure.names, (a, b, e), strict=True))
    update = method.structure.update(parameters, None, None, 2.0, training=True)
    assert isinstance(update, LowRank)
    assert update.a is a and update.b is b and update.e is e and update.scale == 2.0


def test_it_is_differentiable_once(adapted):
    layer = adapted()
    x = x_of(layer, 5, 7)
    a = layer.factors("default")[0]
    loss = layer(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_a_graph_may_be_kept_and_not_used_after_it_is_gone(adapted):
    layer = adapted()
    loss = layer(x_of(layer, 5, 7)).square().sum()
    a = layer.factors("default")[0]
    first = torch.autograd.grad(loss, a, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, a)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, a)


def test_a_change_of_what_was_saved_is_noticed(adapted):
    layer = adapted()
    x = x_of(layer, 5, 7).detach()
    y = layer(x)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_change_in_place_of_what_comes_out_is_seen_by_autograd(adapted, long_way):
    layer = adapted()
    x = x_of(layer, 5, 7)

    def doubled(x):
        return layer(x).mul_(2.0)

    same(passes(layer, x, doubled)[1], long_way(lambda: passes(layer, x, doubled)[1]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpoints_repeat_it(adapted, reentrant, dropout):
    layer = adapted(lora_dropout=dropout)
    x = x_of(layer, 5, 7)

    def again(x):
        return checkpoint(layer, x, use_reentrant=reentrant)

    if reentrant:

        def gradients(call):
            layer.zero_grad()
            torch.manual_seed(11)
            call(x).square().sum().backward()
            return [factor.grad.clone() for factor in layer.factors("default")]

        same(gradients(again), gradients(layer))
    else:
        same(passes(layer, x, again)[1], passes(layer, x)[1])


def test_what_is_saved_goes_through_the_hooks_of_saved_tensors(adapted, long_way):
    layer = adapted()
    x = x_of(layer, 5, 7)

    def packed():
        seen = []

        def pack(tensor):
            seen.append(tensor.shape)
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return passes(layer, x), seen

    (_, found), seen = packed()
    (_, wanted), other = long_way(packed)
    assert seen == other and len(seen) == 6
    same(found, wanted)


def test_an_error_of_a_hook_keeps_its_class(adapted):
    layer = adapted()

    def refuse(tensor):
        raise KeyError("not this one")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t), pytest.raises(KeyError):
        layer(x_of(layer, 5, 7))


class _Shown(Gauge):
    """Keeps what it is shown."""

    name = "shown"

    def __init__(self):
        super().__init__(torch.zeros(1))
        self.seen = []

    def add(self, slot, gy, x):
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        self.seen.append((slot, gy.clone(), x.clone(), *modes))

    @classmethod
    def empty(cls, like, size, given):
        raise NotImplementedError

    @classmethod
    def of_one(cls, total, size, given):
        raise NotImplementedError


def test_an_armed_gauge_is_shown_every_backward_pass(adapted):
    layer = adapted(lora_dropout=0.2)
    x = x_of(layer, 2, 3, 7)
    probe, gauge = layer.probes["default"], _Shown()
    probe.attach(gauge)
    passes(layer, x)
    assert gauge.seen == []
    probe.arm(True)
    y = layer(x)
    assert is_direct(y)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    ((slot, gy, shown, *modes),) = gauge.seen
    assert slot == 0 and modes == [False, False]
    assert torch.equal(gy, torch.ones(6, 9)) and torch.equal(shown, x.detach().view(6, 7))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_armed_sensitivity_is_added_to_as_the_long_way_adds(adapted, long_way, dtypes, dropout):
    layer = adapted(dtypes=dtypes, lora_dropout=dropout)
    x = x_of(layer, 6, 7)

    def total():
        probe, gauge = layer.probes["default"], Sensitivity.of(1)
        probe.attach(gauge)
        probe.arm(True)
        passes(layer, x)
        return gauge.total

    found = total()
    assert found.item() > 0.0 and torch.equal(found, long_way(total))


def test_backward_passes_are_counted(adapted):
    layer = adapted()
    probe, x = layer.probes["default"], x_of(layer, 5, 7)
    for _ in range(3):
        passes(layer, x)
    layer(x)
    assert probe.unattended == 3


def test_an_error_of_a_gauge_keeps_its_class(adapted):
    layer = adapted()
    probe, gauge = layer.probes["default"], _Shown()

    def refuse(*_):
        raise KeyError("no gradient today")

    gauge.add = refuse
    probe.attach(gauge)
    probe.arm(True)
    with pytest.raises(KeyError, match="no gradient today"):
        layer(x_of(layer, 5, 7)).sum().backward()


def test_nothing_of_a_graph_outlives_it(adapted):
    layer = adapted()
    x = x_of(layer, 5, 7)
    probe = weakref.ref(layer.probes["default"])
    y = layer(x)
    del layer
    gc.collect()
    assert probe() is not None
    del y
    # What libtorch lets go of is Python's again when Rust is next called.
    _core.dropout_mask(8, 0.5, 0)
    gc.collect()
    assert probe() is None


@pytest.mark.slow
def test_compiled_autograd_runs_it(adapted):
    from torch._dynamo import compiled_autograd

    layer = adapted(lora_dropout=0.2)
    x = x_of(layer, 5, 7)

    def gradients(compiled):
        layer.zero_grad()
        torch.manual_seed(11)
        y = layer(x)
        assert is_direct(y)
        loss = y.square().sum()
        if compiled:
            with compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        else:
            loss.backward()
        return [factor.grad.clone() for factor in layer.factors("default")]

    wanted = gradients(False)
    for _ in range(2):
        same(gradients(True), wanted)
