"""Exports of experts as one pair each, by the names that layers had before they were fused."""

import json
import warnings

import consumers
import mixtures
import pytest
import torch
from adapted_experts import EXPERTS, MORE_TARGETS, adapted, layers_of
from growing import growing
from increlora_rs import convert_lora, export_lora
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_export_experts import CONFIG, reload_error

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The block of a layer, and the projections in the order of the rows of gate_up_proj, then of down_proj.
QWEN = ("mlp", "gate", ("gate_proj", "up_proj", "down_proj"))
MIXTRAL = ("block_sparse_moe", "gate", ("w1", "w3", "w2"))
NAMES = {"Qwen3Moe": QWEN, "Qwen2Moe": QWEN, "DeepseekV3": QWEN, "Mixtral": MIXTRAL, "Phimoe": MIXTRAL}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "gate_proj", "up_proj", "down_proj"]
layouts = pytest.mark.parametrize("layout", ["uniform", "compact"])
models = pytest.mark.parametrize("name", NAMES)
# By the conversion that PEFT has for them.
READ_BY_PEFT = ["Qwen3Moe", "Mixtral", "DeepseekV3"]


@pytest.fixture
def grown(grow):
    """``grown(name)``: the model with an adapter of ranks from 1 to 3."""

    def run(name, ranks=None, **config):
        model = adapted(name, **config)
        grow(model, ranks)
        return model

    return run


def exported(model, tmp_path, *args, source="model", **kwargs):
    if source == "directory":
        model.save_pretrained(tmp_path / "adapter")
        model = tmp_path / "adapter"
    export = export_lora(model, tmp_path / "lora", *args, experts="separate", **kwargs)
    return tmp_path / "lora", export


def separated(name, model):
    """The update of each layer that the experts and routers were, zeros where it is none, and of others."""
    block, router, (gate, up, down) = NAMES[name]
    wanted, holders = {}, {}
    for key, layer in layers_of(model).items():
        delta = layer.get_delta_weight("default").detach().double()
        layer_name, found, expert = key.partition(".mlp.experts.")
        if key.endswith((".mlp.gate.weight", ".mlp.router.weight")):
            wanted[f"{key.partition('.mlp.')[0]}.{block}.{router}"] = delta
        elif not found:
            wanted[key] = delta
        else:
            parameter, number = expert.split(".")
            holders.setdefault(f"{layer_name}.{block}.experts", {})[number, parameter] = delta
    hidden = model.config.hidden_size
    for holder, deltas in holders.items():
        acting = next(iter(deltas.items()))
        inner = len(acting[1]) // 2 if acting[0][1] == "gate_up_proj" else acting[1].shape[1]
        nothing = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
        for number in {number for number, _ in deltas}:
            whole = {
                parameter: deltas.get((number, parameter), torch.zeros(shape, dtype=torch.float64))
                for parameter, shape in nothing.items()
            }
            halves = dict(zip((gate, up), whole["gate_up_proj"].chunk(2), strict=True))
            wanted |= {f"{holder}.{number}.{part}": half for part, half in halves.items()}
            wanted[f"{holder}.{number}.{down}"] = whole["down_proj"]
    return wanted


def read_by_vllm(name, path, max_lora_rank=8):
    gate, up, down = NAMES[name][2]
    return consumers.vllm(path, max_lora_rank, modules=LINEAR, experts=(4, (gate, down, up)))


def assert_right(found, wanted):
    assert found.keys() == wanted.keys()
    for key, update in wanted.items():
        torch.testing.assert_close(found[key], update, rtol=1e-6, atol=1e-6)


@layouts
@models
def test_the_pairs_are_each_experts_update(grown, tmp_path, name, layout):
    model = grown(name, target_modules=["o_proj"])
    path, _ = exported(model, tmp_path, layout, source="directory")
    assert_right(read_by_vllm(name, path), separated(name, model))


@layouts
@models
def test_added_to_a_checkpoint_of_separate_experts_they_give_the_outputs(grown, tmp_path, name, layout):
    model = grown(name, target_modules=["o_proj"])
    path, _ = exported(model, tmp_path, layout)
    base = mixtures.build(name)
    base.save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for key, update in read_by_vllm(name, path).items():
        weights[f"{key}.weight"] += update.float()
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    served = type(base).from_pretrained(tmp_path / "base").eval()
    wanted = mixtures.logits(model)
    assert (mixtures.logits(served) - wanted).abs().max() < 5e-5
    assert (mixtures.logits(base) - wanted).abs().max() > 1.0


