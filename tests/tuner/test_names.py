"""The parameters have LoRA's names, so what copies or picks by name treats them as LoRA's."""

import copy
import pickle

import pytest
import tiny
import torch
from datasets import Dataset
from every_kind import IDS, TARGETS, EveryKind
from growing import growing
from increlora_rs.layers.factor import Factor
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer


def adapted(form=growing, targets=TARGETS):
    torch.manual_seed(0)
    return get_peft_model(EveryKind(), form(r=2, lora_alpha=4, target_modules=targets))


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_names_are_those_of_lora_and_e():
    ours, theirs = (trained_names(adapted(form, ["conv", "lin"])) for form in (growing, LoraConfig))
    assert {name for name in ours if "lora_E" not in name} == theirs
    assert {name for name in ours if "lora_E" in name} == {n.replace("_A", "_E") for n in theirs if "_A" in n}


def test_saved_names_are_those_of_lora_and_e(tmp_path):
    for form in (growing, LoraConfig):
        adapted(form, ["lin"]).save_pretrained(tmp_path / form.__name__)
    ours, theirs = (
        set(load_file(tmp_path / form.__name__ / "adapter_model.safetensors"))
        for form in (growing, LoraConfig)
    )
    assert ours - theirs == {"base_model.model.lin.lora_E.weight"}
    assert theirs <= ours


def test_a_reference_made_by_name_is_the_adapter(grow):
    # As TRL's trainers make one of an adapter that is trained on.
    model = adapted()
    grow(model, {"emb": 3, "conv": 1, "lin": 2})
    wanted = model(IDS)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    torch.testing.assert_close(model(IDS), wanted)


def test_the_first_loss_of_dpo_on_a_trained_adapter_is_that_of_equal_models(grow, tmp_path):
    model = get_peft_model(
        tiny.llama(), growing(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    )
    grow(model)
    rows = Dataset.from_dict(
        {"prompt": ["the cat"] * 4, "chosen": [" sings and waits"] * 4, "rejected": [" sleeps and waits"] * 4}
    )
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
    )
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tiny.tokenizer())
    trainer.train()
    first = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert float(first) == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-3)


def test_a_factor_reads_as_its_parameter():
    factor = Factor(torch.ones(2, 3))
    assert factor.shape == (2, 3)
    assert factor.detach().sum() == 6.0
    assert {factor.weight: "state"}[factor] == "state"
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        factor.unknown  # noqa: B018


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_of_a_factor_have_its_values(way):
    factor = Factor(torch.arange(6.0).view(2, 3))
    assert torch.equal(way(factor).weight, factor.weight)


@pytest.mark.parametrize("name", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_a_hook_on_a_factor_is_told_that_nothing_calls_it(name):
    factor = Factor(torch.ones(2, 3))
    with pytest.warns(UserWarning, match="is not called, for the update is computed at once"):
        handle = getattr(factor, f"register_{name}_hook")(lambda *_: None)
    handle.remove()


def test_a_factor_that_is_called_says_what_to_take():
    with pytest.raises(NotImplementedError, match=r"get_delta_weight\(adapter_name\)"):
        Factor(torch.ones(2, 3))(torch.ones(1, 3))
