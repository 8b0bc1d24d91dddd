#!/usr/bin/env bash
# torch 2.13.0: FSDP1's full optimizer state of a model on the CPU has one moment of AdamW under both names.
#
# FSDP.optim_state_dict gathers the state of a flattened parameter into one buffer, a name after the other, and with
# offload_to_cpu=True (what FullOptimStateDictConfig is usually given, and Trainer's checkpoints through accelerate
# have) copies the result by .cpu(). On a GPU that is a copy. On the CPU it is the buffer itself, which the next name
# overwrites: exp_avg holds the numbers of exp_avg_sq. Nothing is said; a training that is resumed from it goes on with
# wrong moments. With offload_to_cpu=False both are right.
# Seen, two gloo processes: exp_avg equal to exp_avg_sq in every parameter with offload_to_cpu=True, in none with False.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$dir/shown.py" <<'PY'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

dist.init_process_group("gloo")
torch.manual_seed(0)
layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
model = FSDP(layers, use_orig_params=True, device_id=torch.device("cpu"))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(3):
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
same = {}
for offload in (True, False):
    saved = FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=False)
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), saved):
        state = FSDP.optim_state_dict(model, optimizer)["state"]
    same[offload] = [torch.equal(one["exp_avg"], one["exp_avg_sq"]) for one in state.values()]
if dist.get_rank() == 0:
    print("one moment under both names:", same)
    assert len(same[True]) == 4
    assert all(same[True]) and not any(same[False])
    print("as stated")
dist.destroy_process_group()
PY
OMP_NUM_THREADS=1 "$dir/venv/bin/torchrun" --standalone --nproc_per_node=2 "$dir/shown.py" 2> "$dir/errors" ||
    { cat "$dir/errors"; exit 1; }