@pytest.mark.parametrize(
    "arguments", [{"use_rslora": True}, {"alpha_pattern": {"down_proj": 24, "gate.weight": 2}}]
)
@layouts
def test_scales_are_kept(grown, tmp_path, layout, arguments):
    model = grown("Qwen3Moe", **arguments)
    path, _ = exported(model, tmp_path, layout)
    assert_right(read_by_vllm("Qwen3Moe", path), separated("Qwen3Moe", model))


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
@layouts
@models
def test_projections_without_an_adapter_are_zeros(grown, tmp_path, name, layout, target):
    model = grown(name, target_parameters=[f"experts.{target}"])
    path, _ = exported(model, tmp_path, layout)
    assert_right(read_by_vllm(name, path), separated(name, model))


@layouts
def test_what_is_left_at_rank_0_is_zeros_beside_other_experts(grown, tmp_path, layout):
    # All but one expert of a layer.
    pattern = {r".*\.1\.mlp\.experts\.down_proj\.2": 2, r".*_proj\.\d": 0, "o_proj": 0, "gate.weight": 0}
    model = grown("Mixtral", {}, target_modules=["o_proj", "q_proj"], rank_pattern=pattern)
    path, _ = exported(model, tmp_path, layout)
    found = read_by_vllm("Mixtral", path)
    wanted = {
        key: update
        for key, update in separated("Mixtral", model).items()
        if "o_proj" not in key and not key.endswith(".gate") and "layers.0.block" not in key
    }
    assert_right(found, wanted)
    acting = [key for key, update in found.items() if update.any() and "q_proj" not in key]
    assert acting == ["model.layers.1.block_sparse_moe.experts.2.w2"]


def test_each_projection_of_a_layer_has_one_rank_in_the_compact_layout(grown, tmp_path):
    ranks = {"model.layers.1.mlp.experts.down_proj.2": 2}
    model = grown("Qwen3Moe", ranks, target_parameters=EXPERTS, init_r=1)
    path, export = exported(model, tmp_path, "compact")
    tensors = load_file(path / WEIGHTS)
    key = f"{PREFIX}model.layers.1.mlp.experts.{{}}.{{}}.lora_A.weight"
    assert {len(tensors[key.format(number, "down_proj")]) for number in range(4)} == {2}
    assert {len(tensors[key.format(number, "up_proj")]) for number in range(4)} == {1}
    assert export.config.r == 2
    assert_right(read_by_vllm("Qwen3Moe", path), separated("Qwen3Moe", model))


def test_ranks_are_cut_to_the_nearest_update(grown, tmp_path):
    model = grown("Qwen3Moe")
    path, export = exported(model, tmp_path, rank=1)
    found = read_by_vllm("Qwen3Moe", path)
    for number in range(4):
        wanted = separated("Qwen3Moe", model)
        holder = f"model.layers.1.mlp.experts.{number}"
        gate_up = torch.cat([wanted[f"{holder}.{part}"] for part in ("gate_proj", "up_proj")])
        u, s, v = torch.linalg.svd(gate_up)
        nearest = s[0] * u[:, :1] @ v[:1]
        cut = torch.cat([found[f"{holder}.{part}"] for part in ("gate_proj", "up_proj")])
        torch.testing.assert_close(cut, nearest, rtol=0.0, atol=1e-5)
        lost = export.errors[f"model.layers.1.mlp.experts.gate_up_proj.{number}"]
        assert lost == pytest.approx(float((gate_up - nearest).norm() / gate_up.norm()), abs=1e-5)


def test_they_are_rounded_and_padded_for_vllm(grown, tmp_path):
    path, export = exported(grown("Mixtral"), tmp_path, vllm_rank=True, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(path / WEIGHTS).values()} == {torch.bfloat16}
    assert export.max_lora_rank == export.config.r == 8


# PEFT, which renames and fuses such a LoRA as it loads it.


