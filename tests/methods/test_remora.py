"""ReMoRA: merges against the method written down literally, in float64; and the adapter that holds what was
merged, saved, resumed and taken off as one."""

import copy
import io

import peft
import pytest
import torch
from increlora_rs import (
    MoraConfig,
    attach,
    export_lora,
    growth_history,
    keep_average,
)
from method_cases import adapted_modules, assert_equal_bits, batch, optimizer_of, run, trainable
from paths import assert_near
from squares import dense
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

F64 = torch.float64
SHAPES = {"lin0": (20, 12), "lin1": (6, 20)}
INTERVAL, WARMUP, STEPS = 4, 3, 15
WEIGHTS = "adapter_model.safetensors"


def configure(**settings):
    defaults = {"r": 2, "target_modules": list(SHAPES), "remora_interval": INTERVAL, "remora_warmup": WARMUP}
    return MoraConfig(**(defaults | settings))


def remora(base, **settings):
    torch.manual_seed(11)
    return peft.get_peft_model(base, configure(**settings))


def layers_of(model):
    return {name.rpartition(".")[2]: layer for name, layer in adapted_modules(model).items()}


def x_of(step, rows=9):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(step), dtype=F64)


def target_of(x):
    return torch.sin(3 * x[:, :6])


def train(model, steps, optimizer=None, total=STEPS, **settings):
    """The steps of these numbers of a plain loop; optimizer and scheduler."""
    if optimizer is None:
        optimizer = optimizer_of(model)
        scheduler = attach(model, optimizer, total_steps=total, **settings)
    for step in steps:
        x = x_of(step).to(next(model.parameters()).dtype)
        functional.mse_loss(model(x), target_of(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, scheduler if "scheduler" in locals() else None


@pytest.fixture
def merged(make_plain):
    """A model that was merged three times, and is in a fourth square."""
    model = remora(make_plain()).train()
    train(model, range(STEPS))
    return model.eval()


# The method.


@pytest.mark.parametrize("types", [2, 4])
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_training_is_that_of_merging_into_the_base_literally(make_plain, types, first, decay):
    model = remora(make_plain(), remora_types=types, mora_type=first).double().train()
    base = make_plain().double()
    weights = {name: base.get_submodule(name).weight.detach().clone() for name in SHAPES}
    squares = {
        name: torch.zeros_like(layer.lora_A["default"].weight).requires_grad_()
        for name, layer in layers_of(model).items()
    }
    steps, form = 3 * INTERVAL + 2, first
    optimizer = torch.optim.AdamW(squares.values(), lr=0.02, weight_decay=decay)
    for step in range(1, steps + 1):
        since = (step - 1) % INTERVAL + 1
        warmth = min(1.0, since / WARMUP) if step > INTERVAL else 1.0
        optimizer.param_groups[0]["lr"] = 0.02 * warmth
        x = x_of(step - 1)
        y = x
        for name, m in squares.items():
            y = functional.linear(
                y, weights[name] + dense(form, m, *SHAPES[name]), base.get_submodule(name).bias
            )
            y = torch.relu(y) if name == "lin0" else y
        functional.mse_loss(y, target_of(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % INTERVAL == 0:
            for name, m in squares.items():
                weights[name] += dense(form, m.detach(), *SHAPES[name])
                m.data.zero_()
            optimizer = torch.optim.AdamW(squares.values(), lr=0.02, weight_decay=decay)
            form = form % types + 1
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02, weight_decay=decay)
    attach(model, ours, total_steps=None)
    train(model, range(steps), ours)
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(layer.lora_A["default"].weight, squares[name], rtol=1e-8, atol=1e-10)
        whole = layer.get_base_layer().weight + layer.get_delta_weight("default")
        wanted = weights[name] + dense(form, squares[name], *SHAPES[name])
        torch.testing.assert_close(whole, wanted, rtol=1e-9, atol=1e-11)


def test_a_merge_changes_no_output_and_begins_anew(make_plain):
    model = remora(make_plain()).double().train()
    x, layers = x_of(50), layers_of(model)
    optimizer, scheduler = train(model, range(INTERVAL - 1))
    functional.mse_loss(model(x), target_of(x)).backward()
    seen = []

    def look(*_):
        # Registered after the scheduler's own hook would come too late.
        seen.append([layer.lora_A["default"].weight.detach().clone() for layer in layers.values()])

    optimizer.register_step_post_hook(look)
    optimizer.step()
    assert scheduler.policy.config.merges == 1
    for layer in layers.values():
        assert not layer.lora_A["default"].weight.any()
        assert layer.lora_merged["default"].weight[0].any()
        assert not layer.lora_merged["default"].weight[1].any()
        assert not optimizer.state.get(layer.lora_A["default"].weight)
    before = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    for name, layer in layers.items():
        wanted = dense(1, layer.lora_merged["default"].weight[0], *SHAPES[name])
        torch.testing.assert_close(before[name], wanted, rtol=1e-11, atol=1e-12)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_the_warm_up_is_also_that_of_weights_which_an_optimizer_keeps_beside(make_plain, kind):
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    ends = []
    for warmup in (0, WARMUP):
        model = remora(make_plain(), remora_warmup=warmup).double().train()
        optimizer = getattr(schedulefree, kind)([p for p in model.parameters() if p.requires_grad], lr=0.02)
        attach(model, optimizer)
        optimizer.train()
        # The last one is the first after a merge.
        train(model, range(INTERVAL + 1), optimizer)
        squares = [layer.lora_A["default"].weight for layer in layers_of(model).values()]
        ends.append([tensor for m in squares for tensor in (m.detach(), optimizer.state[m]["z"])])
    for whole, warm in zip(*ends, strict=True):
        assert whole.any()
        torch.testing.assert_close(warm, whole / WARMUP)


def test_what_else_is_trained_keeps_its_optimizer_state(make_plain):
    model = remora(make_plain(), target_modules=["lin0"], modules_to_save=["lin1"]).train()
    optimizer, _ = train(model, range(INTERVAL - 1))
    others = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    train(model, [INTERVAL - 1], optimizer)
    assert model.peft_config["default"].merges == 1
    assert len(others) == 2
    assert all(float(optimizer.state[p]["step"]) == INTERVAL for p in others)
    assert all(bool(optimizer.state[p]["exp_avg"].any()) for p in others)


def test_types_take_turns_from_the_first_one_on(make_plain):
    model = remora(make_plain(), remora_types=4, mora_type=3, remora_interval=1, remora_warmup=0).train()
    config = model.peft_config["default"]
    types = []
    optimizer, _ = train(model, range(0), total=None)
    for step in range(6):
        types.append(config.type_now)
        train(model, [step], optimizer)
    assert types == [3, 4, 1, 2, 3, 4]


def test_nothing_is_merged_at_the_last_step(make_plain):
    model = remora(make_plain()).train()
    train(model, range(2 * INTERVAL), total=2 * INTERVAL)
    assert model.peft_config["default"].merges == 1
    assert all(layer.lora_A["default"].weight.any() for layer in layers_of(model).values())


def test_the_base_stays_as_it_is(merged, make_plain):
    for name, layer in layers_of(merged).items():
        assert torch.equal(layer.get_base_layer().weight, make_plain().get_submodule(name).weight)
    x = x_of(50).float()
    with merged.disable_adapter():
        assert torch.equal(merged(x), make_plain()(x))


def test_what_was_merged_is_neither_trained_nor_dropped(make_plain):
    model = remora(make_plain(), lora_dropout=0.5).double().train()
    train(model, range(INTERVAL))
    kept = [layer.lora_merged["default"].weight for layer in layers_of(model).values()]
    assert not any(tensor.requires_grad for tensor in kept)
    # M is 0, so all that could be dropped is what was merged.
    x = x_of(50)
    assert torch.equal(model(x), model(x))
    model.requires_grad_(True)
    before = [tensor.detach().clone() for tensor in kept]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(tensor, old) for tensor, old in zip(kept, before, strict=True))


# What is told.


def test_the_history_has_every_merge_of_every_module(make_plain, tmp_path):
    model = remora(make_plain()).train()
    _, scheduler = train(model, range(STEPS))
    rows = scheduler.history
    assert rows["step"].tolist() == [4, 4, 8, 8, 12, 12]
    assert rows["module"].tolist() == 3 * list(SHAPES)
    assert rows["rank"].tolist() == 3 * [layer.r["default"] for layer in layers_of(model).values()]
    assert (rows["importance"] > 0).all()
    assert scheduler.logs() == {"total_rank": scheduler.total_rank, "mora_type": 2.0, "merges": 3.0}
    model.save_pretrained(tmp_path)
    assert list(growth_history(tmp_path).steps) == [4, 8, 12]


def test_the_score_of_a_merge_is_the_norm_of_what_it_took_in(make_plain):
    model = remora(make_plain()).double().train()
    _, scheduler = train(model, range(INTERVAL))
    for name, layer in layers_of(model).items():
        norm = float(layer.lora_merged["default"].weight[0].norm())
        assert scheduler.scores[name] == pytest.approx(norm)


@pytest.mark.parametrize("interval", [None, 5])
def test_only_remora_tells_of_a_training_that_lacks_its_scheduler(make_plain, interval, recwarn):
    model = remora(make_plain(), remora_interval=interval).train()
    for _ in range(50):
        model(x_of(0).float()).sum().backward()
    told = [str(warning.message) for warning in recwarn if "no scheduler attached" in str(warning.message)]
    assert bool(told) is (interval is not None)


def test_a_training_too_short_for_a_merge_is_told_so(make_plain):
    model = remora(make_plain(), remora_interval=STEPS).train()
    with pytest.warns(UserWarning, match=f"remora_interval={STEPS}, but the training has {STEPS} steps"):
        attach(model, optimizer_of(model), total_steps=STEPS)


# Saved and loaded.


def by_peft_model(base, path):
    return peft.PeftModel.from_pretrained(base, path)


def by_low_cpu_mem_usage(base, path):
    return peft.PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True)


def over_a_fresh_adapter(base, path):
    model = remora(base)
    model.load_adapter(path, "default")
    return model


def as_second_adapter_of_mora(base, path):
    torch.manual_seed(11)
    model = peft.get_peft_model(base, MoraConfig(r=2, target_modules=list(SHAPES)))
    model.load_adapter(path, "second")
    model.set_adapter("second")
    return model


@pytest.mark.parametrize(
    "load",
    [by_peft_model, by_low_cpu_mem_usage, over_a_fresh_adapter, as_second_adapter_of_mora],
    ids=lambda way: way.__name__,
)
def test_a_loaded_adapter_gives_the_same_outputs(merged, make_plain, tmp_path, load):
    merged.save_pretrained(tmp_path)
    loaded, x = load(make_plain(), tmp_path).eval(), x_of(50).float()
    assert torch.equal(loaded(x), merged(x))
    config = loaded.peft_config[loaded.active_adapter]
    assert (config.merges, config.type_now, config.merged_types) == (3, 2, (1, 2))


def test_transformers_loads_it_with_the_same_outputs(make_bert, tmp_path):
    model = remora(make_bert(), target_modules=["query", "value"]).train()
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=STEPS)
    run(model, optimizer, range(6))
    model.save_pretrained(tmp_path)
    base = make_bert()
    base.load_adapter(str(tmp_path))
    with torch.no_grad():
        wanted = model.eval()(**batch(50)).logits
        assert torch.equal(base.eval()(**batch(50)).logits, wanted)


