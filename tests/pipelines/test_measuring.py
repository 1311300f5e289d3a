"""The measuring pass: gradients of the loss, and the growth that is estimated from them."""

import architectures
import pytest
import tiny
import torch
from compressing import scheme
from pydantic import PrivateAttr
from torch import nn

from bitpress import BitpressError, QuantizationModifier
from bitpress.models.experts import find_layer
from bitpress.models.linears import weight_matrix
from bitpress.modifiers.allocation import rounding_error
from bitpress.pipelines.calibrating import calibrating
from bitpress.pipelines.measuring import DRAWS
from bitpress.session import Session


class Recording(QuantizationModifier):
    """Keeps every gradient."""

    _seen: dict = PrivateAttr(default_factory=dict)

    def on_gradient(self, state, name, gradient):
        self._seen.setdefault(name, []).append(gradient.clone())
        super().on_gradient(state, name, gradient)


def recording(**options):
    grids = [scheme(bits, targets=("Linear", "Conv1D"), group_size=16) for bits in (3, 4)]
    return Recording(**{"ignore": ["lm_head"], "choose_from": grids, "bits_per_weight": 3.5, **options})


def solved(model, modifier, data):
    """The session before it changes the model."""
    session = Session(model, modifier)
    session.check()
    session.initialize(data)
    session.run()
    return session


def reference(model, batch, seed=42):
    """Gradients of the drawn labels' likelihood at all parameters, by nothing but autograd."""
    with calibrating(model), torch.enable_grad():
        logits = model(**tiny.without_cache(model, batch)).logits
        scores = logits[batch["attention_mask"].bool()].log_softmax(-1)
        labels = torch.multinomial(scores.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
        parameters = dict(model.named_parameters())
        found = torch.autograd.grad(scores.gather(1, labels).sum(), parameters.values(), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert])
def test_gradients_are_those_of_the_likelihood(build):
    model = build()
    batch = tiny.tokens(2)
    batch["attention_mask"][0, 17:] = 0
    modifier = recording()
    solved(model, modifier, tiny.data_of([batch]))
    expected = reference(model, batch)
    assert modifier._seen
    for name, (gradient,) in modifier._seen.items():
        layer = find_layer(model, name)
        assert gradient.shape == weight_matrix(layer).shape
        own = expected[f"{name}.weight"]
        own = own if isinstance(layer, nn.Linear) else own.T
        assert torch.allclose(gradient, own, rtol=1e-3, atol=1e-5 * float(own.abs().max()))


def test_gradients_of_experts_are_the_parts_of_their_parameter():
    model = architectures.ARCHITECTURES["qwen2_moe"].build()
    batch = tiny.tokens(2)
    modifier = recording()
    solved(model, modifier, tiny.data_of([batch]))
    expected = reference(model, batch)
    experts = [name for name in modifier._seen if ".experts." in name]
    assert experts
    for name in experts:
        layer = find_layer(model, name)
        whole = expected[f"{name.rpartition('.experts.')[0]}.experts.{layer.projection.parameter}"]
        own = layer.projection.within(whole[layer.expert])
        assert torch.allclose(modifier._seen[name][0], own, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_one_gradient_for_each_draw_and_no_more_than_needed():
    modifier = recording()
    solved(tiny.llama(), modifier, tiny.token_data(batches=DRAWS + 3))
    assert {len(found) for found in modifier._seen.values()} == {DRAWS}


class Stopping(QuantizationModifier):
    def on_gradient(self, state, name, gradient):
        raise KeyboardInterrupt


@pytest.mark.parametrize("stopped", [False, True])
def test_the_model_and_its_own_gradients_are_left_as_they_were(stopped):
    model = tiny.llama()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, index) if index % 3 == 0 else None
    before = tiny.snapshot(model)
    own = [(p.requires_grad, p.grad) for p in model.parameters()]
    forwards = {name: "forward" in module.__dict__ for name, module in model.named_modules()}
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            solved(model, Stopping(**recording().model_dump(exclude_unset=True)), tiny.token_data())
    else:
        solved(model, recording(), tiny.token_data())
    tiny.assert_unchanged(model, before)
    assert all(
        p.requires_grad == required and p.grad is gradient
        for p, (required, gradient) in zip(model.parameters(), own, strict=True)
    )
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert {name: "forward" in module.__dict__ for name, module in model.named_modules()} == forwards


def test_the_estimate_is_near_the_divergence_that_is_measured():
    model = tiny.llama()
    data = tiny.token_data(batches=DRAWS, rows=4)
    modifier = recording(choose_from=[scheme(6), scheme(8)], bits_per_weight=7)
    groups = solved(model, modifier, data).state.allocations[0]["groups"]

    @torch.no_grad()
    def predictions():
        return torch.cat([tiny.logits(model, batch.kwargs).log_softmax(-1) for batch in data.batches]).double()

    own = predictions()
    for group in groups:
        layers = [find_layer(model, name) for name in group["layers"]]
        before = [layer.weight.data.clone() for layer in layers]
        for layer in layers:
            layer.weight.data += rounding_error(layer.weight.data, scheme(6).weights)
        divergence = float((own.exp() * (own - predictions())).sum(-1).mean())
        for layer, weight in zip(layers, before, strict=True):
            layer.weight.data = weight
        estimate = next(iter(group["growth"].values()))
        assert divergence / 2 < estimate < divergence * 2, group["layers"]


def test_a_model_without_logits_is_judged_by_its_output():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256))
    data = [torch.randn(32, 64, generator=generator) for _ in range(DRAWS)]
    modifier = recording(choose_from=[scheme(3), scheme(4)], ignore=[])
    allocation = solved(model, modifier, tiny.data_of(data)).state.allocations[0]
    assert allocation["loss"] == "output"
    (group,) = allocation["groups"]
    x, layer = torch.cat(data), model[0]
    with torch.no_grad():
        expected = (x @ rounding_error(layer.weight, scheme(3).weights).T).square().mean()
        energy = torch.stack([layer(part).square().mean() for part in data]).mean()
    assert next(iter(group["growth"].values())) == pytest.approx(float(expected / energy) / 2, rel=0.2)


class Undifferentiable(tiny.MLP):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def test_an_output_without_a_gradient_is_refused():
    with pytest.raises(BitpressError, match=r"no tensor that has a gradient.*state scheme="):
        solved(Undifferentiable(64, 64, 64), recording(ignore=[]), tiny.data_of([torch.randn(8, 64)]))
