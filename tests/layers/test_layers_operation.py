"""Layers whose class has a forward of its own: those that compute something else are refused. What modules
around a layer read of it is there."""

import pytest
import torch
from growing import growing
from increlora_rs.layers.found import adapted_layers
from peft import get_peft_model
from torch import nn
from torch.nn import functional
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.esm.modeling_esmfold import EsmFoldLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.voxtral_realtime.modeling_voxtral_realtime import VoxtralRealtimeCausalConv1d
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding
from transformers.pytorch_utils import Conv1D


class Logged(nn.Linear):
    """A layer of somebody's own that does what its class does."""

    def forward(self, x):
        self.seen = x.shape
        return super().forward(x)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + (torch.randn(self.out_features) if self.training else 0.0)


class Wanting(nn.Linear):
    """What it computes cannot be told without its second argument."""

    def forward(self, x, factor):
        return super().forward(x) * factor


class Normed(nn.Linear):
    def forward(self, x):
        return functional.linear(x, functional.normalize(self.weight), self.bias)


class Twofold(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2.0 * weight, bias)


def adapted(module, dtype=torch.float32):
    base = nn.Sequential(nn.Identity(), module).to(dtype)
    return get_peft_model(base, growing(r=2, target_modules=["1"]))


OTHERS = [
    WhisperPositionalEmbedding(9, 8),
    OPTLearnedPositionalEmbedding(9, 8),
    BartLearnedPositionalEmbedding(9, 8),
    VoxtralRealtimeCausalConv1d(4, 8, 3, cache_key="conv"),
    IdeficsDecoupledLinear(4, 8, out_additional_features=2),
]
CHANGED = [WeightStandardizedConv2d(4, 8, 3), Normed(4, 8), Twofold(4, 8, 3)]
SAME = [
    BartScaledWordEmbedding(9, 8, 0, embed_scale=3.0),
    Gemma3TextScaledWordEmbedding(9, 8, 0, embed_scale=3.0),
    FalconLinear(4, 8),
    EsmFoldLinear(4, 8),
    Logged(4, 8),
    Noisy(4, 8),
    Wanting(4, 8),
    nn.Conv1d(4, 8, 3, stride=2, padding="valid"),
    Conv1D(8, 4),
]


def name(module):
    return type(module).__name__


@pytest.mark.parametrize("module", OTHERS, ids=name)
def test_a_class_of_which_there_is_no_update_is_refused_by_name(module):
    with pytest.raises(
        ValueError, match=rf"target_modules: 1: a {name(module)} does not compute .* leave it out"
    ):
        adapted(module)


@pytest.mark.parametrize("module", CHANGED, ids=name)
def test_a_class_that_changes_its_weight_is_told_not_to_be_merged(module):
    with pytest.warns(UserWarning, match=rf"a {name(module)} does not compute .* Do not merge it"):
        adapted(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", SAME, ids=name)
def test_a_class_that_computes_what_its_kind_does_is_adapted(module, dtype):
    assert list(adapted_layers(adapted(module, dtype), "default")) == ["base_model.model.1"]


def test_looking_draws_no_random_numbers_and_leaves_the_mode():
    module = Logged(4, 8).train()
    before = torch.get_rng_state()
    get_peft_model(nn.Sequential(module), growing(r=2, target_modules=["0"], init_r=0))
    assert module.training and tuple(module.seen) == (1, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("module", "read"),
    [
        (
            nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=1, dilation=2, padding_mode="circular"),
            "stride padding dilation groups padding_mode kernel_size in_channels out_channels weight bias",
        ),
        (nn.Embedding(9, 8, padding_idx=3), "num_embeddings embedding_dim padding_idx weight"),
        (Gemma3TextScaledWordEmbedding(9, 8, 0, embed_scale=3.0), "embed_scale num_embeddings"),
        (Conv1D(8, 4), "nx nf weight bias"),
        (nn.Linear(4, 8), "in_features out_features weight bias"),
    ],
    ids=lambda value: name(value) if isinstance(value, nn.Module) else "",
)
def test_what_modules_around_a_layer_read_of_it_is_the_base_layers(module, read):
    wanted = {key: getattr(module, key) for key in read.split()}
    layer = adapted(module).base_model.model[1]
    assert all(getattr(layer, key) is value for key, value in wanted.items())


def test_an_embedding_without_a_scale_has_none():
    assert not hasattr(adapted(nn.Embedding(9, 8)).base_model.model[1], "embed_scale")