def test_a_state_dict_brings_the_type_with_it(merged, make_plain):
    fresh = remora(make_plain()).eval()
    fresh.load_state_dict(merged.state_dict())
    x = x_of(50).float()
    assert torch.equal(fresh(x), merged(x))
    assert fresh.peft_config["default"].merges == 3


@pytest.mark.parametrize("first", ["of a fresh base", "of a second adapter"])
def test_a_configuration_that_was_trained_with_makes_an_adapter_that_is_saved_whole(
    merged, make_plain, tmp_path, first
):
    if first == "of a fresh base":
        model, name = peft.get_peft_model(make_plain(), merged.peft_config["default"]), "default"
    else:
        model, name = merged, "second"
        model.add_adapter(name, model.peft_config["default"])
        model.set_adapter(name)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.lora_A[name].weight.normal_()
    model.save_pretrained(tmp_path, selected_adapters=[name])
    path = tmp_path if name == "default" else tmp_path / name
    x = x_of(50).float()
    assert torch.equal(peft.PeftModel.from_pretrained(make_plain(), path).eval()(x), model.eval()(x))


def test_a_copy_is_independent(merged):
    twin, x = copy.deepcopy(merged), x_of(50).float()
    wanted = merged(x)
    assert torch.equal(twin(x), wanted)
    train(twin.train(), range(INTERVAL))
    assert [each.peft_config["default"].merges for each in (twin, merged)] == [4, 3]
    assert torch.equal(merged(x), wanted)


