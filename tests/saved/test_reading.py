"""Reading an adapter from a model or a directory; damaged directories, through every reader there is."""

import json
import shutil

import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, export_lora, rank_table
from increlora_rs.layers.found import adapted_layers
from increlora_rs.saved.reading import read
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANKS = {"lin0": 3, "lin1": 2}
FACTORS = ["lora_A", "lora_B", "lora_E"]


def configure(**kwargs):
    return growing(**({"target_modules": ["lin0", "lin1"], "r": 3, "lora_alpha": 6} | kwargs))


@pytest.fixture
def adapter(make_plain, grow, tmp_path):
    """A saved adapter of ranks 3 and 2 for the two-layer model."""
    model = get_peft_model(make_plain(), configure())
    grow(model, RANKS)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(adapter, change):
    """Saves the tensors of ``adapter`` anew after ``change(tensors)``."""
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})


def key(module, factor):
    return f"base_model.model.{module}.{factor}.weight"


# Readers of a directory: with the base model, and without.


def from_pretrained(base, path):
    return PeftModel.from_pretrained(base, path)


def low_cpu_mem_usage(base, path):
    return PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True)


def over_a_name(base, path):
    return get_peft_model(base, configure()).load_adapter(path, "default")


def second_name(base, path):
    return get_peft_model(base, configure()).load_adapter(path, "second")


def exporting(base, path):
    return export_lora(path, path.parent / "plain")


def tabulating(base, path):
    return rank_table(path)


WITH_BASE = [from_pretrained, low_cpu_mem_usage, over_a_name, second_name]
ALONE = [exporting, tabulating]


def readers(choice):
    return pytest.mark.parametrize("reader", choice, ids=lambda reader: reader.__name__)


def refusal(reader, base, path):
    with pytest.raises(Exception) as error:
        reader(base, path)
    return str(error.value)


# Damaged directories.


@readers(WITH_BASE + ALONE)
def test_missing_directory_is_named(make_plain, tmp_path, reader):
    assert "nowhere" in refusal(reader, make_plain(), tmp_path / "nowhere")


@readers(WITH_BASE + ALONE)
def test_missing_weights_are_named_by_their_directory(make_plain, adapter, reader):
    (adapter / WEIGHTS).unlink()
    assert str(adapter) in refusal(reader, make_plain(), adapter)


@readers([from_pretrained, low_cpu_mem_usage, second_name, *ALONE])
def test_missing_configuration_is_named_by_its_directory(make_plain, adapter, reader):
    (adapter / CONFIG).unlink()
    message = refusal(reader, make_plain(), adapter)
    assert CONFIG in message
    assert str(adapter) in message


@readers(WITH_BASE + ALONE)
@pytest.mark.parametrize("length", [0, 4, 8, 60, 500, 900, -1])
def test_truncated_weights_are_named_by_their_path(make_plain, adapter, reader, length):
    whole = (adapter / WEIGHTS).read_bytes()
    assert len(whole) > 900
    (adapter / WEIGHTS).write_bytes(whole[:length])
    assert str(adapter / WEIGHTS) in refusal(reader, make_plain(), adapter)


@readers(WITH_BASE + ALONE)
def test_weights_that_are_no_safetensors_are_named_by_their_path(make_plain, adapter, reader):
    (adapter / WEIGHTS).write_bytes(b"\xff" * 2000)
    assert str(adapter / WEIGHTS) in refusal(reader, make_plain(), adapter)


@readers(ALONE)
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"peft_type": 3}', "\x00\x01"])
def test_corrupted_configuration_is_named_by_its_directory(make_plain, adapter, reader, text):
    (adapter / CONFIG).write_text(text)
    assert str(adapter) in refusal(reader, make_plain(), adapter)


@readers([from_pretrained, low_cpu_mem_usage, second_name])
@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_corrupted_configuration_does_not_load(make_plain, adapter, reader, text):
    (adapter / CONFIG).write_text(text)
    assert refusal(reader, make_plain(), adapter)


