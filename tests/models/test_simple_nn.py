"""The reference model: what it computes before and after quantization, and what it stores."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from bitpress.errors import BitpressError
from bitpress.models import QuantizedNN, SimpleNN, compute_activation_stats, quantize_model, search_module_scale
from bitpress.models.smoothing import divide_outputs, multiply_inputs
from bitpress.quantization import QuantizationArgs
from bitpress.solvers import output_error, round_to_nearest
from bitpress.statistics import Statistic


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    """(train x, train y, held-out x, held-out y)."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return x[:1347], y[:1347], x[1347:], y[1347:]


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    x, y, _, _ = digits
    model = SimpleNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(12):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.requires_grad_(False)


def random_model(seed=0, **shape):
    """A model of small random weights, and inputs whose channels differ in size."""
    torch.manual_seed(seed)
    model = SimpleNN(**(shape or {"input_dim": 32, "hidden_dims": (48, 16, 5)})).requires_grad_(False)
    for layer in model.layers:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model, torch.randn(100, model.input_dim) * torch.randn(model.input_dim).exp()


def quantize_and_tell(model, x, **options):
    told = {}
    return quantize_model(model, x, **options, on_layer=told.__setitem__), told


def dense_logits(quantized, x):
    """The forward of the dense model with the dequantized weights."""
    first = quantized.layers[0]
    x = x if first.input_scale is None else x / first.input_scale
    dense = SimpleNN(x.shape[-1], [int(layer.weight_shape[0]) for layer in quantized.layers])
    for layer, packed in zip(dense.layers, quantized.layers, strict=True):
        layer.weight.data = packed.dequantize()
    return dense(x)


class TestSimpleNN:
    def test_default_shape(self):
        model = SimpleNN()
        assert [tuple(p.shape) for p in model.parameters()] == [(128, 64), (256, 128), (128, 256), (10, 128)]
        assert set(model.state_dict()) == {f"layers.{index}.weight" for index in range(4)}

    def test_forward_has_relu_between_and_none_after(self):
        model = SimpleNN(8, [6, 3])
        x = torch.randn(5, 8)
        first, second = model.parameters()
        assert torch.equal(model(x), F.linear(F.linear(x, first).relu(), second))
        assert (model(x) < 0).any()

    def test_one_layer_and_leading_dimensions(self):
        assert SimpleNN(8, [3])(torch.randn(2, 4, 8)).shape == (2, 4, 3)

    def test_outputs_end_with_the_logits(self):
        model, x = random_model()
        *hidden, logits = model.outputs(x)
        assert [h.shape[1] for h in hidden] == [48, 16]
        assert torch.equal(logits, model(x))

    @pytest.mark.parametrize("shape", [(64, []), (0, [10]), (64, [128, -1])])
    def test_refuses_widths(self, shape):
        with pytest.raises(BitpressError, match=r"at least one layer, all widths 1 or more"):
            SimpleNN(*shape)


