"""Where τ comes from: the weights of a reference and of the base that it was trained from."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from zokern.checkpoints import opened
from zokern.laws import canonical_name
from zokern.merging import SparseTau, sparse_tau
from zokern.optim.names import plain_name

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike


class Weights:
    """Tensors by the names that an optimizer's parameters have.

    Names match without what wrappers add or, where that finds nothing, without what PEFT adds. The
    tensors of a path are views of a mapped file: they are in memory while they are looked at.
    """

    def __init__(self, source: Source, what: str) -> None:
        tensors: dict[str, Tensor]
        if isinstance(source, nn.Module):
            tensors = dict(source.named_parameters(remove_duplicate=False))
        elif isinstance(source, Mapping):
            tensors = {name: t for name, t in source.items() if isinstance(t, Tensor)}
        elif isinstance(source, (str, os.PathLike)):
            tensors = opened(Path(source))
        else:
            raise TypeError(
                f"{what} must be a module, a state dict or the path of a safetensors checkpoint, "
                f"not {type(source).__name__}"
            )
        self._what = what
        self._tensors = {canonical_name(name): tensor for name, tensor in tensors.items()}
        self._plain: dict[str, list[str]] = {}
        for name in self._tensors:
            self._plain.setdefault(plain_name(name), []).append(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._match(name)].detach()

    def problem(self, name: str, param: Tensor) -> str | None:
        """What is wrong with the tensor of that name beside the parameter, if anything."""
        try:
            tensor = self[name]
        except KeyError as error:
            return f"{self._what} has {error.args[0]} {name!r}"
        if tensor.shape != param.shape:
            return (
                f"{self._what}'s {name!r} has the shape {tuple(tensor.shape)}, the parameter "
                f"{tuple(param.shape)}"
            )
        if not tensor.is_floating_point():
            return f"{self._what}'s {name!r} is {tensor.dtype}"
        return None

    def _match(self, name: str) -> str:
        if canonical_name(name) in self._tensors:
            return canonical_name(name)
        alike = self._plain.get(plain_name(name), [])
        if len(alike) == 1:
            return alike[0]
        raise KeyError("no" if not alike else f"several adapters' {alike[:3]} for")


def check_weights(sources: list[Weights], params: list[tuple[str, Tensor]]) -> None:
    """Raises ValueError, listing them, for tensors that are missing or of another shape."""
    problems = [
        problem
        for name, param in params
        for source in sources
        if (problem := source.problem(name, param)) is not None
    ]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{'; '.join(problems[:8])}{more}")


def smaller(tau: Tensor) -> Tensor | SparseTau:
    """τ without its zeros, where that halves its bytes at least."""
    dense_bytes = tau.numel() * tau.element_size()
    kept_bytes = int(tau.count_nonzero()) * (tau.element_size() + 2)
    if 2 * kept_bytes <= dense_bytes:
        return sparse_tau(tau)
    # -0 becomes +0, as which both forms are read.
    return tau + 0.0