@readers([from_pretrained, second_name, *ALONE])
def test_wrong_value_in_the_configuration_is_named(make_plain, adapter, reader):
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": -1}))
    assert "lora_alpha=-1" in refusal(reader, make_plain(), adapter)


@readers(WITH_BASE + ALONE)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite_is_named_by_module_and_factor(make_plain, adapter, reader, factor, value):
    edit(adapter, lambda tensors: tensors[key("lin1", factor)].view(-1)[-1:].fill_(value))
    message = refusal(reader, make_plain(), adapter)
    assert f"{factor} of module 'lin1'" in message


@readers(WITH_BASE + ALONE)
@pytest.mark.parametrize(
    ("factor", "shape"),
    [
        ("lora_A", (1, 20)),
        ("lora_A", (4, 20)),
        ("lora_A", (2,)),
        ("lora_B", (6, 1)),
        ("lora_B", (6, 3)),
        ("lora_B", (12,)),
        ("lora_E", (2, 2)),
        ("lora_E", (2,)),
        ("lora_E", ()),
    ],
)
def test_wrong_shape_is_named_by_module_and_factor(make_plain, adapter, reader, factor, shape):
    edit(adapter, lambda tensors: tensors.update({key("lin1", factor): torch.zeros(shape)}))
    message = refusal(reader, make_plain(), adapter)
    assert "lin1" in message
    assert "lora_" in message
    assert str(shape) in message


@readers(WITH_BASE + ALONE)
def test_a_rank_of_zero_beside_factors_that_have_rows_is_refused(make_plain, adapter, reader):
    edit(adapter, lambda tensors: tensors.update({key("lin1", "lora_E"): torch.zeros(0, 1)}))
    message = refusal(reader, make_plain(), adapter)
    assert "lora_A of module 'lin1' has shape (2, 20)" in message
    assert "needs (0, 20)" in message


@readers(WITH_BASE + ALONE)
@pytest.mark.parametrize("factor", FACTORS)
def test_missing_tensor_is_named(make_plain, adapter, reader, factor):
    edit(adapter, lambda tensors: tensors.pop(key("lin1", factor)))
    message = refusal(reader, make_plain(), adapter)
    assert "lin1" in message
    assert factor in message


@readers(WITH_BASE)
def test_missing_module_is_named(make_plain, adapter, reader):
    edit(adapter, lambda tensors: [tensors.pop(key("lin1", factor)) for factor in FACTORS])
    assert "lin1" in refusal(reader, make_plain(), adapter)


@readers(WITH_BASE + ALONE)
def test_weights_without_any_tensor_are_refused(make_plain, adapter, reader):
    edit(adapter, lambda tensors: tensors.clear())
    assert "lora_A" in refusal(reader, make_plain(), adapter)


@readers(WITH_BASE + ALONE)
@pytest.mark.parametrize("factor", FACTORS)
def test_tensor_of_an_unknown_module_is_named(make_plain, adapter, reader, factor):
    edit(adapter, lambda tensors: tensors.update({key("lin9", factor): torch.zeros(2, 2)}))
    assert "lin9" in refusal(reader, make_plain(), adapter)


@readers(WITH_BASE)
@pytest.mark.parametrize("width", [10, 13])
def test_adapter_of_a_base_of_other_width_is_refused_by_module(adapter, reader, width):
    base = nn.ModuleDict({"lin0": nn.Linear(width, 20), "lin1": nn.Linear(20, 6)})
    message = refusal(reader, base, adapter)
    assert "lin0" in message
    assert str(width) in message


