"""Adam with a pull towards a reference: the exponential moving average that arXiv 2405.17931
compares online merging with."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from zokern.merging import AdamNumbers, AdamSteps, Mask, SparseTau
from zokern.optim.merging import Member, MergingAdamW
from zokern.optim.merging_groups import Group
from zokern.optim.reference import Source, Weights, stored_dtype


class EMAAdamW(MergingAdamW):
    r"""AdamW that moves the weights a little towards those of a reference after each step.

    .. math::
        \theta &\leftarrow (1 - \mathrm{lr} \cdot \mathrm{wd}) (\theta + \Delta) \\
        \theta &\leftarrow \theta + \eta \, (\theta_\mathrm{ref} - \theta)

    in one sweep, with Adam's step :math:`\Delta` as :class:`zokern.OnDAREAdamW` takes it.
    ``params``, ``lr``, ``betas``, ``eps``, ``weight_decay``, ``correct_bias``, ``param_name_map``,
    ``precision``, ``state_dtype``, ``maximize`` and ``capturable`` are its arguments too.

    Args:
        pull: η, from 0 to 1.
        reference: whose weights :math:`\theta_\mathrm{ref}` are kept, in their own dtype: a module,
            a state dict or the path of a safetensors checkpoint.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it, and for weights of the
            reference that are missing or of other shapes, listing them.
    """

    METHODS: ClassVar[dict[str, str]] = {"qwen": "ema"}

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        pull: float = 1e-3,
        reference: Source | None = None,
        param_name_map: Mapping[tuple[int, int], str] | None = None,
        precision: str = "auto",
        state_dtype: torch.dtype = torch.float32,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "pull": pull,
            "maximize": maximize,
            "capturable": capturable,
        }
        run = {
            "seed": 0,
            "precision": precision,
            "semantics": "qwen",
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults, run, param_name_map)
        if reference is not None:
            self.set_reference(reference)

    def set_reference(self, reference: Source, base: Source | None = None) -> None:
        """Take the weights of a reference, see :class:`EMAAdamW`; a base is not looked at."""
        self._take_weights([Weights(reference, "the reference")])

    def _needs_tau(self, group: Group) -> bool:
        return True

    def _numbers(self, group: Group, t: int) -> AdamNumbers:
        return super()._numbers(group, t)._replace(alpha=float(group["pull"]))

    def _mask(self, members: list[Member], steps: AdamSteps, mask: Mask) -> Mask:
        return mask

    def _new_tau(
        self, weights: list[Tensor], group: Group, tensor_id: int, name: str
    ) -> Tensor | SparseTau:
        return weights[0].to(stored_dtype(*weights), copy=True)
