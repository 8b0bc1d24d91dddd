"""MELoRA's own promises: n small LoRAs on the diagonal, and nothing beside it.

The references go slice by slice, build ``blockdiag(s B_i A_i)``, or are PEFT's LoRA.
"""

import math

import peft
import pytest
import torch
from increlora_rs import MeLoraConfig, export_lora, module_table
from one_layer import layer_of, linear_of, train, x_of
from paths import assert_near
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

R, ALPHA = 3, 12
WEIGHTS = "adapter_model.safetensors"


def model_of(features=24, out=16):
    return linear_of(features, out)


def melora(base, n_slices=4, seed=11, **settings):
    torch.manual_seed(seed)
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["body"]}
    return peft.get_peft_model(base, MeLoraConfig(n_slices=n_slices, **(config | settings)))


def factors(layer, adapter="default"):
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def off_the_diagonal(delta, n_slices):
    """``delta`` with its n blocks set to 0."""
    rest = delta.detach().clone()
    high, wide = (size // n_slices for size in delta.shape)
    for k in range(n_slices):
        rest[k * high : (k + 1) * high, k * wide : (k + 1) * wide] = 0.0
    return rest


# What it is.


@pytest.mark.parametrize("n_slices", [1, 2, 4, 8])
def test_it_trains_as_many_numbers_for_any_number_of_slices(n_slices):
    model = melora(model_of(), n_slices)
    assert model.get_nb_trainable_parameters()[0] == R * (24 + 16)


@pytest.mark.parametrize("n_slices", [2, 4, 8])
def test_outside_of_its_blocks_the_update_stays_0(n_slices):
    layer = train(layer_of(melora(model_of(), n_slices).train()), x_of(5, 24))
    delta = layer.get_delta_weight("default")
    assert delta.any()
    assert not off_the_diagonal(delta, n_slices).any()


@pytest.mark.parametrize("n_slices", [1, 2, 4])
def test_the_update_has_the_rank_of_all_slices_together(n_slices):
    layer = layer_of(melora(model_of(), n_slices, init_lora_weights=False).double())
    rank = int(torch.linalg.matrix_rank(layer.get_delta_weight("default")))
    assert rank == n_slices * R == layer.r["default"]


def test_slices_narrower_than_r_have_no_higher_rank_than_their_width():
    layer = layer_of(melora(model_of(), 8, init_lora_weights=False).double())
    assert int(torch.linalg.matrix_rank(layer.get_delta_weight("default"))) == 8 * 2
    assert layer.r["default"] == 8 * R


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4), (0,)], ids=str)
def test_a_loop_over_the_slices_gives_the_same_for_inputs_of_any_dimensions(leading):
    # The published code takes three dimensions only.
    layer = layer_of(melora(model_of(), 4, init_lora_weights=False)).double()
    a, b = factors(layer)
    x = x_of(*leading, 24, dtype=torch.float64)
    parts = [
        functional.linear(functional.linear(part, a[k]), b[k]) * ALPHA / R
        for k, part in enumerate(x.chunk(4, -1))
    ]
    wanted = layer.get_base_layer()(x) + torch.cat(parts, -1)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-11, atol=1e-12)


def test_the_scale_is_alpha_over_the_rank_of_one_slice():
    for n_slices in (1, 2, 4):
        layer = layer_of(melora(model_of(), n_slices))
        assert layer.scaling["default"] == ALPHA / R
    root = layer_of(melora(model_of(), 4, use_rslora=True))
    assert root.scaling["default"] == pytest.approx(ALPHA / math.sqrt(R))


def test_a_module_of_another_rank_has_its_own_scale():
    layer = layer_of(melora(model_of(), 4, rank_pattern={"body": 2}))
    assert (layer.r["default"], layer.scaling["default"]) == (8, ALPHA / 2)


# One slice is LoRA.


def pair():
    """MELoRA of one slice and PEFT's LoRA, with the same A."""
    ours = layer_of(melora(model_of(), 1)).double()
    lora = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["body"])
    theirs = layer_of(peft.get_peft_model(model_of(), lora)).double()
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A["default"].weight[0])
    return ours, theirs


