"""Logits to figures of tokens, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitpress.evaluation.scores import divergence, negative_log_likelihood


def logits(rows, width, seed, spread=3.0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread


def exact(original, model):
    p, q = original.double().log_softmax(-1), model.double().log_softmax(-1)
    return torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 300),
    seed=st.integers(0, 99),
    distance=st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]),
)
def test_divergence_is_that_of_float64(rows, width, seed, distance):
    original = logits(rows, width, seed)
    model = original + distance * logits(rows, width, seed + 1, 1.0)
    found, expected = divergence(original, model), exact(original, model)
    # Of logits around 10, in float32, a difference of 1e-3 is known to 1e-3 of itself.
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=1e-10)
    assert (found >= 0).all()


def test_small_divergences_are_not_rounding():
    original = logits(8, 20000, 0)
    model = original + 1e-3 * logits(8, 20000, 1, 1.0)
    torch.testing.assert_close(divergence(original, model).double(), exact(original, model), rtol=1e-3, atol=0.0)


def test_the_divergence_from_itself_is_zero():
    for dtype in (torch.float32, torch.bfloat16):
        original = logits(5, 400, 0).to(dtype)
        assert torch.equal(divergence(original, original.clone()), torch.zeros(5))


def test_forbidden_tokens():
    original = logits(1, 6, 0)
    original[0, 2] = -torch.inf
    both, more = original.clone(), logits(1, 6, 0)
    assert divergence(original, both).item() == 0
    # What the original forbids may be given; what it gives may not be forbidden.
    assert divergence(original, more).item() == pytest.approx(exact(original, more).item(), rel=1e-5)
    assert divergence(more, original).item() == torch.inf


@given(rows=st.integers(1, 20), width=st.integers(2, 40), values=st.integers(1, 300))
def test_chunks_change_nothing(rows, width, values):
    original, model = logits(rows, width, 0), logits(rows, width, 1)
    targets = torch.arange(rows) % width
    assert torch.equal(divergence(original, model, working_values=values), divergence(original, model))
    chunked = negative_log_likelihood(model, targets, working_values=values)
    assert torch.equal(chunked, negative_log_likelihood(model, targets))
    torch.testing.assert_close(chunked, -model.log_softmax(-1)[torch.arange(rows), targets])
