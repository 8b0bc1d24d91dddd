#!/usr/bin/env bash
# torch 2.13.0: the name by which torch.compile knows a parameter changes when the class of the module that holds it
# defines __getattr__, so an entry of torch.compiler.config.dynamic_sources silently stops matching.
#
# For a plain module the source ends in `._parameters['weight']`; with a `__getattr__` of its own, even one that
# only calls super(), it ends in `.__dict__['_parameters']['weight']`. A pattern written for the first form leaves
# the parameter static: every new size compiles again, up to recompile_limit, then runs eagerly.
# Seen: one graph for three sizes with the plain class, three with the other, for the same pattern.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
"$dir/venv/bin/python" -W ignore - <<'PY'
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))

class Own(Plain):
    def __getattr__(self, name):
        return super().__getattr__(name)

class Net(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        return x @ self.held.weight.t()

def graphs(held, pattern):
    torch._dynamo.reset()
    count = 0

    def backend(graph, _):
        nonlocal count
        count += 1
        return graph.forward

    net = Net(held)
    with torch.compiler.config.patch(dynamic_sources=pattern):
        compiled = torch.compile(net, backend=backend)
        for rows in (2, 3, 5):
            with torch.no_grad():
                net.held.weight.set_(torch.ones(rows, 4))
            compiled(torch.ones(7, 4))
    return count

narrow, wide = r".*\['held'\]\._parameters\['weight'\]:0", r".*\['held'\].*\['weight'\]:0"
found = {(kind.__name__, name): graphs(kind(), p) for kind in (Plain, Own) for name, p in (("narrow", narrow), ("wide", wide))}
print("graphs for three sizes:", found)
assert found["Plain", "narrow"] == found["Plain", "wide"] == found["Own", "wide"] == 1
assert found["Own", "narrow"] > 1
print("as stated")
PY
