"""LoRA-Mini's own promises: frozen halves that are the seed's, everywhere, and inner ones that learn.

The update is ``s B_aux B A A_aux``, A_aux (a, in), A (r, a), B (b, r), B_aux (out, b); the references build
it as a matrix, or are PEFT's LoRA.
"""

import copy
import math

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from growing import growing
from increlora_rs import LoraMiniConfig, export_lora
from method_cases import adapted_modules, optimizer_of, trainable
from paths import assert_near
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

R, A, B = 2, 5, 4
AUX = ("lora_A_aux", "lora_B_aux")
WEIGHTS = "adapter_model.safetensors"


def mini(base, seed=11, **settings):
    torch.manual_seed(seed)
    config = {"r": R, "lora_a": A, "lora_b": B, "lora_alpha": 4, "target_modules": ["lin0", "lin1"]}
    return peft.get_peft_model(base, LoraMiniConfig(**(config | settings)))


def aux(model, adapter="default"):
    """The frozen halves, by module and name."""
    layers = adapted_modules(model)
    return {(name, half): getattr(layers[name], half)[adapter].weight for name in layers for half in AUX}


def same(first, second):
    assert first.keys() == second.keys()
    return [torch.equal(first[key], second[key]) for key in first]


def train(model, x, steps=4, lr=0.02):
    optimizer = optimizer_of(model, lr)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def model(make_plain, plain_input):
    """A model whose adapter has left its start."""
    return train(mini(make_plain()).train(), plain_input).eval()


# The start.


def test_the_inner_half_of_b_learns_from_the_first_step_on(make_plain, plain_input):
    # Where both inner halves are 0, as in the published code, no gradient ever comes.
    model = mini(make_plain())
    model(plain_input).square().mean().backward()
    for layer in adapted_modules(model).values():
        assert not layer.get_delta_weight("default").any()
        assert layer.lora_B["default"].weight.grad.abs().max() > 0
        assert not layer.lora_A["default"].weight.grad.any()


def test_the_inner_half_of_a_starts_kaiming_uniform_over_lora_a():
    layer = mini(
        nn.ModuleDict({"lin0": nn.Linear(64, 64)}), r=40, lora_a=50, lora_b=40, target_modules=["lin0"]
    )
    a = adapted_modules(layer)["lin0"].lora_A["default"].weight.detach()
    bound = 1 / math.sqrt(50)
    assert bound * 0.98 < float(a.abs().max()) <= bound
    # A uniform's variance; 2000 numbers.
    assert float(a.var()) == pytest.approx(bound**2 / 3, rel=0.1)


@pytest.mark.parametrize(("features", "out"), [(12, 20), (100, 7)])
def test_a_linear_layer_trains_r_times_a_plus_b_numbers_whatever_its_size(features, out):
    model = mini(nn.ModuleDict({"lin0": nn.Linear(features, out)}), target_modules=["lin0"])
    assert model.get_nb_trainable_parameters()[0] == R * (A + B)
    shapes = {key[1]: tuple(half.shape) for key, half in aux(model).items()}
    assert shapes == {"lora_A_aux": (A, features), "lora_B_aux": (out, B)}


# What the frozen halves are.


def halves(init, features, out, a, b, name="lin0"):
    base = nn.ModuleDict({name: nn.Linear(features, out)})
    model = mini(base, lora_a=a, lora_b=b, aux_init=init, target_modules=[name])
    return [half.double() for half in aux(model).values()]


def test_scaled_halves_have_the_variances_that_keep_what_passes():
    aux_a, aux_b = halves("scaled", 300, 200, 40, 50)
    # 12,000 and 10,000 numbers: the standard error of a variance is 1.3 to 1.4 per cent of it.
    assert float(aux_a.var()) == pytest.approx(1 / 300, rel=0.06)
    assert float(aux_b.var()) == pytest.approx(1 / 50, rel=0.06)
    assert abs(float(aux_a.mean())) < 4 / math.sqrt(300 * 12000)
    assert abs(float(aux_b.mean())) < 4 / math.sqrt(50 * 10000)


def test_published_halves_are_standard_normal():
    for half in halves("published", 300, 200, 40, 50):
        assert float(half.var()) == pytest.approx(1.0, rel=0.06)
        assert abs(float(half.mean())) < 0.04


def test_scaled_halves_are_the_published_ones_scaled():
    scaled, published = halves("scaled", 30, 20, 6, 4), halves("published", 30, 20, 6, 4)
    assert_near(scaled[0] * math.sqrt(30), published[0], torch.float32)
    assert_near(scaled[1] * math.sqrt(4), published[1], torch.float32)


