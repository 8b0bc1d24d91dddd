"""A model of one linear layer, for what a method promises of a layer."""

import torch
from method_cases import adapted_modules, optimizer_of
from torch import nn


def linear_of(features, out):
    """The model, the same numbers at every call; its layer is called "body"."""
    torch.manual_seed(5)
    return nn.ModuleDict({"body": nn.Linear(features, out)})


def layer_of(model):
    """The adapted layer."""
    (layer,) = adapted_modules(model).values()
    return layer


def x_of(*shape, dtype=torch.float32):
    """Inputs, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def train(layer, x, steps=6, lr=0.02):
    """The layer, after some steps towards an output of 0."""
    optimizer = optimizer_of(layer, lr)
    for _ in range(steps):
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer
