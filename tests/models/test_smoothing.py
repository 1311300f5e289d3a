"""Scales: moved from the inputs of a layer to the outputs of the one before, in any kind of norm."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.pytorch_utils import Conv1D

from bitpress.errors import BitpressError
from bitpress.models.linears import as_parameter, in_features, is_linear, weight_matrix
from bitpress.models.smoothing import divide_outputs, multiply_inputs, norm_offset, out_channels

WIDTH = 12


class HalfOffsetNorm(nn.Module):
    """A norm of no library: (0.5 + w) x / max(abs(x))."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return (0.5 + self.weight) * x / x.abs().amax(-1, keepdim=True)


class ExponentialNorm(HalfOffsetNorm):
    def forward(self, x):
        return self.weight.exp() * x


class SquareNorm(HalfOffsetNorm):
    def forward(self, x):
        return self.weight.square() * x


class DeafNorm(HalfOffsetNorm):
    """Has a weight, and does not use it."""

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True)


class GatedNorm(HalfOffsetNorm):
    """Needs a second argument."""

    def forward(self, x, gate):
        return self.weight * x * torch.nn.functional.silu(gate)


class MaybeGatedNorm(HalfOffsetNorm):
    """Has a second argument that it can be called without, and cannot do without."""

    def forward(self, x, gate=None):
        return (1 + self.weight) * x / x.norm(dim=-1, keepdim=True) * gate.sigmoid()


class NamedNorm(HalfOffsetNorm):
    """Needs a second argument that is no tensor."""

    def forward(self, x, kind):
        return self.weight * x * len(kind.upper())


class KeyedNorm(HalfOffsetNorm):
    """As above, and fails in another way where it is given one."""

    def forward(self, x, kind):
        return self.weight * {"plain": x, "flipped": -x}[kind]


NORMS = {
    "LayerNorm": (nn.LayerNorm, 0.0),
    "LayerNorm without bias": (lambda n: nn.LayerNorm(n, bias=False), 0.0),
    "RMSNorm": (nn.RMSNorm, 0.0),
    "LlamaRMSNorm": (LlamaRMSNorm, 0.0),
    "Qwen2RMSNorm": (Qwen2RMSNorm, 0.0),
    "Gemma2RMSNorm": (Gemma2RMSNorm, 1.0),
    "Gemma3RMSNorm": (Gemma3RMSNorm, 1.0),
    "HalfOffsetNorm": (HalfOffsetNorm, 0.5),
}
PRODUCERS = {
    **{name: build for name, (build, _) in NORMS.items()},
    "Linear": lambda n: nn.Linear(WIDTH, n),
    "Linear without bias": lambda n: nn.Linear(WIDTH, n, bias=False),
    "Conv1D": lambda n: Conv1D(n, WIDTH),
}
CONSUMERS = {
    "Linear": lambda n: nn.Linear(n, 5),
    "Linear without bias": lambda n: nn.Linear(n, 5, bias=False),
    "Conv1D": lambda n: Conv1D(5, n),
}


def build(kind, width=WIDTH, dtype=torch.float64):
    return tiny.seeded(lambda: kind(width)).to(dtype)


def inputs(seed, dtype=torch.float64):
    return torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positive(seed, width=WIDTH, spread=2.0):
    return torch.exp(spread * torch.randn(width, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NORMS)
def test_norm_offset_is_measured(name, dtype):
    kind, expected = NORMS[name]
    norm = build(kind, 64, dtype)
    before = tiny.snapshot(norm)
    assert norm_offset(norm) == pytest.approx(expected, abs=0 if expected in (0, 1) else 0.02)
    tiny.assert_unchanged(norm, before)


@pytest.mark.parametrize(("kind", "offset"), [(GatedNorm, 0), (MaybeGatedNorm, 1)])
def test_a_norm_with_a_gate_absorbs(kind, offset):
    norm, x, gate, s = build(kind), inputs(0), inputs(1), positive(0).double()
    with torch.no_grad():
        assert norm_offset(norm) == offset
        before = norm(x, gate)
        divide_outputs(norm, s)
        torch.testing.assert_close(norm(x, gate), before / s)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, lambda n: nn.GroupNorm(3, n)])
def test_norms_of_images_absorb_per_channel(kind):
    norm, s = build(kind), positive(0).double()
    x = torch.randn(2, WIDTH, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        before = norm(x)
        divide_outputs(norm, s)
        torch.testing.assert_close(norm(x), before / s.view(-1, 1, 1))


@pytest.mark.parametrize("kind", [ExponentialNorm, SquareNorm, DeafNorm, NamedNorm, KeyedNorm, nn.PReLU])
def test_a_norm_that_is_not_linear_in_its_weight_absorbs_nothing(kind):
    norm = build(kind)
    before = tiny.snapshot(norm)
    with pytest.raises(BitpressError, match=f"{kind.__name__} cannot absorb a scale"):
        divide_outputs(norm, positive(0).double())
    tiny.assert_unchanged(norm, before)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 30), spread=st.floats(0.0, 4.0))
@pytest.mark.parametrize("name", PRODUCERS)
def test_outputs_are_divided(name, seed, spread):
    module, x, s = build(PRODUCERS[name]), inputs(seed), positive(seed, spread=spread).double()
    with torch.no_grad():
        before = module(x)
        divide_outputs(module, s)
        # Llama's and Gemma's norms compute in float32, whatever they are given.
        torch.testing.assert_close(module(x), before / s, rtol=1e-6, atol=1e-5 * float((1 / s).max()))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 30))
@pytest.mark.parametrize("name", CONSUMERS)
def test_inputs_are_multiplied(name, seed):
    module, x, s = build(CONSUMERS[name]), inputs(seed), positive(seed).double()
    with torch.no_grad():
        expected = module(x * s)
        multiply_inputs(module, s)
        torch.testing.assert_close(module(x), expected)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1 << 30))
@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_a_scale_moved_over_cancels_out(producer, consumer, seed):
    first, second, x, s = build(PRODUCERS[producer]), build(CONSUMERS[consumer]), inputs(seed), positive(seed).double()
    with torch.no_grad():
        before = second(first(x))
        divide_outputs(first, s)
        multiply_inputs(second, s)
        torch.testing.assert_close(second(first(x)), before, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_powers_of_two_cost_no_precision_without_an_offset(producer, dtype):
    if producer in NORMS and NORMS[producer][1]:
        pytest.skip("an offset is added to the weight: dividing the sum rounds")
    first, second = build(PRODUCERS[producer], dtype=dtype), build(CONSUMERS["Linear"], dtype=dtype)
    x, s = inputs(3, dtype), torch.tensor([0.25, 0.5, 2.0, 4.0] * (WIDTH // 4))
    with torch.no_grad():
        before = second(first(x))
        divide_outputs(first, s)
        multiply_inputs(second, s)
        assert torch.equal(second(first(x)), before)


@pytest.mark.parametrize("producer", PRODUCERS)
def test_parameters_stay_the_objects_they_are(producer):
    module = build(PRODUCERS[producer], dtype=torch.bfloat16)
    before = {name: (id(p), p.data_ptr(), p.dtype) for name, p in module.named_parameters()}
    with torch.no_grad():
        divide_outputs(module, positive(0))
    assert {name: (id(p), p.data_ptr(), p.dtype) for name, p in module.named_parameters()} == before


def test_out_channels():
    assert out_channels(nn.Linear(3, 7)) == 7
    assert out_channels(Conv1D(7, 3)) == 7
    assert out_channels(nn.LayerNorm(5)) == 5
    assert out_channels(nn.RMSNorm(5)) == 5
    assert out_channels(nn.LayerNorm(5, elementwise_affine=False)) is None
    assert out_channels(nn.Embedding(3, 7)) is None
    assert out_channels(nn.ReLU()) is None


def test_conv1d_is_a_linear_layer_the_other_way_round():
    layer = build(PRODUCERS["Conv1D"], 7)
    matrix = weight_matrix(layer)
    assert is_linear(layer)
    assert matrix.shape == (7, WIDTH)
    assert in_features(layer) == WIDTH
    x = inputs(0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ matrix.T + layer.bias)
        matrix[2] = 0
    assert bool((layer.weight[:, 2] == 0).all())
    assert torch.equal(as_parameter(layer, matrix), layer.weight)
    assert as_parameter(layer, matrix).is_contiguous()


def test_what_is_no_linear_layer():
    assert not is_linear(nn.Conv1d(3, 7, 1))
    assert not is_linear(nn.Embedding(3, 7))
    assert not is_linear(nn.Bilinear(3, 3, 7))
