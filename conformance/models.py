"""Tiny models of random weights, in folders named as the hub models that PEFT's tests load.

``from_pretrained("owner/name")`` takes a folder of that name where there is one, so the tests run in
``hub(method)`` without a hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from increlora_rs.contract.method import Method

from . import words
from .archive import WORK

_PEFT, _TRL, _HF = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
_SIZES = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_BERT = {**_SIZES, "intermediate_size": 37}
_ROBERTA = {**_BERT, "pad_token_id": 1}
_LLAMA = {
    **_BERT,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {**_SIZES, "ffn_dim": 37, "word_embed_proj_dim": 32, "pad_token_id": 0}
_GPT = {"vocab_size": 1000, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_GPT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": 1000, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": 1000,
    "d_model": 32,
    "max_position_embeddings": 512,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 37 for side in ("encoder", "decoder")},
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
_CLIP = {**_SIZES, "intermediate_size": 37, "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2}

#: Class, configuration and its arguments by the hub's name.
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    f"{_PEFT}/tiny-random-OPTForCausalLM": (hf.OPTForCausalLM, hf.OPTConfig, _OPT),
    f"{_PEFT}/opt-125m": (hf.OPTForCausalLM, hf.OPTConfig, {**_OPT, "num_hidden_layers": 12}),
    f"{_PEFT}/tiny-random-GPT2LMHeadModel": (hf.GPT2LMHeadModel, hf.GPT2Config, _GPT),
    f"{_HF}/tiny-random-gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, _GPT),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, _GPT),
    f"{_PEFT}/tiny-random-GPTJForCausalLM": (hf.GPTJForCausalLM, hf.GPTJConfig, {**_GPT, "rotary_dim": 4}),
    f"{_TRL}/tiny-random-LlamaForCausalLM": (hf.LlamaForCausalLM, hf.LlamaConfig, _LLAMA),
    f"{_HF}/tiny-random-MistralForCausalLM": (hf.MistralForCausalLM, hf.MistralConfig, _LLAMA),
    f"{_PEFT}/tiny-dummy-qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, _LLAMA),
    f"{_TRL}/tiny-Qwen3ForCausalLM": (hf.Qwen3ForCausalLM, hf.Qwen3Config, _LLAMA),
    f"{_HF}/tiny-random-Gemma3ForCausalLM": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, _LLAMA),
    f"{_PEFT}/tiny-random-T5ForConditionalGeneration-calibrated": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {**_T5, "decoder_start_token_id": 0},
    ),
    f"{_PEFT}/tiny-random-BartForConditionalGeneration": (
        hf.BartForConditionalGeneration,
        hf.BartConfig,
        _BART,
    ),
    f"{_PEFT}/tiny-random-BertForSequenceClassification": (
        hf.BertForSequenceClassification,
        hf.BertConfig,
        _BERT,
    ),
    "bert-base-uncased": (hf.BertForMaskedLM, hf.BertConfig, _BERT),
    f"{_PEFT}/tiny-random-RobertaForSequenceClassification": (
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig,
        _ROBERTA,
    ),
    f"{_TRL}/tiny-LlamaForSequenceClassification-3.2": (
        hf.LlamaForSequenceClassification,
        hf.LlamaConfig,
        _LLAMA,
    ),
    f"{_PEFT}/tiny-random-BertModel": (hf.BertModel, hf.BertConfig, _BERT),
    f"{_PEFT}/tiny-random-RobertaModel": (hf.RobertaModel, hf.RobertaConfig, _ROBERTA),
    f"{_PEFT}/tiny-random-DebertaModel": (hf.DebertaModel, hf.DebertaConfig, _BERT),
    f"{_PEFT}/tiny-random-DebertaV2Model": (hf.DebertaV2Model, hf.DebertaV2Config, _BERT),
    f"{_PEFT}/tiny-clip-text-2": (
        hf.CLIPTextModelWithProjection,
        hf.CLIPTextConfig,
        _CLIP,
    ),
}
#: The model that tests train on text, and the text.
_WITH_WORDS = f"{_PEFT}/tiny-random-OPTForCausalLM"
_QUOTES = "ybelkada/english_quotes_copy"


def hub(method: Method) -> Path:
    """The folder with the models' folders, and that of an adapter of the method; made once."""
    folder = WORK / "hub" / method.name
    for name, (model, config, arguments) in _MODELS.items():
        if not (folder / name / "config.json").exists():
            torch.manual_seed(0)
            model(config(**arguments)).save_pretrained(folder / name)
    words.save_tokenizer(folder / _WITH_WORDS)
    words.save_quotes(folder / _QUOTES)
    method.config(target_modules=["q_proj"]).save_pretrained(folder / _PEFT / "tiny-opt-lora-revision")
    return folder
