#!/usr/bin/env bash
# peft 0.21.2: LoRA on two kinds of module of Whisper, both of which a regular expression easily takes.
#
# conv1 and conv2 of the encoder: its forward pass reads conv1.stride, and PEFT's layer has none, so that the model raises
# AttributeError with any LoRA there. decoder.embed_positions is an nn.Embedding whose forward looks up the places 0, 1, 2 ...,
# whatever tokens it is given; PEFT's layer looks up its update by the tokens. So merging changes the outputs, without a
# warning, and a token above the number of places raises IndexError. OPT's and BART's embeddings of positions are alike.
# Seen: the error, and merged outputs that differ where those of q_proj do not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import WhisperConfig, WhisperForConditionalGeneration

SIZES = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
INPUTS = {
    "input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1)),
    "decoder_input_ids": torch.tensor([[1, 5, 9, 3], [1, 4, 4, 7]]),
}

def adapted(target):
    torch.manual_seed(0)
    config = WhisperConfig(
        **SIZES, vocab_size=12, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8,
        max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )
    lora = LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    return get_peft_model(WhisperForConditionalGeneration(config), lora).eval()

gaps = {}
with torch.no_grad():
    try:
        adapted(r".*encoder\.conv1")(**INPUTS)
        raised = "nothing"
    except AttributeError as error:
        raised = str(error)
    print("conv1:", raised)
    for name in ("q_proj", "embed_positions"):
        model = adapted(rf".*decoder\..*{name}" if name == "q_proj" else rf".*decoder\.{name}")
        before = model(**INPUTS).logits
        gaps[name] = float((model.merge_and_unload()(**INPUTS).logits - before).abs().max())
        print(f"{name}: merging moves the outputs by {gaps[name]:.2g}")
assert "stride" in raised
assert gaps["q_proj"] < 1e-4 < 0.01 < gaps["embed_positions"]
print("as stated")
PY
