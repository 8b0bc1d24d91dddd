"""Tiny mixtures of experts whose experts and routers are adapted, and what tests look at of them."""

import mixtures
import torch
from growing import growing
from increlora_rs import attach
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import get_peft_model

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Of these PEFT reads the names of Qwen2-MoE and Mixtral in another way than those of Qwen3-MoE.
TARGETS = {
    "Qwen3Moe": [*EXPERTS, "mlp.gate.weight"],
    "Qwen2Moe": [*EXPERTS, "mlp.gate.weight"],
    "Mixtral": [*EXPERTS, "mlp.gate.weight"],
    "GptOss": [*EXPERTS, "mlp.router.weight"],
}
# The routers of DeepSeek's kind have attributes that the block around them reads; Phi-MoE's is a linear layer
# by its class.
MORE_TARGETS = TARGETS | {
    "DeepseekV3": [*EXPERTS, "mlp.gate.weight"],
    "GraniteMoe": [*EXPERTS, "router.weight"],
    "Phimoe": [*EXPERTS, "mlp.router.weight"],
}


def adapted(name, make=growing, **config):
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": [], "target_parameters": MORE_TARGETS.get(name)}
    return get_peft_model(mixtures.build(name), make(**(settings | config))).eval()


def layers_of(model):
    return {short(name): layer for name, layer in adapted_layers(model, "default").items()}


def tokens_of(number):
    return torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(number))


def optimizer_of(model, lr=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(model, steps, *, optimizer=None, total_steps=None, first=0):
    """Trains from step ``first`` on; gives optimizer and scheduler."""
    scheduler = None
    if optimizer is None:
        optimizer = optimizer_of(model)
        scheduler = attach(model, optimizer, total_steps=total_steps or steps)
    model.train()
    for number in range(first, first + steps):
        tokens = tokens_of(number)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer, scheduler
