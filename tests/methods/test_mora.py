"""MoRA's own promises: the types against dW built whole from the paper, in float64, and what the published
code gets wrong."""

import peft
import pytest
import torch
from increlora_rs import MeLoraConfig, MoraConfig, attach, export_lora, module_table
from increlora_rs.ops.square import Square
from method_cases import optimizer_of
from one_layer import layer_of, linear_of, train, x_of
from paths import assert_near
from squares import TYPES, dense, side_of, turn
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

R = 4
EACH = pytest.mark.parametrize("form", TYPES)
AS_LORA = pytest.mark.parametrize("form", [1, 2, 3, 4])
# in, out: to as many, to more, to fewer, by factors that q does not divide.
SIZES = [(40, 40), (24, 90), (90, 24)]
SIZED = pytest.mark.parametrize(("features", "out"), SIZES)


def model_of(features=24, out=90):
    return linear_of(features, out)


def mora(base, form=1, seed=11, **settings):
    torch.manual_seed(seed)
    config = {"r": R, "mora_type": form, "target_modules": ["body"]}
    return peft.get_peft_model(base, MoraConfig(**(config | settings)))


def m_of(layer, adapter="default"):
    return layer.lora_A[adapter].weight


# What it is.


@pytest.mark.parametrize(
    ("features", "out", "form", "side"),
    [
        (4096, 4096, 1, 256),
        (768, 768, 1, 111),
        (768, 768, 6, 110),
        (768, 3072, 1, 175),
        (768, 3072, 6, 174),
        (3072, 768, 2, 175),
    ],
)
def test_the_side_of_the_square_is_the_published_one(features, out, form, side):
    with torch.device("meta"):
        layer = layer_of(mora(model_of(features, out), form, r=8))
    assert m_of(layer).shape == (side, side)
    assert layer.r["default"] == side


@EACH
@SIZED
def test_the_update_is_the_dense_one_of_the_paper(form, features, out):
    layer = layer_of(mora(model_of(features, out), form, init_lora_weights=False)).double()
    wanted = dense(form, m_of(layer), out, features)
    torch.testing.assert_close(layer.get_delta_weight("default"), wanted, rtol=1e-11, atol=1e-12)
    for leading in ((), (5,), (2, 3), (2, 3, 4)):
        x, base = x_of(*leading, features, dtype=torch.float64), layer.get_base_layer()
        result = functional.linear(x, base.weight + wanted, base.bias)
        torch.testing.assert_close(layer(x), result, rtol=1e-11, atol=1e-11)


@EACH
def test_the_square_starts_at_0_and_all_of_its_gradient_is_not(form):
    layer = layer_of(mora(model_of(), form).train())
    assert not layer.get_delta_weight("default").any()
    layer(x_of(50, 24)).square().mean().backward()
    assert bool(m_of(layer).grad.all())


@AS_LORA
@pytest.mark.parametrize(("features", "out"), [(40, 40), (44, 60), (60, 44)])
def test_types_1_to_4_have_the_rank_of_the_square(form, features, out):
    layer = layer_of(mora(model_of(features, out), form, init_lora_weights=False)).double()
    rank = int(torch.linalg.matrix_rank(layer.get_delta_weight("default")))
    assert rank == side_of(R, out, features) == layer.r["default"]


def test_type_6_has_full_rank_where_the_square_divides_both_sizes():
    # q = sqrt(32 * 2) = 8.
    layer = layer_of(mora(model_of(16, 16), 6, r=2, init_lora_weights=False)).double()
    assert layer.r["default"] == 8
    assert int(torch.linalg.matrix_rank(layer.get_delta_weight("default"))) == 16


def test_block_i_of_type_6_is_the_square_turned_i_times():
    layer = layer_of(mora(model_of(32, 32), 6, r=1, init_lora_weights=False)).double()
    m, delta = m_of(layer), layer.get_delta_weight("default")
    assert len(m) == 8
    assert torch.equal(turn(0, 8), torch.eye(8, dtype=torch.float64))
    for block in range(4):
        r = turn(block, 8)
        torch.testing.assert_close(r @ r.T, torch.eye(8, dtype=torch.float64))
        rows = slice(8 * block, 8 * block + 8)
        torch.testing.assert_close(delta[rows, rows], m @ r, rtol=1e-11, atol=1e-12)
        rest = delta.clone()
        rest[rows, rows] = 0.0
        assert not rest[rows].any()


@AS_LORA
def test_where_the_square_divides_the_inputs_the_compression_keeps_their_sum(form):
    # A = M C with M the unit matrix.
    square = Square(torch.eye(8, dtype=torch.float64), form, 12, 32, 1.0)
    a, _ = square.lora()
    assert torch.equal(a.sum(0), torch.ones(32, dtype=torch.float64))


