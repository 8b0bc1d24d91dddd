"""Several adapters in one model, one of them growing; and going on from a finished one."""

from collections.abc import Mapping

import peft
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraCallback, IncreLoraConfig, attach
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

STEPS = 20


def configure(**kwargs):
    # Late, so that ranks do not grow at the first steps already.
    values = {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 6, "growth_end": 0.6} | kwargs
    return growing(**values)


@pytest.fixture
def two(make_bert, grow):
    """A BERT with adapter "default" at its start and "other" of unequal ranks on other modules too."""
    model = get_peft_model(make_bert(), configure())
    model.add_adapter("other", configure(target_modules=["query", "key"], lora_alpha=3))
    grow(model, adapter_name="other", seed=1)
    return model


def values(model, adapter):
    return {n: p.detach().clone() for n, p in model.named_parameters() if f".{adapter}." in n}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def ranks_of(model, adapter):
    return {short(n): layer.r[adapter] for n, layer in adapted_layers(model, adapter).items()}


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model.eval()(tokens, **kwargs).logits


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, tokens, optimizer, steps=STEPS):
    model.train()
    for _ in range(steps):
        model(tokens, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# One grows, others stay.


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "frozen one active too"])
def test_one_adapter_grows_and_the_others_stay(two, tokens, beside):
    if beside:
        two.base_model.set_adapter(["default", "other"])
        two.set_requires_grad("other", False)
    before, ranks = values(two, "other"), ranks_of(two, "other")
    optimizer = optimizer_of(two)
    scheduler = attach(two, optimizer, total_steps=STEPS)
    train(two, tokens, optimizer)
    assert set(scheduler.ranks) == set(ranks_of(two, "default"))
    assert scheduler.total_rank == scheduler.budget == 12
    assert ranks_of(two, "other") == ranks
    assert same(values(two, "other"), before)


def test_frozen_adapter_beside_takes_part_in_the_output(two, make_bert, tokens):
    alone = logits(two, tokens)
    two.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(logits(two, tokens), alone, atol=1e-3)
    two.set_adapter("other")
    other = logits(two, tokens)
    two.base_model.set_adapter(["default", "other"])
    # "default" is at its start, where it adds nothing.
    torch.testing.assert_close(logits(two, tokens), other, rtol=0.0, atol=1e-5)


def test_the_active_adapter_is_the_one_that_grows(two, tokens):
    two.set_adapter("other")
    before = values(two, "default")
    optimizer = optimizer_of(two)
    scheduler = attach(two, optimizer, total_steps=STEPS)
    train(two, tokens, optimizer)
    assert set(scheduler.ranks) == set(ranks_of(two, "other"))
    assert scheduler.total_rank == scheduler.budget == 12
    assert same(values(two, "default"), before)


def test_two_adapters_grow_one_after_the_other(two, tokens):
    two.delete_adapter("other")
    two.add_adapter("other", configure(target_modules=["query", "key"], r=2))
    for name, budget in (("default", 12), ("other", 8)):
        two.set_adapter(name)
        optimizer = optimizer_of(two)
        scheduler = attach(two, optimizer, total_steps=STEPS)
        train(two, tokens, optimizer)
        scheduler.detach()
        assert sum(ranks_of(two, name).values()) == budget
    assert sum(ranks_of(two, "default").values()) == 12


def test_an_adapter_added_while_another_grows_waits(two, tokens):
    optimizer = optimizer_of(two)
    scheduler = attach(two, optimizer, total_steps=STEPS)
    train(two, tokens, optimizer, STEPS // 2)
    two.add_adapter("third", configure(init_r=2))
    train(two, tokens, optimizer, STEPS // 2)
    assert scheduler.total_rank == 12
    assert set(ranks_of(two, "third").values()) == {2}


def test_mixed_batch_of_adapters_of_other_ranks_and_modules(two, make_bert, tokens, grow):
    grow(two, seed=2)
    rows = {"__base__": logits(make_bert(), tokens), "default": logits(two, tokens)}
    two.set_adapter("other")
    rows["other"] = logits(two, tokens)
    names = ["other", "__base__", "default", "other"]
    mixed = logits(two, tokens[:1].expand(4, -1), adapter_names=names)
    wanted = torch.stack([rows[name][0] for name in names])
    torch.testing.assert_close(mixed, wanted, rtol=0.0, atol=1e-5)


def test_each_adapter_is_saved_with_its_own_ranks(two, make_bert, tokens, tmp_path):
    optimizer = optimizer_of(two)
    attach(two, optimizer, total_steps=STEPS)
    train(two, tokens, optimizer)
    two.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        assert ranks_of(loaded, name) == ranks_of(two, name)
        two.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, tokens), logits(two, tokens))


# Deleting.


def test_deleting_an_adapter_with_a_scheduler_is_refused_with_the_way_out(two, tokens):
    optimizer = optimizer_of(two)
    scheduler = attach(two, optimizer, total_steps=STEPS)
    with pytest.raises(ValueError, match=r"adapter_name='default': a scheduler is attached .* detach\(\)"):
        two.delete_adapter("default")
    train(two, tokens, optimizer, 2)
    scheduler.detach()
    two.delete_adapter("default")
    assert list(two.peft_config) == ["other"]
    assert ranks_of(two, "default") == {}