def test_a_file_without_what_was_merged_is_refused_by_module(merged, make_plain, tmp_path):
    merged.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    config.remora_interval = None
    config.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"'.*lora_merge.*' the first, that belong to no adapted module"):
        peft.PeftModel.from_pretrained(make_plain(), tmp_path)


def test_it_merges_into_the_base_and_comes_out_again(merged, make_plain):
    x = x_of(50).float()
    wanted = merged(x).detach()
    merged.merge_adapter()
    assert_near(merged(x), wanted)
    merged.unmerge_adapter()
    for name, layer in layers_of(merged).items():
        assert_near(layer.get_base_layer().weight, make_plain().get_submodule(name).weight)
    assert_near(merged.merge_and_unload()(x), wanted)


def test_it_exports_as_one_lora_of_all_types(merged, make_plain, tmp_path):
    exported = export_lora(merged, tmp_path)
    # Types 1 and 2, of which the second is M's own.
    assert exported.config.r == 2 * max(layer.r["default"] for layer in layers_of(merged).values())
    loaded = peft.PeftModel.from_pretrained(make_plain(), tmp_path)
    x = x_of(50).float()
    assert_near(loaded(x), merged(x))


# Resumed.


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Before the first merge, after it, within the warm-up, at a merge.
STOPS = pytest.mark.parametrize("stop", [2, 5, 6, 8, 11])


