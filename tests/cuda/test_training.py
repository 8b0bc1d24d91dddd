"""The layer and the scheduler with the kernels in the place of the CPU's loops and of torch's."""

import pytest
import torch
from growing import growing
from increlora_rs import _core, attach
from increlora_rs.gauges import Sensitivity
from increlora_rs.ops.linear import add_low_rank, low_rank_linear
from increlora_rs.ops.probe import Probe
from peft import get_peft_model
from torch import nn

LAYER = {"down_8_f32", "apply_mask_f32", "add_grad_x_f32", "score_tile_f32", "score_total"}

# Relative to the largest entry.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def passes(device, dtype, p, whole):
    """Output, gradients and importance of a layer."""
    x, gy = draw(3, 11, 72, dtype=dtype, seed=1).to(device), draw(3, 11, 40, dtype=dtype, seed=2).to(device)
    weight, bias = draw(40, 72, dtype=dtype, seed=3).to(device), draw(40, dtype=dtype, seed=4).to(device)
    factors = [draw(5, 72, seed=5), draw(40, 5, seed=6), draw(4, 1, seed=7)]
    a, b, e = (factor.to(device).requires_grad_() for factor in factors)
    x.requires_grad_()
    probe = Probe()
    probe.attach(Sensitivity.of(2, device))
    probe.arm(True)
    common = {"scale": 0.5, "dropout": p, "probe": probe, "slot": 1}
    torch.manual_seed(9)
    if whole:
        y = low_rank_linear(x, weight, bias, a, b, e, **common)
    else:
        y = add_low_rank(nn.functional.linear(x, weight, bias), x, a, b, e, **common)
    y.backward(gy)
    return [y.detach(), x.grad, a.grad, b.grad, e.grad, probe.gauge.total[1]]


@pytest.fixture
def layer_on_cpu(dtype, p, whole):
    return passes("cpu", dtype, p, whole)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("whole", [False, True], ids=["update", "whole layer"])
def test_a_layer_is_the_one_of_the_cpu(layer_on_cpu, device, dtype, p, whole):
    got = passes(device, dtype, p, whole)
    for value, expected in zip(got, layer_on_cpu, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            value.double().cpu(), expected.double(), rtol=0.0, atol=TOLERANCE[dtype] * scale
        )


def test_the_layer_runs_by_the_kernels(emulated):
    passes("cpu", torch.float32, 0.1, True)
    launched = set(emulated.emulator_launched().decode().split())
    assert {"factors_f32_f32", "gradients_f32_f32", *LAYER} <= launched


def trained(device, p, importance):
    """Parameters and ranks after a training with growth."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16))
    config = growing(
        r=4,
        lora_dropout=p,
        target_modules=["0", "2"],
        orth_reg_weight=0.1,
        tinit=2,
        deltaT=3,
        importance=importance,
    )
    model = get_peft_model(base, config).to(device).train()
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=24)
    x, target = draw(64, 24, seed=1).to(device), draw(64, 16, seed=2).to(device)
    for _ in range(24):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks = scheduler.ranks
    scheduler.detach()
    return ranks, [q.detach().cpu() for q in model.parameters() if q.requires_grad]


@pytest.fixture
def training_on_cpu(p, importance):
    return trained("cpu", p, importance)


@pytest.mark.parametrize("importance", ["sensitivity", "gradient"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_training_is_the_one_of_the_cpu(training_on_cpu, device, p, importance):
    ranks, want = training_on_cpu
    got_ranks, got = trained(device, p, importance)
    assert got_ranks == ranks
    assert sum(ranks.values()) > 2
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-3)


def test_the_scheduler_runs_by_the_kernels(emulated):
    trained("cpu", 0.0, "sensitivity")
    launched = set(emulated.emulator_launched().decode().split())
    wanted = {"smooth", "orthogonality_gram_f32", "orthogonality_gradient_f32", "keep_newborns_f32"}
    assert wanted | {"mix_newborns_f32"} <= launched


def test_a_module_without_a_gradient_counts_in_the_mean(emulated):
    a, b = [draw(2, 24, seed=1), draw(2, 24, seed=2)], [draw(16, 2, seed=3), draw(16, 2, seed=4)]
    leaves = [leaf.requires_grad_() for leaf in [*a, *b]]
    vectors = [torch.zeros(2, dtype=torch.float64) for _ in range(4)]
    for leaf in (a[0], b[0]):
        leaf.grad = torch.zeros_like(leaf)
    _core.StepPlan(a, b, *vectors, 0.85, 0.85).take_gradients_(smooth=False, weight=0.5)
    launched = emulated.emulator_launched().decode().split()
    assert "orthogonality_gradient_f32" in launched
    assert leaves[1].grad is None
    for matrix, rows in ((a[0], True), (b[0], False)):
        twin = matrix.detach().double().requires_grad_()
        gram = twin @ twin.T if rows else twin.T @ twin
        (0.5 / 4 * (gram - torch.eye(2)).norm()).backward()
        torch.testing.assert_close(matrix.grad.double(), twin.grad, rtol=1e-5, atol=1e-6)
