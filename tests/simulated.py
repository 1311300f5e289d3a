"""A device that is none: its memory is the host's, but every tensor on it says that it is elsewhere.

What goes wrong on a GPU, and nowhere else, is mostly that tensors of two devices meet in one operation. Here they do so
without a GPU. The device is torch's own ``privateuseone``, which is for devices that others build: one kernel, for all
operations, checks where the tensors are, runs the operation on the CPU on the same memory, and gives the result to the
device. It refuses what CUDA refuses:

- tensors of both devices in one operation. Exempt are, as with CUDA, numbers (tensors without dimensions) of the CPU,
  indices on the CPU of what is on the device, and copies;
- a random generator of the CPU for numbers on the device;
- ``Tensor.numpy()``, and other views of the memory from outside of torch.

The arithmetic is the CPU's, so that results must be equal to the bit. What it does not show: order of asynchronous
work, other roundings, what CUDA's kernels do not support, and code that asks for "cuda" by name.

A process that has made the device keeps it, and torch then takes it for the accelerator of the machine: that is for
processes of their own.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils import backend_registration

NAME = "simulated"
# Where indices may be on the CPU: operations, and the place of their indices.
INDEXED = {"aten::index": 1, "aten::_index_put_impl_": 1, "aten::_unsafe_index": 1}
COPIES = {
    "aten::_copy_from": lambda source, to, *_: to.copy_(source),
    "aten::_copy_from_and_resize": lambda source, to, *_: to.resize_(source.shape).copy_(source),
}
# What the CPU does by another name, or for floats only.
INSTEAD = COPIES | {
    "aten::convolution_overrideable": torch.ops.aten.convolution.default,
    "aten::histc": lambda x, *args: x.float().histc(*args).to(x.dtype),
}
# Where torch has a kernel for any device that adds up in another order than the CPU's, or that only refuses.
COMPOSED = ("convolution_overrideable", "native_layer_norm", "native_layer_norm_backward", "silu_backward")
# What is done to the memory itself, without an operation on tensors.
OF_MEMORY = ("clone", "copy_", "nbytes", "resizable", "resize_", "size")

HOST = torch.device("cpu")

_aten, _bytes = torch.ops.aten, UntypedStorage.nbytes
_libraries: list[torch.library.Library] = []


def missing() -> str | None:
    """Why there can be no such device with this torch, or None."""
    there = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
    there = there and hasattr(torch._C, "_acc") and hasattr(torch._C._acc, "create_empty_tensor")
    return None if there else f"torch {torch.__version__} takes no device that is written in Python"


def make() -> torch.device:
    """The device. In a process of its own: it stays."""
    if _libraries:
        return torch.device(NAME, 0)
    known = {"get_amp_supported_dtype": lambda _: [torch.bfloat16]}
    module = type("Module", (backend_registration._DummyBackendModule,), known)
    backend_registration._setup_privateuseone_for_python_backend(NAME, module())
    rest, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(_run, "PrivateUse1")
    for name in COMPOSED:
        own.impl(name, _running(getattr(_aten, name).default), "PrivateUse1")
    for name in OF_MEMORY:
        setattr(UntypedStorage, name, _of_memory(getattr(UntypedStorage, name)))
    _libraries.extend((rest, own))
    return torch.device(NAME, 0)


def _running(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(op, *args, **kwargs)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation with something on the device, on the CPU."""
    name = op._schema.name
    if name == "aten::set_":
        return _by_name_of_cpu(op, *args, **kwargs)
    if name == "aten::_fused_sdp_choice":
        return 0  # the way of plain products, which tests of the CPU take as well
    with torch._C.DisableTorchFunction():
        loan = _Loan()
        own = _each(loan.lend, args)
        options = {key: _each(loan.lend, x) for key, x in kwargs.items()}
        if name not in COPIES:
            loan.check(name, args[INDEXED[name]] if name in INDEXED and args[0].device.type == NAME else ())
        found = (INSTEAD.get(name) or _overload(op, own))(*own, **options)
        if op._schema.is_mutable or name in COPIES:
            loan.follow()
        return _each(loan.take, found)