@pytest.mark.parametrize("depth", [1, 3])
def test_adapter_of_a_base_of_other_depth_is_refused_by_module(make_bert, grow, tmp_path, depth):
    model = get_peft_model(make_bert(layers=2), growing(target_modules=["query"]))
    grow(model)
    model.save_pretrained(tmp_path)
    message = refusal(from_pretrained, make_bert(layers=depth), tmp_path)
    assert f"layer.{min(depth, 2)}.attention.self.query" in message
    assert "another base model" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[key("lin1", "lora_A")].fill_(float("nan")),
        lambda tensors: tensors.pop(key("lin1", "lora_E")),
        lambda tensors: tensors.update({key("lin1", "lora_B"): torch.zeros(6, 1)}),
        lambda tensors: tensors.update({key("lin9", "lora_A"): torch.zeros(2, 2)}),
    ],
    ids=["not finite", "missing", "shape", "unknown"],
)
def test_refused_adapter_leaves_the_one_it_was_to_replace(make_plain, grow, adapter, plain_input, change):
    model = get_peft_model(make_plain(), configure())
    grow(model, {"lin0": 2, "lin1": 5}, seed=1)
    before = model.eval()(plain_input)
    edit(adapter, change)
    with pytest.raises(ValueError):
        model.load_adapter(adapter, "default")
    ranks = [layer.r["default"] for layer in adapted_layers(model, "default").values()]
    assert ranks == [2, 5]
    assert torch.equal(model.eval()(plain_input), before)


# What is read.


def test_model_and_directory_give_the_same_factors(make_plain, grow, adapter):
    model = PeftModel.from_pretrained(make_plain(), adapter)
    memory, disk = read(model), read(adapter)
    assert list(memory.modules) == list(disk.modules) == ["lin0", "lin1"]
    for name in RANKS:
        for factor in "abe":
            assert torch.equal(
                getattr(memory.modules[name].update, factor), getattr(disk.modules[name].update, factor)
            )


@pytest.mark.parametrize("form", [growing, IncreLoraConfig.paper])
def test_factors_multiply_to_the_layers_update(make_plain, grow, form):
    model = get_peft_model(make_plain(), form(target_modules=["lin0", "lin1"], alpha_pattern={"lin1": 5}))
    grow(model, RANKS, reserve=1)
    layers = adapted_layers(model, "default")
    for name, module in read(model).modules.items():
        update = module.update
        update = update.scale * (update.b * update.e.view(-1)) @ update.a
        wanted = layers[f"base_model.model.{name}"].get_delta_weight("default")
        torch.testing.assert_close(update, wanted)


def test_total_rank_is_the_sum(adapter):
    assert read(adapter).total_rank == sum(RANKS.values())


def test_path_may_be_a_string(adapter):
    assert read(str(adapter)).modules.keys() == RANKS.keys()


def test_named_adapter_of_a_model_is_read(make_plain, grow):
    model = get_peft_model(make_plain(), configure())
    model.add_adapter("other", configure())
    grow(model, {"lin0": 5, "lin1": 4}, adapter_name="other")
    assert [module.rank for module in read(model, "other").modules.values()] == [5, 4]


def test_unknown_adapter_name_is_refused_with_the_names_there_are(make_plain):
    model = get_peft_model(make_plain(), configure())
    with pytest.raises(ValueError, match=r"'other'.*\['default'\]"):
        read(model, "other")


def test_plain_lora_model_is_refused(make_plain):
    with pytest.raises(ValueError, match="no adapter of increlora_rs 'default'"):
        read(get_peft_model(make_plain(), LoraConfig(target_modules=["lin0"])))


def test_model_without_adapters_is_refused(make_plain):
    with pytest.raises(ValueError, match="no adapter of increlora_rs 'default'"):
        read(make_plain())


def test_plain_lora_directory_is_refused_by_its_type(make_plain, tmp_path):
    get_peft_model(make_plain(), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'LORA'"):
        read(tmp_path)


def test_neither_model_nor_path_is_refused_by_type():
    with pytest.raises(TypeError, match="int"):
        read(3)


def test_directory_is_left_as_it_was(adapter):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    rank_table(adapter)
    export_lora(adapter, adapter.parent / "plain")
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_adapter_survives_moving_its_directory(adapter, make_plain, plain_input):
    before = PeftModel.from_pretrained(make_plain(), adapter)(plain_input)
    moved = shutil.move(adapter, adapter.parent / "elsewhere")
    assert torch.equal(PeftModel.from_pretrained(make_plain(), moved)(plain_input), before)