@EACH
def test_a_training_in_float64_is_that_of_the_dense_update_by_autograd(form):
    layer, x = layer_of(mora(model_of(), form)).double().train(), x_of(7, 24, dtype=torch.float64)
    own, base = m_of(layer).detach().clone().requires_grad_(), layer.get_base_layer()
    optimizer = torch.optim.AdamW([own], lr=0.02)
    for _ in range(15):
        functional.linear(x, base.weight + dense(form, own, 90, 24), base.bias).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    train(layer, x, steps=15)
    torch.testing.assert_close(m_of(layer), own, rtol=1e-9, atol=1e-11)


@EACH
@SIZED
def test_on_conv1d_of_transformers_each_type_is_the_transposed_update(form, features, out):
    torch.manual_seed(5)
    model = mora(nn.ModuleDict({"body": Conv1D(out, features)}), form, init_lora_weights=False).double()
    layer, x = layer_of(model), x_of(2, 3, features, dtype=torch.float64)
    delta, base = dense(form, m_of(layer), out, features), layer.get_base_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), delta.t(), rtol=1e-11, atol=1e-12)
    wanted = functional.linear(x, base.weight.t() + delta, base.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-11, atol=1e-11)


# Type 6 and the inputs that it ignored.


def columns_of_zeros(fold):
    layer = layer_of(mora(model_of(3072, 768), 6, r=8, fold_inputs=fold, init_lora_weights=False))
    return int((layer.get_delta_weight("default") == 0).all(0).sum())


def test_as_published_type_6_ignores_2202_of_3072_inputs():
    assert columns_of_zeros(fold=False) == 2202


def test_folded_type_6_ignores_none():
    assert columns_of_zeros(fold=True) == 0


@pytest.mark.parametrize(("features", "out"), [(40, 40), (24, 90)])
def test_folding_changes_nothing_where_no_input_was_ignored(features, out):
    first, second = (
        layer_of(mora(model_of(features, out), 6, fold_inputs=fold, init_lora_weights=False))
        for fold in (True, False)
    )
    assert torch.equal(first.get_delta_weight("default"), second.get_delta_weight("default"))


@EACH
@pytest.mark.parametrize(("features", "out"), [(16, 96), (96, 16), (9, 9), (3, 2)])
def test_a_square_larger_than_the_module_is_no_trouble(form, features, out):
    # There, type 6 fails where one block holds all inputs.
    model = mora(model_of(features, out), form, r=8, init_lora_weights=False).double()
    layer = layer_of(model)
    assert len(m_of(layer)) >= min(features, out)
    x = x_of(5, features, dtype=torch.float64)
    wanted = layer(x)
    model.merge_adapter()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-11)


# The scale.


def test_without_an_alpha_the_scale_is_1_as_published():
    for settings in ({}, {"use_rslora": True}, {"rank_pattern": {"body": 2}}):
        assert layer_of(mora(model_of(), **settings)).scaling["default"] == 1.0


def test_an_alpha_acts_as_loras_does():
    assert layer_of(mora(model_of(), lora_alpha=10)).scaling["default"] == 10 / R
    assert layer_of(mora(model_of(), lora_alpha=10, use_rslora=True)).scaling["default"] == 10 / R**0.5
    assert layer_of(mora(model_of(), alpha_pattern={"body": 2})).scaling["default"] == 2 / R


def test_no_alpha_is_saved_and_read_back(tmp_path):
    model = mora(model_of(), 6, init_lora_weights=False)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model_of(), tmp_path)
    assert loaded.peft_config["default"].lora_alpha is None
    assert layer_of(loaded).scaling["default"] == 1.0


# Saving, merging, exporting, compiling, type by type.


@EACH
def test_a_saved_adapter_gives_the_same_outputs_and_reads_without_its_base(form, tmp_path):
    model = mora(model_of(), form, init_lora_weights=False)
    model.save_pretrained(tmp_path)
    loaded = layer_of(peft.PeftModel.from_pretrained(model_of(), tmp_path))
    assert torch.equal(loaded(x_of(5, 24)), layer_of(model)(x_of(5, 24)))
    (row,) = module_table(tmp_path).rows
    delta = layer_of(model).get_delta_weight("default").detach().double()
    assert (row.rank, row.shape) == (layer_of(model).r["default"], (90, 24))
    assert row.norm == pytest.approx(float(delta.norm()), rel=1e-5)


@EACH
def test_an_adapter_merges_and_comes_out_again(form):
    model = mora(model_of(), form, init_lora_weights=False)
    layer, x = layer_of(model), x_of(5, 24)
    with model.disable_adapter():
        assert torch.equal(layer(x), model_of()["body"](x))
    wanted, weight = layer(x), layer.get_base_layer().weight.clone()
    model.merge_adapter()
    assert_near(layer(x), wanted)
    model.unmerge_adapter()
    assert_near(layer.get_base_layer().weight, weight)


@AS_LORA
@SIZED
def test_types_1_to_4_export_as_a_lora_of_the_squares_rank(form, features, out, tmp_path):
    model = mora(model_of(features, out), form, init_lora_weights=False, lora_alpha=6)
    exported = export_lora(model, tmp_path)
    assert (exported.config.r, exported.error) == (side_of(R, out, features), 0.0)
    loaded = layer_of(peft.PeftModel.from_pretrained(model_of(features, out), tmp_path))
    assert_near(loaded(x_of(5, features)), layer_of(model)(x_of(5, features)))


