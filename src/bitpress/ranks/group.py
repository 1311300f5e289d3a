"""Several ranks: exchanges over torch.distributed, and who is to blame when one fails."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bitpress.ranks.ranks import Ranks, Received
from bitpress.ranks.watch import Watch

# Bytes that small tensors are joined to before they are sent.
BUCKET = 1 << 24


class Group(Ranks):
    """The ranks of a process group.

    Args:
        group: of torch.distributed; it exchanges tensors on the CPU, and those on other devices if it can.
        watch: tells who is gone.
    """

    def __init__(self, group: Any, watch: Watch) -> None:
        self._group, self._watch = group, watch
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """See :meth:`Ranks.sum`."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def greatest(self, tensors: Sequence[Tensor]) -> None:
        """See :meth:`Ranks.greatest`."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def least(self, tensors: Sequence[Tensor]) -> None:
        """See :meth:`Ranks.least`."""
        self._reduce(tensors, dist.ReduceOp.MIN)

    def gather(self, tensors: Sequence[Tensor] = (), note: Any = None) -> list[Received]:
        """See :meth:`Ranks.gather`."""
        kinds = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in tensors]
        device = tensors[0].device if tensors else torch.device("cpu")
        header = torch.frombuffer(bytearray(json.dumps([note, kinds]).encode()), dtype=torch.uint8)
        payload = torch.cat([_bytes(t.to(device)) for t in tensors]) if tensors else header.new_empty(0)
        if device.type == "cpu":
            # One message in place of two.
            (both,) = self._messages([torch.cat([header, payload])], [len(header)])
            parts = [(message[:length], message[length:]) for message, (length,) in both]
        else:
            lengths, payloads = self._messages([header, payload], [])
            parts = [(h, p) for (h, _), (p, _) in zip(lengths, payloads, strict=True)]
        return [_received(json.loads(bytes(h.tolist())), p) for h, p in parts]

    def from_first(self, tensor: Tensor) -> Tensor:
        """See :meth:`Ranks.from_first`."""
        whole = tensor.contiguous().clone()
        with self._exchanging(whole):
            dist.broadcast(whole, group=self._group, group_src=0)
        return whole

    def _reduce(self, tensors: Sequence[Tensor], op: Any) -> None:
        for bucket in _buckets(tensors):
            whole = bucket[0] if len(bucket) == 1 else torch.cat([t.flatten() for t in bucket])
            # A view of some columns cannot be sent as it is.
            sent = whole.contiguous()
            with self._exchanging(sent):
                dist.all_reduce(sent, op, group=self._group)
            if len(bucket) > 1:
                for tensor, part in zip(bucket, sent.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))
            elif sent is not whole:
                whole.copy_(sent)

    def _messages(self, mine: Sequence[Tensor], extra: Sequence[int]) -> list[list[tuple[Tensor, list[int]]]]:
        """Bytes of different lengths: for each of ``mine`` all ranks', with the numbers that each rank adds."""
        numbers = torch.tensor([*map(len, mine), *extra], dtype=torch.int64)
        all_numbers = [torch.empty_like(numbers) for _ in range(self.size)]
        with self._exchanging(numbers):
            dist.all_gather(all_numbers, numbers, group=self._group)
        found = []
        for i, message in enumerate(mine):
            lengths = [int(n[i]) for n in all_numbers]
            sent = message.new_empty(max(lengths))
            sent[: len(message)] = message
            received = [torch.empty_like(sent) for _ in lengths]
            if len(sent):
                with self._exchanging(sent):
                    dist.all_gather(received, sent, group=self._group)
            found.append([
                (whole[:length], n[len(mine) :].tolist())
                for whole, length, n in zip(received, lengths, all_numbers, strict=True)
            ])  # fmt: skip
        return found

    @contextmanager
    def _exchanging(self, tensor: Tensor) -> Iterator[None]:
        """Around each exchange: the time it takes, and the name of the rank that makes it fail."""
        start = time.perf_counter()
        self._watch.check()
        try:
            if tensor.device.type != "cpu":
                # A kernel that waits for a dead rank does not notice; this does, unless the rank dies in between.
                dist.all_reduce(torch.zeros(1), group=self._group)
            yield
        except RuntimeError as error:
            raise self._watch.culprit(error) from error
        finally:
            self.seconds += time.perf_counter() - start


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _received(header: Any, payload: Tensor) -> Received:
    note, kinds = header
    tensors, done = [], 0
    for kind, shape in kinds:
        dtype = getattr(torch, kind)
        size = math.prod(shape) * dtype.itemsize
        # A copy: the bytes of a view would not be aligned.
        tensors.append(payload[done : done + size].clone().view(dtype).view(shape))
        done += size
    return Received(tensors, note)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, as many as fill a bucket; a large one is a bucket of its own."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for of_kind in kinds.values():
        bucket: list[Tensor] = []
        for tensor in of_kind:
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket
