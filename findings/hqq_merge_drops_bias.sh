#!/usr/bin/env bash
# peft 0.21.2 with hqq 0.2.8.post1: merging a LoRA into an HQQLinear that has a bias takes the bias away.
#
# PEFT writes the merged weight by building a new HQQLinear without handing the bias on. The merged model's output
# is off by the bias, and unmerge_adapter() does not bring it back. Without a bias the same merge is right to the
# quantisation's rounding, so a check on a model without biases (Llama, Qwen's MLPs) shows nothing.
# Seen: after merge_adapter() base_layer.bias is None and the mean output moves by -1.00 for a bias of 1.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0 hqq==0.2.8.post1
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import LoraConfig, get_peft_model

def model_with(bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 64, bias=bias)
    if bias:
        torch.nn.init.constant_(linear.bias, 1.0)
    settings = BaseQuantizeConfig(nbits=8, group_size=64)
    quantised = HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")
    return get_peft_model(torch.nn.Sequential(quantised), LoraConfig(r=4, target_modules=["0"])).eval()

x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
moved = {}
with torch.no_grad():
    for bias in (False, True):
        model = model_with(bias)
        layer, before = model.base_model.model[0], model(x)
        model.merge_adapter()
        moved[bias] = float((model(x) - before).mean())
        print(f"bias={bias}: after merging the bias is", layer.get_base_layer().bias, "mean output moved by", moved[bias])
        model.unmerge_adapter()
        print("   after unmerging the bias is", layer.get_base_layer().bias)
        assert layer.get_base_layer().bias is None
assert abs(moved[False]) < 0.01, "without a bias nothing moves"
assert abs(moved[True] + 1.0) < 0.05, "with a bias of 1 the output falls by 1"
print("as stated")
PY
