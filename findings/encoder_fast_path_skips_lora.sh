#!/usr/bin/env bash
# torch 2.13.0 with peft 0.21.2: a LoRA on linear1 or linear2 of nn.TransformerEncoderLayer works in training and
# has no effect at all in evaluation.
#
# In evaluation the layer's fast path hands the weights of its children to one fused operator and never calls them;
# PEFT's LoRA layer shows its base layer's weight, so the operator computes the base model. There is no error and no
# warning; switching train() and eval() is what changes the output, with all dropout at 0. The path is meant for
# inference and steps aside when a weight that it reads requires a gradient, but under an adapter those are frozen:
# so it is taken with gradients enabled, too, and the output then passes no gradient on to the adapter.
# Seen: in evaluation the output equals the base model's to the last bit, with and without no_grad, and does not
# require a gradient.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
model = get_peft_model(torch.nn.Sequential(layer), LoraConfig(r=2, target_modules=["linear1", "linear2"]))
for parameter in model.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter)
x = torch.randn(1, 3, 8)
with torch.no_grad():
    model.train()
    trained = model(x)
    model.eval()
    evaluated = model(x)
    with model.disable_adapter():
        base = model(x)
with_gradients = model(x)
gap = lambda a, b: float((a - b).detach().abs().max())
print("training against the base:", gap(trained, base))
print("evaluation, no_grad, against the base:", gap(evaluated, base))
print("evaluation with gradients against the base:", gap(with_gradients, base))
print("it requires a gradient:", with_gradients.requires_grad)
assert gap(trained, base) > 0.1
assert gap(evaluated, base) < 1e-5
assert gap(with_gradients, base) < 1e-5 and not with_gradients.requires_grad
print("as stated")
PY
