"""What the merging optimizers share: the step, in which each masks Adam's update in its way."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from zokern import ops
from zokern.merging import AdamNumbers, AdamSteps, Mask, MergeStep, SparseTau, dense_tau
from zokern.optim.compiled import untraced
from zokern.optim.interrupts import uninterrupted
from zokern.optim.merging_groups import Group, check_group, check_paper, numbers_of
from zokern.optim.merging_state import MergingState
from zokern.optim.merging_tables import Member, OnDevice, OnHost, Tables
from zokern.optim.parameters import check_unflattened, named, tensor_ids
from zokern.optim.reference import Source, Weights, check_weights
from zokern.sharding import Groups, Part, describe, is_dtensor, local, placed, whole
from zokern.warn import warn


class MergingAdamW(MergingState):
    """Adam whose step is masked and merged with τ, in one sweep over all parameters."""

    # Whether a mask depends on all elements of a tensor.
    SELECTS: ClassVar[bool] = False

    _on_host: OnHost
    _on_device: OnDevice
    _parts: WeakIdKeyDictionary

    def _begin(self) -> None:
        super()._begin()
        self._parts = WeakIdKeyDictionary()
        self._on_host, self._on_device = OnHost(), OnDevice()

    def _take_reference(self, reference: Source | None, base: Source | None) -> None:
        if (reference is None) != (base is None):
            given = "reference" if base is None else "base"
            raise ValueError(f"reference and base go together; only {given} was given")
        if reference is not None and base is not None:
            self.set_reference(reference, base)

    def init_ref_param_diff(self, ref_model: Source, base_model: Source) -> None:
        """:meth:`set_reference` under its name in QwenLM's online_merging."""
        self.set_reference(ref_model, base_model)

    def set_reference(self, reference: Source, base: Source) -> None:
        """Take τ = reference - base, masked once, for the task vector of the reference.

        Args:
            reference, base: modules, state dicts, or paths of safetensors checkpoints (a file, or a
                folder of shards), which are read one tensor at a time. Their tensors are found by
                the names of the parameters; names that wrappers and PEFT add do not count, so the
                adapters of two PEFT models make the τ of a third.

        Raises:
            ValueError, TypeError: for tensors that are missing or of other shapes, listing them,
                and for parameters without names; nothing has changed then.
        """
        self._take_weights([Weights(reference, "the reference"), Weights(base, "the base")])

    def _take_weights(self, sources: list[Weights]) -> None:
        members = self._moving()
        if members and "param_names" not in self.run:
            raise ValueError(
                "weights are found by name, and the parameters have none: give named_parameters() "
                "to the optimizer, or param_name_map"
            )
        check_weights(sources, [(name, param) for name, param, _, _ in members])
        taus = []
        with torch.no_grad():
            for name, param, group, tensor_id in members:
                weights = [whole(source[name]).to(param.device) for source in sources]
                if any(bool(tensor.isnan().any()) for tensor in weights):
                    raise ValueError(f"the reference or the base has NaN in {name!r}")
                tau = self._new_tau(weights, group, tensor_id, name)
                taus.append(
                    placed(dense_tau(tau, param.shape), param) if is_dtensor(param) else tau
                )
        with uninterrupted():
            for (_, param, _, _), tau in zip(members, taus, strict=True):
                self._set_tau(param, tau)

    def _new_tau(
        self, weights: list[Tensor], group: Group, tensor_id: int, name: str
    ) -> Tensor | SparseTau:
        """τ of one parameter, as the method keeps it."""
        raise TypeError(f"{type(self).__name__} must say what its τ is")

    def _needs_tau(self, group: Group) -> bool:
        """Whether the group's parameters cannot take a step without a reference."""
        return bool(group["use_merge"])

    def _mask(self, members: list[Member], steps: AdamSteps, mask: Mask) -> Mask:
        """The mask that the method draws or selects, instead of one that keeps all."""
        raise TypeError(f"{type(self).__name__} must say what it masks")

    def _ratios(self, members: list[Member], steps: AdamSteps, mask: Mask) -> Tensor:
        """What brings the masked Δ of each parameter back to its L1 norm, in float32."""
        raise TypeError(f"{type(self).__name__} must say how it rescales")

    def _moving(self) -> list[tuple[str, Tensor, Group, int]]:
        """Name, parameter, group and id of those that are not frozen."""
        groups = [group for group in self.param_groups for _ in group["params"]]
        return [
            (name, param, group, tensor_id)
            for (name, param), tensor_id, group in zip(
                named(self.param_groups), tensor_ids(self.param_groups), groups, strict=True
            )
            if param.requires_grad
        ]

    @untraced
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, of the parameters that have gradients.

        Args:
            closure: evaluates the loss again and returns it, as in ``torch.optim``.

        Raises:
            RuntimeError, ValueError: where a reference is wanted and there is none, for sparse or
                complex gradients and for hyper-parameters out of range, before anything is written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            kinds: dict[tuple, list[Member]] = {}
            stepped = self._members()
            self._check_ranks(stepped)
            for member in stepped:
                kinds.setdefault(member.kind, []).append(member)
            prepared = [(members, self._prepare(members)) for members in kinds.values()]
            if len(prepared) > 1:
                # Nothing is written to the first before the last has been looked at.
                for _, step in prepared:
                    ops.check_merge_step(step)
            with uninterrupted():
                for members, step in prepared:
                    ops.merge_step_(step)
                    self._clock(members).advance(members)
                    self._versions.note(member.param for member in members)
        return loss

    def _check_owned(self) -> None:
        """Raises RuntimeError or TypeError for parameters that somebody has replaced."""
        owner = type(self).__name__
        if not all(param in self.state for group in self.param_groups for param in group["params"]):
            raise RuntimeError(
                f"the groups hold parameters that this {owner} was not given: give it those of the "
                "model after that has been sharded. DeepSpeed ZeRO puts flattened ones there, "
                "without the names by which masks and references go; take FSDP2 "
                "(torch.distributed.fsdp.fully_shard)"
            )
        for name, param in named(self.param_groups):
            check_unflattened(name, param, owner)

    def _members(self) -> list[Member]:
        self._check_owned()
        for group in self.param_groups:
            check_group(group)
            if self.run["semantics"] == "paper":
                check_paper(group)
        moving = [(*entry, grad) for entry in self._moving() if (grad := entry[1].grad) is not None]
        for name, _, _, _, grad in moving:
            self._check_grad(name, grad)
        missing = [
            name
            for name, param, group, _, _ in moving
            if self._tau(param) is None and self._needs_tau(group)
        ]
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise RuntimeError(
                f"{type(self).__name__} has no reference for {', '.join(missing[:8])}{more}: give "
                "it to the constructor, or call set_reference"
            )
        return [
            Member(
                name=name,
                param=param,
                own=local(param),
                grad=_grad_of_part(name, param, grad),
                state=self._own_state(param, group),
                group=group,
                tensor_id=tensor_id,
                tau=_own_tau(self._tau(param)),
                part=self._part(param),
            )
            for name, param, group, tensor_id, grad in moving
        ]

    def _part(self, param: Tensor) -> Part:
        if param not in self._parts:
            self._parts[param] = describe(param)
        return self._parts[param]

    def _check_grad(self, name: str, grad: Tensor) -> None:
        if grad.layout != torch.strided or grad.is_complex():
            what = "complex" if grad.is_complex() else "sparse"
            raise RuntimeError(
                f"{type(self).__name__} takes dense, real gradients; that of {name} is {what}"
            )

    def _prepare(self, members: list[Member]) -> MergeStep:
        for member in members:
            self._refresh_if_touched(member.param)
        self._check_capturable(members)
        tables = self._clock(members).tables(members, self._numbers)
        steps, mask = _steps(members, tables), _mask_of_all(members, tables, self.run["seed"])
        mask = self._mask(members, steps, mask)
        if members[0].rescales:
            ratios = self._ratios(members, steps, mask)
            steps.numbers[:, AdamNumbers._fields.index("ratio")] = ratios.to(steps.numbers.device)
        taus = [member.tau for member in members if member.tau is not None]
        return MergeStep(
            params=[member.own for member in members],
            residuals=[member.kept("residual") for member in members],
            masters=_of_all(members, "master"),
            steps=steps,
            taus=taus or None,
            mask=mask,
            method=self.METHODS[self.run["semantics"]],
        )

    def _check_ranks(self, members: list[Member]) -> None:
        """Raises RuntimeError on all ranks where they would step other parts of tensors than of
        the same ones; asked only where the step needs the others."""
        asked: dict[Groups, list] = {}
        for _, param, group, _ in self._moving():
            if (self.SELECTS or group.get("rescale")) and not group["capturable"]:
                asked.setdefault(self._part(param).groups, [])
        asked.pop((), None)
        for member in members:
            if member.part.groups in asked:
                step = int(member.state["step"])
                asked[member.part.groups].append((member.tensor_id, step, member.kind[1:]))
        for groups, stepped in asked.items():
            ops.check_alike(stepped, groups)

    def _check_capturable(self, members: list[Member]) -> None:
        """Raises ValueError where a step would have to ask other ranks while it is captured."""
        shared = next((member for member in members if member.part.groups), None)
        if shared is None or not shared.group["capturable"]:
            return
        if self.SELECTS or shared.rescales:
            raise ValueError(
                f"{type(self).__name__} asks the other ranks about their parts of {shared.name}, "
                "which cannot be captured: capturable must be False"
            )

    def _column(self, members: list[Member], values: list, dtype: torch.dtype) -> Tensor:
        """A number for each member, where a kernel can read it."""
        return self._clock(members).column(values, dtype, members[0].own.device)

    def _clock(self, members: list[Member]) -> OnHost | OnDevice:
        return self._on_device if members[0].group["capturable"] else self._on_host

    def _numbers(self, group: Group, t: int) -> AdamNumbers:
        """The row of a group's parameters that take step number t."""
        return numbers_of(group, t)

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warn(message)


