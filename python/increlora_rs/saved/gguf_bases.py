"""Base models as llama.cpp has them: what a class's matrices are called in a GGUF file, how their rows lie.

llama.cpp's converter turns a checkpoint of Transformers into a GGUF file by the class of the model. For some
classes it interleaves the rows of q_proj and k_proj within each head, by the way in which their graph applies
rotary position embeddings, and an adapter's rows must follow. Nothing in an adapter or in a GGUF file says
so: it is a table here, of the classes that were run.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_WAY_OUT = (
    "Merge the adapter with merge_and_unload() and convert the whole model, or leave the module out of "
    "target_modules."
)
_IN_LAYERS = re.compile(r"^model\.layers\.(?P<layer>\d+)\.(?P<module>.+)$")
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_LAYER = _ATTENTION | _GATED
_SHARED = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_ROUTER = {"mlp.gate.weight": "ffn_gate_inp"}
_EXPERTS = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
}
_FUSED_LAYER = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class _Layout:
    """How the converter writes the models of one class.

    Args:
        architecture: The GGUF file's ``general.architecture``.
        modules: Names in a GGUF file of the modules of a layer to which llama.cpp applies an adapter.
        experts: Those of the parameters that hold all experts of a layer; of several the first has its first
            rows.
        interleaved: Are the rows of q_proj and k_proj interleaved?
        always_tied: Is the embedding the head whatever the configuration says? The converter drops the head.
    """

    architecture: str
    modules: dict[str, str]
    experts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: bool = False
    always_tied: bool = False


# Each was run: tests/saved/test_llama_cpp.py.
LAYOUTS = {
    "LlamaForCausalLM": _Layout("llama", _LAYER, interleaved=True),
    "MistralForCausalLM": _Layout("llama", _LAYER, interleaved=True),
    "GraniteForCausalLM": _Layout("granite", _LAYER, interleaved=True),
    "SmolLM3ForCausalLM": _Layout("smollm3", _LAYER, interleaved=True),
    "Qwen2ForCausalLM": _Layout("qwen2", _LAYER),
    "Qwen3ForCausalLM": _Layout("qwen3", _LAYER),
    "Olmo2ForCausalLM": _Layout("olmo2", _LAYER),
    "Gemma2ForCausalLM": _Layout("gemma2", _LAYER, always_tied=True),
    "Gemma3ForCausalLM": _Layout("gemma3", _LAYER, always_tied=True),
    "Phi3ForCausalLM": _Layout("phi3", _FUSED_LAYER),
    "MixtralForCausalLM": _Layout("llama", _ATTENTION | _ROUTER, _EXPERTS, interleaved=True),
    "Qwen2MoeForCausalLM": _Layout("qwen2moe", _ATTENTION | _ROUTER | _SHARED, _EXPERTS),
    "Qwen3MoeForCausalLM": _Layout("qwen3moe", _ATTENTION | _ROUTER, _EXPERTS),
}


@dataclass(frozen=True)
class GgufBase:
    """A base model, as far as an adapter for llama.cpp has to know it.

    Args:
        name: The model's class.
        layers: Number of its layers.
        heads: Number of heads of the queries.
        kv_heads: Number of heads of keys and values.
        tied: Is the head the embedding?
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool

    @property
    def architecture(self) -> str:
        """The GGUF file's ``general.architecture``."""
        return self._layout.architecture

    @property
    def _layout(self) -> _Layout:
        return LAYOUTS[self.name]

    def tensor(self, module: str) -> str:
        """What the weight of ``module`` is called in the base's GGUF file.

        Raises:
            ValueError: it has none there, or llama.cpp applies no adapter to it.
        """
        match = _IN_LAYERS.match(module)
        if match and match["module"] in self._layout.modules:
            return self._in_layer(module, match["layer"], self._layout.modules[match["module"]])
        outside = {"model.embed_tokens": "token_embd.weight", "lm_head": "output.weight"}
        if module in outside and self.tied:
            raise ValueError(
                f"model_or_adapter_dir: the adapter is on {module!r}, and the base's embedding is its head "
                "too (tie_word_embeddings): llama.cpp has one matrix for both and fails on an update of one. "
                f"{_WAY_OUT}"
            )
        if module in outside:
            return outside[module]
        raise ValueError(
            f"model_or_adapter_dir: the adapter is on {module!r}, to which llama.cpp applies no adapter in a "
            f"{self.name}; it does to {[*self._layout.modules, *self._layout.experts, *outside]}. {_WAY_OUT}"
        )

    def tensors_of_experts(self, parameter: str) -> list[str]:
        """What the parts of ``parameter``, which holds all experts of a layer, are called in the base's GGUF
        file; the first has its first rows.

        Raises:
            ValueError: it has none there.
        """
        match = _IN_LAYERS.match(parameter)
        if match is None or match["module"] not in self._layout.experts:
            raise ValueError(
                f"model_or_adapter_dir: the adapter is on the experts {parameter!r}, to which llama.cpp "
                f"applies no adapter in a {self.name}. {_WAY_OUT}"
            )
        kinds = self._layout.experts[match["module"]]
        return [self._in_layer(parameter, match["layer"], kind) for kind in kinds]

    def _in_layer(self, module: str, layer: str, kind: str) -> str:
        if int(layer) >= self.layers:
            raise ValueError(
                f"base: it has {self.layers} layers, and the adapter is on {module!r}; give the model "
                "that the adapter was trained on."
            )
        return f"blk.{layer}.{kind}.weight"

    def rows(self, tensor: str, count: int) -> Tensor | None:
        """Positions in Transformers' matrix of the rows that its GGUF file has, int64 (count,); None: they
        are in the same order.

        Args:
            tensor: Its name in the GGUF file.
            count: Its number of rows.

        Raises:
            ValueError: the rows are not those of the base's heads.
        """
        kind = tensor.split(".")[-2]
        if not self._layout.interleaved or kind not in ("attn_q", "attn_k"):
            return None
        heads = self.heads if kind == "attn_q" else self.kv_heads
        if count % (2 * heads):
            raise ValueError(
                f"base: it has {heads} heads, and the adapter's update of {tensor} has {count} rows, which "
                "is no even number for each; give the model that the adapter was trained on."
            )
        # Row i of a head's first half, then row i of its second.
        return torch.arange(count).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def gguf_base(base: nn.Module | PretrainedConfig | str | os.PathLike[str]) -> GgufBase:
    """What an adapter for llama.cpp has to know of ``base``: a model, its configuration, directory or name.

    Raises:
        ValueError: there is no configuration, or it is of a class that was not tried in llama.cpp.
        TypeError: ``base`` is none of the four.
    """
    config, name = _described(base)
    if name not in LAYOUTS:
        raise ValueError(
            f"base: its class is {name}, and how llama.cpp's files hold that was not tried; tried are "
            f"{', '.join(LAYOUTS)}. Merge the adapter with merge_and_unload() and convert the whole model."
        )
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    tied = bool(config.tie_word_embeddings) or LAYOUTS[name].always_tied
    return GgufBase(name, int(config.num_hidden_layers), heads, int(kv_heads), tied)


def _described(base: Any) -> tuple[Any, str]:
    """Configuration and class of a model."""
    if isinstance(base, nn.Module):
        model = base.get_base_model() if isinstance(base, PeftModel) else base
        config = getattr(model, "config", None)
        if not isinstance(config, PretrainedConfig):
            raise ValueError(
                f"base: a {type(model).__name__} has no configuration of Transformers; llama.cpp runs models "
                "of Transformers only."
            )
        return config, type(model).__name__
    if isinstance(base, (str, os.PathLike)):
        base = _configuration(os.fspath(base))
    elif not isinstance(base, PretrainedConfig):
        raise TypeError(
            f"base: a {type(base).__name__} is no model, configuration of Transformers, directory or name of "
            "one."
        )
    # Before it was saved with a model, a configuration does not say of which class that is.
    names = base.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(base.model_type, base.model_type)]
    return base, names[0]


def _configuration(path: str) -> Any:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base={path!r} leads to no configuration of a model: {error} Give the directory of the base "
            "model in Transformers' format (its config.json is enough), or its name."
        ) from error
