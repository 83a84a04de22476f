"""OnDARE: Lu et al., Online Merging Optimizers for Boosting Rewards and Mitigating Tax in
Alignment, arXiv 2405.17931."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from zokern import noise, ops
from zokern.merging import AdamNumbers, AdamSteps, Mask, SparseTau
from zokern.optim.merging import Member, MergingAdamW, parts_of
from zokern.optim.merging_groups import NEGLIGIBLE, Group, limit_of
from zokern.optim.reference import Source, smaller, stored_dtype


class OnDAREAdamW(MergingAdamW):
    r"""Adam whose update is thinned out at random and merged with a task vector (OnDARE).

    With Adam's step :math:`\Delta` (bias corrected, eps outside of the root), a Bernoulli(p) mask M
    and the task vector :math:`\tau` = reference - base:

    .. math::
        \theta &\leftarrow \theta + \alpha \, \tilde\tau + (1 - \alpha) \,
            \tfrac{1}{p} M_t \odot \Delta, \qquad
            \tilde\tau = \mathrm{clamp}(\tfrac{1}{p} M_0 \odot \tau, \pm \mathrm{clip\_val}) \\
        \theta &\leftarrow (1 - \mathrm{lr} \cdot \mathrm{wd}) \, \theta

    and without ``use_merge`` :math:`\theta \leftarrow \theta + \frac{1}{p} M_t \odot \Delta`, which
    is ChildTuning. That is the published code, its bugs fixed (``semantics="qwen"``);
    ``semantics="paper"`` is the paper (arXiv 2405.17931): no 1/p, a new mask for τ on each step, no
    clamping, neither bias correction nor weight decay. α·τ is not scaled by lr: the weights move
    along τ at lr = 0, too. α from 1e-7 to 1e-5 and p from 5e-4 to 1 are usual.

    A constructor call of QwenLM's ``online_merging.OnDAREAdamW`` does the same here. Masks come
    from the noise contract (:mod:`zokern.noise`), law ``uniform32``: draw t, the parameter's number
    of steps from 1 on, for Δ, draw 0 for τ (the paper's semantics: t + 2^31); so a run is the same
    on every backend.

    Args:
        params: as ``torch.optim`` takes them; ``model.named_parameters()`` is best: names find the
            reference's weights and make the masks independent of groups. float32, bfloat16 or
            float16; DTensors of which each rank has a part are taken as the full tensors.
        lr, betas, eps, weight_decay: of AdamW. lr may be a scalar tensor.
        correct_bias: correct the moments' bias; by default as the semantics say.
        no_deprecation_warning: is taken for compatibility, and means nothing.
        reserve_p: p, above 0 and at most 1.
        param_name_map: names for parameters that come without: {(group, position in it): name}.
        use_merge: merge with τ; otherwise only mask.
        alpha: α, from 0 to 1.
        rescale: multiply the masked Δ of each tensor by Σ|Δ| / (Σ|masked Δ| + eps), then clamp it
            to ±clip_val: one more pass over gradients and moments. Not in the paper.
        clip_val: above 0.
        online_step: K, at least 1: take plain Adam steps, and on each K-th roll them back and merge
            their sum. 4 bytes a parameter more.
        semantics: ``"qwen"`` or ``"paper"``.
        reference, base: what τ is made of, see :meth:`set_reference`; together or not at all.
        seed: of the masks, below 2^64; None takes one from torch's generator.
        precision: how half-precision weights are kept, as for :class:`zokern.MeZO`: ``inplace``,
            ``split8``, ``split`` or ``master``; ``auto`` is ``split``: what is added is then lost
            only where float32 would lose it.
        state_dtype: of the two moments, float32 or bfloat16.
        maximize: maximize the loss.
        capturable: keep steps on the device, so that a CUDA graph can capture them.

    In a param group, ``lr``, ``betas``, ``eps``, ``weight_decay``, ``correct_bias``, ``reserve_p``,
    ``use_merge``, ``alpha``, ``rescale``, ``clip_val``, ``online_step``, ``maximize`` and
    ``capturable`` may have values of their own.

    Example::

        opt = zokern.OnDAREAdamW(
            policy.named_parameters(), lr=1e-6, reserve_p=0.01, alpha=1e-7, use_merge=True,
            reference=sft_model, base="base/model.safetensors",
        )

    Raises:
        ValueError, TypeError: for an argument out of range, naming it, and for weights of the
            reference or the base that are missing or of other shapes, listing them.
    """

    METHODS: ClassVar[dict[str, str]] = {"qwen": "dare", "paper": "dare_paper"}

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
        clip_val: float = 1,
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
            "clip_val": clip_val,
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
        self._take_reference(reference, base)

    def _numbers(self, group: Group, t: int) -> AdamNumbers:
        numbers = super()._numbers(group, t)
        if self.run["semantics"] == "paper":
            return numbers
        clip = float(group["clip_val"]) if group["rescale"] else float("inf")
        return numbers._replace(scale=1 / float(group["reserve_p"]), clip=clip)

    def _mask(self, members: list[Member], steps: AdamSteps, mask: Mask) -> Mask:
        limits = [limit_of(float(member.group["reserve_p"])) for member in members]
        return replace(mask, limits=self._column(members, limits, torch.int64))

    def _ratios(self, members: list[Member], steps: AdamSteps, mask: Mask) -> Tensor:
        every, kept = ops.l1_sums_of_parts(steps, mask, parts_of(members)).unbind(1)
        scales = [1 / float(member.group["reserve_p"]) for member in members]
        epsilons = [float(member.group["eps"]) for member in members]
        scale = self._column(members, scales, torch.float32).to(every.device)
        eps = self._column(members, epsilons, torch.float32).to(every.device)
        return torch.where(every >= NEGLIGIBLE, every / (scale * kept + eps), 1.0)

    def _new_tau(
        self, weights: list[Tensor], group: Group, tensor_id: int, name: str
    ) -> Tensor | SparseTau:
        new, old = weights
        tau = new.float() - old.float()
        dtype = stored_dtype(new, old)
        if self.run["semantics"] == "paper":
            return tau.to(dtype)
        p, clip = float(group["reserve_p"]), float(group["clip_val"])
        words = noise.sample(
            "uniform32",
            tau.numel(),
            seed=self.run["seed"],
            draw=0,
            tensor_id=tensor_id,
            device=tau.device,
        )
        kept = (words < limit_of(p)).view(tau.shape)
        return smaller((torch.where(kept, tau, 0.0) * (1 / p)).clamp(-clip, clip).to(dtype))