@STOPS
@pytest.mark.parametrize("attach_first", [True, False], ids=["attach, load", "load, attach"])
def test_a_training_goes_on_bit_for_bit_from_adapter_and_optimizer(make_plain, tmp_path, stop, attach_first):
    whole, model = (remora(make_plain(), lora_dropout=0.2).train() for _ in range(2))
    torch.manual_seed(3)
    optimizer, scheduler = train(whole, range(stop))
    state = torch.get_rng_state()
    train(whole, range(stop, STEPS), optimizer)
    torch.manual_seed(3)
    stopped, _ = train(model, range(stop))
    model.save_pretrained(tmp_path)
    resumed = peft.PeftModel.from_pretrained(make_plain(), tmp_path, is_trainable=True).train()
    again = optimizer_of(resumed)
    saved = through_a_file(stopped.state_dict())
    if attach_first:
        last = attach(resumed, again, total_steps=STEPS)
        again.load_state_dict(saved)
    else:
        again.load_state_dict(saved)
        last = attach(resumed, again, total_steps=STEPS)
    torch.set_rng_state(state)
    train(resumed, range(stop, STEPS), again)
    assert_equal_bits(trainable(resumed), trainable(whole))
    kept = [{n: p for n, p in each.named_parameters() if "lora_merge" in n} for each in (resumed, whole)]
    assert_equal_bits(*kept)
    assert last.history.tolist() == scheduler.history.tolist()


