"""The four merges: how their arguments become a recipe."""

import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from zokern.arguments import float32s, integer
from zokern.merge.inputs import Model
from zokern.merge.recipe import Recipe
from zokern.merge.run import run

Semantics = Literal["mergekit", "peft", "ties"]
MajoritySign = Literal["total", "frequency"]
Numbers = float | Sequence[float]

# Weights whose sum is smaller in magnitude do not normalize anything.
NO_WEIGHT = 1e-8


def linear(
    models: Sequence[Model],
    *,
    base: Model | None = None,
    weights: Numbers = 1.0,
    lambda_: float = 1.0,
    semantics: Semantics = "mergekit",
    normalize: bool | None = None,
    out: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """base + λ·Σ wᵢ·(modelᵢ - base), or without a base λ·Σ wᵢ·modelᵢ.

    With a base it is mergekit's ``task_arithmetic`` and peft's ``linear``, without one mergekit's
    ``linear``.

    Args:
        models: at least one, of the same names and shapes; components that wrappers add to names
            do not count. Integer and bool tensors are copied from the base (or the first model),
            with a warning where they differ.
        base: what the models were trained from.
        weights: of each model, or one for all; 1 by default.
        lambda_: what the sum is multiplied with.
        semantics: ``mergekit`` rounds the differences from the base to the models' dtype, ``peft``
            does not.
        normalize: divide by the sum of the weights, so that without a base the weights' mean
            comes out; by default where there is no base and ``semantics`` is ``mergekit``.
        out: a file, or a folder that does not exist, to which the result is written; the form is
            that of the base, or the first model, if that is a path, else a file.
        device: where the kernels run; where the base is by default.
        progress: show a progress bar.

    Returns:
        The new state dict, with the base's names; an empty one if it was written to ``out``.

    Raises:
        TypeError, ValueError: for an argument that does not fit, or names and shapes that differ,
            listing them, before anything is written.
    """
    _check_semantics(semantics, ("mergekit", "peft"), "linear merges")
    _check_options(semantics, mergekit={"normalize": normalize})
    if normalize is None:
        normalize = base is None and semantics == "mergekit"
    recipe = Recipe(
        **_common(models, weights, lambda_),
        densities=[1.0] * len(models),
        rounded=base is not None and semantics == "mergekit",
        normalize=normalize,
    )
    if normalize and base is None and abs(sum(recipe.weights)) < NO_WEIGHT:
        raise ValueError(f"the weights {recipe.weights} sum to 0: they cannot be normalized")
    return run(recipe, models, base, out=out, device=device, progress=progress)


def dare(
    models: Sequence[Model],
    *,
    density: Numbers,
    base: Model | None = None,
    weights: Numbers = 1.0,
    lambda_: float = 1.0,
    semantics: Semantics = "mergekit",
    normalize: bool | None = None,
    rescale: bool | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """DARE: base + λ·Σ wᵢ·(a random part of modelᵢ - base, brought back to scale).

    mergekit's and peft's ``dare_linear`` (arXiv 2311.03099).

    Args:
        density: of each model, or one for all: the probability that an element is kept, in (0, 1].
        base: mergekit's semantics need one. Without one peft's take the models' tensors, for
            example a LoRA adapter's, as the differences.
        semantics: ``mergekit`` or ``peft``; see :mod:`zokern.merge`.
        normalize: mergekit's: divide by the sum of the weights; off by default.
        rescale: mergekit's: bring each tensor's kept part back to its L1 norm; on by default.
        seed: of the random masks, 0 ≤ seed < 2^64.
        models, weights, lambda_, out, device, progress: as for :func:`linear`.

    Returns, Raises: as :func:`linear`.
    """
    _check_semantics(semantics, ("mergekit", "peft"), "random masks (DARE)")
    _check_options(semantics, mergekit={"normalize": normalize, "rescale": rescale})
    _check_base(semantics, base)
    recipe = Recipe(
        **_common(models, weights, lambda_, seed),
        **_random(models, density, semantics, rescale),
        normalize=bool(normalize),
    )
    return run(recipe, models, base, out=out, device=device, progress=progress)


def dare_ties(
    models: Sequence[Model],
    *,
    density: Numbers,
    base: Model | None = None,
    weights: Numbers = 1.0,
    lambda_: float = 1.0,
    semantics: Semantics = "mergekit",
    normalize: bool | None = None,
    rescale: bool | None = None,
    majority_sign: MajoritySign | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """DARE with an election of signs: random parts, of which those that agree are combined.

    mergekit's and peft's ``dare_ties``.

    Args:
        normalize: mergekit's: divide by the weights of those that agree; off by default.
        majority_sign: peft's: the sign is that of the sum of the deltas (``total``, the default)
            or of their signs (``frequency``).
        models, density, base, weights, lambda_, semantics, rescale, seed, out, device, progress: as
            for :func:`dare`.

    Returns, Raises: as :func:`linear`.
    """
    _check_semantics(semantics, ("mergekit", "peft"), "random masks (DARE)")
    _check_options(
        semantics,
        mergekit={"normalize": normalize, "rescale": rescale},
        peft={"majority_sign": majority_sign},
    )
    _check_base(semantics, base)
    recipe = Recipe(
        **_common(models, weights, lambda_, seed),
        **_random(models, density, semantics, rescale),
        **_election(semantics, bool(normalize), majority_sign, None),
    )
    return run(recipe, models, base, out=out, device=device, progress=progress)


def ties(
    models: Sequence[Model],
    *,
    density: Numbers,
    base: Model | None = None,
    weights: Numbers = 1.0,
    lambda_: float = 1.0,
    semantics: Semantics = "mergekit",
    normalize: bool | None = None,
    rescale: bool | None = None,
    majority_sign: MajoritySign | None = None,
    combine: Literal["mean", "sum", "max"] | None = None,
    out: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """TIES: of each model's delta the largest elements, of which those that agree are combined.

    mergekit's and peft's ``ties``, or the paper's (arXiv 2306.01708).

    Args:
        density: of each model, or one for all: the part of its elements that is kept, in (0, 1].
        semantics: ``mergekit``, ``peft`` or ``ties``; see :mod:`zokern.merge`.
        base: mergekit's semantics need one. Without one the others take the models' tensors, for
            example a LoRA adapter's, as the differences.
        normalize: mergekit's: divide by the weights of those that agree; on by default.
        rescale: mergekit's: bring each tensor's kept part back to its L1 norm; off by default.
        majority_sign: peft's; as for :func:`dare_ties`.
        combine: of ``semantics="ties"``: the ``mean`` (default) or ``sum`` of those that agree, or
            the ``max``, the one of the largest magnitude.
        models, weights, lambda_, out, device, progress: as for :func:`linear`.

    Returns, Raises: as :func:`linear`; a NaN in a delta is an error too.
    """
    _check_semantics(semantics, ("mergekit", "peft", "ties"), "TIES")
    _check_options(
        semantics,
        mergekit={"normalize": normalize, "rescale": rescale},
        peft={"majority_sign": majority_sign},
        ties={"combine": combine},
    )
    _check_base(semantics, base)
    recipe = Recipe(
        **_common(models, weights, lambda_),
        densities=_densities(density, len(models)),
        masks="joined" if semantics == "ties" else "magnitude",
        at_least_one=semantics == "mergekit",
        rescale="l1" if rescale else None,
        rounded=semantics != "peft",
        resolve_zero=semantics == "ties",
        **_election(semantics, normalize is not False, majority_sign, combine),
    )
    return run(recipe, models, base, out=out, device=device, progress=progress)


def _common(models: Sequence[Model], weights: Numbers, lambda_: float, seed: int = 0) -> dict:
    if isinstance(models, (str, os.PathLike, torch.nn.Module, dict)):
        raise TypeError("models must be a list of models, not one")
    if len(models) == 0:
        raise ValueError("models is empty: give at least one")
    return {
        "weights": _numbers("weights", weights, len(models)),
        "lambda_": float32s("lambda_", [lambda_])[0],
        "seed": integer("seed", seed, bits=64),
    }


def _random(
    models: Sequence[Model], density: Numbers, semantics: Semantics, rescale: bool | None
) -> dict:
    norm = None if rescale is False else "l1"
    return {
        "densities": _densities(density, len(models)),
        "masks": "random",
        "rescale": norm if semantics == "mergekit" else "inverse",
        "rounded": semantics == "mergekit",
    }


def _election(
    semantics: Semantics, normalize: bool, majority_sign: str | None, combine: str | None
) -> dict:
    if semantics == "mergekit":
        return {"votes": "weighted", "combine": "mean" if normalize else "sum"}
    sign, how = majority_sign or "total", combine or "mean"
    if sign not in ("total", "frequency"):
        raise ValueError(f"majority_sign must be 'total' or 'frequency', not {sign!r}")
    if how not in ("mean", "sum", "max"):
        raise ValueError(f"combine must be 'mean', 'sum' or 'max', not {how!r}")
    return {"votes": sign, "combine": how}


def _numbers(name: str, given: Numbers, count: int) -> list[float]:
    numbers = _one_each(given, count)
    if len(numbers) != count:
        raise ValueError(f"{name} must be one number or {count} for the models; got {given!r}")
    return float32s(name, [float(number) for number in numbers])


def _one_each(given: Numbers, count: int) -> list:
    if isinstance(given, Tensor):
        given = given.tolist()
    if isinstance(given, Sequence) and not isinstance(given, str):
        return list(given)
    return [given] * count


def _densities(given: Numbers, count: int) -> list[float]:
    numbers = _one_each(given, count)
    if len(numbers) != count:
        raise ValueError(f"density must be one number or {count} for the models; got {given!r}")
    densities = [float(number) for number in numbers]
    if not all(0 < density <= 1 for density in densities):
        raise ValueError(f"density must be above 0 and at most 1; got {given!r}")
    return densities


def _check_semantics(given: str, known: tuple[str, ...], what: str) -> None:
    if given not in known:
        raise ValueError(f"semantics={given!r} is none of those that have {what}: {known}")


def _check_options(semantics: str, **options: dict[str, object]) -> None:
    """Each semantics has options of its own."""
    for owner, own in options.items():
        for name, value in own.items():
            if value is not None and owner != semantics:
                raise ValueError(f"{name} is an option of semantics={owner!r}, not {semantics!r}")


def _check_base(semantics: str, base: Model | None) -> None:
    if base is None and semantics == "mergekit":
        raise ValueError(
            "semantics='mergekit' merges differences from a base: give base=, or "
            "semantics='peft' for adapters, whose tensors are differences"
        )