@pytest.mark.parametrize("source", ["model", "directory"])
def test_an_export_of_type_6_is_refused_with_reason_and_way_out(source, tmp_path):
    model = mora(model_of(), 6, init_lora_weights=False)
    model.save_pretrained(tmp_path / "saved")
    told = r"update of module 'body' is that of no LoRA; merge .*merge_and_unload\(\)"
    with pytest.raises(ValueError, match=told):
        export_lora(model if source == "model" else tmp_path / "saved", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    wanted = layer_of(model)(x_of(5, 24))
    assert_near(model.merge_and_unload()["body"](x_of(5, 24)), wanted)


@pytest.mark.parametrize(("form", "told"), [(1, "export_lora("), (6, "merge_and_unload()")])
def test_the_model_card_says_how_the_adapter_leaves_the_library(form, told, tmp_path):
    mora(model_of(), form).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert told in card
    assert ("export_lora(" in card) is (form != 6)


@EACH
def test_compiled_whole_it_gives_eager_modes_numbers(form):
    layer = layer_of(mora(model_of(), form, init_lora_weights=False).train())
    x, found = x_of(5, 24), []
    torch._dynamo.reset()
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        result = run(x)
        found.append((result.detach(), *torch.autograd.grad(result.square().sum(), [m_of(layer)])))
    torch._dynamo.reset()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@EACH
def test_under_a_transform_of_torch_func_it_gives_the_same(form):
    layer = layer_of(mora(model_of(), form, init_lora_weights=False)).double()
    x = x_of(5, 24, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x), rtol=1e-11, atol=1e-12)


@EACH
def test_under_autocast_the_square_learns_in_its_own_dtype(form):
    layer = layer_of(mora(model_of(), form).train())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x_of(5, 24))
        result.square().mean().backward()
    assert result.dtype == torch.bfloat16
    assert m_of(layer).grad.dtype == torch.float32
    assert m_of(layer).grad.any()


def test_a_base_of_half_precision_and_a_later_adapter_have_their_own_squares():
    # There, M stays float32 on such a base, and angles are kept by the first adapter's size and dtype.
    model = mora(model_of().to(torch.bfloat16), 6, init_lora_weights=False)
    assert m_of(layer_of(model)).dtype == torch.float32
    second = MoraConfig(r=2, mora_type=6, target_modules=["body"], init_lora_weights=False)
    model.add_adapter("second", second)
    layer = layer_of(model.double())
    for name in ("default", "second", "default"):
        layer.set_adapter(name)
        x, base = x_of(5, 24, dtype=torch.float64), layer.get_base_layer()
        wanted = functional.linear(x, base.weight + dense(6, m_of(layer, name), 90, 24), base.bias)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-11, atol=1e-11)


# What is refused.


@pytest.mark.parametrize("form", [0, 5, 7, "6", 1.0, True, None])
def test_a_type_that_mora_does_not_have_is_refused_with_those_there_are(form):
    with pytest.raises(ValueError, match=r"mora_type=.* is no type of MoRA; .*\[1, 2, 3, 4, 6\]"):
        MoraConfig(mora_type=form, target_modules=["body"])


def test_type_6_is_refused_by_module_where_the_square_would_be_one_number():
    told = "body: r=1 gives a matrix of one number for its 1 inputs and 1 outputs.*higher r, mora_type=1"
    with pytest.raises(ValueError, match=told):
        mora(model_of(1, 1), 6, r=1)
    assert m_of(layer_of(mora(model_of(1, 1), 1, r=1))).shape == (1, 1)


def test_an_adapter_of_a_base_of_other_sizes_is_refused_though_its_square_fits(tmp_path):
    mora(model_of(24, 90), 1).save_pretrained(tmp_path)
    told = "'body' is 24 by 90, and module_sizes has 90 by 24.*leave module_sizes out"
    with pytest.raises(ValueError, match=told):
        peft.PeftModel.from_pretrained(model_of(90, 24), tmp_path)


def test_a_directory_whose_configuration_lost_the_sizes_is_refused_with_the_way_out(tmp_path):
    model = mora(model_of(), 1)
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    config.module_sizes = {}
    config.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"no module_sizes of module 'body'.*load the adapter into its base"):
        export_lora(tmp_path, tmp_path / "lora")


def test_a_checkpoint_of_another_method_is_refused_by_name():
    states = []
    for config in (
        MeLoraConfig(r=2, target_modules=["body"]),
        MoraConfig(r=2, target_modules=["body"]),
    ):
        model = peft.get_peft_model(model_of(), config).train()
        optimizer = optimizer_of(model)
        attach(model, optimizer, total_steps=2)
        states.append((model, optimizer, optimizer.state_dict()))
    (_, _, of_melora), (_, optimizer, state) = states
    state["param_groups"][0]["increlora"] = of_melora["param_groups"][0]["increlora"]
    with pytest.raises(ValueError, match="a training with 'melora', but the adapter's method is 'mora'"):
        optimizer.load_state_dict(state)
