"""Parameters that are told when somebody reads them, for the time of an evaluation."""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from zokern.memory import Buffer
from zokern.optim.compiled import check_not_compiling

# What is asked of a tensor without a look at its values.
PASSIVE = frozenset(
    {
        *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size"),
        *("storage_offset", "is_contiguous", "is_floating_point", "is_complex", "is_signed"),
        *("get_device", "has_names", "is_inference", "is_shared", "is_pinned", "is_conj", "is_neg"),
        *("requires_grad_", "register_hook", "__hash__", "__len__", "is_tensor", "is_storage"),
        "_is_view",
    }
)
# What is asked of how the parameter is stored.
LAYOUT = frozenset({"stride", "storage_offset", "is_contiguous", "is_shared", "is_pinned"})
# Properties whose values are the tensor's own.
READING_PROPERTIES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
# Whoever gets an address reads the memory behind torch's back.
ADDRESSES = frozenset({"data_ptr", "untyped_storage", "storage", "_typed_storage"})
# Methods of DTensors, which call no function of torch.
OF_PARTS = ("to_local", "full_tensor", "redistribute")


class Reader(Protocol):
    """Who decides what the readers of a parameter see."""

    def name_of(self, param: Tensor) -> str:
        """The parameter's name, for messages."""

    def at_rest(self, param: Tensor) -> Tensor:
        """The parameter as it is stored."""

    def instead(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The result, where no whole parameter need be made for it; or NotImplemented."""

    def lend(self, param: Tensor) -> tuple[Tensor, Buffer]:
        """What is read instead of the parameter, and the buffer that it lies in."""

    def take_back(self, buffer: Buffer) -> None:
        """Nobody who was lent the buffer needs it any more."""


_readers: dict[int, Reader] = {}


class Watched:
    """Mixed into the class of a parameter while it is watched."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        check_not_compiling()
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if _is_passive(func):
                if func.__name__ in LAYOUT:
                    args = (_readers[id(args[0])].at_rest(args[0]), *args[1:])
                return func(*args, **kwargs)
            return _read(func, args, kwargs)

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        return memo.setdefault(id(self), copy.deepcopy(self._at_rest(), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._at_rest().__reduce_ex__(protocol)

    def _at_rest(self) -> nn.Parameter:
        # Copies are of the weights: an optimizer that is copied with them stands at rest too.
        with torch._C.DisableTorchFunctionSubclass():
            stored = _readers[id(self)].at_rest(self)  # type: ignore[arg-type]
            return nn.Parameter(stored, self.requires_grad)  # type: ignore[attr-defined]


def _is_passive(func: Callable) -> bool:
    name = func.__name__
    if name in ("__get__", "__set__"):
        return func.__self__.__name__ not in READING_PROPERTIES  # type: ignore[attr-defined]
    return name in PASSIVE


def _read(func: Callable, args: tuple, kwargs: dict) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    params: list[Any] = list({id(p): p for p in leaves if isinstance(p, Watched)}.values())
    name = func.__name__
    if name in ADDRESSES:
        raise RuntimeError(
            f"{_name(params[0])} is read by its address outside the forward of its own module, "
            "where it is not perturbed: with layerwise=True this module cannot be evaluated; take "
            "layerwise=False"
        )
    if (result := _readers[id(params[0])].instead(func, args, kwargs)) is not NotImplemented:
        return result
    tensors: dict[int, Tensor] = {}
    buffers = []
    try:
        for param in params:
            tensors[id(param)], buffer = _readers[id(param)].lend(param)
            buffers.append((_readers[id(param)], buffer, buffer.memory._version))
        result = _call(func, [tensors.get(id(leaf), leaf) for leaf in leaves], spec)
        if name == "__set__" or any(
            buffer.memory._version != known for _, buffer, known in buffers
        ):
            raise RuntimeError(
                f"{_name(params[0])} was written to while it was evaluated ({name}): the closure "
                "must leave the weights alone"
            )
        return result
    finally:
        # Whoever gives a buffer back may hold nothing of it.
        tensors.clear()
        for reader, buffer, _ in buffers:
            reader.take_back(buffer)


def _call(func: Callable, leaves: list, spec: TreeSpec) -> Any:
    args, kwargs = tree_unflatten(leaves, spec)
    return func(*args, **kwargs)


def _name(param: Tensor) -> str:
    return _readers[id(param)].name_of(param)


def _reading(name: str) -> Callable:
    """The method of that name of a watched class."""

    def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        tensor, _ = _readers[id(self)].lend(self)
        return getattr(tensor, name)(*args, **kwargs)

    return read


_classes: dict[type, type] = {}


def check_unwatched(param: Tensor) -> None:
    """Raises RuntimeError if somebody watches it already."""
    if id(param) in _readers:
        raise RuntimeError(
            f"{_name(param)} is being evaluated layerwise by another optimizer: end its step first"
        )


def watch(param: Tensor, reader: Reader) -> None:
    """Let the reader decide, from now on, what the parameter's readers see."""
    own = type(param)
    if own not in _classes:
        methods = {name: _reading(name) for name in OF_PARTS if hasattr(own, name)}
        body = {"__module__": own.__module__, **methods}
        _classes[own] = type(own.__name__, (Watched, own), body)
    _readers[id(param)] = reader
    param.__class__ = _classes[own]


def unwatch(param: Tensor) -> None:
    """Make it what it was."""
    look_away(param)
    _readers.pop(id(param), None)


def look_away(param: Tensor) -> None:
    """Let the readers of a parameter see what it holds, until :func:`look_again`."""
    if isinstance(param, Watched):
        param.__class__ = type(param).__mro__[2]


def look_again(param: Tensor) -> None:
    param.__class__ = _classes[type(param)]
