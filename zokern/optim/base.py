"""The optimizer that every zeroth-order method extends: torch's protocol, ask and tell."""

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zokern import checks
from zokern.laws import LAWS, canonical_name, tensor_id
from zokern.optim.displacement import Coefficients, Displacement, Member
from zokern.optim.interrupts import uninterrupted
from zokern.optim.precision import PRECISIONS, log_memory, new_residual, resolve
from zokern.optim.steps import Estimate, Method, OpenStep, Point, StepResult

Loss = float | Tensor

# Kept in every param group, where state_dict and pickling find them, but one for the whole run.
SETTINGS = ("eps", "samples", "seed", "law", "precision", "fuse_next")
COUNTERS = ("step", "draws", "skipped")

# eps is used in float32, where smaller and larger ones become 0 and infinity.
MIN_EPS, MAX_EPS = 2.0**-126, 2.0**126

# After so many steps whose losses are equal bit for bit, something must be wrong.
EQUAL_STEPS = 3


class ZOOptimizer(Optimizer):
    """Base of the optimizers that need only losses. A method overrides :meth:`_method`."""

    def __init__(
        self,
        params: Iterable,
        *,
        lr: float | Tensor,
        eps: float,
        weight_decay: float,
        samples: int,
        seed: int | None,
        law: str,
        precision: str,
        fuse_next: bool,
        maximize: bool,
        module: nn.Module | None,
    ) -> None:
        samples = _integer("samples", samples, at_least=1, below=1 << 32)
        if not (_is_number(eps) and MIN_EPS <= eps <= MAX_EPS):
            raise ValueError(f"eps must be positive and finite in float32, not {eps!r}")
        directions = [name for name, entry in LAWS.items() if entry.is_direction]
        if law not in directions:
            raise ValueError(f"law must be one of {', '.join(directions)}, not {law!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        if seed is None:
            # From torch's generator, so that torch.manual_seed governs runs.
            seed = int(torch.randint(-(1 << 63), (1 << 63) - 1, ())) % (1 << 64)
        seed = _integer("seed", seed, at_least=0, below=1 << 64)
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, not {type(module).__name__}")

        self.last: StepResult | None = None
        self._displacement = Displacement()
        self._open: OpenStep | None = None
        self._equal_steps = 0
        self._warned: set[str] = set()
        settings = (eps, samples, seed, law, precision, bool(fuse_next))
        self._run_defaults: dict[str, Any] = dict(
            zip(SETTINGS, settings, strict=True)
        ) | dict.fromkeys(COUNTERS, 0)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})
        params = [param for _, param in self._named()]
        residuals = [state["residual"] for state in self.state.values() if "residual" in state]
        log_memory(type(self).__name__, precision, params, residuals)
        if module is not None and fuse_next:
            module.register_state_dict_pre_hook(_FlushBefore(self))

    def _method(self, step: OpenStep) -> Method:
        """One step, written as a generator.

        It yields lists of points, each a dict from draw to coefficient; is sent their losses; and
        returns the estimate. It may read the optimizer and take draws from ``step``, and must
        change nothing.
        """
        raise TypeError(f"{type(self).__name__} does not say how it estimates: override _method")

    @property
    def run(self) -> dict[str, Any]:
        """The settings and counters of the run, which all param groups hold alike."""
        return self.param_groups[0]

    def _update_run(self, **values: Any) -> None:
        for group in self.param_groups:
            group.update(values)

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters, as ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: for a setting that belongs to the optimizer (``eps``, ``samples``, ``seed``,
                ``law``, ``precision``, ``fuse_next``), a parameter that cannot be swept in place,
                or two names with one tensor id.
        """
        own = [key for key in (*SETTINGS, *COUNTERS) if key in param_group]
        if own:
            raise ValueError(f"{', '.join(own)} belongs to the optimizer, not to a param group")
        self.flush()
        shared = {
            key: self.run[key] if self.param_groups else value
            for key, value in self._run_defaults.items()
        }
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1], shared["precision"])
        except Exception:
            self.param_groups.pop()
            raise
        self.param_groups[-1].update(shared)
        for param in self.param_groups[-1]["params"]:
            self._residual(param)

    def _check_group(self, group: dict, precision: str) -> None:
        if not (_is_number(group["lr"]) and group["lr"] >= 0):
            raise ValueError(f"lr must be at least 0, not {group['lr']!r}")
        if not (_is_number(group["weight_decay"]) and group["weight_decay"] >= 0):
            raise ValueError(f"weight_decay must be at least 0, not {group['weight_decay']!r}")
        owner = type(self).__name__
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        for name, param in zip(names, group["params"], strict=True):
            if param.dtype not in checks.PARAM_DTYPES:
                raise TypeError(
                    f"{owner} moves float32, bfloat16 and float16 parameters; {name} is "
                    f"{param.dtype}"
                )
            if param.layout != torch.strided or not checks.is_dense(param):
                raise ValueError(
                    f"{owner} moves parameters in place; {name} is not dense in memory (layout "
                    f"{param.layout}, shape {tuple(param.shape)})"
                )
            resolve(precision, param.dtype)
        by_id: dict[int, str] = {}
        for number, (name, _) in zip(self._tensor_ids(), self._named(), strict=True):
            if by_id.setdefault(number, name) != name:
                raise ValueError(
                    f"{by_id[number]!r} and {name!r} have the same tensor id and would get the "
                    "same noise: rename one (names of wrappers, such as 'module.', do not count)"
                )

    def _named(self) -> list[tuple[str, Tensor]]:
        """All parameters in order, with their names or, for unnamed ones, their positions."""
        named: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            count = len(group["params"])
            positions = [str(i) for i in range(len(named), len(named) + count)]
            named += zip(group.get("param_names", positions), group["params"], strict=True)
        return named

    def _tensor_ids(self) -> list[int]:
        if "param_names" not in self.run:
            return list(range(len(self._named())))
        return [tensor_id(name) for name, _ in self._named()]

    def _residual(self, param: Tensor) -> Tensor | None:
        """The residual of a parameter that moves, made when it is first wanted."""
        # The entry exists even where it stays empty: torch.distributed.checkpoint takes an
        # optimizer without state for one that has not been initialised, and steps it.
        state = self.state[param]
        if "residual" not in state and param.requires_grad:
            residual = new_residual(param, resolve(self.run["precision"], param.dtype))
            if residual is not None:
                state["residual"] = residual
        return state.get("residual")

    def _members(self) -> list[Member]:
        """The parameters that move: those that are not frozen."""
        groups = [group for group in self.param_groups for _ in group["params"]]
        return [
            Member(param, self._residual(param), number, group)
            for (_, param), number, group in zip(
                self._named(), self._tensor_ids(), groups, strict=True
            )
            if param.requires_grad
        ]

    def _move(self, target: Coefficients, gradient: Coefficients | None = None) -> None:
        self._displacement.move(
            target, seed=self.run["seed"], law=self.run["law"], gradient=gradient
        )

    def ask(self) -> Iterator[Point]:
        """Move the weights to each point at which the step wants the loss, one after the other.

        Follow it by :meth:`tell` with a loss for each point, or by :meth:`flush` to drop the step.
        Parameters with ``requires_grad=False`` are frozen and stand still.

        Raises:
            RuntimeError: if the losses of the points before have not been told.
        """
        if self._open is None:
            self._open = self._begin()
        elif self._open.asked:
            raise RuntimeError("tell the losses of the last ask first, or flush() to drop the step")
        self._open.asked = True
        return self._visit(self._open.round)

    def _begin(self) -> OpenStep:
        members = self._members()
        if not members:
            raise RuntimeError(
                f"{type(self).__name__}: every parameter is frozen, nothing can move"
            )
        moving = [member.param for member in self._displacement.members]
        same = len(moving) == len(members) and all(
            before is member.param for before, member in zip(moving, members, strict=True)
        )
        if not same:
            self._move({})
            self._displacement.members = members
        return self._new_step()

    def _new_step(self) -> OpenStep:
        return OpenStep(self._method, self.run["draws"])

    def _visit(self, points: list[Coefficients]) -> Iterator[Point]:
        for coefficients in points:
            self._move(coefficients)
            draws, coeffs = tuple(coefficients), tuple(coefficients.values())
            yield Point(draws, coeffs, self.run["seed"], self.run["law"])

    def tell(self, losses: Sequence[Loss]) -> StepResult | None:
        """Take the losses of the points that :meth:`ask` gave, in their order, and update.

        A loss that is NaN or infinite skips the update: the weights come to rest, the run goes on
        with the next draws, ``skipped`` in the param groups counts it.

        Returns:
            What the step did, also kept as ``last``; None where the method wants another round of
            ask and tell first.

        Raises:
            RuntimeError: without an :meth:`ask` before.
            TypeError, ValueError: if there is not one float32 scalar for each point; the step
                stays open.
        """
        if self._open is None or not self._open.asked:
            raise RuntimeError("tell follows ask: no step is open")
        if len(losses) != len(self._open.round):
            raise ValueError(f"got {len(losses)} losses for {len(self._open.round)} points")
        values = [self._as_float(loss) for loss in losses]
        self._warn_if_equal(values)
        if not all(math.isfinite(value) for value in values):
            self._warn_once(
                "skipped",
                f"{type(self).__name__}: a loss is not finite ({values}); the update is skipped, "
                "as it will be whenever this happens (the param groups count them in 'skipped')",
            )
            return self._finish(self._open, Estimate({}, values), skipped=True)
        estimate = self._open.send(values)
        return None if estimate is None else self._finish(self._open, estimate, skipped=False)

    def _finish(self, step: OpenStep, estimate: Estimate, *, skipped: bool) -> StepResult:
        before = {key: self.run[key] for key in COUNTERS}
        result = StepResult(
            losses=tuple(estimate.losses),
            draws=tuple(estimate.gradient),
            projected_gradient=tuple(estimate.gradient.values()),
            skipped=skipped,
        )
        with uninterrupted():
            self._update_run(
                step=before["step"] + 1,
                draws=step.next_draw,
                skipped=before["skipped"] + skipped,
            )
            try:
                next_point = self._new_step().round[0] if self.run["fuse_next"] else {}
                self._move(next_point, None if skipped else estimate.gradient)
            except BaseException:
                self._update_run(**before)
                self.flush()
                raise
            self._open = None
            self.last = result
        # Learning-rate schedulers look here for whether the optimizer steps before they do.
        self._opt_called = True
        return result

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Tensor:  # type: ignore[override]
        """One step: evaluate the closure at each point, estimate, update.

        Args:
            closure: computes the loss from the weights as they stand, on the same data at each
                call, and returns it as a Python float or a float32 scalar tensor. It is called
                several times under ``torch.no_grad()`` and calls no ``backward``.

        Returns:
            The mean of the losses that estimate the gradient, a 0-d tensor; ``last`` holds more.

        Raises:
            TypeError: without a closure, or for a loss that is no scalar or in half precision.
            Whatever the closure raises, Ctrl-C too: the weights are brought back to rest first, and
            the run stands where it stood before the step.
        """
        if not callable(closure):
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that returns the loss; got {closure!r}"
            )
        if self._open is not None:
            raise RuntimeError("a step is open: tell its losses first, or flush() to drop it")
        try:
            result = None
            while result is None:
                losses = [self._as_float(closure()) for _ in self.ask()]
                result = self.tell(losses)
        except BaseException:
            self.flush()
            raise
        return torch.tensor(result.loss)

    def flush(self) -> None:
        """Bring the weights to rest, dropping a step that is open.

        With ``fuse_next`` the weights stand displaced between steps: call it before they are
        evaluated, copied or saved (``state_dict`` calls it, the module's too where the module was
        given).
        """
        self._open = None
        if not self._displacement.at_rest:
            self._move({})

    def _as_float(self, loss: Loss) -> float:
        if isinstance(loss, Tensor):
            if loss.numel() != 1 or loss.is_complex():
                raise TypeError(
                    "the closure must return a scalar loss, not a tensor of shape "
                    f"{tuple(loss.shape)} and {loss.dtype}"
                )
            if loss.dtype in (torch.float16, torch.bfloat16):
                raise TypeError(
                    f"the loss is {loss.dtype}, which rounds the difference of two losses away: "
                    "compute it in float32, for example cross_entropy(logits.float(), labels)"
                )
            return float(loss)
        if not isinstance(loss, Real) or type(loss).__name__ == "float16":
            raise TypeError(
                f"the closure must return a float32 scalar loss, not {type(loss).__name__}"
            )
        return float(loss)

    def _warn_if_equal(self, values: list[float]) -> None:
        equal = len(values) > 1 and all(value == values[0] for value in values)
        self._equal_steps = self._equal_steps + 1 if equal else 0
        if self._equal_steps == EQUAL_STEPS:
            self._warn_once(
                "equal",
                f"the losses of {EQUAL_STEPS} steps running are equal bit for bit, so nothing is "
                "learned: the loss may not depend on these parameters, be rounded to half "
                "precision on its way or see a cached copy of the weights, or eps may be too small",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """The state, for :meth:`load_state_dict`; the weights are brought to rest first."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer of the same parameters stood when it gave this state.

        Settings (``lr``, ``eps``, ``seed``, ``precision``, …) are taken from the state, as in
        ``torch.optim``. Residuals keep their dtype.

        Raises:
            ValueError: for a state of another kind of optimizer or of parameters with other names.
        """
        saved_run: dict[str, Any] = next(iter(state_dict.get("param_groups", [])), {})
        missing = [key for key in (*SETTINGS, *COUNTERS) if key not in saved_run]
        if missing:
            raise ValueError(
                f"not a state of {type(self).__name__}: it has no {', '.join(missing)}"
            )
        self._check_names(state_dict)
        self.flush()
        super().load_state_dict(state_dict)
        # torch has cast them to the parameter's dtype.
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (_, param) in zip(saved, self._named(), strict=True):
            residual = state_dict["state"].get(number, {}).get("residual")
            if residual is not None:
                self.state[param]["residual"] = residual.to(param.device, copy=True)

    def _check_names(self, state_dict: dict[str, Any]) -> None:
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            names = [canonical_name(name) for name in own.get("param_names", [])]
            saved_names = [canonical_name(name) for name in saved.get("param_names", [])]
            if names != saved_names:
                differing = sorted(set(names) ^ set(saved_names)) or "their order"
                raise ValueError(
                    "the state's parameters have other names, and with them other noise; they "
                    f"differ in {differing}"
                )

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_displacement", "_run_defaults", "last")
        return super().__getstate__() | {key: self.__dict__[key] for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open = None
        self._equal_steps = 0
        self._warned = set()

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        # GradScaler asks for this before it steps an optimizer.
        raise RuntimeError(
            f"{type(self).__name__} uses no gradients, so there is nothing to scale: call "
            "optimizer.step(closure) without a GradScaler"
        )


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real)


def _integer(name: str, value: int, *, at_least: int, below: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or not at_least <= value < below:
        raise ValueError(
            f"{name} must be an integer of at least {at_least} and below 2^{below.bit_length() - 1}"
            f", not {value!r}"
        )
    return int(value)


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
