"""Where τ comes from: the weights of a reference and of the base that it was trained from."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from zokern.checkpoints import opened
from zokern.checks import PARAM_DTYPES
from zokern.laws import canonical_name
from zokern.merging import BUCKET, SparseTau, sparse_tau
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
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if self._tensors.setdefault(canonical_name(name), tensor) is not tensor:
                raise ValueError(f"{what} has several tensors called {canonical_name(name)!r}")
        self._plain: dict[str, list[str]] = {}
        for name in self._tensors:
            self._plain.setdefault(plain_name(name), []).append(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self.match(name)].detach()

    def problem(self, name: str, param: Tensor) -> str | None:
        """What is wrong with the tensor of that name beside the parameter, if anything."""
        try:
            tensor = self[name]
        except KeyError as error:
            return self.missing(name, *error.args)
        if tensor.shape != param.shape:
            return (
                f"{self._what}'s {name!r} has the shape {tuple(tensor.shape)}, the parameter "
                f"{tuple(param.shape)}"
            )
        if tensor.dtype not in (*PARAM_DTYPES, torch.float64):
            return f"{self._what}'s {name!r} is {tensor.dtype}"
        if tensor.layout != torch.strided or tensor.is_meta:
            return f"{self._what}'s {name!r} has no dense values"
        return None

    def missing(self, name: str, what: str = "no") -> str:
        return f"{self._what} has {what} {name!r}"

    def match(self, name: str) -> str:
        """The name here of that tensor; KeyError where there is none, or more than one."""
        if canonical_name(name) in self._tensors:
            return canonical_name(name)
        alike = self._plain.get(plain_name(name), [])
        if len(alike) == 1:
            return alike[0]
        raise KeyError("no" if not alike else f"several adapters' {alike[:3]} for")


def check_weights(sources: list[Weights], params: list[tuple[str, Tensor]]) -> None:
    """Raises ValueError, listing them, for tensors that are missing or of another shape."""
    problems = []
    for source in sources:
        exact = {canonical_name(name) for name, _ in params}
        for name, param in params:
            problem = source.problem(name, param)
            if problem is None and source.match(name) in exact - {canonical_name(name)}:
                problem = source.missing(name)
            if problem is not None:
                problems.append(problem)
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{'; '.join(problems[:8])}{more}")


def stored_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which what is made of them is kept."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.float32 if dtype == torch.float64 else dtype


def smaller(tau: Tensor) -> Tensor | SparseTau:
    """τ without its zeros, where that halves its bytes at least."""
    dense_bytes = tau.numel() * tau.element_size()
    kept_bytes = int(tau.count_nonzero()) * (tau.element_size() + 2)
    if 2 * kept_bytes <= dense_bytes:
        return sparse_tau(tau)
    # -0 becomes +0, as which both forms are read.
    return tau + 0.0


def check_sparse(name: str, tau: SparseTau, numel: int) -> None:
    """Raises ValueError if a τ that was saved is not that of so many elements."""
    starts, places, values = tau
    whole = len(starts) == -(-numel // BUCKET) + 1 and places.shape == values.shape
    if not whole or int(starts[-1]) != len(values) or bool((starts.diff() < 0).any()):
        raise ValueError(f"the state's τ of {name} is damaged: it does not have {numel} elements")
