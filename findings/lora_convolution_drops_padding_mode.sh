#!/usr/bin/env bash
# peft 0.21.2: a LoRA on a convolution with padding_mode="reflect" computes another update than the one it merges.
#
# PEFT's LoRA for nn.Conv2d makes lora_A with the base layer's kernel size, stride and padding, and leaves its
# padding_mode and dilation at the defaults. The update of the forward pass pads with zeros; merged into the base
# weight it is padded as the base layer pads. So merge_and_unload() changes the model at the borders of the image,
# without a warning. With dilation=2 the two outputs do not even have one shape, and the forward pass raises.
# Seen: unmerged and merged outputs differ for "reflect", at the border only, and agree for "zeros".
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

def adapted(**options):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3, **options)), config).eval()

x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
gaps = {}
with torch.no_grad():
    for mode in ("zeros", "reflect"):
        model = adapted(padding=1, padding_mode=mode)
        before = model(x)
        gap = (model.merge_and_unload()(x) - before).abs()
        gaps[mode] = float(gap.max()), float(gap[..., 1:-1, 1:-1].max())
        print(f"padding_mode={mode}: merging moves the output by {gaps[mode][0]:.2g}, inside by {gaps[mode][1]:.2g}")
    try:
        adapted(dilation=2)(x)
        raised = "nothing"
    except RuntimeError as error:
        raised = str(error)
    print("dilation=2:", raised)
assert gaps["zeros"][0] < 1e-4
assert gaps["reflect"][0] > 0.05 and gaps["reflect"][1] < 1e-4
assert "size" in raised
print("as stated")
PY
