"""Every method is saved, and loaded by every way that PEFT and torch have, with the same outputs."""

import copy
import io
import json
import pickle

import peft
import pytest
import torch
from increlora_rs import AdaLoraRsConfig, IncreLoraConfig, PriLoraConfig, SoraConfig
from increlora_rs.methods import METHODS
from method_cases import (
    CASES,
    EVERY,
    adapted,
    adapted_modules,
    asked_of,
    assert_equal_bits,
    batch,
    config_of,
    optimizer_of,
    run,
    tensors_of,
    trainable,
    trained,
)
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def model(method, make_bert):
    return trained(method, make_bert())


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@torch.no_grad()
def logits(model, step=50):
    return model.eval()(**batch(step)).logits


def by_peft_model(method, base, path):
    return PeftModel.from_pretrained(base, path)


def by_low_cpu_mem_usage(method, base, path):
    return PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True)


def as_trainable(method, base, path):
    return PeftModel.from_pretrained(base, path, is_trainable=True)


def over_a_fresh_adapter(method, base, path):
    model = adapted(method, base)
    model.load_adapter(path, "default")
    return model


def as_second_adapter(method, base, path):
    model = adapted(method, base)
    model.load_adapter(path, "second")
    model.set_adapter("second")
    return model


def as_second_adapter_low_cpu_mem_usage(method, base, path):
    model = adapted(method, base)
    model.load_adapter(path, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    return model


def by_state_dict(method, base, path):
    model = adapted(method, base)
    set_peft_model_state_dict(model, load_file(path / WEIGHTS))
    return model


def by_injection(method, base, path):
    model = inject_adapter_in_model(method.config.from_pretrained(str(path)), base)
    set_peft_model_state_dict(model, load_file(path / WEIGHTS))
    return model


def by_transformers(method, base, path):
    base.load_adapter(str(path))
    return base


WAYS = pytest.mark.parametrize(
    "load",
    [
        by_peft_model,
        by_low_cpu_mem_usage,
        as_trainable,
        over_a_fresh_adapter,
        as_second_adapter,
        as_second_adapter_low_cpu_mem_usage,
        by_state_dict,
        by_injection,
        by_transformers,
    ],
    ids=lambda way: way.__name__,
)


@EVERY
@WAYS
def test_a_loaded_adapter_gives_the_same_outputs(method, model, saved, make_bert, load):
    loaded = load(method, make_bert(), saved)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(make_bert()))


@EVERY
@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_adapter_is_trainable_as_asked(method, saved, make_bert, trainable):
    loaded = PeftModel.from_pretrained(make_bert(), saved, is_trainable=trainable)
    for layer in adapted_modules(loaded).values():
        names = [
            name
            for name in CASES[method.name].tensors
            if isinstance(tensors_of(method, layer)[name], torch.nn.Parameter)
        ]
        assert all(tensors_of(method, layer)[name].requires_grad is trainable for name in names)


@EVERY
def test_a_loaded_adapter_goes_on_as_the_model_that_was_saved(method, model, saved, make_bert):
    loaded = PeftModel.from_pretrained(make_bert(), saved, is_trainable=True)
    for each in (model, loaded):
        run(each.train(), optimizer_of(each), range(10, 13))
    assert_equal_bits(trainable(loaded), trainable(model))


@EVERY
def test_a_loaded_adapter_saves_the_same_bytes_again(method, saved, make_bert, tmp_path):
    PeftModel.from_pretrained(make_bert(), saved).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()


@EVERY
def test_the_file_holds_what_is_trained_and_nothing_else(method, model, saved):
    with safe_open(saved / WEIGHTS, "pt") as file:
        sizes = [file.get_tensor(key).numel() for key in file.keys()]  # noqa: SIM118
    assert sum(sizes) == sum(p.numel() for p in trainable(model).values())


@EVERY
def test_the_configuration_names_the_method_and_is_read_back(method, model, saved):
    assert json.loads((saved / "adapter_config.json").read_text())["peft_type"] == method.name.upper()
    loaded = peft.PeftConfig.from_pretrained(str(saved))
    assert type(loaded) is method.config
    assert {name: loaded.rank_at(name) for name in adapted_modules(model)} == {
        name: asked_of(method, name) for name in adapted_modules(model)
    }
    for name, value in CASES[method.name].settings.items():
        if name != "rank_pattern":
            assert getattr(loaded, name) == value, name


@EVERY
def test_the_model_card_tells_of_the_method(method, saved):
    card = (saved / "README.md").read_text()
    assert f"## {method.title} adapter" in card
    assert method.paper in card


@pytest.mark.slow
@EVERY
def test_an_adapter_loads_in_a_new_process(method, make_bert, bert_dir, tokens, tmp_path, new_process):
    model = trained(method, make_bert())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(tokens).logits
    assert new_process(bert_dir, tmp_path, tokens)["logits"] == wanted.double().tolist()


