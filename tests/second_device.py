"""A second device where there is only one: tensors in the host's memory that count as lying on cuda:0.

Under `second_device` a tensor made on or moved to "cuda" says that it lies there, so the code takes its ways for CUDA,
and an operation that is given tensors of both sides raises Mixed where torch would. This proves that tensors lie where
they belong, and how often the host waits for the whole device. It proves nothing about a GPU's kernels and their
numbers, its memory and its speed, copies that were not waited for, or bitsandbytes' paging itself: of that only the
interface is here, tensors on the host that its own operations take from either side.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")
BYTES = 80 * 2**30

ACROSS = {"copy_", "_to_copy", "lift_fresh", "lift_fresh_copy"}
"""Operations that take tensors of both sides."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Those whose other tensors may lie on the host, if the first is the device's."""
ALIKE = {"stack", "cat"}
"""Those that, like fused and foreach ones, take no number () of the host beside the device's tensors."""

_DEVICE, _IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class Mixed(RuntimeError):
    """An operation was given tensors of two devices."""


@dataclass
class SecondDevice:
    waits: int = 0
    """Times that the host has waited for all of the device."""
    paged: list[Tensor] = field(default_factory=list)
    """All memory that bitsandbytes was given to page, which it never gives back."""
    _there: dict[int, StorageWeakRef] = field(default_factory=dict)
    """A weak reference keeps the key from being given to another storage."""

    def holds(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._there

    def put(self, tensor: Tensor, there: bool) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            if there:
                self._there[storage._cdata] = StorageWeakRef(storage)
            else:
                self._there.pop(storage._cdata, None)

    def is_paged(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return any(tensor.untyped_storage()._cdata == each.untyped_storage()._cdata for each in self.paged)

    def synchronize(self, *_: Any) -> None:
        self.waits += 1

    def get_paged(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As bitsandbytes has it: managed memory comes as a tensor on the host with two marks."""
        assert device.type == "cuda"
        result = torch.full(shape, 77, dtype=dtype)
        result.is_paged, result.page_deviceid = True, device.index  # type: ignore[attr-defined]
        self.paged.append(result)
        return result


@dataclass
class _Operations(TorchDispatchMode):
    """What is made of the device's tensors lies there too."""

    device: SecondDevice

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        if func.namespace == "bitsandbytes":
            given = [each for each in given if not self.device.is_paged(each)]
        there = [self.device.holds(each) for each in given]
        if any(there) and not all(there):
            self._check(func._schema.name.partition("::")[2], given, there)
        result = func(*args, **(kwargs or {}))
        storages = {each.untyped_storage()._cdata for each in given}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in storages:
                self.device.put(each, any(there))
        return result

    def _check(self, name: str, given: list[Tensor], there: list[bool]) -> None:
        alike = "fused" in name or ("foreach" in name and name != "_foreach_mul_") or name in ALIKE
        on_host = [each for each, is_there in zip(given, there, strict=True) if not is_there]
        if name in ACROSS or (name in INDEXING and there[0]):
            return
        if alike or any(each.dim() for each in on_host):
            raise Mixed(f"{name}: on the host {[tuple(each.shape) for each in on_host]}, of {len(given)} tensors")


@dataclass
class _Functions(TorchFunctionMode):
    """What names a device, which is kept from torch."""

    device: SecondDevice

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (_DEVICE, _IS_CUDA):
            there = self.device.holds(args[0])
            return there if func == _IS_CUDA else CUDA if there else torch.device("cpu")
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._moved(func, args, kwargs)
        if func is torch.Tensor.pin_memory:
            return args[0].clone()
        if func is torch.Tensor.numpy and self.device.holds(args[0]):
            raise Mixed("numpy of a tensor on the device")
        if func is torch.Tensor.backward:
            gradient = args[1] if len(args) > 1 else kwargs["gradient"]
            with self:  # Autograd calls backward passes written in Python, which are to see this mode too.
                _engine_run_backward(
                    args[:1],
                    (torch.ones_like(args[0]) if gradient is None else gradient,),
                    *(False, False, ()),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
            return None
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        there = torch.device(kwargs.pop("device")).type == "cuda"
        result = func(*args, **kwargs, device="cpu")
        self.device.put(result, there)
        return result

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, *rest = args
        target = {torch.Tensor.cpu: "cpu", torch.Tensor.cuda: "cuda"}.get(func, kwargs.pop("device", None))
        if rest and isinstance(rest[0], str | torch.device | Tensor):
            first = rest.pop(0)
            target = first
            if isinstance(first, Tensor):
                target, kwargs["dtype"] = CUDA if self.device.holds(first) else "cpu", first.dtype
        there = self.device.holds(tensor)
        wanted = there if target is None else torch.device(target).type == "cuda"
        copy = kwargs.pop("copy", False) or wanted != there
        if func is not torch.Tensor.to:
            rest = []
        result: Tensor = torch.Tensor.to(tensor, "cpu", *rest, copy=copy, **kwargs)
        if wanted != there:
            self.device.put(result, wanted)
        return result


@contextmanager
def second_device() -> Iterator[SecondDevice]:
    """While it lasts; afterwards all tensors lie on the host, as they did."""
    device = SecondDevice()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", device.synchronize)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (BYTES, BYTES))
        for name in ("memory_reserved", "memory_allocated", "max_memory_allocated"):
            patch.setattr(torch.cuda, name, lambda *_: 0)
        for name in ("reset_peak_memory_stats", "empty_cache"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        patch.setattr(bitsandbytes.functional, "get_paged", device.get_paged)
        patch.setattr(bitsandbytes.functional, "fill", lambda tensor, value: tensor.fill_(value))
        patch.setattr(bitsandbytes.functional, "prefetch_tensor", lambda tensor, to_cpu=False: None)
        with _Operations(device), _Functions(device):
            yield device
