"""ZOPrO: zeroth-order preference optimization, arXiv 2503.03460."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from zokern import ops
from zokern.checks import PARAM_DTYPES
from zokern.laws import canonical_name
from zokern.optim.base import CommonArguments, ZOOptimizer
from zokern.optim.displacement import Expansion, Member
from zokern.optim.estimates import pairs, two_sided
from zokern.optim.names import plain_name
from zokern.optim.parameters import named
from zokern.optim.rules import float32
from zokern.optim.settings import integer
from zokern.optim.steps import Estimate, Method, OpenStep
from zokern.sharding import exact_totals, groups_of, is_dtensor, local, placed
from zokern.trajectory import TrajectoryError, checksum

Vectors = Mapping[str, Tensor] | Mapping[Tensor, Tensor]

GAMMA = 1 - 1e-3

# Below this share of ‖n‖² what is left of n beside the reward delta is rounding.
NEGLIGIBLE = 1e-12


class ZOPrO(ZOOptimizer):
    r"""Zeroth-order preference optimization (arXiv 2503.03460): noise guided by policy and reward.

    For each tensor, with the update P that the policy made in the round before, the difference R
    of the reward model from the base model, and noise n:

    .. math::
        \hat v &= R / \lVert R \rVert, \qquad
        n_\perp = n - (\hat v \cdot n) \hat v \\
        z &= \gamma P + \sqrt{1 - \gamma^2} \,
             \frac{\lVert P \rVert}{\lVert n_\perp \rVert + 10^{-8}} \, n_\perp \\
        g &= \frac{L(\theta + \varepsilon z) - L(\theta - \varepsilon z)}{2 \varepsilon}, \qquad
        \theta \leftarrow (1 - \mathrm{lr} \cdot \mathrm{wd}) \, \theta - \mathrm{lr} \, g z

    :math:`\hat v` is 0 where R is, and :math:`n_\perp` is 0 where nothing of n is left beside R
    (tensors of one element). γ begins at 1 - 1e-3.

    A step takes 2 evaluations and 3 sweeps (2 with ``fuse_next``), and one reduction that gives the
    scalars of all tensors; they serve every sweep of the step. Kept beside the weights: P and R, in
    the dtype they come in.

    Args:
        params, lr: as for :class:`zokern.MeZO`.
        eps: ε.
        previous_update: P, a mapping from parameter names or parameters to tensors shaped like
            them, on any device; :func:`delta` makes it from two models. Every parameter that moves
            needs an entry, and no entry may be left over. For a DTensor it is the full tensor or a
            DTensor, of which each rank keeps the parts that it has of the parameter.
        reward_delta: R, likewise; entries that are no parameters' (a score head) are passed over.
        total_steps: of the linear decay.
        decay: of γ with the number t of steps: ``linear``: max(0, γ₀ - t/total_steps); ``exp``:
            γ₀·e^(-t).
        advance: ``step``: each step draws new noise and lets γ decay. ``manual``: both stay until
            :meth:`advance` is called, as for all mini-batches and epochs of one rollout batch.
        **common: the other arguments of :class:`zokern.MeZO`. ``samples`` directions are averaged.

    Raises:
        ValueError, TypeError: as :class:`zokern.MeZO`, and for entries that are missing, misshapen
            or left over, naming them.
    """

    STATE: ClassVar[dict[str, Any]] = {"advances": 0}
    DENSE = ("previous_update", "reward_delta")

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        eps: float = 1e-4,
        *,
        previous_update: Vectors,
        reward_delta: Vectors,
        total_steps: int | None = None,
        decay: Literal["linear", "exp"] = "linear",
        advance: Literal["step", "manual"] = "step",
        **common: Unpack[CommonArguments],
    ) -> None:
        self._given = previous_update, reward_delta
        own = {"total_steps": total_steps, "decay": decay, "advance": advance}
        super().__init__(params, lr, eps, settings=own, **common)

    def _prepare(self) -> None:
        super()._prepare()
        decay, advance = self.run["decay"], self.run["advance"]
        if decay not in ("linear", "exp"):
            raise ValueError(f"decay must be 'linear' or 'exp', not {decay!r}")
        if advance not in ("step", "manual"):
            raise ValueError(f"advance must be 'step' or 'manual', not {advance!r}")
        if self.run["total_steps"] is not None:
            total = integer("total_steps", self.run["total_steps"], at_least=1, below=1 << 63)
            self._update_run(total_steps=total)
        elif decay == "linear":
            raise ValueError("decay='linear' needs total_steps, over which γ falls to 0")
        self._norms: dict[int, float] = {}
        self._checksums: dict[str, list[int]] | None = None
        self.set_round(*self._given)
        del self._given

    @property
    def gamma(self) -> float:
        """γ of the next step."""
        advances = self.run["advances"]
        if self.run["decay"] == "linear":
            return max(0.0, GAMMA - advances / self.run["total_steps"])
        return GAMMA * math.exp(-advances)

    def set_round(self, previous_update: Vectors, reward_delta: Vectors) -> None:
        """Take the vectors of a new round; γ goes on from where it is.

        Raises:
            ValueError, TypeError: as the constructor, before anything is changed.
            RuntimeError: while a step is open.
        """
        self._set_vectors(previous_update, reward_delta, exact=True)

    def _set_vectors(self, previous_update: Vectors, reward_delta: Vectors, *, exact: bool) -> None:
        self._refuse_while_open()
        params = named(self.param_groups)
        vectors = {
            "previous_update": _vectors_of(params, previous_update, "previous_update", exact=exact),
            "reward_delta": _vectors_of(params, reward_delta, "reward_delta", exact=False),
        }
        self.flush()
        for key, found in vectors.items():
            for param, vector in found:
                self.state[param][key] = vector
        self._norms, self._checksums = {}, None

    def _refuse_while_open(self) -> None:
        if self._open is not None:
            raise RuntimeError("a step is open: tell its losses first, or flush() to drop it")

    def advance(self) -> None:
        """With ``advance="manual"``: new noise from the next step on, and γ one decay further.

        Raises:
            RuntimeError: with ``advance="step"``, or while a step is open.
        """
        if self.run["advance"] != "manual":
            raise RuntimeError("each step advances by itself: give advance='manual' to do it here")
        self._refuse_while_open()
        self.flush()
        self._update_run(advances=self.run["advances"] + 1)

    def add_param_group(self, param_group: dict) -> None:
        """Only at construction: what joins later has no vectors.

        Raises:
            RuntimeError: afterwards.
        """
        if hasattr(self, "_norms"):
            raise RuntimeError(
                "ZOPrO takes parameters at construction, together with their vectors"
            )
        super().add_param_group(param_group)

    def _members(self) -> list[Member]:
        without = [
            name
            for name, param in named(self.param_groups)
            if param.requires_grad and "reward_delta" not in self.state[param]
        ]
        if without:
            raise RuntimeError(f"{without} were frozen when set_round() was called: call it again")
        return super()._members()

    def _method(self, step: OpenStep) -> Method:
        eps, q = self.run["eps"], self.run["samples"]
        if self.run["advance"] == "manual":
            step.next_draw = self.run["advances"] * q
        directions = [{draw: 1.0} for draw in step.take_draws(q)]
        losses = yield pairs(directions, eps)
        return Estimate(two_sided(directions, losses, eps), losses)

    def _next_state(self, estimate: Estimate) -> dict[str, Any]:
        return {"advances": self.run["advances"] + (self.run["advance"] == "step")}

    def _expand(self, draw: int, members: list[Member]) -> Expansion:
        run, gamma = self.run, self.gamma
        sums = ops.inner_products(
            [member.dense[1] for member in members],
            draw,
            seed=run["seed"],
            law=run["law"],
            tensor_ids=[member.tensor_id for member in members],
            shards=[member.shard for member in members],
        )
        sums = exact_totals(sums, [groups_of(member.whole) for member in members])
        norms = self._update_norms(members)
        return [
            _coefficients(gamma, norm, *row) for norm, row in zip(norms, sums.tolist(), strict=True)
        ]

    def _update_norms(self, members: list[Member]) -> list[float]:
        """‖P‖ of each member, measured once a round."""
        if any(member.tensor_id not in self._norms for member in members):
            sums = ops.inner_products([m.dense[0] for m in members], 0, seed=0)
            sums = exact_totals(sums, [groups_of(member.whole) for member in members])
            for member, square in zip(members, sums[:, 0].tolist(), strict=True):
                self._norms[member.tensor_id] = math.sqrt(square)
        return [self._norms[member.tensor_id] for member in members]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base's; the vectors of the round are part of the state."""
        super().load_state_dict(state_dict)
        self._norms, self._checksums = {}, None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_norms": {}, "_checksums": None}

    def _replay_arguments(self) -> dict[str, Any]:
        return {key: self.run[key] for key in ("total_steps", "decay", "advance")}

    @classmethod
    def _for_replay(
        cls, params: Iterable, arguments: dict[str, Any], rounds: Sequence, **common: Any
    ) -> ZOOptimizer:
        if not rounds:
            raise TrajectoryError(
                "a run of ZOPrO replays from its vectors too: give rounds=[(previous_update, "
                "reward_delta), …]"
            )
        previous_update, reward_delta = rounds[0]
        # What was frozen during the run may have a vector, but is not replayed.
        entries = [entry for group in params for entry in group["params"]]
        names = {plain_name(entry[0]) for entry in entries if isinstance(entry, tuple)}
        moved = {
            key: vector
            for key, vector in previous_update.items()
            if not (names and isinstance(key, str)) or plain_name(key) in names
        }
        return cls(params, previous_update=moved, reward_delta=reward_delta, **arguments, **common)

    def _direction_settings(self) -> dict[str, Any]:
        advances = self.run["advances"]
        if self.run["advance"] == "step":
            advances -= self.run["step"]
        return {"advances": advances, "checksums": self._vector_checksums()}

    def _vector_checksums(self) -> dict[str, list[int]]:
        if self._checksums is None:
            # Of vectors in parts no rank has all; no trajectory records them.
            members = [member for member in self._members() if not groups_of(member.whole)]
            self._checksums = {
                key: [checksum(member.dense[j]) for member in members]
                for j, key in enumerate(self.DENSE)
            }
        return self._checksums

    def _follow(self, settings: dict[str, Any], number: int, rounds: Sequence) -> None:
        advances = settings["advances"] + (number if self.run["advance"] == "step" else 0)
        self._update_run(advances=advances)
        if self._vector_checksums() == settings["checksums"]:
            return
        for vectors in rounds:
            self._set_vectors(*vectors, exact=False)
            if self._vector_checksums() == settings["checksums"]:
                return
        raise TrajectoryError(
            f"the trajectory is of another run: none of the {len(rounds)} rounds has the checksums "
            f"of the previous_update and the reward_delta of step {number}"
        )


