"""MoRA's update as a matrix, written from the paper and its published code's facts, for whatever tests it:
with every position named, and no operation of the library."""

import math

import torch

TYPES = (1, 2, 3, 4, 6)


def side_of(rank, out, features, form=1):
    """The side q of M: the square nearest to a LoRA's numbers, an even one for type 6."""
    side = math.floor(math.sqrt((out + features) * rank) + 0.5)
    return 2 * (side // 2) if form == 6 else side


def groups(size, side):
    """Which of ``side`` groups of neighbours each of ``size`` positions is in: the first ones are larger."""
    small = size // side
    larger = size - side * small
    counts = [small + 1] * larger + [small] * (side - larger)
    return [group for group, count in enumerate(counts) for _ in range(count)]


def compression(form, side, features, dtype=torch.float64):
    """C (q, in) of types 1 to 4."""
    c = torch.zeros(side, features, dtype=dtype)
    if form in (1, 4):
        for i in range(-(-features // side) * side):
            c[i % side, i % features] += 1
    else:
        for i, group in enumerate(groups(features, side)):
            c[group, i] = 1
    return c


def decompression(form, side, out, dtype=torch.float64):
    """D (out, q) of types 1 to 4."""
    d = torch.zeros(out, side, dtype=dtype)
    shares = [o % side for o in range(out)] if form in (1, 3) else groups(out, side)
    for o, share in enumerate(shares):
        d[o, share] = 1
    return d


def turn(block, side, dtype=torch.float64):
    """R_i (q, q): turns the pairs (j, j + q/2) by i 10000^(-2 j / q)."""
    half, r = side // 2, torch.zeros(side, side, dtype=dtype)
    for j in range(half):
        angle = block * 10000.0 ** (-2 * j / side)
        r[j, j] = r[j + half, j + half] = math.cos(angle)
        r[j, j + half], r[j + half, j] = -math.sin(angle), math.sin(angle)
    return r


def rotated(m, out, features, fold=True):
    """dW (out, in) of type 6."""
    side = len(m)
    blocks, outs = -(-features // side), -(-out // side)
    whole = m.new_zeros(max(blocks, outs) * side, blocks * side)
    for block in range(blocks):
        if block < outs or fold:
            rows = block % outs * side
            whole[rows : rows + side, block * side : (block + 1) * side] = m @ turn(block, side, m.dtype)
    dense = m.new_zeros(out, features)
    for o in range(out):
        for i in range(blocks * side):
            # The last block goes on with the first inputs; where outputs have more blocks, rows go round.
            dense[o, i % features] += whole[o % (blocks * side) if blocks < outs else o, i]
    return dense


def dense(form, m, out, features, fold=True):
    """dW (out, in) of any type, without a scale."""
    if form == 6:
        return rotated(m, out, features, fold)
    c, d = compression(form, len(m), features, m.dtype), decompression(form, len(m), out, m.dtype)
    return d @ m @ c
