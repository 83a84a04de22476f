"""What a merging optimizer keeps: groups, moments, values, τ; torch's protocol for it."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from zokern import checks
from zokern.merging import SparseTau
from zokern.optim.merging_groups import Group, check_group, check_paper
from zokern.optim.parameters import (
    check_names,
    check_params,
    check_tensor_ids,
    named,
    restore_tensors,
)
from zokern.optim.precision import PRECISIONS, VALUE_KEYS, log_memory, new_value_state, resolve
from zokern.optim.settings import run_seed
from zokern.optim.versions import Versions

TAU_KEYS = ("tau_starts", "tau_places", "tau_values")


class MergingState(Optimizer):
    """torch's protocol for state; :class:`zokern.optim.merging.MergingAdamW` adds the step."""

    # By semantics, the method of the sweep.
    METHODS: ClassVar[dict[str, str]]

    _versions: Versions
    # The thresholds of the step before, by what they are of.
    _near: dict[Any, Tensor]
    _warned: set[str]

    def __init__(
        self,
        params: Iterable,
        defaults: Group,
        run: Group,
        param_name_map: Mapping[tuple[int, int], str] | None,
    ) -> None:
        self._begin()
        self._run_defaults = self._checked_run(run)
        super().__init__(params, defaults)
        if param_name_map is not None:
            self._take_names(param_name_map)
        moving = [param for _, param in named(self.param_groups) if param.requires_grad]
        values = [self.state[p][key] for p in moving for key in VALUE_KEYS if key in self.state[p]]
        log_memory(type(self).__name__, self.run["precision"], moving, values)

    def _begin(self) -> None:
        """What is no part of the state."""
        self._versions = Versions()
        self._near = {}
        self._warned = set()

    def _checked_run(self, run: Group) -> Group:
        for key, allowed in (
            ("semantics", tuple(self.METHODS)),
            ("precision", PRECISIONS),
            ("state_dtype", checks.PARAM_DTYPES),
        ):
            if run[key] not in allowed:
                raise ValueError(
                    f"{key} must be one of {', '.join(map(str, allowed))}, not {run[key]!r}"
                )
        return {**run, "seed": run_seed(run["seed"]), "method": type(self).__name__}

    @property
    def run(self) -> Group:
        """The settings of the run, which all param groups hold alike."""
        return self.param_groups[0]

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, as ``torch.optim.Optimizer.add_param_group``.

        They have no τ yet: where the method needs one, give the reference again.

        Raises:
            ValueError, TypeError: for a hyper-parameter out of range, a setting that belongs to the
                optimizer (``seed``, ``precision``, …), or a parameter that cannot be updated in
                place.
        """
        own = [key for key in self._run_defaults if key in param_group]
        if own:
            raise ValueError(f"{', '.join(own)} belongs to the optimizer, not to a param group")
        shared = {
            key: self.run[key] if self.param_groups else value
            for key, value in self._run_defaults.items()
        }
        # torch would write its defaults into the caller's dict.
        super().add_param_group(dict(param_group))
        group = self.param_groups[-1]
        try:
            if group["correct_bias"] is None:
                group["correct_bias"] = shared["semantics"] == "qwen"
            check_group(group)
            if shared["semantics"] == "paper":
                check_paper(group)
            check_params(group, shared["precision"], type(self).__name__)
            check_tensor_ids(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise
        group.update(shared)
        for param in group["params"]:
            self._own_state(param, group)

    def _take_names(self, names: Mapping[tuple[int, int], str]) -> None:
        """Those of QwenLM's ``param_name_map``: {(group, position in it): name}."""
        places = [
            (g, i) for g, group in enumerate(self.param_groups) for i in range(len(group["params"]))
        ]
        missing = [place for place in places if place not in names]
        if missing:
            raise ValueError(f"param_name_map has no name for (group, position) {missing[:8]}")
        for g, group in enumerate(self.param_groups):
            own = [names[g, i] for i in range(len(group["params"]))]
            if group.get("param_names", own) != own:
                raise ValueError(
                    f"param_name_map calls the parameters of group {g} {own[:3]}, …, they come as "
                    f"{group['param_names'][:3]}, …"
                )
            group["param_names"] = own
        check_tensor_ids(self.param_groups)

    def _own_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """What is kept beside a parameter that moves, made when it is first wanted."""
        state = self.state[param]
        if not param.requires_grad:
            return state
        value = param.detach()
        if "step" not in state:
            step = torch.zeros((), device=param.device) if group["capturable"] else 0
            state["step"] = step
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = torch.zeros_like(value, dtype=group["state_dtype"])
        if group.get("online_step", 1) > 1 and "cached_delta" not in state:
            state["cached_delta"] = torch.zeros_like(value, dtype=torch.float32)
        if not any(key in state for key in VALUE_KEYS):
            state.update(new_value_state(param, resolve(group["precision"], param.dtype)))
        return state

    def _set_tau(self, param: Tensor, tau: Tensor | SparseTau) -> None:
        state = self.state[param]
        for key in ("tau_ref", *TAU_KEYS):
            state.pop(key, None)
        if isinstance(tau, SparseTau):
            state.update(zip(TAU_KEYS, tau, strict=True))
        else:
            state["tau_ref"] = tau

    def _tau(self, param: Tensor) -> Tensor | SparseTau | None:
        state = self.state[param]
        if "tau_values" in state:
            return SparseTau(*(state[key] for key in TAU_KEYS))
        return state.get("tau_ref")

    def refresh(self) -> None:
        """Take the parameters as they are now for the weights.

        What is kept beside them (masters, residuals) belongs to the weights that this optimizer has
        written. Where it sees that somebody else has written to a parameter, it does this by
        itself.
        """
        for _, param in named(self.param_groups):
            self._refresh(param)

    def _refresh(self, param: Tensor) -> None:
        state = self.state[param]
        if "master" in state:
            state["master"].copy_(param.detach())
        if "residual" in state:
            state["residual"].zero_()
        self._versions.note([param])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer of the same parameters stood when it gave this state.

        Hyper-parameters and settings are taken from the state, as in ``torch.optim``; τ is in it.
        Tensors keep their dtypes and bits.

        Raises:
            ValueError: for a state of another kind of optimizer or of parameters with other names.
        """
        groups = state_dict.get("param_groups", [])
        saved: Group = groups[0] if groups else {}
        owner = type(self).__name__
        # torch adds to the defaults what no group has when a state is loaded.
        own = [key for key in (*self.defaults, *self._run_defaults) if key in self.param_groups[0]]
        missing = [key for key in own if key not in saved]
        if missing:
            raise ValueError(f"not a state of {owner}: it has no {', '.join(missing)}")
        if saved["method"] != owner:
            raise ValueError(f"not a state of {owner}, but of {saved['method']}")
        self._check_shapes(state_dict)
        check_names(self.param_groups, groups)
        super().load_state_dict(state_dict)
        restore_tensors(self, state_dict)
        self._begin()

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (name, param) in zip(saved, named(self.param_groups), strict=False):
            moment = state_dict["state"].get(number, {}).get("exp_avg")
            if moment is not None and moment.shape != param.shape:
                raise ValueError(
                    f"the state's exp_avg of {name} has the shape {tuple(moment.shape)}, the "
                    f"parameter {tuple(param.shape)}"
                )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_run_defaults": self._run_defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()
