"""A tiny UNet of diffusers, always with the same weights, and what it makes of a fixed input."""

import diffusers
import torch


def unet():
    torch.manual_seed(7)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def noise(model):
    """The model's output, with a graph."""
    generator = torch.Generator().manual_seed(1)
    x, h = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
    return model(x, torch.tensor([3]), h).sample


def sample(model):
    with torch.no_grad():
        return noise(model)
