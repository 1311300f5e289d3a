"""What checkpoint files hold: random state dicts, and words packed bit by bit."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from bitpress.checkpoints.headers import DTYPES
from bitpress.quantization import packing

# As names are in checkpoints, and some that JSON must escape.
PARTS = st.sampled_from(
    ["model", "layers", "0", "q_proj", "weight", "é", 'a"b', "back\\slash", "tab\t", "\x7f", "日本"]
)
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(".".join)
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def state_dicts(draw, min_size=1, max_size=8) -> dict[str, Tensor]:
    """Any dtypes, shapes (empty and without dimensions, too) and bytes."""
    names = draw(st.lists(NAMES, min_size=min_size, max_size=max_size, unique=True))
    return {
        name: tensor(draw(SHAPES), draw(st.sampled_from(list(DTYPES.values()))), seed)
        for seed, name in enumerate(names)
    }


def tensor(shape, dtype, seed=0) -> Tensor:
    """Random bytes; of booleans, random bits."""
    draw = torch.Generator().manual_seed(seed)
    count = int(torch.Size(shape).numel()) * dtype.itemsize
    drawn = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=draw)
    if dtype.is_complex:
        return torch.view_as_complex(drawn.view(torch.float32).view(*shape, 2))
    return drawn.view(dtype).view(shape)


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    whole = tensor.contiguous().reshape(-1)
    whole = torch.view_as_real(whole).reshape(-1) if whole.is_complex() else whole
    return whole.view(torch.uint8).numpy().tobytes()


def assert_same(one: Tensor, other: Tensor) -> None:
    """Dtype, shape and every bit."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert bits(one) == bits(other)


def packed_slowly(values, bits, gaps) -> Tensor:
    """Rows as long integers, cut into words: without gaps, or without an integer in two words."""
    each, words = 32 // bits, packing.count_words(bits, values.shape[1], gaps=gaps)
    rows = []
    for row in values.tolist():
        starts = [i // each * 32 + i % each * bits if gaps else i * bits for i in range(len(row))]
        whole = sum((value + (1 << (bits - 1))) << start for value, start in zip(row, starts, strict=True))
        rows.append([whole >> (32 * i) & 0xFFFFFFFF for i in range(words)])
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), words).to(torch.int32)
