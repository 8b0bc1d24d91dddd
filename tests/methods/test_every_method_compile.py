"""torch.compile(fullgraph=True) of every method: eager mode's numbers, one compilation for a training or the
few that the method needs."""

import pytest
import torch
from increlora_rs import attach
from method_cases import (
    CASES,
    EVERY,
    adapted,
    adapted_modules,
    ready,
    trainable,
)
from paths import assert_near, assert_same_training
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

STEPS = 12
SETTINGS = {"target_modules": ["0", "2", "4"], "rank_pattern": {}}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stack(method):
    torch.manual_seed(3)
    a, b, c, d = map(CASES[method.name].size, (9, 14, 11, 6))
    return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c), nn.Tanh(), nn.Linear(c, d))


def batch(method, t):
    size = CASES[method.name].size
    x = torch.randn(8, size(9), generator=torch.Generator().manual_seed(t))
    return x, torch.sin(2 * x[:, : size(6)])


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def run(method, net, optimizer, steps=STEPS):
    for t in range(steps):
        x, y = batch(method, t)
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def compiled(model, backend="aot_eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


@EVERY
def test_outputs_and_gradients_are_those_of_eager_mode(method):
    model = adapted(method, stack(method), init_lora_weights=False, **SETTINGS).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    net, counter = compiled(model)
    x, y = batch(method, 0)
    found, wanted = net(x), model(x)
    assert counter.frame_count == 1
    assert_near(found.detach(), wanted.detach())
    gradients = [torch.autograd.grad(nn.functional.mse_loss(out, y), parameters) for out in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@EVERY
def test_a_plain_training_is_compiled_once_and_agrees_with_eager_mode(method):
    eager, model = (adapted(method, stack(method), **SETTINGS).train() for _ in range(2))
    net, counter = compiled(model)
    run(method, eager, optimizer_of(eager))
    run(method, net, optimizer_of(model))
    assert counter.frame_count == 1
    assert_same_training(trainable(model).values(), trainable(eager).values())


@EVERY
def test_an_attached_training_is_compiled_as_often_as_the_method_says_and_agrees_with_eager_mode(method):
    ends = []
    for compiles in (False, True):
        more = {"top_h": 2} if CASES[method.name].ranks == "grow" else {}
        model = ready(method, stack(method), **SETTINGS, **more)
        net, counter = compiled(model) if compiles else (model, None)
        optimizer = optimizer_of(model)
        torch.manual_seed(12)
        scheduler = attach(model, optimizer, total_steps=STEPS)
        run(method, net, optimizer)
        ends.append((scheduler.ranks, trainable(model)))
    assert counter.frame_count == CASES[method.name].graphs
    (ranks, wanted), (others, found) = ends
    assert others == ranks
    assert CASES[method.name].ranks != "grow" or sum(ranks.values()) == 3 * 3
    assert_same_training(found.values(), wanted.values())


@pytest.mark.slow
@EVERY
def test_inductor_agrees_with_eager_mode(method):
    eager, model = (adapted(method, stack(method), **SETTINGS).train() for _ in range(2))
    net, counter = compiled(model, "inductor")
    run(method, eager, optimizer_of(eager))
    run(method, net, optimizer_of(model))
    assert counter.frame_count == 1
    assert_same_training(trainable(model).values(), trainable(eager).values())


@EVERY
def test_evaluation_and_batches_of_other_sizes_agree(method):
    model = adapted(method, stack(method), init_lora_weights=False, **SETTINGS).eval()
    net, _ = compiled(model, "eager")
    with torch.no_grad():
        for rows in (8, 3, 5):
            x = batch(method, rows)[0][:rows]
            assert_near(net(x), model(x))


@EVERY
def test_autocast_inside_a_compiled_function_is_obeyed(method):
    model = adapted(method, stack(method), init_lora_weights=False, **SETTINGS).eval()

    def function(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    x = batch(method, 0)[0]
    with torch.no_grad():
        found = torch.compile(function, backend="eager", fullgraph=True)(x)
        assert_near(found, function(x), torch.bfloat16)


@EVERY
def test_a_merged_and_an_unmerged_model_are_compiled(method):
    model = adapted(method, stack(method), init_lora_weights=False, **SETTINGS).eval()
    x = batch(method, 0)[0]
    net, _ = compiled(model, "eager")
    with torch.no_grad():
        wanted = net(x)
        model.merge_adapter()
        assert_near(net(x), wanted)
        model.unmerge_adapter()
        assert_near(net(x), wanted)


@EVERY
def test_an_exported_program_gives_the_same_output(method):
    model = adapted(method, stack(method), init_lora_weights=False, **SETTINGS).eval()
    x = batch(method, 0)[0]
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert_near(program.module()(x), model(x))


@EVERY
def test_a_compiled_model_is_saved_by_the_names_of_the_plain_one(method, tmp_path):
    model = adapted(method, stack(method), init_lora_weights=False, **SETTINGS)
    x = batch(method, 0)[0]
    compiled(model, "eager")[0](x)
    model.save_pretrained(tmp_path)
    fresh = adapted(method, stack(method), **SETTINGS)
    fresh.load_adapter(tmp_path, "default")
    for name, layer in adapted_modules(fresh).items():
        wanted = adapted_modules(model)[name].get_delta_weight("default")
        assert torch.equal(layer.get_delta_weight("default"), wanted)
