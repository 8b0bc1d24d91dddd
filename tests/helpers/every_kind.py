"""A small model with a layer of each kind: embedding, convolution, linear."""

import torch
from torch import nn


class EveryKind(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.lin = nn.Linear(8, 5)

    def forward(self, ids):
        return self.lin(torch.relu(self.conv(self.emb(ids).transpose(1, 2))).transpose(1, 2))


IDS = torch.arange(11).view(1, 11)
TARGETS = ["emb", "conv", "lin"]
