#!/usr/bin/env bash
# torch 2.13.0: an optimizer whose step() calls super().step() runs its step hooks once or twice a step, and which of
# the two depends on what else the process has made before.
#
# torch wraps the step of a class when the first optimizer of exactly that class is made. A subclass's step is wrapped
# when it is made; the inherited step inside only if somebody has made an optimizer of the base class by then. So a
# counter in a step hook counts right in one script and double in the next, and importing a library that makes an
# AdamW of its own is enough to change it.
# Seen: 1 call of the pre hook for a step in a fresh process, 2 after an AdamW was made beside it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
"$dir/venv/bin/python" -W ignore - <<'PY'
import torch

class Mine(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)

def calls_of_one_step():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = Mine([weight])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    weight.grad = torch.ones(2)
    optimizer.step()
    return len(calls)

alone = calls_of_one_step()
torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
beside = calls_of_one_step()
print("hook calls for one step:", alone, "in a fresh process,", beside, "after an AdamW was made")
assert (alone, beside) == (1, 2)
print("as stated")
PY