def test_orthonormal_halves_have_orthonormal_rows_and_columns_of_the_same_mean_square():
    aux_a, aux_b = halves("orthonormal", 30, 20, 6, 4)
    torch.testing.assert_close(aux_a @ aux_a.T, torch.eye(6).double(), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(aux_b.T @ aux_b, torch.eye(4).double() * 20 / 4, rtol=0.0, atol=1e-5)
    assert float(aux_a.square().mean()) == pytest.approx(1 / 30)
    assert float(aux_b.square().mean()) == pytest.approx(1 / 4)


def test_orthonormal_halves_larger_than_the_module_are_orthonormal_the_other_way():
    aux_a, aux_b = halves("orthonormal", 6, 5, 9, 8)
    torch.testing.assert_close(aux_a.T @ aux_a, torch.eye(6).double() * 9 / 6, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(aux_b @ aux_b.T, torch.eye(5).double(), rtol=0.0, atol=1e-6)
    assert float(aux_a.square().mean()) == pytest.approx(1 / 6)
    assert float(aux_b.square().mean()) == pytest.approx(1 / 8)


@pytest.mark.parametrize("init", ["scaled", "orthonormal"])
def test_what_passes_both_halves_keeps_its_size(init):
    aux_a, aux_b = halves(init, 256, 192, 64, 64)
    x = torch.randn(400, 256, dtype=torch.float64)
    down = x @ aux_a.T
    assert float(down.var()) == pytest.approx(1.0, rel=0.15)
    up = torch.randn(400, 64, dtype=torch.float64) @ aux_b.T
    assert float(up.var()) == pytest.approx(1.0, rel=0.15)


# Where they come from.


def test_the_same_seed_and_names_give_the_same_halves(make_plain):
    # What torch draws from has no part in it.
    assert all(same(aux(mini(make_plain(), seed=1)), aux(mini(make_plain(), seed=2))))


def test_another_seed_gives_others(make_plain):
    assert not any(same(aux(mini(make_plain())), aux(mini(make_plain(), aux_seed=1))))


def test_modules_of_one_size_have_halves_of_their_own():
    base = nn.ModuleDict({name: nn.Linear(9, 7) for name in ("lin0", "lin1")})
    found = aux(mini(base))
    for half in AUX:
        assert not torch.equal(found["lin0", half], found["lin1", half])


def test_another_module_name_gives_others():
    first, second = (halves("scaled", 9, 7, A, B, name=name) for name in ("lin0", "lin2"))
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_two_halves_of_a_square_module_are_not_each_others_transposes():
    aux_a, aux_b = halves("published", 9, 9, 4, 4)
    assert not torch.equal(aux_a, aux_b.T)


def test_another_adapter_of_the_model_has_the_same_halves_under_the_same_seed(model):
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("second", config)
    assert all(same(aux(model, "second"), aux(model)))


def test_the_dtype_and_the_default_device_that_the_model_is_made_under_have_no_part(make_plain):
    wanted = aux(mini(make_plain()))
    torch.set_default_dtype(torch.float64)
    try:
        found = aux(mini(make_plain().double()))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same(found, wanted))
    with torch.device("cpu"):
        assert all(same(aux(mini(make_plain())), wanted))


def test_the_number_of_threads_has_no_part(make_plain):
    wanted, threads = aux(mini(make_plain())), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        found = aux(mini(make_plain()))
    finally:
        torch.set_num_threads(threads)
    assert all(same(found, wanted))


def test_the_numbers_of_a_seed_are_these():
    # A change of how they are drawn would give every saved adapter another meaning.
    few = halves("published", 3, 2, 2, 2)
    wanted = [[-0.0900011, 0.7062492, -0.1979306], [0.5653241, 0.5369959, 0.4915507]]
    torch.testing.assert_close(few[0], torch.tensor(wanted).double(), rtol=0.0, atol=1e-6)
    wanted = [[0.0426662, -0.8053757], [-0.6267704, -1.0725847]]
    torch.testing.assert_close(few[1], torch.tensor(wanted).double(), rtol=0.0, atol=1e-6)
    # Of 16 numbers on, torch draws in another way.
    many = halves("published", 12, 20, 5, 4)
    torch.testing.assert_close(
        many[0][0, :3], torch.tensor([-0.3915744, 0.5894166, 0.2536591]).double(), rtol=0.0, atol=1e-6
    )
    torch.testing.assert_close(
        many[1][0, :3], torch.tensor([0.4572511, -0.1703187, -0.3950733]).double(), rtol=0.0, atol=1e-6
    )


# Training.


def test_training_leaves_every_byte_of_them(make_plain, plain_input):
    model = mini(make_plain()).train()
    before = {key: half.clone() for key, half in aux(model).items()}
    train(model, plain_input)
    assert all(same(aux(model), before))
    assert not any(half.requires_grad or half.grad is not None for half in aux(model).values())


def test_an_optimizer_of_all_parameters_with_weight_decay_leaves_them(make_plain, plain_input):
    model = mini(make_plain()).train()
    before = {key: half.clone() for key, half in aux(model).items()}
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(plain_input).square().mean().backward()
    optimizer.step()
    assert all(same(aux(model), before))


def test_they_are_neither_parameters_nor_buffers_nor_in_the_state_dict(model):
    kept = {half.data_ptr() for half in aux(model).values()}
    held = [*model.parameters(), *model.buffers(), *model.state_dict(keep_vars=True).values()]
    assert not kept & {tensor.data_ptr() for tensor in held}


def test_distributed_data_parallel_sends_none_of_them_around(model, group_of_one):
    ddp = DistributedDataParallel(model)
    sent = [*ddp.modules_buffers, *(p for _, p in ddp.named_parameters())]
    assert not {half.data_ptr() for half in aux(model).values()} & {tensor.data_ptr() for tensor in sent}
    assert len(ddp.modules_buffers) == 0


def test_frozen_whole_halves_of_identity_make_it_plain_lora(make_plain, plain_input):
    # a = in, A_aux = I, b = out, B_aux = I: dW = s B A.
    features, out = 12, 20
    ours = mini(make_plain(), lora_a=features, lora_b=out, target_modules=["lin0"])
    layer = adapted_modules(ours)["lin0"]
    layer.lora_A_aux["default"].weight = torch.eye(features)
    layer.lora_B_aux["default"].weight = torch.eye(out)
    lora = peft.get_peft_model(make_plain(), peft.LoraConfig(r=R, lora_alpha=4, target_modules=["lin0"]))
    theirs = adapted_modules(lora)["lin0"]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.lora_A["default"].weight)
    x = plain_input.double()
    for model in (ours.double(), lora.double()):
        train(model.train(), x, steps=20)
    torch.testing.assert_close(ours(x), lora(x), rtol=1e-10, atol=1e-12)
    for factor in ("lora_A", "lora_B"):
        mine, wanted = (getattr(each, factor)["default"].weight for each in (layer, theirs))
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)


