"""An adapter that is loaded over another one, of which PEFT reads no configuration: refused where it is of
another method, or where its numbers would be another update."""

import json

import peft
import pytest
import torch
from increlora_rs.methods import METHODS
from method_cases import CASES, EVERY, adapted, batch, config_of

OTHERS = dict(zip(METHODS, METHODS[1:] + METHODS[:1], strict=True))
BY_NAME = {method.name: method for method in METHODS}
# Of the same shapes, and of another update.
MEANINGS = [
    ("lora_mini", {"aux_seed": 1}),
    ("lora_mini", {"aux_init": "published"}),
    ("lorta", {"orientation": "litgpt"}),
    ("lorta", {"after_heads": ["query"]}),
    ("mora", {"mora_type": 2}),
    ("mora", {"mora_type": 6, "fold_inputs": False}),
]


@torch.no_grad()
def logits(model):
    return model.eval()(**batch(50)).logits


def saved(method, base, path, **settings):
    adapted(method, base, init_lora_weights=False, **settings).save_pretrained(path)
    return path


@EVERY
def test_an_adapter_of_another_method_is_refused_by_both_names(method, make_bert, tmp_path):
    model = adapted(method, make_bert(), init_lora_weights=False)
    before, other = logits(model), OTHERS[method]
    path = saved(other, make_bert(), tmp_path)
    told = f"an adapter of type '{other.name.upper()}', .* of '{method.name.upper()}'.*from_pretrained"
    with pytest.raises(ValueError, match=told):
        model.load_adapter(path, "default")
    assert torch.equal(logits(model), before)


@EVERY
def test_a_plain_lora_is_refused_by_its_type(method, make_bert, tmp_path):
    targets = list(CASES[method.name].targets)
    peft.get_peft_model(make_bert(), peft.LoraConfig(r=2, target_modules=targets)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an adapter of type 'LORA'"):
        adapted(method, make_bert()).load_adapter(tmp_path, "default")


@pytest.mark.parametrize(("name", "options"), MEANINGS, ids=str)
def test_an_option_by_which_the_same_numbers_are_another_update_is_told(name, options, make_bert, tmp_path):
    method, option = BY_NAME[name], list(options)[-1]
    path = saved(method, make_bert(), tmp_path, **options)
    model = adapted(method, make_bert(), **{key: options[key] for key in list(options)[:-1]})
    before = logits(model)
    with pytest.raises(ValueError, match=rf"{option}=.*'default' of the model has {option}=.*make the model"):
        model.load_adapter(path, "default")
    assert torch.equal(logits(model), before)
    model = adapted(method, make_bert(), **options)
    model.load_adapter(path, "default")
    assert torch.equal(logits(model), logits(peft.PeftModel.from_pretrained(make_bert(), path)))


def test_a_tuple_is_the_list_that_a_file_makes_of_it(make_bert, tmp_path):
    ends = ("attention.output.dense",)
    path = saved(BY_NAME["lorta"], make_bert(), tmp_path, after_heads=ends)
    adapted(BY_NAME["lorta"], make_bert(), after_heads=ends).load_adapter(path, "default")


@pytest.mark.parametrize("left", [None, "[]", "{", "{}"], ids=str)
def test_weights_load_without_a_configuration_as_in_peft(left, make_bert, tmp_path):
    method = BY_NAME["mora"]
    path = saved(method, make_bert(), tmp_path)
    wanted = logits(peft.PeftModel.from_pretrained(make_bert(), path))
    file = path / "adapter_config.json"
    assert json.loads(file.read_text())["peft_type"] == "MORA"
    if left is None:
        file.unlink()
    else:
        file.write_text(left)
    model = peft.get_peft_model(make_bert(), config_of(method))
    model.load_adapter(path, "default")
    assert torch.equal(logits(model), wanted)
