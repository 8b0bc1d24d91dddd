"""Adapters with modules of rank 0 on disk: saved, loaded, exported without them, shown as 0."""

import warnings

import peft
import pytest
import torch
from growing import growing
from increlora_rs import export_lora, module_table, rank_table
from increlora_rs.layers.found import adapted_layers
from peft import PeftModel
from safetensors.torch import load_file


@pytest.fixture
def grown(make_bert, grow):
    """An adapter of ranks 0 but for two modules, which have 2 and 1."""
    model = peft.get_peft_model(
        make_bert(), growing(r=3, init_r=0, target_modules=["query", "value", "intermediate.dense"])
    )
    prefix = "bert.encoder.layer"
    grow(model, {f"{prefix}.0.attention.self.value": 2, f"{prefix}.1.intermediate.dense": 1})
    return model.eval()


def ranks_of(model):
    return {name: layer.rank("default") for name, layer in adapted_layers(model, "default").items()}


@pytest.mark.parametrize("meta", [False, True])
def test_a_saved_adapter_loads_with_its_ranks_and_without_a_warning(grown, make_bert, tokens, tmp_path, meta):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        grown.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_bert(), tmp_path, low_cpu_mem_usage=meta).eval()
    assert ranks_of(loaded) == ranks_of(grown)
    assert torch.equal(loaded(tokens).logits, grown(tokens).logits)


def test_an_adapter_is_loaded_over_one_of_other_ranks(grown, make_bert, tokens, tmp_path):
    grown.save_pretrained(tmp_path)
    other = peft.get_peft_model(
        make_bert(), growing(r=3, init_r=3, target_modules=["query", "value", "intermediate.dense"])
    )
    other.load_adapter(tmp_path, "default")
    assert ranks_of(other) == ranks_of(grown)
    assert torch.equal(other.eval()(tokens).logits, grown(tokens).logits)


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("rank", [None, 1])
def test_an_export_has_the_modules_that_have_something_and_no_other(grown, tmp_path, layout, rank):
    config = export_lora(grown, tmp_path, layout, rank).config
    names = {f"bert.encoder.layer.{name}" for name in ("0.attention.self.value", "1.intermediate.dense")}
    assert set(config.target_modules) == names
    assert all(value >= 1 for value in [*config.rank_pattern.values(), *config.alpha_pattern.values()])
    modules = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in _weights(tmp_path)}
    assert modules == names


def _weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_peft_gives_the_same_outputs_by_an_export(grown, make_bert, tokens, tmp_path, layout):
    export_lora(grown, tmp_path, layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lora = PeftModel.from_pretrained(make_bert(), tmp_path).eval()
    torch.testing.assert_close(lora(tokens).logits, grown(tokens).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.(query|value)"},
        {"target_modules": ["query", "value"], "layers_to_transform": [1], "layers_pattern": "layer"},
        {"target_modules": ["query", "value"], "exclude_modules": ["layer.0.attention.self.value"]},
    ],
)
def test_an_export_is_on_the_same_modules_however_they_were_named(
    make_bert, grow, tokens, tmp_path, settings
):
    model = peft.get_peft_model(make_bert(), growing(r=3, init_r=0, **settings))
    grow(model, {"bert.encoder.layer.1.attention.self.query": 2})
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(make_bert(), tmp_path).eval()
    torch.testing.assert_close(lora(tokens).logits, model.eval()(tokens).logits)


def test_a_module_whose_name_ends_another_of_rank_zero_is_exported_alone(tmp_path):
    def build():
        torch.manual_seed(0)
        return torch.nn.ModuleDict(
            {"a": torch.nn.Linear(3, 4), "b": torch.nn.ModuleDict({"a": torch.nn.Linear(4, 2)})}
        )

    model = peft.get_peft_model(build(), growing(r=1, rank_pattern={"^b.a": 0}, target_modules=["a"]))
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(build(), tmp_path)
    adapted = [
        name for name, module in lora.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    assert adapted == ["base_model.model.a"]


def test_an_adapter_with_nothing_is_not_exported(make_bert, tmp_path):
    model = peft.get_peft_model(make_bert(), growing(r=3, init_r=0, target_modules=["query"]))
    with pytest.raises(ValueError, match="each of the 2 modules has rank 0"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_tables_show_zero(grown):
    table = rank_table(grown)
    assert sorted(table.ranks.values()) == [0, 0, 0, 0, 1, 2]
    rows = module_table(grown).rows
    assert {row.rank: row.norm == 0.0 for row in rows} == {0: True, 1: False, 2: False}
    assert "0" in str(table)


def test_the_model_card_names_ranks_from_zero(grown, tmp_path):
    grown.save_pretrained(tmp_path)
    assert "6 modules, ranks 0 to 2" in (tmp_path / "README.md").read_text()


def test_parts_that_other_processes_hold_are_still_told_from_modules_with_nothing(grown, tmp_path):
    state = dict(grown.state_dict())
    key = next(key for key in state if key.endswith("lora_A.default.weight"))
    # As DeepSpeed ZeRO-3 leaves a parameter: of no dimension that is its own.
    state[key] = torch.empty(0)
    with pytest.raises(ValueError, match=r"cannot be saved.*Gather the parameters"):
        grown.save_pretrained(tmp_path, state_dict=state)