def _coefficients(
    gamma: float, update_norm: float, rr: float, rn: float, nn: float
) -> tuple[float, float, float]:
    """z = a·n + γ·P + b·R, from R·R, R·n and n·n: a, γ and b."""
    # Where its square is no float32, a vector counts as 0.
    reward_norm = math.sqrt(rr) if rr >= 2.0**-126 else 0.0
    along = rn / reward_norm if reward_norm > 0.0 else 0.0
    perpendicular = nn - along * along
    if perpendicular <= NEGLIGIBLE * nn:
        return 0.0, float32(gamma), 0.0
    scale = math.sqrt(1 - gamma * gamma) * update_norm / (math.sqrt(perpendicular) + 1e-8)
    back = -scale * along / reward_norm if reward_norm > 0.0 else 0.0
    return float32(scale), float32(gamma), float32(back)


def _vectors_of(
    params: list[tuple[str, Tensor]], vectors: Vectors, what: str, *, exact: bool
) -> list[tuple[Tensor, Tensor]]:
    """Parameters and their vectors, on one device; errors name what does not fit.

    A frozen parameter may have a vector or none.
    """
    if not isinstance(vectors, Mapping):
        raise TypeError(f"{what} must be a mapping from names or parameters to tensors")
    for key, value in vectors.items():
        if not isinstance(key, str | Tensor) or not isinstance(value, Tensor):
            raise TypeError(
                f"{what} must map names or parameters to tensors, not {key!r} to {value!r}"
            )
    left = _Entries(vectors, what)
    found, missing = [], []
    for name, param in params:
        vector = left.take(name, param)
        if vector is None:
            missing += [name] if param.requires_grad else []
            continue
        if vector.shape != param.shape:
            raise ValueError(
                f"{what}[{name!r}] has shape {tuple(vector.shape)}, but the parameter has "
                f"{tuple(param.shape)}"
            )
        dtype = vector.dtype if vector.dtype in PARAM_DTYPES else torch.float32
        vector = vector.detach().to(param.device, dtype, copy=True)
        if not bool(local(vector).isfinite().all()):
            raise ValueError(f"{what}[{name!r}] has entries that are NaN or infinite")
        if is_dtensor(param) or is_dtensor(vector):
            vector = placed(vector, param).clone()
        found.append((param, vector))
    if missing:
        advice = "" if exact else ": give zeros where the reward model has nothing to say"
        raise ValueError(f"{what} has no entry for {missing}{advice}")
    if exact and left.names():
        raise ValueError(f"{what} has entries for no parameter of the optimizer: {left.names()}")
    return found


