"""MeZO: Malladi et al., Fine-Tuning Language Models with Just Forward Passes, arXiv 2305.17333."""

from zokern.optim.base import ZOOptimizer
from zokern.optim.estimates import pairs, two_sided
from zokern.optim.steps import Estimate, Method, OpenStep


class MeZO(ZOOptimizer):
    r"""Zeroth-order SGD (arXiv 2305.17333): two forward passes a direction, no backward pass.

    With directions :math:`z_k` drawn from the seed, never stored:

    .. math::
        g_k &= \frac{L(\theta + \varepsilon z_k) - L(\theta - \varepsilon z_k)}{2 \varepsilon} \\
        \hat g &= \frac{1}{q} \sum_{k=1}^{q} g_k z_k \\
        \theta &\leftarrow (1 - \mathrm{lr} \cdot \mathrm{wd}) \, \theta - \mathrm{lr} \, \hat g

    A step sweeps the weights 2q + 1 times, 2q times with ``fuse_next``. Direction k of step t is
    draw t·q + k. The result is the same bits on every backend.

    Args:
        params: as ``torch.optim`` takes them. Give ``model.named_parameters()`` (or groups of it,
            see :func:`zokern.param_groups`): a named weight's noise depends on its name and the
            seed alone, not on groups or on what is frozen. float32, bfloat16, float16; those with
            ``requires_grad=False`` stand still. Of DTensors each rank moves its part: see
            docs/distributed.md.
        lr: learning rate; a float or a scalar tensor. Used in float32.
        eps: ε, the size of the perturbation.
        weight_decay: wd, decoupled.
        momentum: μ, at least 0 and below 1: m ← μ·m + ĝ, and m takes the place of ĝ. Kept in
            float32 (4 bytes a parameter), updated in the same sweep as the weights. As with
            ``torch.optim.SGD``, a scheduler that cycles momentum switches it on.
        sign: step by the sign of ĝ (or of m): θ ← (1 - lr·wd)·θ - lr·sign(ĝ).
        samples: q, directions a step.
        seed: of the run, below 2^64; None takes one from torch's generator.
        law: ``gauss16``, ``gauss32``, ``rademacher`` or ``normal``; see :mod:`zokern.noise`.
        precision: how weights are kept. ``inplace``: the parameter alone; without stochastic
            rounding half precision loses updates below half an ulp. ``split8``: 1 byte more
            (bfloat16 only). ``split``: 2 bytes more, as exact as float32. ``master``: a float32
            master, 4 bytes more; evaluations write only the parameter, so the weights come back bit
            for bit. ``auto``: ``inplace`` for float32, which has no residual; for half precision
            ``inplace``, layerwise and with stochastic rounding, where ``module`` is given (and
            ``fuse_next`` is not), else ``split``. The logger ``zokern`` says what it is.
        layerwise: evaluate without a change to the weights: each layer of ``module`` reads its
            perturbed parameters from a buffer as large as the largest layer. The weights come back
            bit for bit at no byte per parameter; see docs/layerwise.md. Under FSDP2 what a module
            gathers is displaced instead. None: as ``auto`` says, and not for DTensors.
        stochastic_rounding: round what is stored up or down at random, so that it is right on
            average: for ``inplace`` and ``split8`` in half precision. None: with ``split8``, and
            with ``layerwise`` where the parameter is all there is.
        fuse_next: merge the update with the first move of the next step. The weights then stand
            displaced between steps; :meth:`flush` brings them to rest.
        maximize: maximize the loss.
        common_random_numbers: evaluate all points of a step under the same state of torch's random
            generators; see :meth:`step`.
        module: the module that is trained, for ``layerwise``; with ``fuse_next`` its ``state_dict``
            flushes first; under FSDP2 the copies of weights that it has gathered are dropped when
            these move.
        trajectory: a :class:`zokern.Trajectory` that records each step; of several ranks, rank 0's.
        process_group: the ranks that make the run together, a group of ``torch.distributed``: they
            exchange losses, and each makes the same update of its own copy of the weights, or of
            the parts that it has of DTensors: then it must hold all ranks of their meshes. None:
            this process alone. See docs/distributed.md.
        parallel: ``data``: each rank evaluates all points on a batch of its own, and the loss is
            the mean over ranks. ``population``: each evaluates its share of the points; all must
            see the same batch.

    Example::

        opt = zokern.MeZO(model.named_parameters(), lr=1e-6)
        loss = opt.step(lambda: loss_fn(model(x), y))

    Raises:
        ValueError, TypeError: for an argument out of range, or a parameter that cannot be moved in
            place, naming it; on every rank, if they were given different arguments.
    """

    def _method(self, step: OpenStep) -> Method:
        eps = self.run["eps"]
        directions = [{draw: 1.0} for draw in step.take_draws(self.run["samples"])]
        losses = yield pairs(directions, eps)
        return Estimate(two_sided(directions, losses, eps), losses)
