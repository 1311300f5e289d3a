"""Integers are packed as compressed-tensors packs them."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import packed_slowly

from bitpress.quantization import packing


@settings(deadline=None)
@given(
    st.integers(2, 8), st.integers(0, 9), st.integers(1, 70), st.integers(0, 1000), st.integers(1, 300), st.booleans()
)
def test_packs_as_compressed_tensors(bits, rows, columns, seed, chunk, transposed):
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)
    values = values.T.contiguous().T if transposed else values
    before = values.clone()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "CHUNK", chunk)
        packed = packing.pack_integers(values, bits)
    expected = pack_to_int32(values, bits)
    assert packed.dtype == expected.dtype
    assert packed.is_contiguous()
    assert torch.equal(packed, expected)
    assert torch.equal(values, before)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 1000))
def test_words_of_either_packing_are_read(bits, rows, columns, seed):
    half = 1 << (bits - 1)
    values = torch.randint(
        -half, half, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed)
    )
    own, other = (packed_slowly(values, bits, gaps) for gaps in (packing.LEAVES_GAPS, not packing.LEAVES_GAPS))
    assert torch.equal(own, packing.pack_integers(values, bits))
    for words, gaps in ((own, packing.LEAVES_GAPS), (other, not packing.LEAVES_GAPS)):
        assert torch.equal(packing.unpack_integers(words, bits, columns, gaps=gaps), values)
    assert torch.equal(packing.repack(own, bits, columns), own)
    if own.shape != other.shape:
        assert torch.equal(packing.repack(other, bits, columns), own)
