"""Observers: how a scheme says that its ranges are chosen."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from bitpress import AWQModifier, BitpressError, GPTQModifier, QuantizationModifier, Recipe, oneshot
from bitpress.modifiers.observers import OBSERVERS
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.solvers import gptq, minmax_parameters, round_to_nearest, search_parameters
from bitpress.statistics import Statistic

MINMAX = ("minmax", "memoryless_minmax", "static_minmax")
MSE = ("mse", "memoryless_mse")
BY_INPUTS = ("imatrix_mse", "gram")


def scheme(observer=None, bits=3, strategy="group", **fields):
    size = {"group_size": 32} if strategy == "group" else {}
    stated = {} if observer is None else {"observer": observer}
    weights = QuantizationArgs(num_bits=bits, symmetric=False, strategy=strategy, **size, **stated, **fields)
    return QuantizationScheme(targets=["re:.*layers.*"], weights=weights)


class Seeing:
    """Remembers what each layer was solved from, and its ranges."""

    def solve_all(self, problems):
        before = {p.name: p.weight.clone() for p in problems}
        solved = super().solve_all(problems)
        for problem, quantized in zip(problems, solved, strict=True):
            statistics = problem.statistics
            known = statistics is not None and Statistic.GRAM in statistics.wanted
            SEEN[problem.name] = before[problem.name], statistics.gram.clone() if known else None, quantized
        return solved


class SeeingRTN(Seeing, QuantizationModifier):
    pass


class SeeingGPTQ(Seeing, GPTQModifier):
    pass


SEEN = {}


@pytest.fixture(autouse=True)
def _forgetting():
    SEEN.clear()


def ranges(observer, weight, args, gram):
    if observer in MINMAX:
        return minmax_parameters(weight, args, weight.dtype)
    gram = {"gram": gram, "imatrix_mse": None if gram is None else gram.diagonal()}.get(observer)
    return search_parameters(weight, args, gram, weight.dtype)


def test_every_name_is_tried_below():
    assert set(OBSERVERS) == {*MINMAX, *MSE, *BY_INPUTS}


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("modifier", [SeeingRTN, SeeingGPTQ])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_ranges_are_those_of_the_observer(observer, modifier, strategy):
    group = scheme(observer, strategy=strategy)
    order = {"actorder": None} if modifier is SeeingGPTQ else {}
    tiny.compress(tiny.llama(num_hidden_layers=1), [modifier(scheme=group, **order)], tiny.token_data(2))
    args = group.weights
    assert len(SEEN) == 7
    for weight, gram, quantized in SEEN.values():
        found = ranges(observer, weight, args, gram)
        expected = round_to_nearest(weight, args, weight.dtype, found)
        if modifier is SeeingGPTQ:
            expected = gptq(weight, gram, args, weight.dtype, found, dampening=modifier().dampening_frac).weight
        assert torch.equal(quantized.scale, expected.scale)
        assert torch.equal(quantized.zero_point, expected.zero_point)
        # Layers that share their input are solved at once: a value half-way between two points may fall to either.
        assert float((quantized.values == expected.values).double().mean()) > 0.98


def test_without_a_name_it_is_min_max():
    weights = {}
    for observer in (None, *MINMAX):
        model = tiny.llama()
        tiny.compress(model, [QuantizationModifier(scheme=scheme(observer))])
        weights[observer] = tiny.snapshot(model)
    for found in weights.values():
        assert all(torch.equal(found[n], v) for n, v in weights[None].items())


def test_what_each_needs_of_the_data():
    for observer in (*MINMAX, *MSE):
        session = tiny.compress(tiny.llama(), [QuantizationModifier(scheme=scheme(observer))])
        assert session.pipeline == "datafree"
    for observer in BY_INPUTS:
        with pytest.raises(BitpressError, match="QuantizationModifier needs calibration data"):
            tiny.compress(tiny.llama(), [QuantizationModifier(scheme=scheme(observer))])


def test_searched_ranges_lower_the_error_that_they_are_chosen_by():
    errors = {}
    for observer in ("minmax", "mse", "imatrix_mse", "gram"):
        session = tiny.compress(
            tiny.llama(), [QuantizationModifier(scheme=scheme(observer))], tiny.token_data(4), pipeline="basic"
        )
        errors[observer] = session.state.layer_records
    for name, found in errors["mse"].items():
        assert found["weight_error"] < errors["minmax"][name]["weight_error"]
    gram = [r["relative_error"] for r in errors["gram"].values()]
    imatrix = [r["relative_error"] for r in errors["imatrix_mse"].values()]
    assert sum(gram) < sum(imatrix)


def test_ranges_of_awq_stay_unless_an_observer_is_stated():
    kept = {}
    for observer in (None, "minmax", "mse"):
        for clip in (True, False):
            SEEN.clear()
            recipe = [AWQModifier(clip=clip), SeeingRTN(scheme=scheme(observer))]
            tiny.compress(tiny.llama(), recipe, tiny.token_data(2))
            kept[observer, clip] = {n: (w, q.scale) for n, (w, _, q) in SEEN.items()}
            if observer is not None:
                for weight, scale in kept[observer, clip].values():
                    args = scheme(observer).weights
                    assert torch.equal(scale, ranges(observer, weight, args, None)[0])
    differ = [n for n, (_, scale) in kept[None, True].items() if not torch.equal(scale, kept[None, False][n][1])]
    assert len(differ) > 7
    for name, (_, scale) in kept["mse", True].items():
        assert torch.equal(scale, kept["mse", False][name][1])


def test_awq_alone_takes_its_ranges_from_the_observer():
    model, other = tiny.llama(), tiny.llama()
    tiny.compress(model, [AWQModifier(scheme=scheme("mse"))], tiny.token_data(2))
    tiny.compress(other, [AWQModifier(), QuantizationModifier(scheme=scheme("mse"))], tiny.token_data(2))
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        ("imatrix", r"config group 'group_0': weights: no observer is called 'imatrix'; did you mean 'imatrix_mse'\?"),
        ("nvfp4_expanded_mse", "no observer is called"),
        ("xyzzy", "no observer is called 'xyzzy'"),
        ("", "no observer is called ''"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(observer, message):
    model = tiny.llama()
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match=message) as error:
        tiny.compress(model, [QuantizationModifier(scheme=scheme(observer))], tiny.token_data(1))
    assert all(name in str(error.value) for name in OBSERVERS)
    tiny.assert_unchanged(model, before)


def test_arguments_of_observers_are_refused():
    group = scheme("mse", observer_kwargs={"norm": 2.4, "grid": 50})
    with pytest.raises(BitpressError, match=r"observer_kwargs \(norm, grid\) are not supported: leave them out"):
        tiny.compress(tiny.llama(), [QuantizationModifier(scheme=group)])


def test_disagreement_names_the_observers():
    recipe = [AWQModifier(scheme=scheme("mse")), QuantizationModifier(scheme=scheme("gram"))]
    with pytest.raises(BitpressError, match=r"disagree about .*observer mse and .*observer gram"):
        tiny.compress(tiny.llama(), recipe, tiny.token_data(1))


@pytest.mark.parametrize("observer", ["mse", "imatrix_mse", "gram"])
def test_from_end_to_end(observer, tmp_path):
    model = tiny.llama()
    ids = [list(range(3 + i, 27 + i)) for i in range(4)]
    recipe = Recipe.of([QuantizationModifier(scheme=scheme(observer))])
    assert Recipe.of(recipe.to_yaml()) == recipe
    oneshot(model, ids, recipe.to_yaml(), num_calibration_samples=4)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), tiny.logits(model))