@pytest.mark.parametrize("name", READ_BY_PEFT)
def test_plain_peft_fuses_them_to_the_same_outputs(grown, tmp_path, name):
    model = grown(name, target_modules=["o_proj"])
    path, export = exported(model, tmp_path, source="directory")
    assert export.config.target_modules == {"o_proj", NAMES[name][1], *NAMES[name][2]}
    assert not export.config.target_parameters
    assert reload_error(name, path, model) < 5e-5


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3"])
def test_beside_dense_layers_of_the_same_names(grown, tmp_path, name):
    model = grown(name, target_modules=["up_proj", "q_proj" if name == "Qwen3Moe" else "o_proj"])
    path, _ = exported(model, tmp_path)
    assert reload_error(name, path, model) < 5e-5
    assert_right(read_by_vllm(name, path), separated(name, model))


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
def test_plain_peft_fuses_one_parameter_alone(grown, tmp_path, target):
    model = grown("Mixtral", target_parameters=[f"experts.{target}"])
    path, _ = exported(model, tmp_path)
    assert reload_error("Mixtral", path, model) < 5e-5


def test_plain_peft_refuses_the_compact_layout(grown, tmp_path):
    path, _ = exported(grown("Qwen3Moe", target_modules=["o_proj"]), tmp_path, "compact")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(mixtures.build("Qwen3Moe"), path)


def test_plain_peft_leaves_out_experts_of_models_that_it_does_not_rename(grown, tmp_path):
    path, _ = exported(grown("Phimoe", target_modules=["o_proj"]), tmp_path)
    loaded = PeftModel.from_pretrained(mixtures.build("Phimoe"), path)
    assert {key.split(".")[6] for key in loaded.state_dict() if "lora_" in key} == {"o_proj"}


def test_plain_peft_refuses_the_router_of_qwen2(grown, tmp_path):
    path, _ = exported(grown("Qwen2Moe"), tmp_path)
    with pytest.raises(ValueError, match="Qwen2MoeTopKRouter"):
        PeftModel.from_pretrained(mixtures.build("Qwen2Moe"), path)


# What is refused.


@pytest.mark.parametrize("name", ["GptOss", "GraniteMoe"])
def test_experts_that_were_never_separate_are_refused(grown, tmp_path, name):
    with pytest.raises(ValueError, match=r"experts='separate'.*gate_up_proj.*experts='fused'"):
        exported(grown(name), tmp_path)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("config", [{"target_parameters": ["mlp.gate.weight"]}, {"target_parameters": None}])
def test_an_adapter_on_no_experts_is_refused(grow, tmp_path, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = get_peft_model(mixtures.build("Qwen3Moe"), growing(r=2, target_modules=["o_proj"], **config))
    grow(model)
    with pytest.raises(ValueError, match=r"experts='separate': the adapter is on no experts"):
        exported(model, tmp_path)


def test_other_values_are_refused(grown, tmp_path):
    with pytest.raises(ValueError, match=r"experts='apart' is unknown.*'fused', 'separate'"):
        export_lora(grown("Qwen3Moe"), tmp_path / "lora", experts="apart")


def test_they_are_not_converted_back(grown, tmp_path):
    model = grown("Mixtral")
    mixtures.build("Mixtral").config.save_pretrained(tmp_path / "base")
    path, _ = exported(model, tmp_path)
    with pytest.warns(UserWarning, match=r"on separate experts, .*experts\.0\.w1' among 24, and does not"):
        convert_lora(path, tmp_path / "back")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    path, _ = exported(model, tmp_path)
    with pytest.raises(ValueError, match=r"on separate experts, .*experts\.0\.w1' among 24, which are one"):
        convert_lora(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def as_an_earlier_version_saved_it(model, path):
    model.save_pretrained(path)
    config = json.loads((path / CONFIG).read_text())
    del config["unfused_layers"]
    (path / CONFIG).write_text(json.dumps(config))


def test_an_earlier_adapter_takes_names_from_its_bases_configuration(grown, tmp_path):
    model = grown("Mixtral")
    mixtures.build("Mixtral").config.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    as_an_earlier_version_saved_it(model, tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora", experts="separate")
    assert_right(read_by_vllm("Mixtral", tmp_path / "lora"), separated("Mixtral", model))


def test_an_earlier_adapter_of_an_unknown_base_is_refused(grown, tmp_path):
    as_an_earlier_version_saved_it(grown("Mixtral"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"does not say what its base model is.*export the model in memory"):
        export_lora(tmp_path / "adapter", tmp_path / "lora", experts="separate")


def test_every_model_of_the_table_is_written_or_refused():
    assert {*NAMES, "GptOss", "GraniteMoe"} == set(MORE_TARGETS)
