"""A base layer is called wherever calling it does more, or something else, than its class's forward."""

import contextlib

import pytest
import torch
from growing import growing
from increlora_rs.layers.call import is_plain_call
from increlora_rs.training.modules import adapted_modules
from peft import get_peft_model
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

_IDS = torch.tensor([[1, 2, 3], [0, 4, 1]])
KINDS = {
    "Linear": (lambda: nn.Linear(4, 6), lambda: torch.randn(3, 4)),
    "Conv1D": (lambda: Conv1D(6, 4), lambda: torch.randn(3, 4)),
    "Embedding": (lambda: nn.Embedding(5, 6), lambda: _IDS),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3), lambda: torch.randn(2, 2, 5, 5)),
}


class Seen:
    """Counts how often something ran, and doubles what comes out of the layer."""

    def __init__(self):
        self.calls = 0

    def pre(self, module, args):
        self.calls += 1

    def pre_with_kwargs(self, module, args, kwargs):
        self.calls += 1
        return args, kwargs

    def post(self, module, args, output):
        self.calls += 1
        return output * 2

    def post_with_kwargs(self, module, args, kwargs, output):
        self.calls += 1
        return output * 2

    def backward(self, module, *gradients):
        self.calls += 1

    def around(self, function):
        def run(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs) * 2

        return run


def _hook(register, hook, **options):
    def change(layer, seen):
        return getattr(layer, register)(getattr(seen, hook), **options).remove

    return change


def _global_hook(register, hook):
    def change(layer, seen):
        def only_here(module, *rest):
            return getattr(seen, hook)(module, *rest) if module is layer else None

        return getattr(torch_module, register)(only_here).remove

    return change


def _attribute(name):
    def change(layer, seen):
        setattr(layer, name, seen.around(getattr(layer, name)))
        return lambda: delattr(layer, name)

    return change


def _accelerate(layer, seen):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Hook(ModelHook):
        def post_forward(self, module, output):
            seen.calls += 1
            return output * 2

    add_hook_to_module(layer, Hook())
    return lambda: remove_hook_from_module(layer)


def _class_forward(layer, seen):
    kind, before = type(layer), type(layer).forward

    def forward(self, x):
        out = before(self, x)
        if self is not layer:
            return out
        seen.calls += 1
        return out * 2

    kind.forward = forward
    return lambda: setattr(kind, "forward", before)


def _compiled(layer, seen):
    # What `layer.compile()` sets; torch leaves its own classes' code alone there, whatever the backend.
    layer._compiled_call_impl = seen.around(layer._call_impl)
    return lambda: vars(layer).pop("_compiled_call_impl")


CHANGES = {
    "forward_pre_hook": _hook("register_forward_pre_hook", "pre"),
    "forward_pre_hook_with_kwargs": _hook("register_forward_pre_hook", "pre_with_kwargs", with_kwargs=True),
    "forward_hook": _hook("register_forward_hook", "post"),
    "forward_hook_with_kwargs": _hook("register_forward_hook", "post_with_kwargs", with_kwargs=True),
    "forward_hook_always_called": _hook("register_forward_hook", "post", always_call=True),
    "global_forward_pre_hook": _global_hook("register_module_forward_pre_hook", "pre"),
    "global_forward_hook": _global_hook("register_module_forward_hook", "post"),
    "own_forward": _attribute("forward"),
    "own_call_impl": _attribute("_call_impl"),
    "forward_of_the_class": _class_forward,
    "hook_of_accelerate": _accelerate,
    "compiled_layer": _compiled,
}
BACKWARD = {
    "full_backward_hook": _hook("register_full_backward_hook", "backward"),
    "full_backward_pre_hook": _hook("register_full_backward_pre_hook", "backward"),
    "global_full_backward_hook": _global_hook("register_module_full_backward_hook", "backward"),
    "global_full_backward_pre_hook": _global_hook("register_module_full_backward_pre_hook", "backward"),
}