def _grad_of_part(name: str, param: Tensor, grad: Tensor) -> Tensor:
    """This rank's part of a gradient, which may have to be summed over the ranks first."""
    if not is_dtensor(param):
        return grad
    if not is_dtensor(grad) or grad.device_mesh != param.device_mesh:
        raise RuntimeError(
            f"{name} is a DTensor, and its gradient is not one of the same device mesh: it cannot "
            "be told which part of it this rank has"
        )
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def parts_of(members: list[Member]) -> list[Part]:
    return [member.part for member in members]


def _own_tau(tau: Tensor | SparseTau | None) -> Tensor | SparseTau | None:
    return local(tau) if isinstance(tau, Tensor) else tau


def _of_all(members: list[Member], key: str) -> list[Tensor] | None:
    """What all members have in their state, or none of them."""
    if key not in members[0].state:
        return None
    return [local(member.state[key]) for member in members]


def _steps(members: list[Member], tables: Tables) -> AdamSteps:
    return AdamSteps(
        grads=[member.grad for member in members],
        exp_avgs=[local(member.state["exp_avg"]) for member in members],
        exp_avg_sqs=[local(member.state["exp_avg_sq"]) for member in members],
        cached=_of_all(members, "cached_delta"),
        numbers=tables.numbers,
        merges=tables.merges,
    )


def _mask_of_all(members: list[Member], tables: Tables, seed: int) -> Mask:
    """A mask that keeps everything."""
    shards = [member.part.shard for member in members]
    ids = [member.tensor_id for member in members]
    limits = torch.full_like(tables.draws, 1 << 32)
    return Mask(None, None, tables.draws, limits, shards, ids, seed)