class TestStatistics:
    def test_are_those_of_the_inputs(self):
        model, x = random_model()
        found = compute_activation_stats(model, x.split(30))
        assert list(found) == ["layers.0", "layers.1", "layers.2"]
        hidden = [x, *(y.relu() for y in model.outputs(x))]
        for statistics, inputs in zip(found.values(), hidden, strict=False):
            assert statistics.rows == 100
            assert statistics.wanted == Statistic.GRAM | Statistic.MEAN_MAGNITUDE
            torch.testing.assert_close(statistics.gram, inputs.T @ inputs, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(statistics.mean_magnitude, inputs.abs().mean(0))

    def test_one_tensor_is_one_batch(self):
        model, x = random_model()
        for whole, parts in zip(
            compute_activation_stats(model, x).values(), compute_activation_stats(model, [x]).values(), strict=True
        ):
            assert torch.equal(whole.gram, parts.gram)

    def test_leave_no_hooks(self):
        model, x = random_model()
        compute_activation_stats(model, x)
        assert not any(layer._forward_pre_hooks for layer in model.layers)

    def test_scale_of_a_module_and_of_its_weight(self):
        model, x = random_model()
        statistics = compute_activation_stats(model, x)["layers.1"]
        args = QuantizationArgs(num_bits=4, group_size=16, symmetric=False)
        of_module = search_module_scale(model.layers[1], statistics, args, n_grid=5)
        of_weight = search_module_scale(model.layers[1].weight.data, statistics, args, n_grid=5)
        assert torch.equal(of_module.scales, of_weight.scales)
        assert of_module.scales.shape == (48,)
        assert of_module.error <= of_module.error_before


class TestQuantizedNN:
    @settings(max_examples=15, deadline=None)
    @given(
        bits=st.integers(2, 8),
        symmetric=st.booleans(),
        group_size=st.sampled_from([None, -1, 16]),
        seed=st.integers(0, 99),
    )
    def test_logits_are_those_of_the_dense_model(self, bits, symmetric, group_size, seed):
        model, x = random_model(seed)
        quantized = quantize_model(model, x, bits=bits, symmetric=symmetric, group_size=group_size, n_grid=4)
        assert torch.equal(quantized(x), dense_logits(quantized, x))

    def test_leaves_the_model_as_it_was(self):
        model, x = random_model()
        before = copy.deepcopy(model.state_dict())
        quantize_model(model, x)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_is_deterministic(self):
        model, x = random_model()
        first, second = (quantize_model(model, x).state_dict() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first | second)

    def test_smoothing_alone_keeps_the_function(self):
        model, x = random_model()
        _, told = quantize_and_tell(model, x)
        smoothed = copy.deepcopy(model)
        for index, info in enumerate(told.values()):
            assert info["awq"].ratio is not None
            multiply_inputs(smoothed.layers[index], info["awq"].scales)
            if index:
                divide_outputs(smoothed.layers[index - 1], info["awq"].scales)
        x_scaled = x / told["layers.0"]["awq"].scales
        torch.testing.assert_close(smoothed(x_scaled), model(x), rtol=1e-4, atol=1e-5)

    def test_scales_folded_into_quantized_rows_cancel(self):
        """The network is that of the quantized weights, with each layer's scales taken out of its columns."""
        model, x = random_model()
        quantized, told = quantize_and_tell(model, x)
        unfolded = copy.deepcopy(model)
        for layer, info in zip(unfolded.layers, told.values(), strict=True):
            layer.weight.data = info["quantized"].dequantize() / info["awq"].scales
        torch.testing.assert_close(quantized(x), unfolded(x), rtol=1e-4, atol=1e-5)

    def test_layers_are_solved_on_what_the_quantized_layers_give(self):
        model, x = random_model()
        quantized, told = quantize_and_tell(model, x, bits=3)
        for (y, following), scale in zip(
            zip(quantized.outputs(x), list(told.values())[1:], strict=False),
            [info["awq"].scales for info in list(told.values())[1:]],
            strict=True,
        ):
            arriving = (y * scale).relu()
            torch.testing.assert_close(following["statistics"].gram, arriving.T @ arriving, rtol=1e-3, atol=1e-3)

    @settings(max_examples=15, deadline=None)
    @given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99))
    def test_error_is_never_above_round_to_nearest(self, bits, symmetric, seed):
        model, x = random_model(seed)
        quantized, told = quantize_and_tell(model, x, bits=bits, symmetric=symmetric, n_grid=8)
        following = [*[info["awq"].scales for info in told.values()][1:], torch.ones(1)]
        for layer, s, info in zip(quantized.layers, following, told.values(), strict=True):
            weight, gram = info["weight"], info["statistics"].gram
            plain = round_to_nearest(weight, layer.args, torch.float32).dequantize()
            shipped = layer.dequantize() * s.unsqueeze(1) / info["awq"].scales
            error, error_before = (output_error(w - weight, gram) for w in (shipped, plain))
            assert error <= error_before * 1.0001
            assert info["relative_error"] <= info["relative_error_before"]
            signal = output_error(weight, gram)
            assert info["relative_error"] == pytest.approx((error / signal) ** 0.5, rel=1e-2)
            assert info["relative_error_before"] == pytest.approx((error_before / signal) ** 0.5, rel=1e-2)

    def test_no_exponents_is_round_to_nearest(self):
        model, x = random_model()
        rounded = quantize_model(model, x, n_grid=0)
        for layer, packed in zip(model.layers, rounded.layers, strict=True):
            expected = round_to_nearest(layer.weight.data, packed.args, torch.float32).dequantize()
            assert packed.input_scale is None
            assert torch.equal(packed.dequantize(), expected)

    @pytest.mark.parametrize(("bits", "points"), [(8, 0.01), (4, 0.03)])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_accuracy_on_digits(self, trained, digits, bits, points, symmetric):
        x, _, held_out_x, held_out_y = digits
        quantized = quantize_model(trained, x.split(256), bits=bits, symmetric=symmetric)
        before, after = (
            float((network(held_out_x).argmax(1) == held_out_y).float().mean()) for network in (trained, quantized)
        )
        assert before > 0.92
        assert after >= before - points

    def test_dead_inputs_do_no_harm(self):
        model, x = random_model()
        x[:, :5] = 0
        assert quantize_model(model, x)(x).isfinite().all()

    def test_half_precision(self):
        model, x = random_model()
        quantized = quantize_model(model.bfloat16(), x.bfloat16(), bits=8)
        logits = quantized(x.bfloat16())
        assert logits.dtype == torch.bfloat16
        assert float((logits - model(x.bfloat16())).norm() / logits.norm()) < 0.05

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("bits", [4, 8])
    def test_cuda(self, bits):
        model, x = random_model()
        on_cpu = quantize_model(model, x, bits=bits)
        torch.testing.assert_close(copy.deepcopy(on_cpu).to("cuda")(x.cuda()).cpu(), on_cpu(x), rtol=1e-3, atol=1e-3)
        there = quantize_model(model.cuda(), x.cuda(), bits=bits)
        assert all(buffer.is_cuda for buffer in there.buffers())
        assert there.nbytes() == on_cpu.nbytes()


