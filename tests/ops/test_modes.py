"""Tensors that are no plain memory, and modes that see operations, change no result and end no process."""

import pytest
import torch
from growing import growing
from increlora_rs import attach
from increlora_rs.layers import Linear
from increlora_rs.training.modules import adapted_modules
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

KINDS = {
    "linear": (lambda: nn.Linear(4, 6), lambda: torch.randn(5, 4)),
    "embedding": (lambda: nn.Embedding(7, 6), lambda: torch.tensor([[1, 2], [3, 0]])),
    "convolution": (lambda: nn.Conv2d(2, 3, 3), lambda: torch.randn(2, 2, 5, 5)),
}


@pytest.fixture
def adapted():
    """``adapted(kind)``: a model of one adapted layer whose update is not 0, and an input."""

    def build(kind="linear", **config):
        make, draw = KINDS[kind]
        config = {"r": 2, "lora_alpha": 2, "target_modules": ["0"]} | config
        model = get_peft_model(nn.Sequential(make()), growing(**config))
        with torch.no_grad():
            for factor, _, _ in adapted_modules(model, "default")[0].parameters:
                factor.normal_()
        return model, draw()

    return build


class _Passive(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _PassiveFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Passive, _PassiveFunctions, lambda: torch.device("cpu")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mode_changes_neither_output_nor_gradients(adapted, kind, mode):
    model, x = adapted(kind)
    expected = model(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    with mode():
        output = model(x)
        output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    for parameter, gradient in zip(
        [p for p in model.parameters() if p.requires_grad], gradients, strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("importance", ["sensitivity", "gradient"])
def test_a_mode_changes_no_score(adapted, importance):
    scores = []
    for mode in (None, _Passive):
        torch.manual_seed(0)
        model, x = adapted(importance=importance, tinit=1, deltaT=1, top_h=1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        scheduler = attach(model, optimizer, total_steps=8)
        for _ in range(3):
            if mode is None:
                loss = model(x).square().sum()
            else:
                with mode():
                    loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        scores.append(scheduler.scores)
    assert min(scores[0].values()) > 0.0
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)


def test_counted_operations_include_base_and_update(adapted):
    model, x = adapted()
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * len(x) * (4 * 6 + 4 + 6)


def test_selective_checkpointing_gives_the_gradients_of_none(adapted):
    model, x = adapted()

    def policy(_, op, *args, **kwargs):
        kept = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def gradients(run):
        model.zero_grad()
        run().square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients(lambda: model(x))
    selective = gradients(
        lambda: checkpoint(
            model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )
    )
    torch.testing.assert_close(selective, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_give_the_shape(adapted, kind):
    model, x = adapted(kind)
    expected = model(x).shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = model(mode.from_tensor(x))
        output.sum().backward()
    assert output.shape == expected


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_meta_gives_the_shape(adapted, kind, autocast):
    model, x = adapted(kind)
    expected = model(x).shape
    model.to("meta")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(x.to("meta"))
    output.sum().backward()
    assert (output.shape, output.device.type) == (expected, "meta")


def test_a_traced_graph_gives_the_same_output(adapted):
    model, x = adapted()
    graph = make_fx(model.eval())(x)
    torch.testing.assert_close(graph(x + 1), model(x + 1))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_vmap_gives_the_output_of_each(adapted, kind):
    model, x = adapted(kind)
    several = torch.stack([x, x + 1])
    torch.testing.assert_close(torch.vmap(model)(several), torch.stack([model(x), model(x + 1)]))


def test_grad_of_torch_func_gives_autograds_gradients(adapted):
    model, x = adapted()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(trained)
    model(x).square().sum().backward()
    torch.testing.assert_close(gradients, {name: p.grad for name, p in trained.items()})


def test_a_wrapper_subclass_gives_what_its_parts_give(adapted):
    model, x = adapted()
    output = model(TwoTensor(x, x + 1))
    torch.testing.assert_close((output.a, output.b), (model(x), model(x + 1)))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_give_the_output_of_each(adapted, layout):
    model, x = adapted()
    output = model(torch.nested.nested_tensor([x[:2], x[2:]], layout=layout))
    for part, expected in zip(output.unbind(), (x[:2], x[2:]), strict=True):
        torch.testing.assert_close(part, model(expected))


def test_a_default_device_keeps_the_one_operation(adapted, monkeypatch):
    model, x = adapted()
    fused = []
    real = Linear._fused
    monkeypatch.setattr(Linear, "_fused", lambda *args: fused.append(real(*args)) or fused[-1])
    with torch.device("cpu"):
        model(x)
    assert fused[0] is not None