def test_one_slice_is_drawn_as_lora_draws():
    ours = factors(layer_of(melora(model_of(), 1, seed=3)))[0][0]
    torch.manual_seed(3)
    assert torch.equal(ours, nn.init.kaiming_uniform_(torch.empty(R, 24), a=math.sqrt(5)))


def test_one_slice_trains_as_lora_does():
    ours, theirs = pair()
    x = x_of(7, 24, dtype=torch.float64)
    for layer in (ours, theirs):
        train(layer.train(), x, steps=20)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-12)
    for mine, factor in zip(factors(ours), ("lora_A", "lora_B"), strict=True):
        wanted = getattr(theirs, factor)["default"].weight
        torch.testing.assert_close(mine[0], wanted, rtol=1e-9, atol=1e-11)


# The start.


@pytest.mark.parametrize("n_slices", [1, 4])
def test_every_a_starts_kaiming_uniform_over_its_own_slice(n_slices):
    layer = layer_of(melora(model_of(256, 64), n_slices, r=16))
    a, b = (factor.detach() for factor in factors(layer))
    bound = math.sqrt(n_slices / 256)
    assert bound * 0.98 < float(a.abs().max()) <= bound
    assert float(a.var()) == pytest.approx(bound**2 / 3, rel=0.1)
    assert not b.any()


def test_slices_are_drawn_apart():
    a, _ = factors(layer_of(melora(model_of(), 4)))
    assert not any(torch.equal(a[0], other) for other in a[1:])


def test_b_of_every_slice_learns_from_the_first_step_on():
    layer = layer_of(melora(model_of(), 4).train())
    layer(x_of(5, 24)).square().mean().backward()
    a, b = factors(layer)
    assert all(bool(gradient.any()) for gradient in b.grad)
    assert not a.grad.any()


# Training.


def test_a_training_in_float64_is_that_of_the_dense_update_by_autograd():
    layer, x = layer_of(melora(model_of(), 4)).double().train(), x_of(7, 24, dtype=torch.float64)
    own = [p.detach().clone().requires_grad_() for p in factors(layer)]
    base = layer.get_base_layer()
    optimizer = torch.optim.AdamW(own, lr=0.02)
    for _ in range(20):
        blocks = [ALPHA / R * b @ a for a, b in zip(*own, strict=True)]
        result = functional.linear(x, base.weight + torch.block_diag(*blocks), base.bias)
        result.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    train(layer, x, steps=20)
    for mine, wanted in zip(factors(layer), own, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)


def test_every_slice_has_a_dropout_of_its_own():
    # A picks the first feature of each slice: which of them is dropped is seen at the output.
    layer = layer_of(melora(model_of(32, 8), 8, r=1, lora_alpha=1, lora_dropout=0.5)).train()
    a, b = factors(layer)
    with torch.no_grad():
        a.zero_()[:, 0, 0] = 1.0
        b.fill_(1.0)
        layer.get_base_layer().weight.zero_()
        layer.get_base_layer().bias.zero_()
    kept = layer(torch.ones(400, 32)) != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    assert not any(torch.equal(kept[:, 0], kept[:, k]) for k in range(1, 8))


