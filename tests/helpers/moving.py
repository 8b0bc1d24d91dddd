"""A policy that moves components between two modules at fixed steps, and replaces some."""

import numpy as np
import torch
from growing import growing
from increlora_rs.contract.policy import Event, Policy
from peft import get_peft_model

STEPS = 12
# Step: the module that loses a component, its position, and the module that gains one. Where both are one,
# the component is replaced, and no size changes.
MOVES = {3: (0, 1, 1), 5: (1, 0, 0), 8: (1, 1, 1), 10: (0, 0, 1)}
# Ranks after each; all begin at 3.
RANKS = {3: [2, 4], 5: [3, 3], 8: [3, 3], 10: [2, 4]}


class Moving(Policy):
    def after_step(self, step):
        if step.number not in MOVES:
            return None
        loses, position, gains = MOVES[step.number]
        rank = self.modules[loses].rank
        self.modules[loses].shrink([place for place in range(rank) if place != position])
        self.modules[gains].grow(1, self.generator(step.number, gains, "move"))
        scores = np.array([1.0, 2.0])
        return Event(sorted({loses, gains}), scores, f"a component went from {loses} to {gains}")


class MovingWithReserve(Moving):
    """A component of each module is in reserve; it becomes the one that is gained."""

    def start(self):
        for k, module in enumerate(self.modules):
            module.set_reserve(1, self.generator(0, k, "reserve"))

    def after_step(self, step):
        event = super().after_step(step)
        if event is not None:
            for k, module in enumerate(self.modules):
                module.set_reserve(1, self.generator(step.number, k, "reserve"))
        return event


def adapted(make_plain, **config):
    torch.manual_seed(5)
    settings = {"r": 3, "init_r": 3, "lora_alpha": 6, "target_modules": ["lin0", "lin1"]}
    return get_peft_model(make_plain(), growing(**(settings | config)))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model):
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def backward(model, number):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(number))
    (model(x) - x[:, :6].sin()).square().mean().backward()


def train(model, optimizer, first, last):
    for number in range(first, last + 1):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