@EVERY
def test_an_adapter_loads_with_its_base_through_auto_peft_model(method, bert_dir, tmp_path):
    base = BertForSequenceClassification.from_pretrained(bert_dir)
    model = trained(method, base, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(logits(loaded), logits(model))


@EVERY
def test_two_adapters_are_saved_each_in_its_folder(method, model, make_bert, tmp_path):
    model.add_adapter("second", config_of(method, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    first = PeftModel.from_pretrained(make_bert(), tmp_path)
    second = PeftModel.from_pretrained(make_bert(), tmp_path / "second")
    assert torch.equal(logits(first), logits(model))
    model.set_adapter("second")
    assert torch.equal(logits(second), logits(model))


@EVERY
def test_an_adapter_saved_without_safetensors_loads(method, model, make_bert, tmp_path):
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits(PeftModel.from_pretrained(make_bert(), tmp_path)), logits(model))


@EVERY
def test_a_model_of_bfloat16_comes_back(method, make_bert, tmp_path):
    model = trained(method, make_bert()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert_equal_bits(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    assert torch.equal(logits(loaded), logits(model))


@EVERY
def test_an_adapter_saved_while_merged_loads(method, model, make_bert, tmp_path):
    wanted = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_bert(), tmp_path)), wanted)


# By torch alone.


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@EVERY
@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save], ids=lambda way: way.__name__)
def test_a_copied_model_gives_the_same_outputs_and_trains_alike(model, copied):
    twin = copied(model)
    assert torch.equal(logits(twin), logits(model))
    for each in (model, twin):
        run(each.train(), optimizer_of(each), range(10, 12))
    assert_equal_bits(trainable(twin), trainable(model))


@EVERY
def test_a_state_dict_loads_into_a_fresh_model(method, model, make_bert):
    fresh = adapted(method, make_bert())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


# What is refused.


def damaged(saved, change):
    tensors = load_file(saved / WEIGHTS)
    key = next(key for key in tensors if "query.lora_A" in key)
    change(tensors, key)
    save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
    return key


@EVERY
def test_an_adapter_with_a_number_that_is_not_finite_is_refused_by_module(saved, make_bert):
    damaged(saved, lambda tensors, key: tensors[key].view(-1)[:1].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"lora_A of module '.*query' holds 1 values that are NaN"):
        PeftModel.from_pretrained(make_bert(), saved)


@EVERY
def test_an_adapter_without_one_of_its_tensors_is_refused_by_module(saved, make_bert):
    damaged(saved, lambda tensors, key: tensors.pop(key))
    with pytest.raises(ValueError, match=r"no tensor '.*query\.lora_A.*' for the adapted module '.*query'"):
        PeftModel.from_pretrained(make_bert(), saved)


@EVERY
def test_an_adapter_with_a_tensor_of_another_shape_is_refused_by_module(saved, make_bert):
    damaged(saved, lambda tensors, key: tensors.update({key: tensors[key][:, 1:].contiguous()}))
    with pytest.raises(ValueError, match=r"size mismatch: lora_A of module '.*query'"):
        PeftModel.from_pretrained(make_bert(), saved)


@EVERY
def test_an_adapter_with_tensors_of_no_module_is_refused_with_the_first(saved, make_bert):
    damaged(saved, lambda tensors, key: tensors.update({key.replace("query", "key"): tensors[key].clone()}))
    with pytest.raises(ValueError, match=r"1 tensors, '.*key\.lora_A.*' the first, that belong to no"):
        PeftModel.from_pretrained(make_bert(), saved)


@EVERY
def test_a_refused_load_leaves_the_adapter_that_is_there(method, model, saved):
    wanted = logits(model)
    damaged(saved, lambda tensors, key: tensors.pop(key))
    with pytest.raises(ValueError, match="no tensor"):
        model.load_adapter(saved, "default")
    assert torch.equal(logits(model), wanted)


@pytest.fixture(scope="module")
def of_every_method(make_bert, tmp_path_factory):
    """An adapter of each method, by its name, and one of LoRA."""
    folders = {name: tmp_path_factory.mktemp(name) for name in (*CASES, "lora")}
    for method in METHODS:
        adapted(method, make_bert()).save_pretrained(folders[method.name])
    lora = peft.LoraConfig(target_modules=["query", "value"], r=2)
    peft.get_peft_model(make_bert(), lora).save_pretrained(folders["lora"])
    return folders


@EVERY
def test_an_adapter_of_another_method_is_not_loaded_over_one(method, make_bert, of_every_method):
    model = adapted(method, make_bert())
    before = trainable(model)
    for name, folder in of_every_method.items():
        if name != method.name:
            told = f"type '{name.upper()}', and adapter_name='default' of the model is of "
            told += f"'{method.name.upper()}'"
            with pytest.raises(ValueError, match=rf"model_id: .*{told}; .*PeftModel\.from_pretrained"):
                model.load_adapter(folder, "default")
    assert_equal_bits(trainable(model), before)
    model.load_adapter(of_every_method[method.name], "default")


def test_tensors_that_the_method_has_not_are_refused_by_the_first(make_bert):
    factors = {"target_modules": ["query"], "init_lora_weights": False, "r": 2}
    with_e = AdaLoraRsConfig(init_r=2, **factors), SoraConfig(**factors), IncreLoraConfig(init_r=2, **factors)
    for other in with_e:
        tensors = get_peft_model_state_dict(peft.get_peft_model(make_bert(), other))
        model = peft.get_peft_model(make_bert(), PriLoraConfig(r_s=2, **factors))
        with pytest.raises(ValueError, match=r"2 tensors, '.*layer\.0.*query\.lora_E.*' the first"):
            set_peft_model_state_dict(model, tensors)


@EVERY
def test_a_file_that_was_cut_short_is_refused_by_its_name(saved, make_bert):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=WEIGHTS):
        PeftModel.from_pretrained(make_bert(), saved)


@EVERY
def test_an_adapter_of_a_base_of_other_modules_is_refused_by_the_first(method, saved, make_bert):
    with pytest.raises(ValueError, match=CASES[method.name].other_modules):
        PeftModel.from_pretrained(make_bert(layers=1), saved)


@EVERY
def test_an_adapter_of_a_base_of_other_sizes_is_refused_by_module(saved, make_bert):
    with pytest.raises(ValueError, match=r"size mismatch: .* module '.*query'.*another base model"):
        PeftModel.from_pretrained(make_bert(hidden=16), saved)
