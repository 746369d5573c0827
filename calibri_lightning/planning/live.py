"""Follows how many bytes of tensors are alive while some code runs; on the meta device nothing is computed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make on one device, for as long as something refers to them.

    What existed before (weights, say) does not count. Of what kernels allocate for their own use, one thing is counted:
    a convolution's copies of its input and output in another order, which the libraries of CPUs and GPUs make. Not
    counted is what an allocator adds by rounding and fragmentation.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts at zero.

        Args:
            device: Where tensors count.
        """
        super().__init__()
        self.peak = 0
        """Most bytes alive at a time."""
        self._now = 0
        self._device = device
        self._known: dict[int, weakref.ref[Any]] = {}
        self._collects = False

    def __enter__(self) -> LiveBytes:
        """Starts to follow; Python's collector rests, for what dies in a cycle would die at a time of its choice."""
        self._collects = gc.isenabled()
        gc.disable()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Ends to follow."""
        super().__exit__(*exception)
        if self._collects:
            gc.enable()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation and notes what it made."""
        for value in tree_leaves((args, kwargs)):
            self._note(value, new=False)
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            self._note(value, new=True)
        if func is torch.ops.aten.convolution.default and made.device == self._device:
            copies = (args[0].numel() + made.numel()) * made.element_size()
            self.peak = max(self.peak, self._now + copies)
        return made

    def _note(self, value: Any, new: bool) -> None:
        if not isinstance(value, Tensor) or value.device != self._device:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0

        def gone(_: Any) -> None:
            self._now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)


class FusedAttention(TorchFunctionMode):
    """Lets attention on the meta device take the memory that a fused kernel takes: no matrix of logits.

    Without it the operation falls back to one that holds every query's logits for every key, as no GPU and no CPU does
    nowadays. The output lies in memory as the kernels put it, heads after positions. Gradients pass,
    and what the kernels keep for them is kept.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replaces scaled_dot_product_attention on meta tensors, and nothing else."""
        named = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | named
            query, value = given["query"], given["value"]
            if query.is_meta:
                return _Attention.apply(query, given["key"], value)
        return func(*args, **named)


class _Attention(torch.autograd.Function):
    """The memory of a fused kernel: it keeps its inputs and output for the backward, and one number a query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Makes an output without numbers."""
        *batch, heads, length, _ = query.shape
        output = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-3, -2)
        # The logarithms of the sums of exponentials.
        logsumexp = query.new_empty(*batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Makes gradients without numbers."""
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