class TestStored:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_through_safetensors(self, tmp_path, bits, symmetric):
        model, x = random_model()
        quantized, told = quantize_and_tell(model, x, bits=bits, symmetric=symmetric)
        assert told["layers.0"]["awq"].ratio is not None
        save_file(quantized.state_dict(), tmp_path / "model.safetensors")
        stored = load_file(tmp_path / "model.safetensors")
        assert "layers.0.input_scale" in stored
        loaded = QuantizedNN.from_state_dict(stored, quantized.layers[0].args)
        assert torch.equal(loaded(x), quantized(x))
        other = quantize_model(SimpleNN(32, (48, 16, 5)), x, bits=bits, symmetric=symmetric)
        if other.layers[0].input_scale is not None:
            other.load_state_dict(stored)
            assert torch.equal(other(x), quantized(x))

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_bytes_are_exact(self, bits, symmetric):
        model, x = random_model(input_dim=64, hidden_dims=(128, 32, 16))
        quantized = quantize_model(model, x, bits=bits, symmetric=symmetric, group_size=32)
        assert quantized.layers[0].input_scale is not None
        values = 64 * 128 + 128 * 32 + 32 * 16
        groups = values // 32
        zero_points = 0 if symmetric else groups * bits // 8
        shapes, input_scale = 3 * 2 * 8, 64 * 4
        assert quantized.nbytes() == values * bits // 8 + groups * 4 + zero_points + shapes + input_scale
        assert quantized.nbytes() == sum(t.numel() * t.element_size() for t in quantized.state_dict().values())
        assert quantized.nbytes() == sum(layer.nbytes() for layer in quantized.layers)

    def test_has_no_parameters_and_says_its_scheme(self):
        model, x = random_model()
        quantized = quantize_model(model, x)
        assert not list(quantized.parameters())
        assert "32 -> 48, 4 bits, asymmetric, group_size=16" in repr(quantized)

    def test_refuses_other_state(self):
        model, x = random_model()
        quantized = quantize_model(model, x, symmetric=True)
        asymmetric = QuantizationArgs(num_bits=4, group_size=16, symmetric=False)
        with pytest.raises(BitpressError, match=r"layers\.0 lacks weight_zero_point"):
            QuantizedNN.from_state_dict(quantized.state_dict(), asymmetric)
        with pytest.raises(BitpressError, match=r"QuantizedNN\.state_dict\(\)"):
            QuantizedNN.from_state_dict({"weight": x}, asymmetric)


class TestRefusals:
    @pytest.mark.parametrize("group_size", [32, 0, -2, 7])
    def test_group_size(self, group_size):
        model, x = random_model()
        name = {32: r"48 inputs of layers\.1", 7: r"32 inputs of layers\.0"}.get(group_size, r"layers\.0")
        with pytest.raises(BitpressError, match=rf"{name}\. Sizes that fit every layer: 16, 8, 4, 2 and -1"):
            quantize_model(model, x, group_size=group_size)

    @pytest.mark.parametrize(("widths", "expected"), [((64, 128, 10), 64), ((96, 64, 10), 32), ((60, 64, 10), -1)])
    def test_group_size_that_is_chosen(self, widths, expected):
        model, x = random_model(input_dim=widths[0], hidden_dims=widths[1:])
        assert quantize_model(model, x, n_grid=2).layers[0].args.group_size == expected

    @pytest.mark.parametrize("bits", [0, 1, 9, 16])
    def test_bits(self, bits):
        model, x = random_model()
        with pytest.raises(BitpressError, match="num_bits 2 to 8"):
            quantize_model(model, x, bits=bits)

    @pytest.mark.parametrize("batches", [[], torch.empty(0, 32)])
    def test_no_batches(self, batches):
        with pytest.raises(BitpressError, match="no calibration input"):
            quantize_model(random_model()[0], batches)

    def test_weight_that_is_not_finite(self):
        model, x = random_model()
        model.layers[1].weight.data[0, 0] = torch.nan
        with pytest.raises(BitpressError, match=r"layers\.1\.weight holds 1 NaN"):
            quantize_model(model, x)

    def test_batch_that_is_not_finite(self):
        model, x = random_model()
        x[3] = torch.inf
        with pytest.raises(BitpressError, match=r"input of layers\.0 .* batch 0"):
            quantize_model(model, x)

    def test_statistics_of_any_model(self):
        model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
        assert list(compute_activation_stats(model, torch.randn(6, 4))) == ["0", "2"]
