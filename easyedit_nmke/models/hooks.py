"""The only ways into a forward pass: read what modules see (`record`) and how they are called (`record_calls`), leave out what
nobody will read (`only_at`), change what modules put out (`altered`), and silence inputs (`silenced`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch


class _Stop(Exception):
    """Ends a forward pass once everything asked for has been seen."""


def first_tensor(value) -> torch.Tensor:
    """A module's main tensor: blocks of some architectures return a tuple."""
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def record(wanted: Mapping[str, tuple[torch.nn.Module, str]], stop: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a dictionary that a forward pass fills: name -> the module's "input" or "output" (its first tensor), not detached.

    With `stop`, the forward pass ends (quietly, inside the block) as soon as all of them have been seen: nothing above the
    last one is computed.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep(name, value):
        seen[name] = first_tensor(value)
        if stop and len(seen) == len(wanted):
            raise _Stop

    def hook_for(name, side):
        def on_input(_module, args, kwargs):
            keep(name, args[0] if args else kwargs["hidden_states"])

        def on_output(_module, _args, output):
            keep(name, output)

        return on_input if side == "input" else on_output

    handles = []
    try:
        for name, (module, side) in wanted.items():
            hook = hook_for(name, side)
            if side == "input":
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook))
        yield seen
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_calls(modules: Sequence[torch.nn.Module]) -> Iterator[list[tuple[tuple, dict]]]:
    """Yield a list that a forward pass fills: what each module, in order, is called with besides its hidden states (masks,
    positions), as (args, kwargs). `module(hidden, *args, **kwargs)` repeats the call with other states."""
    calls: list[tuple[tuple, dict]] = []

    def keep(_module, args, kwargs):
        calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def repeated(
    blocks: Iterable[torch.nn.Module], hidden: torch.Tensor, calls: Iterable[tuple[tuple, dict]]
) -> Iterator[torch.Tensor]:
    """The output of each block, one after the other, called as `record_calls` saw; the first on `hidden`."""
    for block, (args, kwargs) in zip(blocks, calls, strict=True):
        hidden = first_tensor(block(hidden.to(next(block.parameters()).device), *args, **kwargs))
        yield hidden


@contextmanager
def only_at(places: Mapping[torch.nn.Module, torch.Tensor]) -> Iterator[None]:
    """Inside the block, each module (one that treats every position by itself, as an FFN does) is computed at some positions
    only: `places` index its input [B, T, D] as [B·T, D]. Its output is zero elsewhere."""

    def hooks_for(where: torch.Tensor):
        shape = None

        def gather(_module, args):
            nonlocal shape
            shape = args[0].shape
            return (args[0].flatten(0, 1).index_select(0, where.to(args[0].device))[None], *args[1:])

        def scatter(_module, _args, output):
            nothing = output.new_zeros(shape).flatten(0, 1)
            return nothing.index_copy(0, where.to(output.device), output[0]).unflatten(0, shape[:2])

        return gather, scatter

    handles = []
    try:
        for module, where in places.items():
            gather, scatter = hooks_for(where)
            handles += [module.register_forward_pre_hook(gather), module.register_forward_hook(scatter)]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def altered(outputs: Mapping[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Inside the block, each module puts out what its function makes of its output (its first tensor)."""

    def hook_for(change):
        def alter(_module, _args, output):
            changed = change(first_tensor(output))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return alter

    handles = []
    try:
        for module, change in outputs.items():
            handles.append(module.register_forward_hook(hook_for(change)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def shifted(module: torch.nn.Module, columns: torch.Tensor, delta: torch.Tensor) -> AbstractContextManager[None]:
    """Inside the block, the module's output [B, T, D] has `delta` [B, D] added in each row's column of `columns` [B]."""

    def add(states: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(states), device=states.device)
        return states.index_put((rows, columns.to(states.device)), delta.to(states), accumulate=True)

    return altered({module: add})


@contextmanager
def silenced(inputs: Mapping[torch.nn.Module, torch.Tensor]) -> Iterator[None]:
    """Inside the block some inputs of each module (indices of the last dimension) are 0, in place of what they would be. Weights
    are not touched, and however the block ends, the model is as it was."""

    def hook_for(chosen: torch.Tensor):
        def silence(_module, args):
            return (args[0].index_fill(-1, chosen.to(args[0].device), 0), *args[1:])

        return silence

    handles = []
    try:
        for module, chosen in inputs.items():
            handles.append(module.register_forward_pre_hook(hook_for(chosen)))
        yield
    finally:
        for handle in handles:
            handle.remove()
