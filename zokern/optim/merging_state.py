"""What a merging optimizer keeps: groups, moments, values, τ; torch's protocol for it."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from zokern.checks import RESIDUAL_DTYPES, check_disjoint
from zokern.merging import SparseTau, dense_tau
from zokern.optim.fsdp_copies import check_weights_themselves
from zokern.optim.merging_groups import Group, check_group, check_paper
from zokern.optim.parameters import (
    check_names,
    check_params,
    check_tensor_ids,
    named,
    restore_tensors,
)
from zokern.optim.precision import (
    PRECISIONS,
    VALUE_KEYS,
    log_memory,
    new_value_state,
    resolve,
    same_bits,
)
from zokern.optim.reference import check_sparse
from zokern.optim.settings import run_seed
from zokern.optim.versions import Versions
from zokern.sharding import is_dtensor, like, local, of_first_rank, placed

# In a parameter's state the tensors of its shape.
PARAM_KEYS = ("exp_avg", "exp_avg_sq", *VALUE_KEYS, "cached_delta", "tau_ref")
TAU_KEYS = ("tau_starts", "tau_places", "tau_values")


class MergingState(Optimizer):
    """torch's protocol for state; :class:`zokern.optim.merging.MergingAdamW` adds the step."""

    # By semantics, the method of the sweep.
    METHODS: ClassVar[dict[str, str]]

    _versions: Versions
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
        if run["seed"] is None:
            self._share_seed()
        moving = [param for _, param in named(self.param_groups) if param.requires_grad]
        values = [self.state[p][key] for p in moving for key in VALUE_KEYS if key in self.state[p]]
        how = f"precision={self.run['precision']!r}"
        log_memory(type(self).__name__, how, moving, values)

    def _share_seed(self) -> None:
        """All ranks that have parts of the parameters take the seed that the first has drawn."""
        for _, param in named(self.param_groups):
            if is_dtensor(param):
                seed = of_first_rank(self.run["seed"], param)
                for settings in (self._run_defaults, *self.param_groups):
                    settings["seed"] = seed
                return

    def _begin(self) -> None:
        """What is no part of the state."""
        self._versions = Versions()
        self._warned = set()

    def _checked_run(self, run: Group) -> Group:
        for key, allowed in (
            ("semantics", tuple(self.METHODS)),
            ("precision", PRECISIONS),
            # In float16 the squares of most gradients are 0.
            ("state_dtype", (torch.float32, torch.bfloat16)),
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
            check_weights_themselves(named(self.param_groups[-1:]))
            check_tensor_ids(self.param_groups)
            check_disjoint(
                ("parameter", i, local(param), True)
                for i, (_, param) in enumerate(named(self.param_groups))
                if not param.is_meta
            )
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
        value, is_new = local(param).detach(), "exp_avg" not in state
        # Between int and tensor, as a GPU that counts by itself needs it.
        step = state.get("step", 0)
        if group["capturable"] and not isinstance(step, Tensor):
            state["step"] = torch.tensor(float(step), device=param.device)
        elif not group["capturable"]:
            state["step"] = int(step)
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = like(param, torch.zeros_like(value, dtype=group["state_dtype"]))
        if group.get("online_step", 1) > 1 and "cached_delta" not in state:
            state["cached_delta"] = like(param, torch.zeros_like(value, dtype=torch.float32))
        if not any(key in state for key in VALUE_KEYS):
            state.update(new_value_state(param, resolve(group["precision"], param.dtype)))
        if is_new:
            self._versions.note([param])
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

        What is kept beside them (masters, residuals, the Δ since the last merge) belongs to the
        weights that this optimizer has written. Where it sees that somebody else has written to a
        parameter, it does this by itself.
        """
        for _, param in named(self.param_groups):
            self._refresh(param)

    def _refresh(self, param: Tensor) -> None:
        state = self.state[param]
        if "master" in state:
            local(state["master"]).copy_(local(param).detach())
        for key in ("residual", "cached_delta"):
            if key in state:
                local(state[key]).zero_()
        self._versions.note([param])

    def _refresh_if_touched(self, param: Tensor) -> None:
        """What a parameter that somebody else has written to does not go with any more."""
        if self._versions.knows(param):
            touched = self._versions.changed(param)
        else:
            # A state that was loaded: its master goes with the parameter, or with another one.
            master = self.state[param].get("master")
            touched = master is not None and not same_bits(
                local(param), local(master).to(param.dtype)
            )
        if touched:
            self._refresh(param)

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
        check_names(self.param_groups, groups)
        for group in groups:
            check_group(group)
        self._check_saved(state_dict)
        super().load_state_dict(state_dict)
        restore_tensors(self, state_dict, unplaced=("step", *TAU_KEYS))
        for _, param in named(self.param_groups):
            tau = self._tau(param)
            if is_dtensor(param) and isinstance(tau, SparseTau):
                self._set_tau(param, placed(dense_tau(tau, param.shape), param))
        self._begin()

    def _check_saved(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError, naming it, for a tensor that does not fit its parameter."""
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (name, param) in zip(saved, named(self.param_groups), strict=False):
            state = state_dict["state"].get(number, {})
            wanted = ("exp_avg", "exp_avg_sq") if state else ()
            missing = [key for key in wanted if key not in state]
            if missing:
                raise ValueError(f"the state of {name} has no {', '.join(missing)}")
            for key in PARAM_KEYS:
                if key in state and state[key].shape != param.shape:
                    raise ValueError(
                        f"the state's {key} of {name} has the shape {tuple(state[key].shape)}, the "
                        f"parameter {tuple(param.shape)}"
                    )
            residual = state.get("residual")
            if residual is not None and residual.dtype not in RESIDUAL_DTYPES[param.dtype]:
                raise ValueError(
                    f"the state's residual of {name} is {residual.dtype}, which does not go with a "
                    f"{param.dtype} parameter"
                )
            if "tau_values" in state:
                check_sparse(name, SparseTau(*(state[key] for key in TAU_KEYS)), param.numel())

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_run_defaults": self._run_defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()
