"""The backends, and which of them runs an operation.

A backend is a package with the functions

- ``why_not(device) -> str | None``: None where it can run on that kind of device, else the reason;
- ``why_not_by_default(device)``: likewise, for the automatic choice;
- ``perturb_(sweep)``, ``inner_products(products)``, ``sample(law, numel, ...)``: the operations of
  :mod:`zokern.ops`;
- ``prepare(sweep)``, which not every backend has: a function of the outs and of the draws, coeffs,
  scales and seed in :class:`zokern.ops.SweepNumbers` that runs a sweep into outs again, by one row
  of numbers for all tensors, into outs that lie to each other as the sweep's do;
- ``select(selection)``: float32 thresholds, int64 cuts and the float32 largest magnitudes (NaN
  where a value is), ``l1_sums(sums)`` in float64, ``histogram(histogram)`` and
  ``equal_counts(counts)`` in int64: those of :mod:`zokern.ops.magnitudes`, on the tensors' device;
- ``merge_step_(step)``: that of :mod:`zokern.ops.steps`;
- ``merge_deltas(merge)``: that of :mod:`zokern.ops.deltas`.

To add one, write the package and put its name into ``ORDER``.
"""

import functools
import importlib
from types import ModuleType

import torch

from zokern import env

# The automatic choice takes the first that can run.
ORDER = ("native", "triton", "reference")

_chosen: str | None = None


@functools.cache
def load(name: str) -> ModuleType:
    if name not in ORDER:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(ORDER)}")
    return importlib.import_module(f"zokern.backends.{name}")


def chosen() -> str | None:
    """The backend asked for by name, or None where the choice is automatic."""
    return _chosen or env.backend()


def select(device: torch.device) -> ModuleType:
    """The backend that runs operations on this device."""
    name = chosen()
    if name is not None:
        module = load(name)
        reason = module.why_not(device)
        if reason is not None:
            raise RuntimeError(f"the backend {name!r} cannot run on {device}: {reason}")
        return module
    for name in ORDER:
        module = load(name)
        if module.why_not_by_default(device) is None:
            return module
    raise AssertionError("the reference backend runs everywhere")


class use_backend:
    """Choose the backend by name; ``None`` goes back to the automatic choice.

    As a function the choice stays; as a context manager it ends with the block::

        zokern.use_backend("triton")
        with zokern.use_backend("reference"):
            ...

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that can
    run on no device of this machine.
    """

    def __init__(self, name: str | None) -> None:
        global _chosen
        self._before = _chosen
        if name is not None:
            module = load(name)
            reasons = {kind: module.why_not(torch.device(kind)) for kind in device_kinds()}
            if None not in reasons.values():
                why = "; ".join(f"on {kind}: {reason}" for kind, reason in reasons.items())
                raise RuntimeError(f"the backend {name!r} cannot run here: {why}")
        _chosen = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _chosen
        _chosen = self._before


def device_kinds() -> list[str]:
    """The kinds of device that torch has on this machine."""
    kinds = ["cpu"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        kinds.append(accelerator.type)
    return kinds
