"""Statistics of inputs: those of a float64 computation over all rows at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.errors import BitpressError
from bitpress.statistics import InputStatistics, Statistic
from bitpress.statistics.inputs import PANEL

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
ALL = Statistic.GRAM | Statistic.MEAN_MAGNITUDE | Statistic.MAX_MAGNITUDE | Statistic.RANGE
WIDTHS = (1, PANEL - 1, PANEL, PANEL + 1, 255, 256, 257, 600)


def inputs_of(rows, features, seed=0):
    """Columns of very different magnitudes, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10 ** (torch.rand(features, generator=generator) * 3 - 1)
    return torch.randn(rows, features, generator=generator) * magnitude


def collect(*chunks, wanted=ALL):
    statistics = InputStatistics(chunks[0].shape[-1], wanted)
    for chunk in chunks:
        statistics.update(chunk)
    return statistics


def assert_gram_of(gram, x):
    """Within float32 rounding of the sum of each entry: relative to sum(abs(x_i * x_j))."""
    x = x.double()
    bound = (x.abs().T @ x.abs()) * 1e-5 + 1e-30
    assert gram.dtype == torch.float32
    assert bool(((gram.double() - x.T @ x).abs() <= bound).all())


def assert_statistics_of(statistics, x):
    x = x.reshape(-1, x.shape[-1]).float()
    assert statistics.rows == x.shape[0]
    assert_gram_of(statistics.gram, x)
    torch.testing.assert_close(statistics.mean_magnitude, x.double().abs().mean(0).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics.max_magnitude, x.abs().amax(0), rtol=1e-6, atol=0)
    low, high = statistics.range
    torch.testing.assert_close(low, x.amin(0).clamp(max=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(high, x.amax(0).clamp(min=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_the_float64_statistics(features, dtype):
    x = inputs_of(40, features).to(dtype)
    assert_statistics_of(collect(x), x)


@pytest.mark.parametrize("features", WIDTHS)
def test_gram_may_be_read_at_any_time(features):
    first, second, third = inputs_of(30, features).split(10)
    statistics = collect(first)
    assert_gram_of(statistics.gram, first)
    assert_gram_of(statistics.gram, first)
    statistics.update(second)
    assert_gram_of(statistics.gram, torch.cat([first, second]))
    statistics.update(third)
    assert_gram_of(statistics.gram, torch.cat([first, second, third]))


@pytest.mark.parametrize("features", WIDTHS)
def test_gram_is_symmetric_to_the_bit_outside_the_diagonal_panels(features):
    gram = collect(inputs_of(7, features)).gram
    for start in range(0, features, PANEL):
        stop = min(start + PANEL, features)
        assert torch.equal(gram[start:stop, stop:], gram[stop:, start:stop].T)


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 300), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_chunks_of_any_size_are_one_update(rows, features, sizes, seed):
    x = inputs_of(rows, features, seed)
    cuts = sorted({min(rows, cut) for cut in torch.tensor(sizes).cumsum(0).tolist()})
    assert_statistics_of(collect(*torch.tensor_split(x, cuts)), x)


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 40), st.booleans(), st.integers(0, 99))
def test_merging_is_one_collection(rows, features, cut, read, seed):
    x = inputs_of(rows, features, seed)
    one, other = collect(x[:cut]), collect(x[cut:])
    if read:  # A mirrored half must not be counted twice.
        _ = other.gram
    before = other.gram.clone()
    one.merge(other)
    assert_statistics_of(one, x)
    assert other.rows == max(0, rows - cut)
    assert torch.equal(other.gram, before)


@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("read", [False, True])
def test_rescaling_is_collecting_the_divided_input(features, read):
    x = inputs_of(50, features)
    scales = torch.rand(features, generator=torch.Generator().manual_seed(1)) * 3 + 0.01
    statistics = collect(x)
    if read:
        _ = statistics.gram
    statistics.rescale(scales.bfloat16())
    divided = (x.double() / scales.bfloat16().double()).float()
    assert_statistics_of(statistics, divided)
    more = inputs_of(3, features, seed=2)
    statistics.update(more)
    assert_statistics_of(statistics, torch.cat([divided, more]))


def test_a_clone_shares_nothing():
    x = inputs_of(20, 300)
    statistics = collect(x)
    clone = statistics.clone()
    assert_statistics_of(clone, x)
    clone.update(x * 2)
    clone.rescale(torch.full((300,), 0.5))
    assert_statistics_of(statistics, x)
    copy = statistics.clone()
    statistics.update(x)
    assert_statistics_of(copy, x)


@pytest.mark.parametrize("wanted", [s for s in Statistic if s and s != Statistic.DRIFT] + [ALL])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, PANEL - 1, PANEL, 299])
def test_a_value_that_is_not_finite_is_noticed_in_any_column(wanted, bad, column):
    x = inputs_of(20, 300)
    statistics = collect(x, wanted=wanted)
    assert statistics.is_finite()
    x[7, column] = bad
    statistics.update(x)
    assert not statistics.is_finite()
    statistics.update(inputs_of(20, 300))
    assert not statistics.is_finite()


@pytest.mark.parametrize("wanted", [Statistic.GRAM, ALL])
def test_a_gram_matrix_that_overflows_is_noticed(wanted):
    x = torch.ones(4, 3)
    x[1, 2] = 1e25
    assert not collect(x, wanted=wanted).is_finite()


