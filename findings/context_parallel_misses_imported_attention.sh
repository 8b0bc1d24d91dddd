#!/usr/bin/env bash
# torch 2.13.0: context_parallel leaves attention that was imported by name as it is, and says nothing.
#
# Within torch.distributed.tensor.experimental.context_parallel each process has a part of the sequence, and attention is
# to be passed around a ring. The way there is an attribute: torch.nn.functional.scaled_dot_product_attention is
# replaced for the time. A module that has the function under a name of its own ("from torch.nn.functional import
# scaled_dot_product_attention", as many models do) calls the old one: every process attends to its own part of the
# sequence alone. Shapes are right, losses fall, the model is another.
# Seen, two gloo processes, math backend, not causal: the joined output differs from that of the whole sequence by
# rounding through the attribute, and by more than 1 (of numbers of size 1) through the imported name.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$dir/shown.py" <<'PY'
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

WAYS = {
    "the attribute": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "the imported name": lambda q, k, v: scaled_dot_product_attention(q, k, v),
}
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
gaps = {}
for way, attention in WAYS.items():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        whole = attention(q, k, v)
        with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
            part = attention(q, k, v)
            assert part.shape[2] == 8
    (joined,) = context_parallel_unshard(mesh, [part], [2])
    gaps[way] = (joined - whole).abs().max().item()
if dist.get_rank() == 0:
    for way, gap in gaps.items():
        print(f"through {way}: {gap:.2g} from the whole sequence's")
    assert gaps["the attribute"] < 1e-5
    assert gaps["the imported name"] > 0.5
    print("as stated")
dist.destroy_process_group()
PY
OMP_NUM_THREADS=1 "$dir/venv/bin/torchrun" --standalone --nproc_per_node=2 "$dir/shown.py" 2> "$dir/errors" ||
    { cat "$dir/errors"; exit 1; }
