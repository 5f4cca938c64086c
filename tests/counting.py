"""What torch is asked to do, by phase: launches, waits, operations, bytes, memory held."""

import weakref
from collections import Counter
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
# Of these no kernel is launched: views, memory that is not written, questions about types.
FREE = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "squeeze_", "detach",
    "alias", "split", "split_with_sizes", "as_strided", "unbind", "lift_fresh", "_reshape_alias", "diagonal", "empty", "empty_like",
    "new_empty", "empty_strided", "promote_types", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal"}
READ_AS_LISTS = ("tolist", "cpu", "numpy")


def _product(left, right):
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


FLOPS = {
    aten.addmm_: lambda _, left, right: _product(left, right),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v: sdpa_flop_count(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}
PRODUCTS = {aten.mm, aten.addmm}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    FLOPS[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, _: 2 * x.numel() * len(weight)


class Counts(TorchDispatchMode):
    """Counts by phase; `phase(name)` begins one. bytes: read and written by every launch; read: of `parameters`, by products."""

    def __init__(self, parameters=()):
        super().__init__()
        self.now = "rest"
        self.launches, self.waits, self.flops, self.bytes, self.read, self.peak = (Counter() for _ in range(6))
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._known, self._held = set(), 0
        self._lists = _Lists(self)

    @contextmanager
    def phase(self, name):
        before, self.now = self.now, name
        self.peak[name] = max(self.peak[name], self._held)
        try:
            yield
        finally:
            self.now = before

    def __enter__(self):
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, packet = func(*args, **(kwargs or {})), func.overloadpacket
        name = packet.__name__
        self.launches[self.now] += name not in FREE
        self.waits[self.now] += name in WAITS
        if packet in FLOPS:
            self.flops[self.now] += FLOPS[packet](*args[: 4 if "backward" in name else 3])
        elif packet in flop_registry:
            self.flops[self.now] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        if packet in PRODUCTS:
            matrices = [a for a in args if torch.is_tensor(a) and a.dim() > 1]
            self.read[self.now] += sum(a.nbytes for a in matrices if a.untyped_storage().data_ptr() in self._parameters)
        made, read = ([leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)] for tree in (out, args))
        if name not in FREE:
            self.bytes[self.now] += sum(tensor.nbytes for tensor in [*made, *read])
        seen = {tensor.untyped_storage()._cdata for tensor in read}
        for storage in (tensor.untyped_storage() for tensor in made):
            if storage._cdata not in seen:
                self._hold(storage)
        return out

    def _hold(self, storage):
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._held += storage.nbytes()
            self.peak[self.now] = max(self.peak[self.now], self._held)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, number, size):
        self._known.discard(number)
        self._held -= size


class _Lists(TorchFunctionMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.counts.waits[self.counts.now] += getattr(func, "__name__", "") in READ_AS_LISTS
        return func(*args, **(kwargs or {}))
