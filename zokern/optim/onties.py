"""OnTIES: Lu et al., Online Merging Optimizers for Boosting Rewards and Mitigating Tax in
Alignment, arXiv 2405.17931."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from zokern import ops
from zokern.merging import AdamSteps, Mask, SparseTau, some_of
from zokern.optim.merging import Member, MergingAdamW, parts_of
from zokern.optim.merging_groups import NEGLIGIBLE, Group
from zokern.optim.reference import Source, smaller, stored_dtype


class OnTIESAdamW(MergingAdamW):
    r"""Adam whose largest updates are kept and merged with a task vector by sign (OnTIES).

    With Adam's step :math:`\Delta` (bias corrected, eps outside of the root), the task vector
    :math:`\tau` = reference - base and :math:`T_p`, which keeps the ⌊p·n⌋ elements of largest
    magnitude of a tensor (of equal ones those of lower index) and takes 0 for the others:

    .. math::
        s &= \mathrm{sign}(T_p(\tau) + T_p(\Delta)) \quad (\mathrm{+1 \; at \; 0}) \\
        \theta &\leftarrow \theta + \alpha \, [T_p(\tau)]_s + (1 - \alpha) \, [T_p(\Delta)]_s \\
        \theta &\leftarrow (1 - \mathrm{lr} \cdot \mathrm{wd}) \, \theta

    where :math:`[x]_s` is x where its sign is s, else 0; without ``use_merge``
    :math:`\theta \leftarrow \theta + [T_p(\Delta)]_s`, which needs τ all the same. That is the
    published code, its bugs fixed (``semantics="qwen"``): where τ is much larger than Δ it drops
    almost every Δ whose sign is not τ's. ``semantics="paper"`` is the paper (arXiv 2405.17931): the
    sign of :math:`\alpha T_p(\tau) + (1 - \alpha) T_p(\Delta)`, which an exact tie does not have,
    at least one element kept, neither bias correction nor weight decay; without ``use_merge`` plain
    top-p Adam. Adam's first step gives nearly equal magnitudes everywhere, of which the mask then
    takes the first. α·τ is not scaled by lr.

    A constructor call of QwenLM's ``online_merging.OnTIESAdamW`` does the same here. The arguments
    ``params``, ``lr``, ``betas``, ``eps``, ``weight_decay``, ``correct_bias``,
    ``no_deprecation_warning``, ``param_name_map``, ``use_merge``, ``alpha``, ``online_step``,
    ``semantics``, ``reference``, ``base``, ``seed``, ``precision``, ``state_dtype``, ``maximize``
    and ``capturable`` are those of :class:`zokern.OnDAREAdamW`; nothing is drawn at random.

    Args:
        reserve_p: p, above 0 and at most 1. Where ⌊p·n⌋ is 0, the published code masks nothing, and
            so does this, with a warning.
        rescale: multiply T_p(τ) and T_p(Δ) of each tensor by Σ|x| / Σ|T_p(x)|. Not in the paper.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it, and for weights of the
            reference or the base that are missing or of other shapes, listing them.
    """

    METHODS: ClassVar[dict[str, str]] = {"qwen": "ties", "paper": "ties_paper"}
    SELECTS = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool | None = None,
        no_deprecation_warning: bool = True,
        reserve_p: float = 1,
        param_name_map: Mapping[tuple[int, int], str] | None = None,
        use_merge: bool = False,
        alpha: float = 0,
        rescale: bool = False,
        online_step: int = 1,
        *,
        semantics: str = "qwen",
        reference: Source | None = None,
        base: Source | None = None,
        seed: int | None = None,
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
            "reserve_p": reserve_p,
            "use_merge": use_merge,
            "alpha": alpha,
            "rescale": rescale,
            "online_step": online_step,
            "maximize": maximize,
            "capturable": capturable,
        }
        run = {
            "seed": seed,
            "precision": precision,
            "semantics": semantics,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults, run, param_name_map)
        if semantics == "qwen" and not all(group["use_merge"] for group in self.param_groups):
            self._warn_once(
                "use_merge",
                "OnTIESAdamW without use_merge still needs the reference: the signs of τ decide "
                "which updates are kept, as in the published code; semantics='paper' is plain "
                "top-p Adam then",
            )
        self._take_reference(reference, base)

    def _needs_tau(self, group: Group) -> bool:
        return self.run["semantics"] == "qwen" or super()._needs_tau(group)

    def _kept(self, group: Group, name: str, numel: int) -> int:
        """How many elements of a tensor the mask keeps."""
        p = float(group["reserve_p"])
        k = int(p * numel)
        if self.run["semantics"] == "paper":
            return min(max(1, k), numel)
        if k < 1 <= numel:
            self._warn_once(
                "kept",
                f"reserve_p={p} of the {numel} elements of {name} is less than one: nothing of it "
                "is masked, as in the published code (semantics='paper' keeps one)",
            )
            return numel
        return numel if p >= 1 else k

    def _mask(self, members: list[Member], steps: AdamSteps, mask: Mask) -> Mask:
        numels = [member.param.numel() for member in members]
        counts = [self._kept(m.group, m.name, n) for m, n in zip(members, numels, strict=True)]
        device = members[0].own.device
        masked = [i for i, (k, n) in enumerate(zip(counts, numels, strict=True)) if k < n]
        if not members[0].group["capturable"]:
            masked = [i for i in masked if steps.merges[i]]
        # A threshold of 0 and a cut behind the last element keep all.
        thresholds = torch.zeros(len(members), device=device)
        cuts = self._column(members, numels, torch.int64).to(device, copy=True)
        if masked:
            chosen = some_of(steps, masked)
            kept, parts = [counts[i] for i in masked], [members[i].part for i in masked]
            found = ops.adam_threshold_of_parts(chosen, kept, parts)
            at = self._column([members[i] for i in masked], masked, torch.int64).to(device)
            thresholds[at], cuts[at] = found
        return replace(mask, thresholds=thresholds, cuts=cuts)

    def _ratios(self, members: list[Member], steps: AdamSteps, mask: Mask) -> Tensor:
        every, kept = ops.l1_sums_of_parts(steps, mask, parts_of(members)).unbind(1)
        return torch.where((every >= NEGLIGIBLE) & (kept > 0), every / kept, 1.0)

    def _new_tau(
        self, weights: list[Tensor], group: Group, tensor_id: int, name: str
    ) -> Tensor | SparseTau:
        new, old = weights
        dtype = stored_dtype(new, old)
        tau = (new.float() - old.float()).to(dtype)
        k = self._kept(group, name, tau.numel())
        if k >= tau.numel():
            return smaller(tau)
        (threshold,), (cut,) = ops.magnitude_threshold([tau], [k])
        magnitudes = tau.float().abs()
        ties = magnitudes == threshold
        index = torch.arange(tau.numel(), device=tau.device).view(tau.shape)
        masked = torch.where((magnitudes > threshold) | (ties & (index < cut)), tau, 0.0)
        if group["rescale"]:
            every, kept = magnitudes.double().sum().float(), masked.double().abs().sum().float()
            if every >= NEGLIGIBLE:
                masked = (masked.float() * (every / kept)).to(dtype)
        return smaller(masked)
