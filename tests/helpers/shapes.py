"""Models of several shapes, tiny and from their configurations, always with the same weights: what each is
given, what its outputs and its loss are, and the options of an adapter for it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE_TOKEN, _VISION_START, _VISION_END, _VIDEO_TOKEN = 98, 97, 96, 95


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    """Integers (4, 9) that are neither special tokens nor an image's."""
    return torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(1))


def _logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


def _own_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).loss


@dataclass(frozen=True)
class Shape:
    """A model of one shape.

    Args:
        model: Makes it.
        inputs: Makes the arguments of its call.
        config: Options of an adapter for it.
        output: What the call gives out, as one tensor.
        loss: What is trained.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    config: dict[str, Any]
    output: Callable[[nn.Module, dict[str, Any]], Tensor] = field(default=_logits)
    loss: Callable[[nn.Module, dict[str, Any]], Tensor] = field(default=_own_loss)

    def build(self) -> nn.Module:
        """The model, the same at each call."""
        state = torch.get_rng_state()
        torch.manual_seed(7)
        model = self.model().eval()
        torch.set_rng_state(state)
        return model

    def of(self, model: nn.Module) -> Tensor:
        """What ``model`` makes of the inputs."""
        with torch.no_grad():
            return self.output(model, self.inputs())


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=3,
        initializer_range=0.2,
    )
    return transformers.ViTForImageClassification(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=99,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        dropout=0.0,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    return transformers.WhisperForConditionalGeneration(config)


def _llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=_IMAGE_TOKEN,
        image_token_id=_IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _qwen_vl() -> nn.Module:
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=_IMAGE_TOKEN,
        video_token_id=_VIDEO_TOKEN,
        vision_start_token_id=_VISION_START,
        vision_end_token_id=_VISION_END,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _with_image(first: int, **images: Any) -> dict[str, Any]:
    ids = tokens()
    ids[:, first - 1] = _VISION_START
    ids[:, first : first + 4] = _IMAGE_TOKEN
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} | images


def _qwen_vl_inputs() -> dict[str, Any]:
    grid = torch.tensor([[1, 4, 4]] * 4)
    inputs = _with_image(2, pixel_values=_drawn(4 * 16, 3 * 2 * 16), image_grid_thw=grid)
    taken = inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward).parameters
    if "mm_token_type_ids" in taken:  # Not in Transformers 5.0.
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == _IMAGE_TOKEN).int()
    return inputs


_MAMBA = {"vocab_size": 99, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.2}


def _mamba() -> nn.Module:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**_MAMBA, hidden_size=24, time_step_rank=4))


def _mamba2() -> nn.Module:
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**_MAMBA, **sizes))


def _text() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens()}


def _embedder() -> nn.Module:
    sizes = {
        key: TEXT[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    }
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **dropout, num_attention_heads=4, initializer_range=0.2)
    return transformers.BertModel(config)


def _mean_of_tokens(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return nn.functional.normalize(model(**inputs).last_hidden_state.mean(1), dim=-1)


def _unlike_each_other(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    vectors = _mean_of_tokens(model, inputs)
    return (vectors @ vectors.T - torch.eye(len(vectors))).square().mean()


def _reward() -> nn.Module:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TEXT, num_labels=1))


def _chosen_above_rejected(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    chosen, rejected = model(**inputs).logits.view(2, -1)
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def _unet() -> nn.Module:
    # Not every environment has diffusers.
    import unets

    return unets.unet()


def _noise_of_image(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).sample


def _noise_missed(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return (model(**inputs).sample - _drawn(1, 4, 8, 8).flip(0, 1)).square().mean()


SHAPES = {
    "ViT": Shape(
        _vit,
        lambda: {"pixel_values": _drawn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])},
        {
            # The names of Transformers 5.24, and those of 5.0.
            "target_modules": r".*\.(q_proj|v_proj|query|value|projection)",
            "modules_to_save": ["classifier"],
        },
    ),
    "Whisper": Shape(
        _whisper,
        lambda: {"input_features": _drawn(4, 8, 20), "labels": tokens()},
        {"target_modules": ["q_proj", "v_proj", "fc1"]},
    ),
    "LLaVA": Shape(
        _llava,
        lambda: _with_image(2, pixel_values=_drawn(4, 3, 16, 16)),
        {"target_modules": r".*language_model.*\.(q|k|v|o)_proj"},
    ),
    "Qwen2-VL": Shape(
        _qwen_vl, _qwen_vl_inputs, {"target_modules": r".*language_model.*\.(q|v|gate|up|down)_proj"}
    ),
    "Mamba": Shape(_mamba, _text, {"target_modules": ["in_proj", "x_proj"]}),
    "Mamba-2": Shape(_mamba2, _text, {"target_modules": ["in_proj"]}),
    "UNet": Shape(
        _unet,
        lambda: {
            "sample": _drawn(1, 4, 8, 8),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": _drawn(1, 5, 8),
        },
        {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]},
        _noise_of_image,
        _noise_missed,
    ),
    "embedding": Shape(
        _embedder,
        lambda: {"input_ids": tokens()},
        {"target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"},
        _mean_of_tokens,
        _unlike_each_other,
    ),
    "reward": Shape(
        _reward,
        lambda: {"input_ids": tokens()},
        {"target_modules": "all-linear", "modules_to_save": ["score"], "task_type": "SEQ_CLS"},
        loss=_chosen_above_rejected,
    ),
}