@pytest.fixture
def adapted():
    """``adapted(kind)``: a model of one adapted layer whose update is not 0, the layer's base, an input."""

    def build(kind, fresh=False):
        make, draw = KINDS[kind]
        torch.manual_seed(1)
        model = get_peft_model(nn.Sequential(make()), growing(r=2, lora_alpha=2, target_modules=["0"]))
        module = adapted_modules(model, "default")[0]
        if not fresh:
            with torch.no_grad():
                for factor, _, _ in module.parameters:
                    factor.normal_()
        return model, module.layer.base_layer, draw()

    return build


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_call_reaches_the_base_layer_and_is_gone_when_taken_off(adapted, kind, change, training):
    model, base, x = adapted(kind)
    model.train(training)
    before = model(x).detach()
    plain = base(x).detach()
    seen = Seen()
    take_off = CHANGES[change](base, seen)
    try:
        changed = model(x).detach()
        calls = seen.calls
        expected = base(x).detach()
    finally:
        take_off()
    assert calls == 1
    # The update is added to what the changed call gives.
    torch.testing.assert_close(changed - expected, before - plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x).detach(), before)


@pytest.mark.parametrize("change", BACKWARD)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
def test_a_backward_hook_of_the_base_layer_is_called(adapted, kind, change):
    model, base, x = adapted(kind)
    x.requires_grad_()
    seen = Seen()
    take_off = BACKWARD[change](base, seen)
    try:
        model(x).sum().backward()
    finally:
        take_off()
    assert seen.calls == 1


@pytest.mark.parametrize("change", [*CHANGES, *BACKWARD])
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_call_is_not_plain_until_the_change_is_taken_off(kind, change):
    layer = KINDS[kind][0]()
    assert is_plain_call(layer)
    take_off = (CHANGES | BACKWARD)[change](layer, Seen())
    try:
        assert not is_plain_call(layer)
    finally:
        take_off()
    assert is_plain_call(layer)


@pytest.mark.parametrize("state", ["merged", "disabled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_is_called_where_the_adapter_is_merged_or_disabled(adapted, kind, state):
    model, base, x = adapted(kind)
    seen = Seen()
    base.register_forward_pre_hook(seen.pre)
    if state == "merged":
        model.merge_adapter()
    with model.disable_adapter() if state == "disabled" else contextlib.nullcontext():
        model(x)
    assert seen.calls == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_pre_hook_that_was_there_before_the_adapter_changes_the_input(kind):
    make, draw = KINDS[kind]
    net, x = nn.Sequential(make()), draw()
    net[0].register_forward_pre_hook(lambda _, args: (args[0] * 0,))
    expected = net(x)
    model = get_peft_model(net, growing(r=2, target_modules=["0"]))
    torch.testing.assert_close(model(x), expected)


REPARAMETRISED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("change", REPARAMETRISED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_leaves_the_output_of_a_reparametrised_layer(adapted, kind, change):
    model, base, x = adapted(kind, fresh=True)
    REPARAMETRISED[change](base)
    model.eval()
    torch.testing.assert_close(model(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_was_pruned_before_it_was_adapted_stays_pruned(kind):
    make, draw = KINDS[kind]
    net, x = nn.Sequential(make()), draw()
    prune.l1_unstructured(net[0], "weight", 0.5)
    expected = net(x)
    torch.testing.assert_close(get_peft_model(net, growing(r=2, target_modules=["0"]))(x), expected)


def test_a_subclass_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    net, x = nn.Sequential(Doubled(4, 6)), torch.randn(3, 4)
    expected = net(x)
    with pytest.warns(UserWarning, match="Doubled does not compute .* Do not merge it"):
        model = get_peft_model(net, growing(r=2, target_modules=["0"]))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("owner", "name"), [(functional, "linear"), (nn.Module, "_call_impl")])
def test_a_function_of_torch_that_was_replaced_is_run(adapted, monkeypatch, owner, name):
    model, _, x = adapted("Linear")
    real, runs = getattr(owner, name), []

    def counted(*args, **kwargs):
        runs.append(type(args[0]))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    model(x)
    assert (nn.Linear if owner is nn.Module else torch.Tensor) in runs


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_forward_hook_keeps_is_not_written_to(adapted, kind):
    model, base, x = adapted(kind)
    kept = []
    base.register_forward_hook(lambda *args: kept.append(args[2]))
    model(x)
    torch.testing.assert_close(kept[0], base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_runs_a_hook_of_the_base_layer(adapted, kind):
    model, base, x = adapted(kind)
    base.register_forward_hook(lambda _, args, output: output * 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_runs_a_hook_of_the_base_layer(adapted, strict):
    model, base, x = adapted("Linear")
    base.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    program = torch.export.export(model.eval(), (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))