def test_a_training_in_float64_is_that_of_the_dense_update_by_autograd(make_plain, plain_input):
    model, x = mini(make_plain()).double().train(), plain_input.double()
    base = make_plain().double()
    layers = adapted_modules(model)
    inner = {
        name: [
            getattr(layer, f)["default"].weight.detach().clone().requires_grad_()
            for f in ("lora_A", "lora_B")
        ]
        for name, layer in layers.items()
    }
    frozen = {key: half.double() for key, half in aux(model).items()}

    def forward():
        weights = {}
        for name, (a, b) in inner.items():
            delta = 4 / R * frozen[name, "lora_B_aux"] @ b @ a @ frozen[name, "lora_A_aux"]
            weights[f"{name}.weight"] = base.get_submodule(name).weight + delta
        return torch.func.functional_call(base, weights, x)

    optimizer = torch.optim.AdamW([p for pair in inner.values() for p in pair], lr=0.02)
    for _ in range(20):
        forward().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    train(model, x, steps=20)
    torch.testing.assert_close(model(x), forward(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(make_llama, tokens, reentrant):
    collected = []
    for checkpointing in (False, True):
        model = mini(make_llama(), target_modules="all-linear", init_lora_weights=False, lora_dropout=0.2)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model.train()(tokens, labels=tokens).loss.backward()
        collected.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(collected[1], collected[0], rtol=1e-4, atol=1e-6)


def test_under_autocast_the_two_factors_are_made_in_the_parameters_dtype(model):
    for layer in adapted_modules(model).values():
        wanted = layer.update("default").lora()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer.update("default").lora()
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_under_autocast_it_learns(make_plain, plain_input):
    model = mini(make_plain()).train()
    before = trainable(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(plain_input).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert gradients
    assert all(p.dtype == torch.float32 and p.any() for p in gradients.values())
    assert before.keys() >= gradients.keys()


# Half precision, devices, copies.


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half", "double"])
def test_a_cast_model_keeps_their_bits(model, cast):
    before = {key: half.clone() for key, half in aux(model).items()}
    model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert all(half.dtype == torch.float32 for half in aux(model).values())
    assert all(same(aux(model), before))


def test_an_adapter_that_was_trained_in_bfloat16_loads_to_the_same_outputs(make_plain, plain_input, tmp_path):
    model = mini(make_plain().to(torch.bfloat16), init_lora_weights=False).to(torch.bfloat16)
    x = plain_input.to(torch.bfloat16)
    train(model.train(), x, lr=0.1).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        make_plain().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False
    )
    assert torch.equal(loaded(x), model(x))


def test_halves_of_a_cast_and_recast_model_are_those_of_a_fresh_one(make_plain):
    model = mini(make_plain()).to(torch.bfloat16).float()
    assert all(same(aux(model), aux(mini(make_plain()))))


def test_a_model_that_goes_to_the_meta_device_takes_them_along(model):
    assert all(half.is_meta for half in aux(model.to("meta")).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_device_has_the_bits_of_the_cpu(make_plain):
    wanted = aux(mini(make_plain()))
    moved = {key: half.cpu() for key, half in aux(mini(make_plain()).to("cuda")).items()}
    made = {key: half.cpu() for key, half in aux(mini(make_plain().to("cuda"))).items()}
    assert all(same(moved, wanted))
    assert all(same(made, wanted))


# Files.


def test_the_file_has_r_times_a_plus_b_numbers_a_module_and_no_frozen_half(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert not [name for name in tensors if "aux" in name]
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * R * (A + B)
    header = 8 + int.from_bytes((tmp_path / WEIGHTS).read_bytes()[:8], "little")
    assert (tmp_path / WEIGHTS).stat().st_size == header + 4 * 2 * R * (A + B)


def test_the_file_is_the_smaller_the_larger_the_module_against_loras(tmp_path):
    base = {"lin0": nn.Linear(768, 768)}
    model = mini(nn.ModuleDict(base), r=8, lora_a=32, lora_b=32, target_modules=["lin0"])
    model.save_pretrained(tmp_path)
    # 8 (32 + 32) numbers, where LoRA's are 8 (768 + 768): 24 times fewer.
    assert sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS).values()) == 8 * 64


def test_a_loaded_adapter_has_the_seeds_halves(model, make_plain, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_plain(), tmp_path)
    assert all(same(aux(loaded), aux(model)))


def test_low_cpu_mem_usage_makes_the_seeds_halves(model, make_plain, plain_input, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_plain(), tmp_path, low_cpu_mem_usage=True)
    assert all(same(aux(loaded), aux(model)))
    assert torch.equal(loaded(plain_input), model(plain_input))


@pytest.mark.parametrize("init", ["scaled", "orthonormal", "published"])
def test_each_kind_of_halves_comes_back(make_plain, plain_input, tmp_path, init):
    model = mini(make_plain(), aux_init=init, aux_seed=7, init_lora_weights=False)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_plain(), tmp_path)
    assert (loaded.peft_config["default"].aux_init, loaded.peft_config["default"].aux_seed) == (init, 7)
    assert torch.equal(loaded(plain_input), model(plain_input))


def test_an_export_is_a_times_a_aux_and_b_aux_times_b(model, tmp_path):
    export_lora(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name, layer in adapted_modules(model).items():
        tensor = {
            half: getattr(layer, half)["default"].weight.double() for half in (*AUX, "lora_A", "lora_B")
        }
        a, b = (
            tensors[f"base_model.model.{name}.{factor}.weight"].double() for factor in ("lora_A", "lora_B")
        )
        wanted = tensor["lora_B_aux"] @ tensor["lora_B"] @ tensor["lora_A"] @ tensor["lora_A_aux"]
        assert a.shape[0] == b.shape[1] == R
        assert_near((b @ a).detach(), (4 / R * wanted).detach(), torch.float32)


def test_a_directory_is_exported_without_its_base(model, make_plain, plain_input, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    export_lora(tmp_path / "saved", tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(make_plain(), tmp_path / "lora")
    assert_near(loaded(plain_input), model(plain_input))


def test_a_directory_without_the_modules_sizes_is_refused_with_the_way_out(model, tmp_path):
    config = model.peft_config["default"]
    model.save_pretrained(tmp_path)
    config.module_sizes = {}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"module_sizes of module 'lin0'.*load the adapter into its base"):
        export_lora(tmp_path, tmp_path / "lora")


def test_an_adapter_of_another_rank_is_refused_by_module(model, make_plain, tmp_path):
    model.save_pretrained(tmp_path)
    other = mini(make_plain(), r=3)
    with pytest.raises(
        ValueError, match=r"size mismatch: lora_A of module 'lin0' has shape \(2, 5\).*\(3, 5\)"
    ):
        other.load_adapter(tmp_path, "default")


# Bases that are not plain.


def test_the_sizes_of_a_convolution_are_those_of_its_kernel():
    model = mini(nn.ModuleDict({"conv": nn.Conv2d(3, 8, (2, 5))}), target_modules=["conv"])
    shapes = {key[1]: tuple(half.shape) for key, half in aux(model).items()}
    assert shapes == {"lora_A_aux": (A, 3 * 2 * 5), "lora_B_aux": (8, B)}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_adapted_and_trained(bits, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    width = 64

    def base():
        torch.manual_seed(0)
        plain = nn.Linear(width, width)
        if bits == 8:
            quantised = bnb.nn.Linear8bitLt(width, width, has_fp16_weights=False, threshold=6.0)
        else:
            quantised = bnb.nn.Linear4bit(width, width, compute_dtype=torch.float32, quant_type="nf4")
        quantised.load_state_dict(plain.state_dict())
        return nn.Sequential(quantised.to("cpu"), nn.Linear(width, 4))

    x = torch.randn(5, width)
    model = mini(base(), target_modules=["0"])
    plain = model(x).detach()
    with model.disable_adapter():
        assert_near(plain, model(x).detach())
    train(model.train(), x).eval()
    assert not torch.allclose(model(x), plain, atol=1e-3)
    (layer,) = adapted_modules(model).values()
    low = base().eval()[0](x) + x @ layer.get_delta_weight("default").T
    assert_near(layer(x).detach(), low.detach())
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(base(), tmp_path)(x), model(x))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_base_gives_the_whole_models_output_and_gradients(
    make_plain, plain_input, tmp_path, place
):
    device = torch.device("cpu")

    def offloaded(net):
        if place == "cpu":
            return cpu_offload(net, execution_device=device)
        return disk_offload(net, str(tmp_path / "offloaded"), execution_device=device)

    models = [mini(base, init_lora_weights=False) for base in (make_plain(), offloaded(make_plain()))]
    for model in models:
        model(plain_input).square().mean().backward()
    gradients = [[p.grad for p in model.parameters() if p.requires_grad] for model in models]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert_near(models[1](plain_input).detach(), models[0](plain_input).detach())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_offloaded_with_its_adapter_gives_the_same_output_and_file(
    model, plain_input, tmp_path, place
):
    wanted = model(plain_input).detach()
    model.save_pretrained(tmp_path / "whole")
    device = torch.device("cpu")
    if place == "cpu":
        model = cpu_offload(model, execution_device=device)
    else:
        model = disk_offload(model, str(tmp_path / "offloaded"), execution_device=device)
    with torch.no_grad():
        assert_near(model(plain_input), wanted)
    model.save_pretrained(tmp_path / "offloaded_adapter")
    first, second = (load_file(tmp_path / path / WEIGHTS) for path in ("whole", "offloaded_adapter"))
    assert all(torch.equal(first[name], second[name]) for name in first)


# What is refused; arguments of the wrong value are in the table of every method.


def test_an_embedding_is_refused_and_increlora_named():
    with pytest.raises(ValueError, match=r"emb.*'embedding'.*LoRA-Mini.*IncreLoraConfig"):
        mini(nn.ModuleDict({"emb": nn.Embedding(9, 6)}), target_modules=["emb"])
    peft.get_peft_model(nn.ModuleDict({"emb": nn.Embedding(9, 6)}), growing(target_modules=["emb"]))


@pytest.mark.parametrize(("a", "b"), [(1, 4), (4, 1)])
def test_a_rank_above_either_inner_size_is_refused_with_both(a, b):
    with pytest.raises(ValueError, match=rf"r=2 is above lora_a={a} or lora_b={b}.*lower the rank, or raise"):
        LoraMiniConfig(r=2, lora_a=a, lora_b=b)


def test_an_adapter_of_a_base_of_other_sizes_is_refused_by_module_and_both_sizes(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = nn.ModuleDict({"lin0": nn.Linear(13, 20), "lin1": nn.Linear(20, 6)})
    with pytest.raises(
        ValueError, match=r"'lin0' is 20 by 13, and module_sizes has 20 by 12.*leave module_sizes"
    ):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_a_weighted_sum_is_refused_with_the_way_out(model):
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    with pytest.raises(ValueError, match=r"adapters: .*LoRA-Mini.*export_lora"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    assert list(model.peft_config) == ["default", "second"]