@pytest.mark.parametrize(
    ("missing", "read"),
    [
        (Statistic.GRAM, lambda s: s.gram),
        (Statistic.MEAN_MAGNITUDE, lambda s: s.mean_magnitude),
        (Statistic.MAX_MAGNITUDE, lambda s: s.max_magnitude),
    ],
)
def test_asking_for_what_was_not_collected_names_it(missing, read):
    statistics = collect(inputs_of(4, 5), wanted=ALL & ~missing)
    with pytest.raises(BitpressError, match=missing.name):
        read(statistics)
    assert read(collect(inputs_of(4, 5), wanted=missing)).isfinite().all()


def test_no_rows_change_nothing():
    statistics = InputStatistics(6, ALL)
    statistics.update(torch.empty(2, 0, 6))
    assert statistics.rows == 0
    assert statistics.is_finite()
    for tensor in (statistics.gram, statistics.mean_magnitude, statistics.max_magnitude):
        assert not tensor.any()
    x = inputs_of(5, 6)
    statistics.update(x)
    statistics.update(torch.empty(0, 6, dtype=torch.bfloat16))
    assert_statistics_of(statistics, x)


def test_inputs_of_any_number_of_dimensions():
    x = inputs_of(24, 5)
    assert_statistics_of(collect(x.reshape(2, 3, 4, 5)), x)
    assert_statistics_of(collect(x[0]), x[:1])
    strided = x.T.contiguous().T
    assert_statistics_of(collect(strided), x)


def test_inputs_that_need_gradients_leave_no_graph():
    x = inputs_of(4, 5).requires_grad_()
    statistics = collect(x)
    assert not statistics.gram.requires_grad
    assert not statistics.mean_magnitude.requires_grad


def held_out_of(x, every, read=False):
    """Statistics of single rows, every so many held out."""
    statistics = InputStatistics(x.shape[1], Statistic.HELD_OUT)
    for i, row in enumerate(x.split(1)):
        statistics.update(row, held_out=i % every == 0)
        if read:
            _ = statistics.gram, statistics.held_out_gram
    return statistics


@PROPERTY
@given(st.integers(1, 20), st.integers(1, 250), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_held_out_rows_count_in_both_gram_matrices_whatever_becomes_of_them(rows, features, every, read, seed):
    x = inputs_of(rows, features, seed)
    statistics = held_out_of(x, every, read)
    assert statistics.wanted == Statistic.GRAM | Statistic.HELD_OUT
    more = inputs_of(3, features, seed + 1)
    copy = statistics.clone()
    copy.merge(held_out_of(more, 2))
    both, held = torch.cat([x, more]), torch.cat([x[::every], more[::2]])
    scales = torch.rand(features, generator=torch.Generator().manual_seed(1)) * 3 + 0.1
    copy.rescale(scales)
    assert_gram_of(copy.gram, (both.double() / scales.double()).float())
    assert_gram_of(copy.held_out_gram, (held.double() / scales.double()).float())
    assert (copy.rows, copy.held_out_rows) == (len(both), len(held))
    assert_gram_of(statistics.held_out_gram, x[::every])


def test_without_being_asked_for_nothing_is_held_out():
    statistics = InputStatistics(5, Statistic.GRAM)
    statistics.update(inputs_of(4, 5), held_out=True)
    assert statistics.held_out_rows == 0
    with pytest.raises(BitpressError, match="HELD_OUT"):
        _ = statistics.held_out_gram


@pytest.mark.parametrize("other", [InputStatistics(4, ALL), InputStatistics(5, Statistic.GRAM)])
def test_statistics_of_different_inputs_do_not_merge(other):
    with pytest.raises(BitpressError, match="do not merge"):
        InputStatistics(5, ALL).merge(other)


class TestDrift:
    WANTED = Statistic.GRAM | Statistic.DRIFT

    def pairs(self, features=PANEL + 5, rows=60, seed=0):
        x = inputs_of(rows, features, seed)
        return x, x + 0.1 * inputs_of(rows, features, seed + 1)

    def collect(self, *pairs):
        statistics = InputStatistics(pairs[0][0].shape[-1], self.WANTED)
        for x, original in pairs:
            statistics.update(x)
            statistics.compare(x, original)
        return statistics

    def assert_drift_of(self, statistics, x, original):
        x, original = x.double(), original.double()
        bound = ((original - x).abs().T @ x.abs()) * 1e-4 + original.abs().max() * x.abs().max() * 1e-5
        assert bool(((statistics.drift.double() - (original - x).T @ x).abs() <= bound).all())

    def test_is_the_product_of_the_difference_and_the_input(self):
        x, original = self.pairs()
        statistics = self.collect(*zip(x.split(7), original.split(7), strict=True))
        self.assert_drift_of(statistics, x, original)
        assert_gram_of(statistics.gram, x)

    def test_follows_a_smoothing_of_both_models(self):
        x, original = self.pairs()
        scales = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(1)) * 3 + 0.1
        statistics = self.collect((x, original))
        statistics.rescale(scales)
        self.assert_drift_of(statistics, x / scales, original / scales)

    def test_merges_and_is_cloned(self):
        x, original = self.pairs()
        one, other = self.collect((x[:20], original[:20])), self.collect((x[20:], original[20:]))
        one.merge(other)
        self.assert_drift_of(one, x, original)
        clone = one.clone()
        clone.compare(x, original)
        self.assert_drift_of(one, x, original)

    def test_of_the_same_rows_is_nothing(self):
        x, _ = self.pairs()
        assert not self.collect((x, x.clone())).drift.any()

    @pytest.mark.parametrize("column", [0, PANEL + 4])
    def test_an_original_that_is_not_finite_is_noticed(self, column):
        x, original = self.pairs()
        original[3, column] = float("inf")
        assert not self.collect((x, original)).is_finite()

    def test_is_asked_for_by_name(self):
        with pytest.raises(BitpressError, match="DRIFT"):
            _ = collect(inputs_of(4, 5)).drift