class _Entries:
    """The entries of a mapping that have not been taken yet."""

    def __init__(self, vectors: Vectors, what: str) -> None:
        self._what = what
        self._by_param = {id(k): v for k, v in vectors.items() if isinstance(k, Tensor)}
        self._by_name = {canonical_name(k): v for k, v in vectors.items() if isinstance(k, str)}

    def take(self, name: str, param: Tensor) -> Tensor | None:
        """That of the parameter, of its name, or of its name without what PEFT adds to it."""
        if id(param) in self._by_param:
            return self._by_param.pop(id(param))
        if canonical_name(name) in self._by_name:
            return self._by_name.pop(canonical_name(name))
        alike = [key for key in self._by_name if plain_name(key) == plain_name(name)]
        if len(alike) > 1:
            raise ValueError(f"{self._what} has several entries for {name!r}: {alike}")
        return self._by_name.pop(alike[0]) if alike else None

    def names(self) -> list[str]:
        shapes = (tuple(vector.shape) for vector in self._by_param.values())
        return [*self._by_name, *(f"a parameter of shape {shape}" for shape in shapes)]


def delta(
    new: nn.Module | Mapping[str, Tensor], old: nn.Module | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """new - old for each floating-point tensor that both have, in float32.

    ``previous_update = delta(policy_now, policy_before)`` and
    ``reward_delta = delta(reward_model, base_model)``.

    Args:
        new, old: modules or state dicts. Of a module it is the parameters that count: of ``new``
            those that are trained, or all where none is. Adapters of PEFT are matched by what they
            adapt: the prefix ``base_model.model.`` and the adapter's own name do not count.

    Returns:
        A mapping from names (of ``new``, so reduced) to tensors.

    Raises:
        ValueError: if a tensor has another shape in the other, or there is none in common.
    """
    news, olds = _tensors(new, trained=True), _tensors(old, trained=False)
    result = {}
    for name, tensor in news.items():
        other = olds.get(name)
        if other is None:
            continue
        if other.shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in new and {tuple(other.shape)} in old"
            )
        other = placed(other.to(tensor.device), tensor)
        result[name] = tensor.float() - other.float()
    if not result:
        raise ValueError(
            f"new and old have no tensor in common: new has {sorted(news)[:3]}, old has "
            f"{sorted(olds)[:3]}, …"
        )
    return result


def _tensors(source: nn.Module | Mapping[str, Tensor], *, trained: bool) -> dict[str, Tensor]:
    if isinstance(source, nn.Module):
        tensors: dict[str, Tensor] = dict(source.named_parameters())
        if trained:
            tensors = {n: p for n, p in tensors.items() if p.requires_grad} or tensors
    else:
        tensors = dict(source)
    named_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if plain_name(name) in named_tensors:
            raise ValueError(
                f"{name!r} is not the only tensor that is called {plain_name(name)!r} without the "
                "name of its adapter: give the tensors of one adapter"
            )
        named_tensors[plain_name(name)] = tensor.detach()
    return named_tensors