def test_a_running_training_goes_back_to_an_earlier_state(make_plain):
    model = remora(make_plain()).train()
    optimizer, _ = train(model, range(6))
    weights, state = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
    train(model, range(6, STEPS), optimizer)
    wanted = trainable(model)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert model.peft_config["default"].merges == 1
    train(model, range(6, STEPS), optimizer)
    assert_equal_bits(trainable(model), wanted)


def test_an_optimizer_of_another_checkpoint_than_the_adapter_is_refused(make_plain):
    model = remora(make_plain()).train()
    optimizer, _ = train(model, range(6))
    state = through_a_file(optimizer.state_dict())
    train(model, range(6, 10), optimizer)
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="merged 2 times, but the resumed optimizer state is of 1 merges"):
        train(model, [10], optimizer)


# In other company.


def test_an_average_over_merges_is_refused_and_told_of(make_plain):
    model = remora(make_plain()).train()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer, scheduler = train(model, range(INTERVAL - 1))
    with pytest.raises(ValueError, match=r"Remora lets the adapter's parameters begin anew.*remora_interval"):
        keep_average(scheduler, average)
    with pytest.warns(UserWarning, match="AveragedModel averages this adapter, whose parameters have begun"):
        train(model, [INTERVAL - 1], optimizer)


def test_under_ddp_it_merges_as_without(make_plain, group_of_one):
    plain, wrapped = (remora(make_plain()).train() for _ in range(2))
    train(plain, range(STEPS))
    ddp = DistributedDataParallel(wrapped)
    optimizer = optimizer_of(wrapped)
    attach(ddp, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        x = x_of(step).float()
        functional.mse_loss(ddp(x), target_of(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_bits(trainable(wrapped), trainable(plain))


@pytest.mark.parametrize("types", [2, 4])
def test_compiled_it_is_compiled_once_a_type_however_often_it_is_merged(make_plain, types):
    settings = {"remora_types": types, "remora_interval": 2, "remora_warmup": 0}
    eager, model = (remora(make_plain(), **settings).train() for _ in range(2))
    train(eager, range(24), total=None)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    net = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=None)
    for step in range(24):
        x = x_of(step).float()
        functional.mse_loss(net(x), target_of(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch._dynamo.reset()
    assert model.peft_config["default"].merges == 12
    # Before the first merge, and each type after it.
    assert counter.frame_count == 1 + types
    for found, wanted in zip(trainable(model).values(), trainable(eager).values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_loss_scaler_that_skips_a_step_delays_the_merge(make_plain):
    model = remora(make_plain()).train()
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scheduler = attach(model, optimizer, total_steps=STEPS, scaler=scaler)
    for step in range(INTERVAL + 1):
        x = x_of(step).float()
        loss = functional.mse_loss(model(x), target_of(x)) * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert model.peft_config["default"].merges == int(scheduler.step == INTERVAL)
    assert scheduler.step == INTERVAL


def test_an_adapter_without_remora_has_no_tensors_of_it(make_plain):
    model = peft.get_peft_model(make_plain(), MoraConfig(r=2, target_modules=list(SHAPES)))
    assert not [name for name in model.state_dict() if "lora_merge" in name]


@pytest.mark.parametrize("merges", [0, 1, 127, 128, 300, 128**3 + 5])
def test_a_model_that_is_cast_keeps_the_number_of_its_merges(make_plain, merges):
    model = remora(make_plain()).train()
    optimizer = optimizer_of(model)
    scheduler = attach(model, optimizer)
    model.peft_config["default"].note_merges(max(merges - 1, 0))
    if merges:
        scheduler.step = INTERVAL - 1
        train(model, [0], optimizer)
    state = model.to(torch.bfloat16).state_dict()
    fresh = remora(make_plain()).to(torch.bfloat16)
    fresh.load_state_dict(state)
    assert fresh.peft_config["default"].merges == merges
