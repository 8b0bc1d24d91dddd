"""Other shapes of model: each is trained, with ranks that grow or move, saved, loaded, exported, merged."""

import importlib.util
import warnings

import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, attach, export_lora
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import PeftModel, get_peft_model
from shapes import SHAPES

RANK, STEPS = 3, 60
FORMS = {"grows": growing, "moves": IncreLoraConfig}
WITHOUT_DIFFUSERS = "diffusers is not installed, of which this model is"


def trained(shape, form, targets=None):
    """The model, its scheduler, the ranks at the start, and the losses."""
    config = form(r=RANK, lora_alpha=6, **(shape.config | ({"target_modules": targets} if targets else {})))
    torch.manual_seed(3)
    with warnings.catch_warnings():
        # Of Mamba's x_proj, which kernels that are not installed read.
        warnings.filterwarnings("ignore", message=".*with kernels of its own")
        model = get_peft_model(shape.build(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    first, losses = dict(scheduler.ranks), []
    for _ in range(STEPS):
        loss = shape.loss(model, shape.inputs())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), scheduler, first, losses


@pytest.fixture(scope="module", params=[(name, form) for name in SHAPES for form in FORMS], ids="-".join)
def run(request):
    """A shape, its trained model, and what :func:`trained` gives beside it."""
    name, form = request.param
    if name == "UNet" and importlib.util.find_spec("diffusers") is None:
        pytest.skip(WITHOUT_DIFFUSERS)
    return SHAPES[name], *trained(SHAPES[name], FORMS[form])


def largest_difference(one, other):
    return (one - other).abs().max().item()


@pytest.mark.filterwarnings("ignore:.*with kernels of its own:UserWarning")
class TestShape:
    def test_ranks_change_within_the_budget_and_the_loss_falls(self, run):
        _, _, scheduler, first, losses = run
        assert scheduler.ranks != first
        assert len(scheduler.history) > 0
        assert 0.9 * scheduler.budget < scheduler.spent <= scheduler.budget
        assert losses[-1] < 0.8 * losses[0]

    def test_the_saved_adapter_gives_the_same_outputs(self, run, tmp_path):
        shape, model, scheduler, *_ = run
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(shape.build(), tmp_path).eval()
        layers = {short(name): layer for name, layer in adapted_layers(loaded, "default").items()}
        assert {name: layer.rank("default") for name, layer in layers.items()} == scheduler.ranks
        assert torch.equal(shape.of(loaded), shape.of(model))

    @pytest.mark.parametrize("layout", ["uniform", "compact"])
    def test_plain_peft_gives_the_same_outputs(self, run, tmp_path, layout):
        shape, model, *_ = run
        export_lora(model, tmp_path, layout)
        loaded = PeftModel.from_pretrained(shape.build(), tmp_path).eval()
        assert loaded.peft_config["default"].peft_type == "LORA"
        assert largest_difference(shape.of(model), shape.of(shape.build())) > 0.1
        assert largest_difference(shape.of(loaded), shape.of(model)) < 1e-4

    def test_the_merged_model_gives_the_same_outputs(self, run, tmp_path):
        shape, model, *_ = run
        model.save_pretrained(tmp_path)
        merged = PeftModel.from_pretrained(shape.build(), tmp_path).merge_and_unload()
        assert not adapted_layers(merged, "default")
        assert largest_difference(shape.of(merged), shape.of(model)) < 1e-4


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL"])
def test_a_regex_for_the_language_part_leaves_the_vision_part_alone(name):
    model = get_peft_model(SHAPES[name].build(), growing(r=2, **SHAPES[name].config))
    names = [short(key) for key in adapted_layers(model, "default")]
    assert names
    assert all(key.startswith("model.language_model.layers.") for key in names)


@pytest.mark.parametrize("name", ["Whisper", "LLaVA", "Qwen2-VL", "Mamba"])
@pytest.mark.filterwarnings("ignore:.*with kernels of its own:UserWarning")
def test_what_is_generated_after_loading_is_what_was_generated_before(name, tmp_path):
    shape = SHAPES[name]
    model, *_ = trained(shape, IncreLoraConfig)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(shape.build(), tmp_path).eval()
    inputs = {key: value for key, value in shape.inputs().items() if key != "labels"}
    wanted, found = (m.generate(**inputs, max_new_tokens=5, do_sample=False) for m in (model, loaded))
    assert torch.equal(found, wanted)


def test_the_convolutions_of_whispers_encoder_train_and_merge(tmp_path):
    # The encoder reads their strides. PEFT's LoRA has none, and fails there with any adapter on them.
    shape = SHAPES["Whisper"]
    model, scheduler, *_ = trained(shape, growing, ["conv1", "conv2", "q_proj"])
    assert scheduler.ranks["model.encoder.conv1"] == RANK
    wanted = shape.of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(shape.of(PeftModel.from_pretrained(shape.build(), tmp_path).eval()), wanted)
    assert largest_difference(shape.of(model.merge_and_unload()), wanted) < 1e-4


def test_whispers_embedding_of_positions_is_refused_by_name():
    with pytest.raises(ValueError, match=r"decoder\.embed_positions: a WhisperPositionalEmbedding does not"):
        get_peft_model(SHAPES["Whisper"].build(), growing(r=2, target_modules=r".*decoder\.embed_positions"))