def test_half_precision_bases_have_parameters_of_float32_unless_told_otherwise():
    wide = layer_of(melora(model_of().to(torch.bfloat16), 4))
    assert {p.dtype for p in factors(wide)} == {torch.float32}
    torch.manual_seed(11)
    config = MeLoraConfig(r=R, n_slices=4, target_modules=["body"])
    base = model_of().to(torch.bfloat16)
    narrow = layer_of(peft.get_peft_model(base, config, autocast_adapter_dtype=False))
    assert {p.dtype for p in factors(narrow)} == {torch.bfloat16}
    for layer in (wide, narrow):
        assert layer(x_of(5, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


# Several adapters, and what the published code loses.


def test_a_second_adapter_may_have_another_number_of_slices():
    # There, each adapter divides the sizes of the layer once more.
    model = melora(model_of(), 4, init_lora_weights=False).double()
    second = MeLoraConfig(r=2, n_slices=8, target_modules=["body"], init_lora_weights=False)
    model.add_adapter("second", second)
    layer = layer_of(model.double())
    first, other = (layer.get_delta_weight(name) for name in ("default", "second"))
    assert not off_the_diagonal(first, 4).any()
    assert not off_the_diagonal(other, 8).any()
    layer.set_adapter(["default", "second"])
    x = x_of(5, 24, dtype=torch.float64)
    base = layer.get_base_layer()
    wanted = functional.linear(x, base.weight + first + other, base.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-11, atol=1e-12)


def test_it_merges_comes_out_again_and_is_disabled():
    model = melora(model_of(), 4, init_lora_weights=False)
    layer, x = layer_of(model), x_of(5, 24)
    with model.disable_adapter():
        assert torch.equal(layer(x), model_of()["body"](x))
    wanted, weight = layer(x), layer.get_base_layer().weight.clone()
    model.merge_adapter()
    assert_near(layer(x), wanted)
    model.unmerge_adapter()
    assert_near(layer.get_base_layer().weight, weight)


# As a plain LoRA.


def test_the_export_has_the_rank_of_all_slices_and_zeros_between_them(tmp_path):
    model = melora(model_of(), 4, init_lora_weights=False)
    exported = export_lora(model, tmp_path)
    assert (exported.config.r, exported.config.lora_alpha, exported.error) == (4 * R, 4 * R, 0.0)
    tensors = load_file(tmp_path / WEIGHTS)
    a, b = (next(t for key, t in tensors.items() if factor in key) for factor in ("lora_A", "lora_B"))
    assert (a.shape, b.shape) == ((4 * R, 24), (16, 4 * R))
    assert not off_the_diagonal(a, 4).any()
    assert not off_the_diagonal(b, 4).any()
    loaded = layer_of(peft.PeftModel.from_pretrained(model_of(), tmp_path))
    assert_near(loaded(x_of(5, 24)), layer_of(model)(x_of(5, 24)))


def test_the_adapters_own_file_is_as_many_times_smaller(tmp_path):
    model = melora(model_of(), 4, init_lora_weights=False)
    model.save_pretrained(tmp_path / "own")
    export_lora(model, tmp_path / "lora")
    own, lora = (
        sum(t.numel() for t in load_file(tmp_path / folder / WEIGHTS).values()) for folder in ("own", "lora")
    )
    assert (own, lora) == (R * 40, 4 * R * 40)


def test_the_table_of_modules_has_the_singular_values_of_the_whole_update():
    model = melora(model_of(), 2, init_lora_weights=False)
    (row,) = module_table(model).rows
    wanted = torch.linalg.svdvals(layer_of(model).get_delta_weight("default").detach().double())
    assert row.rank == 2 * R
    assert row.singular_values == pytest.approx(wanted[: 2 * R].tolist(), rel=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("features", "out", "fitting"), [(26, 16, 2), (24, 18, 6), (25, 16, 1)], ids=["in", "out", "both"]
)
def test_slices_that_do_not_divide_are_refused_by_module_size_and_way_out(features, out, fitting):
    told = (
        rf"body: n_slices=4 does not divide its {features} inputs and {out} outputs .*"
        rf"divides both, such as {fitting} .*exclude_modules"
    )
    with pytest.raises(ValueError, match=told):
        melora(model_of(features, out), 4)


def test_the_number_of_slices_that_is_told_fits():
    assert layer_of(melora(model_of(24, 18), 6)).r["default"] == 6 * R


def test_a_refused_adapter_leaves_the_model_as_it_was():
    base = nn.ModuleDict({"body": nn.Linear(8, 8), "tail": nn.Linear(8, 3)})
    model = melora(base, 4)
    with pytest.raises(ValueError, match="tail: n_slices=4 does not divide its 8 inputs and 3 outputs"):
        model.add_adapter("second", MeLoraConfig(r=2, n_slices=4, target_modules=["tail"]))
    assert list(model.peft_config) == ["default"]


def test_a_list_of_ranks_as_in_the_published_code_is_refused_by_name():
    with pytest.raises(TypeError, match=r"r=\[2, 4\] must be an integer"):
        MeLoraConfig(r=[2, 4], target_modules=["body"])


def test_an_adapter_of_other_slices_is_refused_by_module(tmp_path):
    melora(model_of(), 4, init_lora_weights=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="size mismatch: lora_A of module 'body'"):
        melora(model_of(), 2).load_adapter(tmp_path, "default")
