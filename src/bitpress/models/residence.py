"""Parameters that are read when a part of the model is used, and dropped after it: the model stays on the disk."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.models.experts import rebind_experts

Read = Callable[[Collection[str]], Mapping[str, Tensor]]


class Residence:
    """Where the parameters of a model are.

    Between uses they are on the meta device. Modules outside of the blocks (an embedding, a head) have theirs from when
    they are called until the next block is needed.

    Buffers are on the device from the start.

    Args:
        model: with parameters on the meta device.
        read: makes parameters, on the CPU, by their names in the model.
        device: where parameters are when they are used.
        read_ahead: called by another thread with the names in the block that comes next, while this one is used: those
            of them that can be read so. None to read when they are needed, which holds one block and not two.

    Attributes:
        device: where parameters are when they are used.
    """

    def __init__(
        self, model: nn.Module, read: Read, device: torch.device | str = "cpu", read_ahead: Read | None = None
    ) -> None:
        self.model, self.device = model, torch.device(device)
        self._read = read
        self._ahead = None if read_ahead is None else _Ahead(read_ahead)
        self._order: list[str] = []
        self._used: dict[str, int] = {}
        self._held: dict[str, dict[str, nn.Parameter | None]] = {}
        self._running: set[str] = set()
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def expect(self, order: Sequence[str]) -> None:
        """Say in which order :meth:`present` will be asked for modules: what comes next can be read ahead."""
        self._order = list(order)

    @contextmanager
    def present(self, name: str) -> Iterator[None]:
        """Inside the ``with`` the module of that name, and all within it, has its parameters."""
        self.release()
        self._used[name] = self._used.get(name, 0) + 1
        try:
            if self._used[name] == 1:
                self._bring(name, recurse=True)
                self._look_ahead(name)
            yield
        finally:
            self._used[name] -= 1
            if not self._used[name]:
                self._drop(name)

    @contextmanager
    def around(self, blocks: Collection[str]) -> Iterator[None]:
        """Inside the ``with`` modules outside of ``blocks`` have their parameters when they are called.

        Raises:
            RuntimeError: the model's code uses a parameter's place before it calls the parameter's module.
        """
        inside = tuple(f"{name}." for name in blocks)
        embedding = _embedding(self.model)
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                outside = name not in blocks and not name.startswith(inside)
                if outside and any(p is not None for p in module._parameters.values()):
                    before = module.register_forward_pre_hook(partial(self._call, name), prepend=True)
                    after = module.register_forward_hook(partial(self._called, name))
                    stack.callback(before.remove)
                    stack.callback(after.remove)
                    if module is embedding:
                        self._bring(name, recurse=False)  # some models ask where it is before they call it
            stack.callback(self.release, everything=True)
            yield

    def release(self, *, everything: bool = False) -> None:
        """Drop the parameters of modules outside of the blocks that do not run."""
        for name in [n for n in self._held if n not in self._used or not self._used[n]]:
            if everything or name not in self._running:
                self._drop(name)

    def _call(self, name: str, _: nn.Module, args: Any) -> None:
        if any(isinstance(x, Tensor) and x.is_meta for x in args):
            raise RuntimeError(f"{name} is given a tensor on the meta device")
        self._running.add(name)
        if name not in self._held:
            self._bring(name, recurse=False)

    def _called(self, name: str, *_: Any) -> None:
        self._running.discard(name)

    def _look_ahead(self, name: str) -> None:
        """Have the block after this one read meanwhile; after the last comes the first, of the next phase."""
        if self._ahead is not None and name in self._order:
            after = self._order[(self._order.index(name) + 1) % len(self._order)]
            if after not in self._held:
                self._ahead.start(after, list(self._parameters(after, recurse=True)))

    def _parameters(self, name: str, *, recurse: bool) -> dict[str, nn.Parameter]:
        module = self.model.get_submodule(name)
        return dict(module.named_parameters(prefix=name, recurse=recurse, remove_duplicate=False))

    def _bring(self, name: str, *, recurse: bool) -> None:
        module, absent = self.model.get_submodule(name), self._parameters(name, recurse=recurse)
        values = dict(self._ahead.take(name)) if self._ahead is not None else {}
        values |= self._read([n for n in absent if n not in values])
        present: dict[int, nn.Parameter] = {}  # what is shared within the module stays shared
        for parameter_name, parameter in absent.items():
            value = values[parameter_name].to(self.device, non_blocking=True)
            put = present.setdefault(id(parameter), nn.Parameter(value, requires_grad=parameter.requires_grad))
            self._put(parameter_name, put)
        self._held[name] = dict(absent)
        rebind_experts(module)

    def _drop(self, name: str) -> None:
        for parameter_name, parameter in self._held.pop(name, {}).items():
            self._put(parameter_name, parameter)
        rebind_experts(self.model.get_submodule(name))

    def _put(self, name: str, parameter: nn.Parameter | None) -> None:
        owner, _, local = name.rpartition(".")
        self.model.get_submodule(owner)._parameters[local] = parameter


class _Ahead:
    """Reads one block while another is worked on."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(1, "bitpress-read-ahead")
        self._name = ""
        self._found: Future[Mapping[str, Tensor]] | None = None

    def start(self, name: str, names: Collection[str]) -> None:
        """Read what is in the block of that name; what was read of another is let go."""
        if name != self._name:
            self._name, self._found = name, self._pool.submit(self._read, names)

    def take(self, name: str) -> Mapping[str, Tensor]:
        """What has been read of the block; nothing if it was not foreseen."""
        if name != self._name or self._found is None:
            return {}
        found, self._name, self._found = self._found, "", None
        return found.result()


def _embedding(model: Any) -> nn.Module | None:
    """Where a transformers model looks up its tokens."""
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found
