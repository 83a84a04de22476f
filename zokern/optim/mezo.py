"""MeZO: Malladi et al., Fine-Tuning Language Models with Just Forward Passes, arXiv 2305.17333."""

from collections.abc import Iterable

from torch import Tensor, nn

from zokern.optim.base import ZOOptimizer
from zokern.optim.steps import Estimate, Method, OpenStep


class MeZO(ZOOptimizer):
    r"""Zeroth-order SGD (arXiv 2305.17333): two forward passes a direction, no backward pass.

    With directions :math:`z_k` drawn from the seed, never stored:

    .. math::
        g_k &= \frac{L(\theta + \varepsilon z_k) - L(\theta - \varepsilon z_k)}{2 \varepsilon} \\
        \theta &\leftarrow (1 - \mathrm{lr} \cdot \mathrm{wd}) \, \theta
                - \frac{\mathrm{lr}}{q} \sum_{k=1}^{q} g_k z_k

    A step sweeps the weights 2q + 1 times, 2q times with ``fuse_next``. Direction k of step t is
    draw t·q + k. The result is the same bits on every backend.

    Args:
        params: as ``torch.optim`` takes them. Give ``model.named_parameters()`` (or groups of it,
            see :func:`zokern.param_groups`): a named weight's noise depends on its name and the
            seed alone, not on groups or on what is frozen. float32, bfloat16, float16.
        lr: learning rate; a float or a scalar tensor.
        eps: ε, the size of the perturbation.
        weight_decay: wd, decoupled.
        samples: q, directions a step.
        seed: of the run, below 2^64; None takes one from torch's generator.
        law: ``gauss16``, ``gauss32``, ``rademacher`` or ``normal``; see :mod:`zokern.noise`.
        precision: how half-precision weights are kept. ``inplace``: 2 bytes, loses updates below
            half an ulp. ``split8``: 3 bytes (bfloat16 only). ``split``: 4 bytes, as exact as
            float32. ``auto``: ``split``. float32 weights are always ``inplace``.
        fuse_next: merge the update with the first move of the next step. The weights then stand
            displaced between steps; :meth:`flush` brings them to rest.
        maximize: maximize the loss.
        module: whose ``state_dict`` flushes first.

    Example::

        opt = zokern.MeZO(model.named_parameters(), lr=1e-6)
        loss = opt.step(lambda: loss_fn(model(x), y))

    Raises:
        ValueError, TypeError: for an argument out of range, or a parameter that cannot be moved in
            place, naming it.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        samples: int = 1,
        seed: int | None = None,
        law: str = "gauss16",
        precision: str = "auto",
        fuse_next: bool = False,
        maximize: bool = False,
        module: nn.Module | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            samples=samples,
            seed=seed,
            law=law,
            precision=precision,
            fuse_next=fuse_next,
            maximize=maximize,
            module=module,
        )

    def _method(self, step: OpenStep) -> Method:
        eps = self.run["eps"]
        draws = step.take_draws(self.run["samples"])
        losses = yield [{draw: sign * eps} for draw in draws for sign in (1, -1)]
        gradient = {
            draw: (plus - minus) / (2 * eps) / len(draws)
            for draw, plus, minus in zip(draws, losses[0::2], losses[1::2], strict=True)
        }
        return Estimate(gradient, losses)
