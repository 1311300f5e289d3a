"""Several ranks give what one gives, and the same on all of them."""

import architectures
import gang
import pytest
import tiny
import torch
from compressing import awq, rtn, scheme
from pydantic import PrivateAttr

from bitpress import AWQModifier, BitpressError, DistillationModifier, GPTQModifier, QuantizationModifier
from bitpress.modifiers import LearnedRoundingModifier, SmoothQuantModifier
from bitpress.modifiers import awq as awq_modifier
from bitpress.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from bitpress.statistics import Statistic

INT8 = QuantizationArgs(num_bits=8, dynamic=False, strategy="tensor")


def quantizing(kind, bits=4, **fields):
    group = scheme(bits=bits, targets=["re:.*"])
    return kind(ignore=["lm_head"], config_groups={"g": group}, **fields)


def activations():
    args = scheme(bits=8, strategy=QuantizationStrategy.CHANNEL, symmetric=True)
    group = args.model_copy(update={"input_activations": INT8, "output_activations": INT8})
    return QuantizationModifier(ignore=["lm_head"], config_groups={"g": group}, kv_cache_scheme=INT8)


def blocks():
    weights = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[16, 32])
    return QuantizationScheme(targets=["Linear"], weights=weights)


def observed(name):
    group = scheme(bits=4)
    weights = group.weights.model_copy(update={"observer": name})
    return QuantizationModifier(ignore=["lm_head"], config_groups={"g": group.model_copy(update={"weights": weights})})


RECIPES = {
    "rtn": rtn,
    "awq": awq,
    "awq and gptq": lambda: [AWQModifier(), quantizing(GPTQModifier)],
    "per tensor": lambda: [
        AWQModifier(),
        QuantizationModifier(
            ignore=["lm_head"], config_groups={"g": scheme(bits=8, strategy=QuantizationStrategy.TENSOR)}
        ),
    ],
    "refined": lambda: [quantizing(GPTQModifier, refine=1)],
    "corrected": lambda: [AWQModifier(), quantizing(GPTQModifier, error_correction=0.5)],
    "smoothquant, static": lambda: [SmoothQuantModifier(smoothing_strength="search"), activations()],
    "observed": lambda: [observed("gram")],
    "global scales": lambda: [AWQModifier(), QuantizationModifier(ignore=["lm_head"], scheme="NVFP4A16")],
    "blocks": lambda: [AWQModifier(), QuantizationModifier(ignore=["lm_head"], config_groups={"g": blocks()})],
    "distilled": lambda: [*rtn(), DistillationModifier()],
    "learned": lambda: [quantizing(GPTQModifier, bits=3), LearnedRoundingModifier(iterations=6, batch_size=3)],
    "chosen": lambda: [
        QuantizationModifier(ignore=["lm_head"], choose_from=[scheme(bits=b) for b in (3, 4)], bits_per_weight=3.5)
    ],
}


def padded(seed):
    batch = tiny.tokens(2, 24, seed)
    batch["attention_mask"][0, 17:] = 0
    return batch


def data(batches=5):
    return tiny.data_of([padded(seed) for seed in range(batches)])


def same_on_all(size, recipe, build=tiny.llama, batches=5, **options):
    """The sessions of all ranks, whose models are the same to the bit."""
    models = [build() for _ in range(size)]  # here: threads would share the seed
    sessions = gang.in_step(
        size, lambda ranks: gang.compress(ranks, models[ranks.rank], recipe(), data(batches), **options)
    )
    for session in sessions[1:]:
        tiny.assert_unchanged(session.model, tiny.snapshot(sessions[0].model))
        assert session.state.layer_records == sessions[0].state.layer_records
        assert session.state.mapping_records == sessions[0].state.mapping_records
    return sessions


def assert_near(found, expected):
    """Nearly all weights are equal, and all layers are about as good: a tie may fall to the other side."""
    for name, layer in tiny.linears(expected.model).items():
        other = tiny.linears(found.model)[name].weight
        near = torch.isclose(other, layer.weight, rtol=1e-3, atol=1e-5).float().mean()
        assert near >= 0.97, (name, float(near))
    for name, record in expected.state.layer_records.items():
        other = found.state.layer_records[name]
        assert other["weight_error"] == pytest.approx(record["weight_error"], rel=0.03)
        if "relative_error" in record:
            assert other["relative_error"] == pytest.approx(record["relative_error"], rel=0.03)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_give_what_one_gives(name, size):
    alone = same_on_all(1, RECIPES[name])[0]
    several = same_on_all(size, RECIPES[name])[0]
    assert_near(several, alone)
    if name == "rtn":
        tiny.assert_unchanged(several.model, tiny.snapshot(alone.model))
    assert several.state.distillation.keys() == alone.state.distillation.keys()
    assert several.state.activations.keys() == alone.state.activations.keys()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"moe_calibrate_all_experts": False, "moe_min_tokens": 1}])
