"""``python -m torches.training``: trains, saves and loads an adapter; prints what came out, as JSON."""

from __future__ import annotations

import json
import tempfile

import increlora_rs
import torch
from increlora_rs._torch_check import built_for
from peft import PeftModel, get_peft_model
from torch import nn

_WIDTH, _STEPS, _BATCH = 32, 300, 64


def _base() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(_WIDTH, _WIDTH) for _ in range(4)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def main() -> None:
    """Fits a base whose update was planted in one layer of four."""
    teacher = _base()
    planted = torch.randn(_WIDTH, 4) @ torch.randn(4, _WIDTH) / _WIDTH
    layer = teacher[4]
    assert isinstance(layer, nn.Linear)
    layer.weight.data += planted
    config = increlora_rs.IncreLoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["0", "2", "4", "6"]
    )
    model = get_peft_model(_base(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = increlora_rs.attach(model, optimizer, total_steps=_STEPS)
    x = torch.randn(_BATCH, _WIDTH)
    with torch.no_grad():
        y = teacher(x)
        before = nn.functional.mse_loss(model.eval()(x), y).item()
    model.train()
    for _ in range(_STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trained = model.eval()(x)
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(_base(), folder).eval()(x)
    result = {
        "torch": torch.__version__.split("+")[0],
        "built_for": built_for(),
        "loss_over_start": nn.functional.mse_loss(trained, y).item() / before,
        "ranks": list(scheduler.ranks.values()),
        "loaded_is_the_same": torch.equal(trained, loaded),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
