"""Components that leave a module take their share of the update along, and nothing else."""

import pytest
import torch
from growing import growing
from increlora_rs.training.modules import adapted_modules
from peft import get_peft_model
from torch import nn

SCALINGS = {
    "budget": {"scaling": "budget"},
    "rank": {"scaling": "rank"},
    "rslora": {"scaling": "rank", "use_rslora": True},
}
KINDS = {
    "linear": lambda: nn.Linear(9, 7),
    "embedding": lambda: nn.Embedding(9, 7),
    "convolution": lambda: nn.Conv2d(3, 7, (2, 3)),
}
KEEP = [1, 3]


def module_of(kind="linear", reserve=0, **config):
    torch.manual_seed(3)
    settings = {"r": 5, "init_r": 5, "lora_alpha": 6, "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(KINDS[kind]()), growing(**(settings | config))).double()
    (module,) = adapted_modules(model, "default")
    module.set_reserve(reserve, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for factor in module.factors:
            factor.normal_()
    return module


def shares(module):
    """``s b_i e_i a_i^T`` of every active component, as matrices (out, in)."""
    a, b, e = (factor.detach() for factor in module.factors)
    scale = module.layer.scaling["default"]
    return [scale * e[i] * torch.outer(b[:, i], a[i]) for i in range(len(e))]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_loses_the_shares_of_what_goes_and_nothing_else(kind, scaling):
    module = module_of(kind, **SCALINGS[scaling])
    before, gone = module.layer.update("default").dense(), shares(module)
    module.shrink(KEEP)
    wanted = before - sum(gone[i] for i in range(5) if i not in KEEP)
    torch.testing.assert_close(module.layer.update("default").dense(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_share_of_each_component_that_stays_is_what_it_was(scaling):
    module = module_of(**SCALINGS[scaling])
    before = shares(module)
    module.shrink(KEEP)
    torch.testing.assert_close(shares(module), [before[i] for i in KEEP], rtol=1e-12, atol=1e-12)


def test_without_preserve_output_e_is_left_alone():
    module = module_of(scaling="rank", preserve_output=False)
    e = module.factors[2].detach().clone()
    module.shrink(KEEP)
    assert torch.equal(module.factors[2].detach(), e[KEEP])


@pytest.mark.parametrize("reserve", [0, 2])
def test_rows_stay_in_order_and_the_reserve_behind_them(reserve):
    module = module_of(reserve=reserve)
    a, b, e = (factor.detach().clone() for factor in module.factors)
    module.shrink(KEEP)
    rows = [*KEEP, *range(5, 5 + reserve)]
    wanted = a[rows], b[:, rows], e[KEEP]
    assert all(torch.equal(have.detach(), want) for have, want in zip(module.factors, wanted, strict=True))


def test_parameters_stay_the_objects_that_they_were_and_lose_their_gradient():
    module = module_of()
    before = [id(factor) for factor in module.factors]
    for factor in module.factors:
        factor.grad = torch.ones_like(factor)
    module.shrink(KEEP)
    assert [id(factor) for factor in module.factors] == before
    assert all(factor.grad is None for factor in module.factors)
    assert all(factor.is_contiguous() for factor in module.factors)


def test_the_next_backward_pass_gives_gradients_of_the_new_size():
    module = module_of()
    x = torch.randn(4, 9, dtype=torch.float64)
    module.layer(x).sum().backward()
    module.shrink(KEEP)
    module.layer(x).sum().backward()
    assert [tuple(factor.grad.shape) for factor in module.factors] == [(2, 9), (7, 2), (2, 1)]


def test_keeping_all_changes_nothing():
    module = module_of(scaling="rank")
    before = [(factor.data_ptr(), factor.detach().clone()) for factor in module.factors]
    module.shrink(range(5))
    assert all(
        (factor.data_ptr(), factor.detach().equal(value)) == (place, True)
        for factor, (place, value) in zip(module.factors, before, strict=True)
    )


def test_a_merged_adapter_is_refused():
    module = module_of()
    module.layer.merge()
    with pytest.raises(ValueError, match=r"'default' is merged.*cannot shrink; call\s+unmerge_adapter"):
        module.shrink(KEEP)


@pytest.mark.parametrize("keep", [[5], [-1], [1, 1], [3, 1], [0, 9]])
def test_positions_that_are_not_there_or_not_in_order_are_refused(keep):
    module = module_of()
    before = [factor.detach().clone() for factor in module.factors]
    with pytest.raises(ValueError, match=r"keep=\[.*positions of the 5 components, from 0 to 4"):
        module.shrink(keep)
    assert all(torch.equal(*pair) for pair in zip(module.factors, before, strict=True))


@pytest.mark.parametrize("keep", [[1.0], ["1"], [True]])
def test_what_is_no_position_is_refused(keep):
    with pytest.raises(TypeError, match=r"keep=.*must be integers, positions of components"):
        module_of().shrink(keep)