def test_ranks_agree_about_experts_and_other_layers(family, options, monkeypatch):
    monkeypatch.setattr(awq_modifier, "MAPPINGS_PER_RANK", 1)
    build = architectures.ARCHITECTURES[family].build
    recipe = RECIPES["awq and gptq"]
    alone = same_on_all(1, recipe, build, **options)[0]
    assert_near(same_on_all(2, recipe, build, **options)[0], alone)


def test_ranks_without_a_batch_go_along():
    alone = same_on_all(1, RECIPES["awq and gptq"], batches=2)[0]
    assert_near(same_on_all(3, RECIPES["awq and gptq"], batches=2)[0], alone)


@pytest.mark.parametrize("pipeline", ["basic", "sequential"])
def test_static_scales_are_those_of_all_batches(pipeline):
    """Ranges are exact whatever the order in which they are taken."""
    recipe = lambda: [activations()]  # noqa: E731
    alone, several = (same_on_all(size, recipe, pipeline=pipeline)[0].state.activations for size in (1, 3))
    assert alone.keys() == several.keys()
    assert alone
    for name, tensors in alone.items():
        for kind, tensor in tensors.items():
            assert torch.equal(several[name][kind], tensor), (name, kind)


class Watching(QuantizationModifier):
    """Keeps the statistics that it is shown."""

    _seen: dict = PrivateAttr(default_factory=dict)

    def required_statistics(self, state, name):
        return Statistic.GRAM | Statistic.MEAN_MAGNITUDE | Statistic.MAX_MAGNITUDE | Statistic.HELD_OUT

    def on_block(self, state, block):
        self._seen |= {n: (s.clone(), id(s)) for n, s in state.statistics.items()}
        super().on_block(state, block)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_statistics_are_those_of_one_process(size):
    """Held-out batches are chosen by their numbers, wherever they are."""

    def seen(size):
        recipes = [[quantizing(Watching, bits=8)] for _ in range(size)]
        models = [tiny.llama() for _ in range(size)]
        gang.in_step(size, lambda r: gang.compress(r, models[r.rank], recipes[r.rank], data(9), pipeline="basic"))
        return recipes[0][0]._seen

    alone, several = seen(1), seen(size)
    assert alone.keys() == several.keys()
    for name, (expected, _) in alone.items():
        found, _ = several[name]
        assert (found.rows, found.held_out_rows) == (expected.rows, expected.held_out_rows)
        assert 0 < found.held_out_rows < found.rows
        torch.testing.assert_close(found.gram, expected.gram, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.held_out_gram, expected.held_out_gram, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.mean_magnitude, expected.mean_magnitude, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.max_magnitude, expected.max_magnitude)
    sharing = {n for n, (_, i) in several.items() for m, (_, j) in several.items() if n != m and i == j}
    assert any(name.endswith("k_proj") for name in sharing)


class Plain(QuantizationModifier):
    """A user's solver, which is told nothing of ranks."""

    _solved: list = PrivateAttr(default_factory=list)

    def solve(self, weight, args, statistics, ranges, global_scale=None):
        self._solved.append(tuple(weight.shape))
        return super().solve(weight, args, statistics, ranges, global_scale)


def test_layers_of_another_solver_are_shared_out_whole():
    modifiers, models = [quantizing(Plain) for _ in range(2)], [tiny.llama() for _ in range(2)]
    gang.in_step(2, lambda ranks: gang.compress(ranks, models[ranks.rank], [modifiers[ranks.rank]]))
    shapes = [tuple(m.weight.shape) for n, m in tiny.linears(tiny.llama()).items() if n != "lm_head"]
    assert sorted(modifiers[0]._solved + modifiers[1]._solved) == sorted(shapes)
    assert all(modifier._solved for modifier in modifiers)


def test_mappings_of_experts_are_apart_and_those_of_a_chain_are_not():
    waves = []

    class Counting(AWQModifier):
        def _smooth(self, state, mappings):
            waves.append([{m.smooth_name, *m.balance} for m in mappings])
            return super()._smooth(state, mappings)

    recipe = [Counting(n_grid=1), quantizing(QuantizationModifier)]
    tiny.compress(architectures.ARCHITECTURES["mixtral"].build(), recipe, data(2))
    assert any(len(wave) > 1 for wave in waves)
    for wave in waves:
        assert len(set().union(*wave)) == sum(map(len, wave))


def test_models_that_differ_are_refused():
    models = [tiny.llama(), tiny.llama()]
    with torch.no_grad():
        models[1].model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(BitpressError, match=r"the weights of rank \d are not those of rank \d"):
        gang.in_step(2, lambda ranks: gang.compress(ranks, models[ranks.rank], awq(), data()))
