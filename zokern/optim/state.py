"""What a zeroth-order optimizer keeps: groups, what lies beside parameters, where they stand."""

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from zokern.distributed import Ranks
from zokern.optim.displacement import Coefficients, Displacement, Expansion, Member, Step
from zokern.optim.fsdp_copies import GatheredCopies
from zokern.optim.interrupts import uninterrupted
from zokern.optim.losses import EqualLosses
from zokern.optim.parameters import (
    check_last_group,
    check_names,
    named,
    restore_tensors,
    tensor_ids,
)
from zokern.optim.precision import VALUE_KEYS, new_value_state, resolve, same_bits
from zokern.optim.recording import Recorder
from zokern.optim.rules import Rule, rule_of
from zokern.optim.settings import ROUNDINGS, SETTINGS, run_settings
from zokern.optim.steps import OpenStep, StepResult
from zokern.optim.versions import Versions
from zokern.sharding import is_dtensor, like, local, shard_of
from zokern.sweep import Shard


class ZOState(Optimizer):
    """torch's protocol for state; :class:`zokern.optim.base.ZOOptimizer` adds the steps."""

    # What a method remembers between steps, by name, with what it begins with.
    STATE: ClassVar[dict[str, Any]] = {}
    # The names in a parameter's state of the tensors that directions are made of beside noise.
    DENSE: ClassVar[tuple[str, ...]] = ()

    last: StepResult | None
    _displacement: Displacement
    _versions: Versions
    _open: OpenStep | None
    _recorder: Recorder
    _ranks: Ranks
    _equal_losses: EqualLosses
    _warned: set[str]
    _run_defaults: dict[str, Any]
    _gathered: GatheredCopies
    _shards: dict[int, Shard]
    _evaluating = False

    @property
    def run(self) -> dict[str, Any]:
        """The settings and counters of the run, which all param groups hold alike."""
        return self.param_groups[0]

    def _update_run(self, **values: Any) -> None:
        for group in self.param_groups:
            group.update(values)

    def _expand(self, draw: int, members: list[Member]) -> Expansion:
        """What a draw's direction is made of, for a method with ``DENSE`` tensors."""
        raise TypeError(f"{type(self).__name__} has DENSE tensors: override _expand")

    def _rule(self, group: dict[str, Any]) -> Rule:
        """How the estimated gradient is applied to a group's parameters."""
        return rule_of(group, sign=self.run["sign"])

    def _as_step(self, gradient: Coefficients) -> Step:
        return Step(gradient, self._rule, self.run["sign"])

    def _move(self, target: Coefficients, gradient: Coefficients | None = None) -> None:
        step = None if gradient is None else self._as_step(gradient)
        displacement, run = self._displacement, self.run
        if self.DENSE:
            wanted = {*target, *displacement.coefficients, *(gradient or {})}
            for draw in wanted - displacement.expansions.keys():
                displacement.expansions[draw] = self._expand(draw, displacement.members)
        with uninterrupted():
            displacement.move(
                target, seed=run["seed"], law=run["law"], step=step, rounding=self._rounding
            )
            self._versions.note(member.whole for member in displacement.members)
            self._gathered.drop()

    def _rounding(self) -> int | None:
        """The draw of a sweep's stochastic rounding."""
        params = (member.param for member in self._displacement.members)
        if not self.run["stochastic_rounding"] or all(p.dtype == torch.float32 for p in params):
            return None
        number = self.run[ROUNDINGS]
        self._update_run(**{ROUNDINGS: number + 1})
        return number

    def flush(self) -> None:
        """Bring the weights to rest, dropping a step that is open.

        With ``fuse_next`` the weights stand displaced between steps: call it before they are
        evaluated, copied or saved (``state_dict`` calls it, the module's too where the module was
        given).

        Raises:
            RuntimeError: if somebody has written to the displaced weights, see :meth:`refresh`; and
                in the closure of a step, as whatever else changes the optimizer's state.
        """
        self._refuse_in_closure()
        if not self._displacement.at_rest:
            self._check_untouched()
        self._drop_step()
        self._rest()
        self._gathered.drop()

    def _rest(self) -> None:
        if not self._displacement.at_rest:
            self._move({})
        self._displacement.forget_all_but({})

    def _drop_step(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None

    def _rest_untouched(self) -> None:
        """Bring to rest what nobody else has written to."""
        displacement = self._displacement
        if not displacement.at_rest:
            displacement.keep(lambda member: not self._versions.changed(member.whole))
        self._rest()

    def _refuse_in_closure(self) -> None:
        if self._evaluating:
            raise RuntimeError(
                "the weights stand displaced while a step evaluates its closure: state_dict, "
                "flush, refresh and the like must wait for the end of the step"
            )

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters, as ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: for a setting that belongs to the optimizer (``eps``, ``samples``, ``seed``,
                ``law``, ``precision``, ``fuse_next``, …), a parameter that cannot be swept in
                place, or two names with one tensor id.
        """
        own = [key for key in self._run_defaults if key in param_group]
        if own:
            raise ValueError(f"{', '.join(own)} belongs to the optimizer, not to a param group")
        self.flush()
        shared = {
            key: self.run[key] if self.param_groups else value
            for key, value in self._run_defaults.items()
        }
        # torch would write its defaults into the caller's dict.
        super().add_param_group(dict(param_group))
        try:
            self._check_last_group(shared["precision"])
        except Exception:
            self.param_groups.pop()
            raise
        self.param_groups[-1].update(shared)
        for param in self.param_groups[-1]["params"]:
            self._own_state(param)
        self._versions.note(self.param_groups[-1]["params"])

    def _check_last_group(self, precision: str) -> None:
        owner, params = type(self).__name__, named(self.param_groups[-1:])
        check_last_group(self.param_groups, precision, owner)
        self._gathered.check(params, owner)
        self._ranks.check_dtensors([param for _, param in params])
        self._displacement.check(params)

    def _own_state(self, param: Tensor) -> dict[str, Tensor]:
        """What is kept beside a parameter that moves, made when it is first wanted."""
        # The entry exists even where it stays empty: torch.distributed.checkpoint takes an
        # optimizer without state for one that has not been initialised, and steps it.
        state = self.state[param]
        if not param.requires_grad:
            return state
        new = {}
        if not any(key in state for key in VALUE_KEYS):
            new = new_value_state(local(param), resolve(self.run["precision"], param.dtype))
        if "momentum" not in state and self._keeps_momentum():
            new["momentum"] = torch.zeros_like(local(param).detach(), dtype=torch.float32)
        for key, value in new.items():
            state[key] = like(param, value)
        return state

    def _members(self) -> list[Member]:
        """The parameters that move: those that are not frozen."""
        groups = [group for group in self.param_groups for _ in group["params"]]
        return [
            self._member(param, number, group)
            for (_, param), number, group in zip(
                named(self.param_groups), tensor_ids(self.param_groups), groups, strict=True
            )
            if param.requires_grad
        ]

    def _member(self, param: Tensor, number: int, group: dict[str, Any]) -> Member:
        state = self._own_state(param)
        parts = {key: local(tensor) for key, tensor in state.items()}
        return Member(
            local(param),
            residual=parts.get("residual"),
            master=parts.get("master"),
            momentum=parts.get("momentum"),
            dense=tuple(parts[key] for key in self.DENSE),
            tensor_id=number,
            group=group,
            whole=param,
            kept=tuple(state.values()),
            shard=self._shard(param),
        )

    def _shard(self, param: Tensor) -> Shard | None:
        """Where the part of a DTensor lies that this rank has."""
        if not is_dtensor(param):
            return None
        if id(param) not in self._shards:
            self._shards[id(param)] = shard_of(param)
        return self._shards[id(param)]

    def _keeps_momentum(self) -> bool:
        return any(group["momentum"] != 0.0 for group in self.param_groups)

    def refresh(self) -> None:
        """Take the parameters as they are now for the weights at rest.

        Call it after new weights were loaded into the module, or they were changed in any other
        way than by this optimizer: what it keeps beside the parameters (masters, residuals, where
        they stand displaced) belongs to the old ones. Parameters that nobody else has written to
        come to rest as with :meth:`flush`. Momentum and counters stay.

        Raises:
            RuntimeError: if a trajectory records the run, which could not be replayed any more.
        """
        self._refuse_in_closure()
        if self._recorder.has_begun:
            raise RuntimeError(
                "a trajectory records this run from its base weights; other weights need a new "
                "optimizer with a trajectory of its own"
            )
        self._drop_step()
        self._rest_untouched()
        self._recorder.detach()
        self._displacement = self._displacement.fresh()
        self._shards.clear()
        for _, param in named(self.param_groups):
            state = self.state[param]
            # They may have another dtype or memory format now.
            for key in VALUE_KEYS:
                state.pop(key, None)
            self._own_state(param)
            self._versions.note([param])

    def _check_untouched(self) -> None:
        """Moving on would overwrite what somebody has written to the weights, or mix the two."""
        self._displacement.settle()
        touched = self._touched()
        if touched is None:
            return
        if self._displacement.members or not self._versions.knows(touched[1]):
            name, _, what = touched
            advice = "call refresh() to go on from the weights as they are now"
            if self._open is not None and self._open.visited:
                advice = (
                    "an evaluation must leave the weights alone (a forward through nn.Embedding "
                    "with max_norm does not: freeze its weight or drop max_norm); then " + advice
                )
            if self._recorder.has_begun:
                advice = (
                    "a replay would not know; where it holds again what it held, "
                    "load_state_dict(state_dict()) of the optimizer goes on"
                )
            raise RuntimeError(f"{name} {what}, and somebody else has written to it: {advice}")
        # Nothing has moved yet, so nothing belongs to the weights of before.
        self.refresh()

    def _touched(self) -> tuple[str, Tensor, str] | None:
        """A parameter that no longer holds what the optimizer takes it to hold, and why not."""
        at_rest = self._displacement.at_rest
        if self._versions.all_known(p for group in self.param_groups for p in group["params"]):
            return None
        moving = {id(member.whole) for member in self._displacement.members}
        for name, param in named(self.param_groups):
            if not self._versions.changed(param):
                continue
            state, known = self.state[param], self._versions.knows(param)
            master = state.get("master")
            kept = None if master is None else local(master)
            if known and not at_rest and id(param) in moving:
                return name, param, "stands displaced"
            if not param.requires_grad:
                # Frozen, it is not moved, and looked at again when it is thawed.
                continue
            if kept is not None and at_rest and not same_bits(local(param), kept.to(param.dtype)):
                return name, param, "has a master in the optimizer"
            # What was loaded belongs to parameters that are loaded too.
            if known and "residual" in state:
                return name, param, "has a residual in the optimizer"
            if known and id(param) in moving and master is None and self._recorder.has_begun:
                return name, param, "is recorded in a trajectory"
        return None

    def state_dict(self) -> dict[str, Any]:
        """The state, for :meth:`load_state_dict`; the weights are brought to rest first."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer of the same parameters stood when it gave this state.

        Settings (``lr``, ``eps``, ``seed``, ``precision``, …) are taken from the state, as in
        ``torch.optim``. Tensors keep their dtypes. The weights themselves are the module's to
        load, before or after.

        Raises:
            ValueError: for a state of another kind of optimizer or of parameters with other names.
        """
        self._refuse_in_closure()
        saved_run: dict[str, Any] = next(iter(state_dict.get("param_groups", [])), {})
        owner = type(self).__name__
        missing = [key for key in self._run_defaults if key not in saved_run]
        if missing:
            raise ValueError(f"not a state of {owner}: it has no {', '.join(missing)}")
        if saved_run["method"] != owner:
            raise ValueError(f"not a state of {owner}, but of {saved_run['method']}")
        run_settings(**{key: saved_run[key] for key in SETTINGS})
        if saved_run["layerwise"] != self.run["layerwise"]:
            raise ValueError(
                f"the state is of a run with layerwise={saved_run['layerwise']}, and this "
                f"{owner} has layerwise={self.run['layerwise']}: give the constructor the same"
            )
        check_names(self.param_groups, state_dict["param_groups"])
        self._check_shapes(state_dict)
        self._drop_step()
        self._rest_untouched()
        super().load_state_dict(state_dict)
        restore_tensors(self, state_dict)
        self._displacement = self._displacement.fresh()
        self._versions.forget()
        self._recorder.detach(loaded=True)

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (name, param) in zip(saved, named(self.param_groups), strict=False):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.shape != param.shape:
                    raise ValueError(
                        f"the state's {key} of {name} has shape {tuple(value.shape)}, the "
                        f"parameter {tuple(param.shape)}"
                    )

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_displacement", "_ranks", "_run_defaults", "last")
        return super().__getstate__() | {key: self.__dict__[key] for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_displacement" not in state:
            # load_state_dict passes through here too.
            return
        self._open = None
        self._versions = Versions()
        self._shards = {}
        self._gathered = GatheredCopies(None)
        # Two optimizers cannot record one run.
        self._recorder = Recorder(None)
        self._equal_losses = EqualLosses()
        self._warned = set()

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        # GradScaler asks for this before it steps an optimizer.
        raise RuntimeError(
            f"{type(self).__name__} uses no gradients, so there is nothing to scale: call "
            "optimizer.step(closure) without a GradScaler"
        )
