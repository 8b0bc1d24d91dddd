"""Weighted sums of adapters: what PEFT's LoRA promises, for adapters whose ranks differ by module."""

import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, attach, export_lora
from increlora_rs.layers.found import adapted_layers
from increlora_rs.methods.lora_mini import LoraMiniConfig
from increlora_rs.support.names import short
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils

WEIGHTS = [0.7, -1.3]
THINNED = ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
FACTORWISE = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
SELECTIONS = {
    "same modules": ({"target_modules": ["query", "value"]}, {"target_modules": ["query", "value"]}),
    "other modules": ({"target_modules": ["query", "value"]}, {"target_modules": ["value", "key"]}),
    "list and regex": ({"target_modules": ["query"]}, {"target_modules": r".*layer\.1\..*(query|key)"}),
    "other layers": (
        {"target_modules": ["query"], "layers_to_transform": [0]},
        {"target_modules": ["query", "value"], "layers_to_transform": [1]},
    ),
}


def configure(**kwargs):
    return growing(**({"target_modules": ["query", "value"], "r": 3, "lora_alpha": 6} | kwargs))


@pytest.fixture
def two(make_bert, grow):
    """``two(first, second)``: a float64 BERT with adapters "default" and "other" of unequal ranks, from
    the arguments of their configurations; the paper's form is the second one's."""

    def run(first=None, second=None):
        model = get_peft_model(make_bert().double(), configure(**(first or {})))
        second = {"target_modules": ["query", "value"]} | (second or {})
        model.add_adapter("other", IncreLoraConfig.paper(**second))
        grow(model, reserve=0)
        names = [short(name) for name in adapted_layers(model, "other")]
        grow(model, {name: 1 + 2 * (k % 2) for k, name in enumerate(names)}, adapter_name="other", seed=1)
        return model.eval()

    return run


@pytest.mark.parametrize("combination", ["cat", "svd", "linear", "ties_svd"])
def test_adapters_of_a_method_without_sums_are_told_the_way_out_whatever_the_combination(
    make_bert, combination
):
    config = LoraMiniConfig(r=2, target_modules=["query"])
    model = get_peft_model(make_bert(), config)
    model.add_adapter("other", config)
    with pytest.raises(ValueError, match=r"none of the method; write each by increlora_rs\.export_lora"):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type=combination)
    assert set(model.peft_config) == {"default", "other"}


def updates(model, adapter):
    return {
        short(name): layer.get_delta_weight(adapter) for name, layer in adapted_layers(model, adapter).items()
    }


def ranks_of(model, adapter):
    return {short(name): layer.r[adapter] for name, layer in adapted_layers(model, adapter).items()}


def wanted_sum(model, weights=WEIGHTS):
    total = {}
    for adapter, weight in zip(["default", "other"], weights, strict=True):
        for name, update in updates(model, adapter).items():
            total[name] = total.get(name, 0.0) + weight * update
    return total


def logits(model, tokens, adapter):
    model.set_adapter(adapter)
    with torch.no_grad():
        return model(tokens).logits


def assert_updates(found, wanted, tolerance=1e-10):
    assert set(found) == set(wanted)
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, rtol=0.0, atol=tolerance)


# Exact ones.


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_cat_is_the_exact_sum(two, selection):
    model = two(*selection)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", "cat")
    assert_updates(updates(model, "sum"), wanted_sum(model))


def test_cat_has_the_ranks_added_up(two):
    model = two()
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", "cat")
    first, second = ranks_of(model, "default"), ranks_of(model, "other")
    assert ranks_of(model, "sum") == {name: first[name] + second[name] for name in first}


def test_cat_of_more_components_than_a_module_has_room_for_is_exact(make_plain, grow):
    model = get_peft_model(make_plain().double(), growing(r=4, target_modules=["lin0", "lin1"]))
    model.add_adapter("other", growing(r=4, target_modules=["lin0", "lin1"]))
    grow(model, {"lin0": 4, "lin1": 4})
    grow(model, {"lin0": 4, "lin1": 5}, adapter_name="other", seed=1)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", "cat")
    assert ranks_of(model, "sum") == {"lin0": 8, "lin1": 6}
    assert_updates(updates(model, "sum"), wanted_sum(model))


