"""What is merged: modules, state dicts and safetensors checkpoints, matched name by name."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from zokern.checkpoints import opened
from zokern.checks import PARAM_DTYPES
from zokern.laws import canonical_name

Model = nn.Module | Mapping[str, Tensor] | str | os.PathLike

# Names that an error lists.
LISTED = 8


@dataclass(frozen=True)
class Entry:
    """A tensor of the result.

    Attributes:
        names: under which it is stored, as the base or else the first model has them; several
            where these are one tensor there (tied weights).
        models: the models' tensors, in their order.
    """

    names: list[str]
    base: Tensor | None
    models: list[Tensor]

    @property
    def like(self) -> Tensor:
        """What the result is like."""
        return self.models[0] if self.base is None else self.base

    @property
    def has_one_dtype(self) -> bool:
        return all(model.dtype == self.like.dtype for model in self.models)

    @property
    def is_merged(self) -> bool:
        """Whether it is merged, not copied."""
        return self.like.is_floating_point()


def is_path(given: object) -> TypeGuard[str | os.PathLike]:
    return isinstance(given, (str, os.PathLike))


def read(name: str, given: Model) -> dict[str, Tensor]:
    """A model's tensors; those of files are views of mapped ones."""
    if isinstance(given, nn.Module):
        state = {key: value for key, value in given.state_dict().items() if _is_tensor(value)}
    elif isinstance(given, Mapping):
        state = dict(given)
        for key, value in state.items():
            if not _is_tensor(value):
                raise TypeError(f"{name}[{key!r}] must be a tensor, not {type(value).__name__}")
    elif is_path(given):
        state = opened(Path(given))
    else:
        raise TypeError(
            f"{name} must be a module, a state dict or a path, not {type(given).__name__}"
        )
    if not state:
        raise ValueError(f"{name} has no tensors")
    return {key: value.detach() for key, value in state.items()}


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def aligned(models: list[dict[str, Tensor]], base: dict[str, Tensor] | None) -> list[Entry]:
    """The tensors of the base, or else of the first model, with those of the models.

    Components that wrappers add to names do not count.

    Raises:
        ValueError: that lists the names that are missing or of another shape or dtype.
    """
    titles = [f"models[{m}]" for m in range(len(models))]
    target, title = (models[0], titles[0]) if base is None else (base, "base")
    groups = _tied(title, target)
    problems: list[str] = []
    found: list[list[Tensor | None]] = []
    for own, model in zip(titles, models, strict=True):
        by_name = _by_canonical_name(own, model)
        tensors = [_first(by_name, names) for names in groups]
        missing = [n[0] for n, tensor in zip(groups, tensors, strict=True) if tensor is None]
        if missing:
            problems.append(f"{own} has no {_listed(missing)}")
        for names in groups:
            places = {_place(t) for n in names if (t := by_name.get(canonical_name(n))) is not None}
            if len(places) > 1:
                problems.append(f"{_listed(names)} are one tensor in {title}, several in {own}")
        known = {_place(tensor) for tensor in tensors if tensor is not None}
        wanted = {canonical_name(name) for names in groups for name in names}
        extra = [n for n in by_name.keys() - wanted if _place(by_name[n]) not in known]
        if extra:
            problems.append(f"{title} has no {_listed(sorted(extra))}, which {own} has")
        for names, tensor in zip(groups, tensors, strict=True):
            if tensor is not None:
                problems += _differences(names[0], target[names[0]], tensor, title, own)
        found.append(tensors)
    if problems:
        rest = len(problems) - LISTED
        more = f"; and {rest} more" if rest > 0 else ""
        raise ValueError(f"the models cannot be merged: {'; '.join(problems[:LISTED])}{more}")
    return [
        Entry(
            names,
            None if base is None else base[names[0]],
            [tensor for tensors in found if (tensor := tensors[i]) is not None],
        )
        for i, names in enumerate(groups)
    ]


def _by_canonical_name(title: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if result.setdefault(canonical_name(name), tensor) is not tensor:
            raise ValueError(
                f"{title} has two tensors of the name {canonical_name(name)!r} (components of "
                "wrappers, such as 'module.', do not count)"
            )
    return result


def _tied(title: str, tensors: dict[str, Tensor]) -> list[list[str]]:
    """The names, those together that are one tensor."""
    _by_canonical_name(title, tensors)
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(_place(tensor), []).append(name)
    return list(groups.values())


def _place(tensor: Tensor) -> object:
    """Equal for tensors that are the same elements in memory."""
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.device.type == "meta":
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _first(by_name: dict[str, Tensor], names: list[str]) -> Tensor | None:
    for name in names:
        if (tensor := by_name.get(canonical_name(name))) is not None:
            return tensor
    return None


def _differences(name: str, wanted: Tensor, given: Tensor, title: str, own: str) -> list[str]:
    if wanted.shape != given.shape:
        shapes = tuple(wanted.shape), tuple(given.shape)
        return [f"{name} has the shape {shapes[0]} in {title}, {shapes[1]} in {own}"]
    for tensor in (wanted, given):
        merges = tensor.is_floating_point() or tensor.is_complex()
        if merges and tensor.dtype not in PARAM_DTYPES:
            return [f"{name} is {tensor.dtype}: float32, bfloat16 and float16 are merged"]
    if wanted.is_floating_point() != given.is_floating_point():
        return [f"{name} is {wanted.dtype} in {title}, {given.dtype} in {own}"]
    return []


def _listed(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(map(repr, names[:LISTED])) + (f" and {rest} more" if rest > 0 else "")
