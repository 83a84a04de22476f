"""The optimizer that every zeroth-order method extends: ask, tell and step."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zokern.distributed import Ranks
from zokern.optim import agreement
from zokern.optim.compiled import untraced
from zokern.optim.displacement import Coefficients, Displacement, Member
from zokern.optim.fsdp_copies import GatheredCopies
from zokern.optim.interrupts import Postponed, uninterrupted
from zokern.optim.layerwise import LayerwiseDisplacement
from zokern.optim.losses import EqualLosses, Loss, as_float
from zokern.optim.parameters import named
from zokern.optim.precision import choose, log_memory
from zokern.optim.probe import fidelity, sampled_fidelity
from zokern.optim.randomness import RandomState
from zokern.optim.recording import Recorder, check_whole
from zokern.optim.rules import float32
from zokern.optim.settings import COUNTERS, check_step, run_settings
from zokern.optim.state import ZOState
from zokern.optim.steps import Estimate, Method, Move, OpenStep, StepResult
from zokern.optim.versions import Versions
from zokern.trajectory import Trajectory
from zokern.warn import warn

# Below this the rounded probe is warned about.
LEAST_FIDELITY = 0.99
_READ_UNNOTICED = (
    "; with layerwise=True, NaN is also what TorchScript, DLPack and torch.tensor read of a "
    "parameter: if that is so, take layerwise=False"
)


class CommonArguments(TypedDict, total=False):
    """The arguments that all methods take, documented at :class:`zokern.MeZO`."""

    weight_decay: float
    momentum: float
    sign: bool
    samples: int
    seed: int | None
    law: str
    precision: str
    layerwise: bool | None
    stochastic_rounding: bool | None
    fuse_next: bool
    maximize: bool
    common_random_numbers: bool
    module: nn.Module | None
    trajectory: Trajectory | None
    process_group: dist.ProcessGroup | None
    parallel: str


class ZOOptimizer(ZOState):
    """Base of the optimizers that need only losses. A method overrides :meth:`_method`.

    What a method adds of its own goes into the param groups: ``settings``, given to the
    constructor, and ``STATE``, which its estimates change from step to step.
    """

    # By rank 0, if there are several.
    _is_recorded = False

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        sign: bool = False,
        samples: int = 1,
        seed: int | None = None,
        law: str = "gauss16",
        precision: str = "auto",
        layerwise: bool | None = None,
        stochastic_rounding: bool | None = None,
        fuse_next: bool = False,
        maximize: bool = False,
        common_random_numbers: bool = True,
        module: nn.Module | None = None,
        trajectory: Trajectory | None = None,
        process_group: dist.ProcessGroup | None = None,
        parallel: str = "data",
        settings: dict[str, Any] | None = None,
    ) -> None:
        self._ranks = Ranks(process_group, parallel)
        with self._ranks.together("the construction of an optimizer"):
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"module must be an nn.Module, not {type(module).__name__}")
            if parallel not in ("data", "population"):
                raise ValueError(f"parallel must be 'data' or 'population', not {parallel!r}")
            self.last: StepResult | None = None
            self._gathered = GatheredCopies(module)
            choice = choose(
                precision, layerwise, stochastic_rounding, module=module, fuse_next=bool(fuse_next)
            )
            self._displacement = Displacement()
            if choice.layerwise and module is not None:
                self._displacement = LayerwiseDisplacement(module)
            self._versions = Versions()
            self._shards = {}
            self._open: OpenStep | None = None
            self._recorder = Recorder(trajectory if self._ranks.rank == 0 else None)
            self._equal_losses = EqualLosses()
            self._warned: set[str] = set()
            self._run_defaults: dict[str, Any] = {
                **run_settings(
                    eps=eps,
                    samples=samples,
                    seed=seed,
                    law=law,
                    precision=choice.precision,
                    layerwise=choice.layerwise,
                    stochastic_rounding=choice.stochastic_rounding,
                    fuse_next=fuse_next,
                    sign=sign,
                    common_random_numbers=common_random_numbers,
                ),
                # A state is of one method.
                "method": type(self).__name__,
                **(settings or {}),
                **self.STATE,
            }
            defaults = {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "maximize": bool(maximize),
            }
            super().__init__(params, defaults)
            held = [tensor for state in self.state.values() for tensor in state.values()]
            self._prepare()
            if trajectory is not None:
                check_whole(named(self.param_groups))
            params = [param for _, param in named(self.param_groups)]
            if stochastic_rounding and all(param.dtype == torch.float32 for param in params):
                raise ValueError(
                    "stochastic_rounding=True is for weights in half precision; float32 is stored "
                    "as it is computed"
                )
            log_memory(type(self).__name__, str(choice), params, held)
            if module is not None and fuse_next:
                module.register_state_dict_pre_hook(_FlushBefore(self))
        run_seed, self._is_recorded = agreement.agree(self, seed, records=trajectory is not None)
        self._run_defaults["seed"] = run_seed
        self._update_run(seed=run_seed)

    def _prepare(self) -> None:
        """Check ``settings`` and make what the method keeps; the other ranks learn what it raises.

        At the end of the constructor: the parameters are there.
        """

    def _method(self, step: OpenStep) -> Method:
        """One step, written as a generator.

        It yields lists of points, each a dict from draw to coefficient; is sent their losses; and
        returns the estimate. It may read the optimizer and take draws from ``step``, and must
        change nothing.
        """
        raise TypeError(f"{type(self).__name__} does not say how it estimates: override _method")

    def _next_state(self, estimate: Estimate) -> dict[str, Any]:
        """``STATE`` after a step, a skipped one too."""
        return estimate.state

    def _replays_as(self) -> str:
        """The class that a replay needs, for the directions or how the estimate is applied.

        Other methods are their directions' numbers and coefficients alone.
        """
        is_special = bool(self.DENSE) or type(self)._rule is not ZOOptimizer._rule
        return type(self).__name__ if is_special else ZOOptimizer.__name__

    def _replay_arguments(self) -> dict[str, Any]:
        """The constructor's arguments that a replay needs: a trajectory's header keeps them."""
        return {}

    @classmethod
    def _for_replay(
        cls, params: Iterable, arguments: dict[str, Any], rounds: Sequence, **common: Any
    ) -> "ZOOptimizer":
        """An optimizer that follows a trajectory. Only ZOPrO has rounds."""
        return cls(params, **arguments, **common)

    def _direction_settings(self) -> dict[str, Any]:
        """What else decides on a step's directions: a trajectory notes it where it changes."""
        return {}

    def _follow(self, settings: dict[str, Any], number: int, rounds: Sequence) -> None:
        """Take over what was recorded by :meth:`_direction_settings` for step ``number``."""

    def ask(self) -> Iterator[Move]:
        """Move the weights to each point at which the step wants the loss, one after the other.

        Follow it by :meth:`tell` with a loss for each point, or by :meth:`flush` to drop the step.
        With ``parallel="population"`` these are the points that this rank evaluates.
        Parameters with ``requires_grad=False`` are frozen and stand still.

        Raises:
            RuntimeError: if the losses of the points before have not been told, or if somebody has
                written to weights of which the optimizer keeps a master or a residual.
        """
        if self._open is None:
            self._open = self._begin()
        elif self._open.asked:
            raise RuntimeError("tell the losses of the last ask first, or flush() to drop the step")
        self._open.asked = True
        return self._visit(self._open, self._open.round)

    def _begin(self) -> OpenStep:
        check_step(self.param_groups)
        from_rest = self._displacement.at_rest
        self._check_untouched()
        # Somebody may have evaluated the model since.
        self._gathered.drop()
        self._gathered.check_dropped()
        members = self._members()
        if not members:
            raise RuntimeError(
                f"{type(self).__name__}: every parameter is frozen, nothing can move"
            )
        if [m.identity for m in members] != [m.identity for m in self._displacement.members]:
            self._rest()
            self._displacement.members = members
            self._recorder.detach()
            self._warn_of_a_lost_probe(members)
        with uninterrupted():
            self._recorder.attach(self)
        step = self._new_step()
        step.from_rest = from_rest or self._displacement.is_beside_rest
        return step

    def assert_in_sync(self) -> None:
        """Compare weights, and what is kept beside them, with the other ranks', bit for bit.

        All ranks must call it. The weights are brought to rest first; 8 bytes a tensor travel.

        Raises:
            RuntimeError: on every rank, naming the ranks that have drifted from most others (from
                rank 0, where there is no majority) and the first parameter that they differ in.
        """
        with self._ranks.together("assert_in_sync"):
            self.flush()
        found = agreement.drift(self)
        if found:
            raise RuntimeError(found)

    def probe_fidelity(self) -> float:
        """The cosine between the perturbation that the forward pass sees and the intended ε·z.

        1 is right. In half precision the point θ + ε·z is rounded before it is evaluated: for
        bfloat16 weights of scale 0.02 the cosine is 0.9994 at ε = 1e-3, 0.95 at 1e-4 and 0.46 at
        1e-5, where most weights do not move at all. Measured on the weights as they are, for the
        next direction, over all parameters that are not frozen; below 0.99 a step warns once. Where
        ranks hold parts of the weights, all must call it.
        """
        self._refuse_in_closure()
        self.flush()
        return fidelity(self._members(), **self._probe())

    def _probe(self) -> dict[str, Any]:
        run = self.run
        return {"eps": run["eps"], "seed": run["seed"], "draw": run["draws"], "law": run["law"]}

    def _warn_of_a_lost_probe(self, members: list[Member]) -> None:
        if "fidelity" in self._warned or all(m.param.dtype == torch.float32 for m in members):
            return
        # By this rank's own parts: ranks that wait for each other here would wait for one that has
        # failed.
        seen = sampled_fidelity(members, **self._probe())
        has_any = any(member.param.numel() for member in members)
        if has_any and seen < LEAST_FIDELITY:
            self._warn_once(
                "fidelity",
                f"{type(self).__name__}: the forward pass sees perturbations of eps="
                f"{self.run['eps']:g} rounded to half precision, with a cosine of {seen:.2f} to "
                "the intended ones: take a larger eps (probe_fidelity() measures it)",
            )
        self._warned.add("fidelity")

    def _new_step(self) -> OpenStep:
        return OpenStep(self._method, self.run["draws"])

    def _first_point(self) -> Coefficients:
        """Where the next step will want the weights first."""
        step = self._new_step()
        step.close()
        return step.round[0]

    def _visit(self, step: OpenStep, points: list[Coefficients]) -> Iterator[Move]:
        for i, coefficients in enumerate(points):
            if self._open is not step or step.round is not points:
                raise RuntimeError("the step of this ask is over: its losses were told, or dropped")
            self._check_untouched()
            is_own = self._ranks.has(i, len(points))
            if is_own or not self._displacement.is_beside_rest:
                self._move(coefficients)
            step.visited += 1
            if not is_own:
                continue
            made = self._displacement.from_rest(coefficients)
            assert made is not None
            yield Move(*made, self.run["seed"], self.run["law"])

    def tell(self, losses: Sequence[Loss]) -> StepResult | None:
        """Take the losses of the points that :meth:`ask` gave, in their order, and update.

        A loss that is NaN or infinite skips the update: the weights come to rest, the run goes on
        with the next draws, ``skipped`` in the param groups counts it. With a process group it
        waits for the losses of all ranks.

        Returns:
            What the step did, also kept as ``last``; None where the method wants another round of
            ask and tell first.

        Raises:
            RuntimeError: without an :meth:`ask` before; on every rank, where their settings differ.
            TypeError, ValueError: if there is not one float32 scalar for each point; the step
                stays open.
        """
        return self._take(self._told(losses))

    def _told(self, losses: Sequence[Loss]) -> list[float]:
        if self._open is None or not self._open.asked:
            raise RuntimeError("tell follows ask: no step is open")
        points = len(self._open.round)
        if self._open.visited < points:
            raise RuntimeError(
                f"tell needs the losses of all {points} points, and the weights have been at "
                f"{self._open.visited} of them: go through ask() to its end"
            )
        own = sum(self._ranks.has(i, points) for i in range(points))
        if len(losses) != own:
            raise ValueError(f"got {len(losses)} losses for {own} points")
        self._check_untouched()
        return [as_float(loss) for loss in losses]

    def _take(self, own: list[float]) -> StepResult | None:
        """Losses that have been checked, as the run's: those of all ranks."""
        step = self._open
        assert step is not None
        with uninterrupted():
            try:
                settings = {} if self._ranks.is_alone else agreement.of_step(self, step)
                values = self._ranks.losses(own, len(step.round), settings)
            except BaseException:
                self._drop_step()
                self._rest_untouched()
                raise
            return self._use(step, values)

    def _use(self, step: OpenStep, values: list[float]) -> StepResult | None:
        if self._equal_losses.seen(values):
            self._warn_once("equal", EqualLosses.WARNING)
        if not all(math.isfinite(value) for value in values):
            self._warn_once(
                "skipped",
                f"{type(self).__name__}: a loss is not finite ({values}); the update is skipped, "
                "as it will be whenever this happens (the param groups count them in 'skipped')"
                + (_READ_UNNOTICED if self.run["layerwise"] else ""),
            )
            return self._finish(step, Estimate({}, values), skipped=True)
        estimate = step.send(values)
        return None if estimate is None else self._finish(step, estimate, skipped=False)

    def _recording(self) -> AbstractContextManager:
        """A step that rank 0 cannot record is not made on the others either."""
        if self._is_recorded:
            return self._ranks.together("the record of a step")
        return nullcontext()

    def _finish(self, step: OpenStep, estimate: Estimate, *, skipped: bool) -> StepResult:
        before = {key: self.run[key] for key in (*COUNTERS, *self.STATE)}
        gradient = {draw: float32(g) for draw, g in estimate.gradient.items()}
        made = None
        if not skipped:
            made = self._displacement.from_rest({}, self._as_step(gradient))
        result = StepResult(
            losses=tuple(estimate.losses),
            draws=tuple(gradient),
            projected_gradient=tuple(gradient.values()),
            skipped=skipped,
            update=None if made is None else Move(*made, self.run["seed"], self.run["law"]),
        )
        with uninterrupted():
            recorded = False
            try:
                with self._recording():
                    self._recorder.append(self, gradient)
                recorded = True
                self._update_run(
                    step=before["step"] + 1,
                    draws=step.next_draw,
                    skipped=before["skipped"] + skipped,
                    **self._next_state(estimate),
                )
                next_point = self._first_point() if self.run["fuse_next"] else {}
                self._move(next_point, None if skipped else gradient)
            except BaseException:
                self._update_run(**before)
                if recorded:
                    self._recorder.withdraw()
                self.flush()
                raise
            self._displacement.forget_all_but(next_point)
            self._open = None
            self.last = result
        # Learning-rate schedulers look here for whether the optimizer steps before they do.
        self._opt_called = True
        return result

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Tensor:  # type: ignore[override]
        """One step: evaluate the closure at each point, estimate, update.

        Args:
            closure: computes the loss from the weights as they stand, on the same data at each
                call, and returns it as a Python float or a float32 scalar tensor. It is called
                several times under ``torch.no_grad()`` and calls no ``backward``. To accumulate
                over micro-batches, let it return their mean loss.

        All evaluations of a step see the same state of torch's random generators (so dropout drops
        the same units, and the difference of losses is not its noise), unless
        ``common_random_numbers=False``; after the step the generators stand as after one of them.

        Returns:
            The mean of the losses that estimate the gradient, a 0-d tensor; ``last`` holds more.

        Raises:
            TypeError: without a closure, or for a loss that is no scalar or in half precision.
            Whatever the closure raises, Ctrl-C too: the weights are brought back to rest first, and
            the run stands where it stood before the step.
            RuntimeError: where the closure of another rank raises, naming both; then too.
        """
        if not callable(closure):
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that returns the loss; got {closure!r}"
            )
        if self._open is not None:
            raise RuntimeError("a step is open: tell its losses first, or flush() to drop it")
        try:
            with Postponed(not self._ranks.is_alone) as interrupts:
                result = None
                while result is None:
                    result = self._take(self._losses(closure, interrupts))
        except BaseException:
            if self._open is not None:
                self._drop_step()
                self._rest_untouched()
            raise
        return torch.tensor(result.loss)

    def _losses(self, closure: Callable[[], Loss], interrupts: Postponed) -> list[float]:
        """Of this rank's points in a round; if there are none after all, the others are told."""
        losses = []
        try:
            points = self.ask()
            try:
                for _ in points:
                    self._set_randomness()
                    with interrupts.let_through():
                        losses.append(as_float(self._evaluate(closure)))
                interrupts.now()
            except BaseException:
                self._follow_the_others(points)
                raise
            return self._told(losses)
        except BaseException as error:
            self._ranks.fail(error)
            raise

    def _evaluate(self, closure: Callable[[], Loss]) -> Loss:
        self._evaluating = True
        try:
            return closure()
        finally:
            self._evaluating = False

    def _set_randomness(self) -> None:
        assert self._open is not None
        if self._open.random_state is not None:
            self._open.random_state.restore()
        elif self.run["common_random_numbers"]:
            devices = {member.param.device for member in self._displacement.members}
            self._open.random_state = RandomState(devices)

    def _follow_the_others(self, points: Iterator[Move]) -> None:
        """To the end of a round that cannot be used: rounding depends on the way to rest."""
        if not self._ranks.is_alone:
            with suppress(Exception):
                for _ in points:
                    pass

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn(message, RuntimeWarning)


class _FlushBefore:
    """A module's state_dict pre-hook: the weights come to rest before they are saved."""

    def __init__(self, optimizer: ZOOptimizer | None) -> None:
        self._optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.flush()

    def __reduce__(self) -> tuple:
        # A copy of the module has weights of its own, which this optimizer does not move.
        return _FlushBefore, (None,)