@pytest.mark.parametrize("kind", ["svd", "cat", *THINNED, *FACTORWISE])
@pytest.mark.parametrize("weight", [0.5, -2, 0])
@pytest.mark.parametrize("adapter", ["default", "other"])
def test_one_adapter_alone_is_scaled_exactly(two, kind, weight, adapter):
    model = two()
    model.add_weighted_adapter([adapter], [weight], "scaled", kind)
    assert_updates(
        updates(model, "scaled"), {name: weight * update for name, update in updates(model, adapter).items()}
    )
    assert ranks_of(model, "scaled") == ranks_of(model, adapter)


def test_sum_that_cancels_gives_the_base_outputs(two, make_bert, tokens):
    model = two()
    model.add_weighted_adapter(["other", "other"], [0.4, -0.4], "nothing", "cat")
    with torch.no_grad():
        base = make_bert().double()(tokens).logits
    torch.testing.assert_close(logits(model, tokens, "nothing"), base, rtol=0.0, atol=1e-10)


# By singular values.


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("rank", [None, 1, 2, 20])
def test_svd_is_the_nearest_sum_of_its_rank(two, selection, rank):
    model = two(*selection)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", svd_rank=rank)
    first, second = ranks_of(model, "default"), ranks_of(model, "other")
    wanted = {}
    for name, update in wanted_sum(model).items():
        u, s, v = torch.linalg.svd(update)
        n = rank or max(first.get(name, 0), second.get(name, 0))
        wanted[name] = u[:, :n] * s[:n] @ v[:n]
    assert_updates(updates(model, "sum"), wanted)


def test_svd_rank_is_the_most_that_a_module_keeps(two):
    model = two()
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", svd_rank=2)
    assert set(ranks_of(model, "sum").values()) == {2}
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "whole", svd_rank=20)
    first, second = ranks_of(model, "default"), ranks_of(model, "other")
    assert ranks_of(model, "whole") == {name: first[name] + second[name] for name in first}


@pytest.mark.parametrize("kind", THINNED)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_thinned_sums_are_pefts(two, kind, sign):
    model = two()
    torch.manual_seed(5)
    model.add_weighted_adapter(
        ["default", "other"], WEIGHTS, "sum", kind, svd_rank=32, density=0.4, majority_sign_method=sign
    )
    torch.manual_seed(5)
    first, second, wanted = updates(model, "default"), updates(model, "other"), {}
    method = getattr(merge_utils, kind.removesuffix("_svd"))
    further = [sign] if "ties" in kind else []
    for name in first:
        tensors = [first[name], second[name]]
        wanted[name] = method(tensors, torch.tensor(WEIGHTS), 0.4, *further)
    assert_updates(updates(model, "sum"), wanted, 1e-6)


# The new adapter.


def test_sum_is_frozen_and_changes_nothing_of_the_others(two, tokens):
    model = two()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    active = model.active_adapters
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", "cat")
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert model.active_adapters == active


def test_sum_of_adapters_that_are_loaded_frozen_leaves_them_frozen(two, make_bert, tmp_path):
    two().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_bert(), tmp_path)
    model.load_adapter(tmp_path / "other", "other")
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", "cat")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == []


def test_sum_shares_no_memory_with_its_adapters(two):
    model = two()
    model.add_weighted_adapter(["default"], [1.0], "twin")
    before = {name: update.clone() for name, update in updates(model, "twin").items()}
    with torch.no_grad():
        for layer in adapted_layers(model, "default").values():
            layer.lora_A["default"].weight.zero_()
    assert_updates(updates(model, "twin"), before, 0.0)


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_sum_is_saved_and_loaded(two, make_bert, tokens, tmp_path, selection, kind):
    model = two(*selection)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", kind)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(make_bert().double(), tmp_path / "sum", adapter_name="sum").eval()
    assert ranks_of(loaded, "sum") == ranks_of(model, "sum")
    assert torch.equal(logits(loaded, tokens, "sum"), logits(model, tokens, "sum"))


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_sum_is_exported(two, make_bert, tokens, tmp_path, selection):
    model = two(*selection)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", "cat")
    export_lora(model, tmp_path, adapter_name="sum")
    loaded = PeftModel.from_pretrained(make_bert().double(), tmp_path, adapter_name="sum").eval()
    torch.testing.assert_close(
        logits(loaded, tokens, "sum"), logits(model, tokens, "sum"), rtol=0.0, atol=1e-9
    )


