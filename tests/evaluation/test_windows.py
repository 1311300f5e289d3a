"""Cutting: each token once, with as much before it as was asked for."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from bitpress.evaluation.windows import batches, cut


@given(
    tokens=st.integers(0, 60), length=st.integers(2, 12), stride=st.integers(1, 12), first=st.sampled_from([None, 999])
)
def test_each_token_is_scored_once(tokens, length, stride, first):
    room = length - (first is not None)
    assume(stride <= room)
    sequence = torch.arange(tokens)
    windows = list(cut(sequence, length, stride, first=first))
    scored = [int(i) for w in windows for i in w.ids[w.scored :]]
    unscored = range(0, tokens, stride) if stride == room and first is None else range(int(first is None))
    assert scored == [i for i in range(tokens) if i not in unscored]
    for window in windows:
        assert len(window.ids) <= length
        assert window.scored >= 1
        place = torch.arange(len(window.ids)) + window.start
        if first is not None:
            assert window.ids[0] == first
        assert torch.equal(window.ids[first is not None :], place[first is not None :])
        # Behind the first window, at least length - stride tokens are before each that is scored.
        assert window.start <= 0 or window.scored >= min(length - stride, len(window.ids) - 1)


@given(lengths=st.lists(st.integers(2, 5), max_size=12), size=st.integers(1, 4))
def test_batches_hold_all_windows_in_order_and_of_one_length(lengths, size):
    windows = [w for i, n in enumerate(lengths) for w in cut(torch.arange(n), 5, 5, index=i)]
    groups = list(batches(windows, size))
    assert [w.sequence for group in groups for w in group] == [w.sequence for w in windows]
    assert all(len(group) <= size and len({len(w.ids) for w in group}) == 1 for group in groups)