class _Loan:
    """What an operation on the CPU is given for its arguments, and what is given back for its results."""

    def __init__(self) -> None:
        self.lent: list[Tensor] = []
        self.strangers: list[Any] = []
        self._given: dict[int, Tensor] = {}
        self._memory: dict[int, UntypedStorage] = {}

    def lend(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            if type(x) is torch.Generator:
                self.strangers.append(x)
            return HOST if type(x) is torch.device else x
        own = x
        if x.device.type == NAME:
            own = _lent(x)
            self.lent.append(own)
            self._memory[own.untyped_storage()._cdata] = x.untyped_storage()
        elif x.dim():
            self.strangers.append(x)
        self._given[id(own)] = x
        return own

    def check(self, name: str, allowed: Any) -> None:
        """Refuse what is not on the device."""
        for each in self.strangers:
            if type(each) is torch.Generator:
                raise RuntimeError(f"{name}: Expected a '{NAME}' device type for generator but found 'cpu'")
            if self.lent and not any(each is x for x in allowed):
                theirs = ", ".join(str(tuple(x.shape)) for x in self.lent)
                found = f"{tuple(each.shape)} on {each.device}, and {theirs} on {NAME}"
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {found}")

    def follow(self) -> None:
        for each in self.lent:
            _follow(self._given[id(each)], each)

    def take(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        given = self._given.get(id(x))
        return _taken(x, self._memory.get(x.untyped_storage()._cdata)) if given is None else given


def _each(function: Callable[[Any], Any], x: Any) -> Any:
    """The same of every tensor in lists of tensors."""
    if type(x) not in (list, tuple):
        return function(x)
    return type(x)([_each(function, each) if type(each) in (list, tuple) else function(each) for each in x])


def _overload(op: Any, args: Any) -> Callable[..., Any]:
    """The operation, or its overload for numbers: what were tensors of one number come here as that."""
    numbers = any(type(args[place]) in (int, float) for place in _tensors_of(op) if place < len(args))
    return op.overloadpacket if numbers else op


@functools.cache
def _tensors_of(op: Any) -> list[int]:
    return [place for place, each in enumerate(op._schema.arguments) if str(each.type) == "Tensor"]


def _lent(x: Tensor) -> Tensor:
    """A tensor of the CPU with the same memory."""
    storage = x.untyped_storage()
    if _bytes(storage.host) < _bytes(storage):
        raise RuntimeError("the memory of a tensor is used that has been given back")
    return torch.empty(0, dtype=x.dtype).set_(storage.host, x.storage_offset(), x.shape, x.stride())


def _taken(x: Tensor, storage: UntypedStorage | None) -> Tensor:
    """A tensor of the device with the memory of one on the CPU, which is that of another on the device, or new."""
    made = torch._C._acc.create_empty_tensor((0,), x.dtype)
    return _set(made, x, _storage(x.untyped_storage()) if storage is None else storage)


def _follow(x: Tensor, lent: Tensor) -> None:
    """Make a tensor of the device what an operation in place has made of its counterpart."""
    storage = x.untyped_storage()
    if lent.data_ptr() != x.data_ptr() or lent.shape != x.shape or lent.stride() != x.stride():
        own = lent.untyped_storage()
        _set(x, lent, storage if own.data_ptr() == storage.data_ptr() else _storage(own))


def _storage(host: UntypedStorage) -> UntypedStorage:
    """Memory of the device; what keeps the host's alive is that torch keeps an object in Python for each."""
    made = torch._C._construct_storage_from_data_pointer(host.data_ptr(), torch.device(NAME, 0), host.nbytes())
    made.host = host
    return made


def _of_memory(own: Callable[..., Any]) -> Callable[..., Any]:
    """A method of storages that does to those of the device, which torch cannot manage, what it does to the host's."""

    def method(self: UntypedStorage, *args: Any, **kwargs: Any) -> Any:
        mine = getattr(self, "host", self)
        found = own(mine, *(getattr(x, "host", x) for x in args), **kwargs)
        if mine is self or not isinstance(found, UntypedStorage):
            return found
        return self if found is mine else _storage(found)

    return method


def _set(x: Tensor, like: Tensor, storage: UntypedStorage) -> Tensor:
    op = _aten.set_.source_Storage_storage_offset
    return _by_name_of_cpu(op, x, storage, like.storage_offset(), like.shape, like.stride())


def _by_name_of_cpu(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Done by the CPU's kernel to the tensors themselves: one that only sets where and how memory is seen."""
    return op._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