def test_sum_can_be_trained_and_grows(two, make_bert, tokens, tmp_path):
    model = two()
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", "svd", svd_rank=2)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    config = configure(r=3, lora_alpha=3)
    model = PeftModel.from_pretrained(make_bert(), tmp_path / "sum", is_trainable=True, config=config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = attach(model, optimizer, total_steps=20)
    assert scheduler.total_rank == 8
    for _ in range(20):
        model(tokens, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scheduler.total_rank == 12


def test_sum_keeps_the_dtype_of_its_adapters(make_bert, grow):
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(make_bert().bfloat16(), configure(), autocast_adapter_dtype=autocast)
        model.add_adapter("other", configure(), autocast_adapter_dtype=autocast)
        grow(model)
        grow(model, adapter_name="other")
        for kind in ("cat", "svd"):
            model.add_weighted_adapter(["default", "other"], WEIGHTS, kind, kind)
            layers = adapted_layers(model, kind).values()
            assert {factor.dtype for x in layers for factor in x.factors(kind)} == {dtype}


def test_sum_of_a_merged_adapter_unmerges_it_as_peft_does(two):
    model = two()
    wanted = wanted_sum(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", "cat")
    assert_updates(updates(model, "sum"), wanted)
    assert not any(layer.merged for layer in adapted_layers(model, "default").values())


# What is refused.


@pytest.mark.parametrize("kind", FACTORWISE)
def test_adding_factor_to_factor_is_refused_with_the_way_out(two, kind):
    with pytest.raises(ValueError, match=rf"combination_type='{kind}' .*'cat', which is exact"):
        two().add_weighted_adapter(["default", "other"], WEIGHTS, "sum", kind, density=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": ["default", "nobody"]}, "adapters: there is no 'nobody'"),
        ({"adapters": []}, "adapters="),
        ({"weights": [1.0]}, r"weights=\[1.0\]"),
        ({"weights": [1.0, float("nan")]}, "weights=nan"),
        ({"adapter_name": "other"}, "adapter_name='other' is taken"),
        ({"combination_type": "sum"}, "combination_type='sum'"),
        ({"svd_rank": 0}, "svd_rank=0"),
        ({"svd_rank": 4, "combination_type": "cat"}, "svd_rank=4"),
        ({"svd_clamp": 0.99}, "svd_clamp=0.99"),
        ({"combination_type": "ties_svd"}, "density=None"),
        ({"combination_type": "ties_svd", "density": 0.0}, "density=0.0"),
        ({"combination_type": "ties_svd", "density": 1.1}, "density=1.1"),
        ({"majority_sign_method": "most"}, "majority_sign_method='most'"),
    ],
)
def test_wrong_argument_is_refused_by_name(two, arguments, message):
    model = two()
    given = {"adapters": ["default", "other"], "weights": WEIGHTS, "adapter_name": "sum"} | arguments
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**given)
    assert list(model.peft_config) == ["default", "other"]


@pytest.mark.parametrize("arguments", [{"modules_to_save": ["classifier"]}, {"bias": "all"}])
def test_adapters_that_train_more_than_their_update_are_refused(make_bert, arguments):
    model = get_peft_model(make_bert(), configure(**arguments))
    with pytest.raises(ValueError, match=f"'default' has {next(iter(arguments))}="):
        model.add_weighted_adapter(["default"], [0.5], "half")
    assert list(model.peft_config) == ["default"]
