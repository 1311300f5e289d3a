"""The model's own forward, paused whenever one of its blocks is about to be called.

Each forward runs in a greenlet, on a stack of its own. When it calls a block it hands over the arguments and waits;
given the block's output it goes on, to the next block. Nothing is traced or rewritten: masks, rotary embeddings and
control flow are whatever the model's own code makes them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitpress.models.blocks import Block, Call


class PausePoints:
    """Blocks whose forward pauses when it is called inside a :class:`PausedForward`, and runs otherwise."""

    def __init__(self, blocks: list[Block]) -> None:
        self._blocks = blocks
        self._forwards: dict[str, Callable[..., Any]] = {}

    @contextmanager
    def installed(self) -> Iterator["PausePoints"]:
        """The blocks' forwards are replaced inside the ``with``, and their own again after it."""
        own = {b.name: b.module.__dict__.get("forward") for b in self._blocks}
        self._forwards = {b.name: b.module.forward for b in self._blocks}
        try:
            for block in self._blocks:
                block.module.forward = self._pausing(block)
            yield self
        finally:
            for block in self._blocks:
                forward = own[block.name]
                if forward is None:
                    block.module.__dict__.pop("forward", None)
                else:
                    block.module.forward = forward

    def run(self, block: Block, call: Call) -> Any:
        """The block's own forward on the arguments of a call, outside of any paused forward."""
        return call.of(self._forwards[block.name])

    def _pausing(self, block: Block) -> Callable[..., Any]:
        def pause(*args: Any, **kwargs: Any) -> Any:
            here = getcurrent()
            if not isinstance(here, _Forward):
                return self._forwards[block.name](*args, **kwargs)
            return here.hand_over(block, args, kwargs)

        return pause


class _Forward(greenlet):  # type: ignore[misc]
    """A greenlet that keeps the thread's torch state of its own across switches."""

    def hand_over(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inside = _TorchState()
        try:
            return self.parent.switch((block, Call(args, kwargs, inside.entered)))
        finally:
            inside.put()


class PausedForward:
    """One forward of the model that stops at each call of a block.

    Attributes:
        at: the block that is about to be called, or None when the forward has ended.
        call: the arguments of that call.
        result: what the model returned, once it has.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.at: Block | None = None
        self.call: Call | None = None
        self.result: Any = None
        self._greenlet = _Forward(lambda: model(*args, **kwargs))
        self._greenlet.gr_context = copy_context()
        self._guard: Any = None

    @property
    def waiting_for(self) -> Call:
        """The call that it waits for."""
        if self.call is None:
            raise RuntimeError("the forward is not paused at a block.")
        return self.call

    def resume(self, output: Any = None) -> None:
        """Start, or go on with the output of the block that is waited for, to the next call of a block."""
        self.call = None
        with self._inside():
            handed = self._greenlet.switch() if self.at is None else self._greenlet.switch(output)
        if self._greenlet.dead:
            self.at, self.result = None, handed
        else:
            self.at, self.call = handed

    def stop(self) -> None:
        """Give the forward up where it is; its ``finally`` clauses run."""
        self.at = self.call = None
        if not self._greenlet.dead:
            with self._inside():
                self._greenlet.throw(GreenletExit)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Around a switch to the forward: torch's state of this side is back after it."""
        outside = _TorchState()
        inference = torch.is_inference_mode_enabled()
        if self._guard is not None:
            self._guard.__exit__(None, None, None)
            self._guard = None
        try:
            yield
        finally:
            if torch.is_inference_mode_enabled() != inference:
                # The mode is set and restored by a guard only: it is held while the forward is paused.
                self._guard = torch._C._InferenceMode(inference)
            outside.put()


class _TorchState:
    """What torch keeps per thread: it belongs to the forward that set it, not to the one that runs next."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _devices()
        }
        self.cache = torch.is_autocast_cache_enabled()
        self.function_modes = _function_modes()
        self.dispatch_modes = _dispatch_modes()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside the ``with`` this state, but for gradients: what is computed there is the scheduler's."""
        outside = _TorchState()
        try:
            self.put()
            torch.set_grad_enabled(outside.grad)
            yield
        finally:
            outside.put()

    def put(self) -> None:
        torch.set_grad_enabled(self.grad)
        for device, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.cache)
        # Weights change between switches: a cast copy of one must not outlive them.
        torch.clear_autocast_cache()
        _set_function_modes(self.function_modes)
        _set_dispatch_modes(self.dispatch_modes)


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _function_modes() -> list[TorchFunctionMode]:
    count = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(count)]


def _set_function_modes(modes: list[TorchFunctionMode]) -> None:
    if modes == _function_modes():
        return
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def _dispatch_modes() -> list[TorchDispatchMode]:
    count = torch._C._len_torch_dispatch_stack()
    return [torch._C._get_dispatch_stack_at(i) for i in range(count)]


def _set_dispatch_modes(modes: list[TorchDispatchMode]) -> None:
    if modes == _dispatch_modes():
        return
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    for mode in modes:
        torch._C._push_on_torch_dispatch_stack(mode)
