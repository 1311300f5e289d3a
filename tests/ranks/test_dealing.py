"""Dealing work out: nothing is lost, nothing is done twice, and nobody has much more than the others."""

import gang
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitpress.ranks import ALONE, Found, Ranks, Work, deal, share_out

HEIGHTS = st.sampled_from([0, 1, 3, 8])
ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@st.composite
def works(draw):
    found, count = [], 0
    for _ in range(draw(st.integers(0, 5))):
        rows = draw(ROWS)
        indices = tuple(range(count, count + len(rows)))
        count += len(rows)
        costs = draw(st.floats(0, 50)), draw(st.floats(0.01, 5))
        found.append(Work(indices, tuple(rows), draw(HEIGHTS), *costs))
    return found


def cost(pieces, work):
    rows = [stop - start for index, start, stop in pieces if index in work.indices]
    return work.fixed + work.per_row * sum(rows) if rows else 0.0


@given(works(), st.integers(1, 6))
def test_every_row_is_dealt_once_in_whole_units(given_works, size):
    dealt = deal(given_works, size)
    assert len(dealt) == size
    for work in given_works:
        for index, rows in zip(work.indices, work.rows, strict=True):
            pieces = [p for of_rank in dealt for p in of_rank if p.matrix == index]
            assert [r for _, start, stop in pieces for r in range(start, stop)] == list(range(rows))
            assert all(start % (work.height or rows) == 0 for _, start, _ in pieces)


@given(works(), st.integers(1, 6))
def test_nobody_has_more_than_a_fair_share_and_what_a_cut_costs(given_works, size):
    loads = [sum(cost(pieces, w) for w in given_works) for pieces in deal(given_works, size)]
    total = sum(w.fixed + w.per_row * sum(w.rows) for w in given_works)
    # In a row that is filled up in turn a rank goes without at most one unit, which has to fit the next.
    unit = max((w.fixed + w.per_row * min(w.height or max(w.rows), max(w.rows)) for w in given_works), default=0)
    assert max(loads, default=0) <= 1.01 * (total / size + 2 * unit) + 1e-6


@given(st.integers(0, 200), st.integers(0, 50), st.integers(1, 9), st.integers(1, 6))
def test_parts_of_rows_are_all_rows_once(count, first, height, size):
    parts = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        part = ranks.part(first, first + count, height)
        parts += range(first + count)[part]
        assert (part.start - first) % height == 0 or part.start == first + count
    assert parts == list(range(first, first + count))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_get_what_each_has_found(size):
    matrices = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (7, 1, 12)]

    def work(ranks):
        own = [Work((0, 1), (7, 1), 2, 5.0), Work((2,), (12,))]
        found = share_out(
            ranks, own, lambda pieces: [Found([matrices[i][a:b] * 2], {"first": a}) for i, a, b in pieces]
        )
        return {
            i: (torch.cat([f.tensors[0] for f in parts]), [f.note["first"] for f in parts])
            for i, parts in found.items()
        }

    for found in gang.in_step(size, work):
        assert list(found) == [0, 1, 2]
        for index, matrix in enumerate(matrices):
            assert torch.equal(found[index][0], matrix * 2)
            assert found[index][1] == sorted(found[index][1])


def test_alone_nothing_is_copied():
    tensor = torch.ones(3)
    assert ALONE.gather([tensor])[0].tensors[0] is tensor
    assert ALONE.from_first(tensor) is tensor
