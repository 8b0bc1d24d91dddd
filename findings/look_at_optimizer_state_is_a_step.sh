#!/usr/bin/env bash
# torch 2.13.0: asking torch.distributed.checkpoint for the state of an optimizer that has not stepped yet takes a step.
#
# get_optimizer_state_dict() (and set_optimizer_state_dict(), which every resume calls first) fills the state of a
# fresh optimizer by giving every parameter a gradient of zeros, setting each group's lr to 0 and calling step().
# Step hooks fire, so whatever counts steps there counts one that never was. Values survive, because lr is 0; a
# hook, a per-step schedule or an optimizer whose update is not a multiple of its lr does not know.
# Seen: one pre hook and one post hook call for one look, none for the second look; lr seen by the hook is 0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
"$dir/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

model = torch.nn.Linear(3, 2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
calls = []
optimizer.register_step_pre_hook(lambda o, *_: calls.append(("pre", float(o.param_groups[0]["lr"]))))
optimizer.register_step_post_hook(lambda o, *_: calls.append(("post", float(o.param_groups[0]["lr"]))))
before = model.weight.detach().clone()
get_optimizer_state_dict(model, optimizer)
first = list(calls)
get_optimizer_state_dict(model, optimizer)
print("hooks of the first look:", first, "of the second:", calls[len(first):])
print("gradients left behind:", model.weight.grad)
assert first == [("pre", 0.0), ("post", 0.0)] and len(calls) == 2
assert torch.equal(model.weight, before)
print("as stated")
PY