def test_deleting_another_adapter_leaves_the_growing_one_growing(two, tokens):
    optimizer = optimizer_of(two)
    scheduler = attach(two, optimizer, total_steps=STEPS)
    train(two, tokens, optimizer, 5)
    two.delete_adapter("other")
    train(two, tokens, optimizer, STEPS - 5)
    assert scheduler.total_rank == 12


def test_nothing_of_a_deleted_adapter_is_left(two):
    layers = list(adapted_layers(two, "other").values())
    two.delete_adapter("other")
    assert layers
    for layer in layers:
        kept = {n: v for n, v in vars(layer).items() if isinstance(v, Mapping) and not n.startswith("_")}
        assert {"scaling", "use_rslora", "configs"} <= set(kept)
        assert [name for name, values in kept.items() if "other" in values] == []


def test_the_last_adapter_can_be_deleted(two, make_bert, tokens):
    two.delete_adapter("other")
    two.delete_adapter("default")
    assert two.active_adapters == []
    assert torch.equal(two.base_model(tokens).logits, make_bert()(tokens).logits)


def test_deleting_an_unknown_adapter_is_refused(two):
    with pytest.raises(ValueError, match="nobody"):
        two.delete_adapter("nobody")


# Beside a plain LoRA.


def test_a_plain_lora_of_the_same_peft_model_is_refused_by_peft(two):
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        two.add_adapter("plain", LoraConfig(target_modules=["query"]))


def test_an_adapter_on_top_of_a_plain_lora_is_refused_with_the_way_out(make_bert):
    inner = get_peft_model(make_bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"plain LoRA already, at '.*query'.*merge_and_unload"):
        get_peft_model(inner, configure())
    assert type(get_peft_model(inner.merge_and_unload(), configure())) is PeftModel


# Going on from a finished adapter.


@pytest.mark.parametrize("form", [growing, IncreLoraConfig.paper], ids=["default", "paper"])
def test_a_finished_adapter_grows_on_to_a_larger_budget(make_bert, tokens, tmp_path, form):
    arguments = {"target_modules": ["query", "value"], "lora_alpha": 6}
    model = get_peft_model(make_bert(), form(r=2, **arguments))
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=STEPS)
    train(model, tokens, optimizer)
    model.save_pretrained(tmp_path / "first")
    first = ranks_of(model, "default")
    # The scale of the default form is alpha / r, of the paper's alpha / r_k.
    alpha = 15 if form is growing else 6
    config = form(r=5, **(arguments | {"lora_alpha": alpha}))
    again = PeftModel.from_pretrained(make_bert(), tmp_path / "first", is_trainable=True, config=config)
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens), rtol=0.0, atol=1e-5)
    assert ranks_of(again, "default") == first
    optimizer = optimizer_of(again)
    scheduler = attach(again, optimizer, total_steps=STEPS)
    train(again, tokens, optimizer)
    assert scheduler.total_rank == scheduler.budget == 20
    assert all(rank >= first[name] for name, rank in ranks_of(again, "default").items())
    again.save_pretrained(tmp_path / "second")
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "second")
    assert loaded.peft_config["default"].r == 5
    assert ranks_of(loaded, "default") == ranks_of(again, "default")
    assert torch.equal(logits(loaded, tokens), logits(again, tokens))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(0, 99, (6,), generator=generator), "labels": index % 3}


def run_trainer(model, folder):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = IncreLoraCallback()
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[callback]).train()
    return callback


def test_trainer_goes_on_from_a_finished_adapter(make_bert, tokens, tmp_path):
    model = get_peft_model(make_bert(), configure(r=2, lora_alpha=4))
    run_trainer(model, tmp_path / "run1")
    assert sum(ranks_of(model, "default").values()) == 8
    model.save_pretrained(tmp_path / "adapter")
    config = configure(r=4, lora_alpha=8)
    again = PeftModel.from_pretrained(make_bert(), tmp_path / "adapter", is_trainable=True, config=config)
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens), rtol=0.0, atol=1e-5)
    run_trainer(again, tmp_path / "run2")
    assert sum(ranks_of(again, "default").values()) == 16


def test_trainer_grows_the_trainable_one_of_two_adapters(two, tmp_path):
    before = values(two, "other")
    run_trainer(two, tmp_path)
    assert sum(ranks_of(two, "default").values()) == 12
    assert same(values(two, "other"), before)


def test_a_saved_adapter_loads_under_a_smaller_budget_and_says_that_it_will_not_grow(
    make_bert, grow, tmp_path
):
    model = get_peft_model(make_bert(), configure())
    grow(model, dict.fromkeys(ranks_of(model, "default"), 3))
    model.save_pretrained(tmp_path)
    config = configure(r=2, lora_alpha=4)
    again = peft.PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True, config=config)
    with pytest.warns(UserWarning, match="the ranks add up to 12 already, more than the budget of 8"):
        attach(again, optimizer_of(again), total_steps=STEPS)
