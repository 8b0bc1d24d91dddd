#!/usr/bin/env bash
# torch 2.13.0: the backward of a custom op returns None for a Tensor? argument, but never for a Tensor[] argument.
#
# torch.library.custom_op's register_autograd takes None for every input that needs no gradient, an optional tensor
# that was not given among them. For a list of tensors None raises in the backward pass, also where the list is
# empty: the result has to have the structure of the inputs, so [] for [], [None] for one tensor. Forward, shape
# checks and a compiled forward pass say nothing of it; an op whose list is empty at first fails in its first
# backward pass.
# Seen: RuntimeError "Expected the return from backward to be of the same structure as the inputs" for None, with
# a list of none and of one; no error for [None] * length; no error for None in the place of a Tensor?.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
"$dir/venv/bin/python" -W ignore - <<'PY'
import torch


def make(name, kind, backward):
    @torch.library.custom_op(f"shown::{name}", mutates_args=(), schema=f"(Tensor x, {kind} more) -> Tensor")
    def op(x, more):
        return 2 * x

    op.register_fake(lambda x, more: torch.empty_like(x))
    op.register_autograd(backward, setup_context=lambda ctx, inputs, output: setattr(ctx, "more", inputs[1]))
    return op


def gradient(op, more):
    x = torch.ones(2, requires_grad=True)
    try:
        op(x, more).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0].partition(". Got")[0]
    return x.grad.tolist()


of_list = make("of_list", "Tensor[]", lambda ctx, gy: (2 * gy, None))
as_list = make("as_list", "Tensor[]", lambda ctx, gy: (2 * gy, [None] * len(ctx.more)))
optional = make("optional", "Tensor?", lambda ctx, gy: (2 * gy, None))
refused = "Expected the return from backward to be of the same structure as the inputs"
for more in ([], [torch.ones(2)]):
    print(len(more), "tensors, None:", gradient(of_list, more))
    print(len(more), "tensors, a list:", gradient(as_list, more))
    assert gradient(of_list, more) == refused
    assert gradient(as_list, more) == [2.0, 2.0]
assert gradient(optional, None) == [2.0, 2.0]
print("as stated")
PY
