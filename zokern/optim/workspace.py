"""What layerwise evaluation keeps from step to step, so that it need not be found out again."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zokern import ops
from zokern.memory import Scratch
from zokern.optim.aliases import Places
from zokern.optim.displacement import Member
from zokern.optim.layers import Layer, layers, structure


@dataclass(frozen=True, eq=False)
class Part:
    """What is perturbed together: members, or some rows of one."""

    members: list[int]
    rows: slice | None
    # The bytes that a buffer for them needs, and where.
    size: int
    device: torch.device
    sweeper: ops.Sweeper = field(default_factory=ops.Sweeper)


class Workspace:
    """How a module is divided, the sweepers of its parts, and buffers that have no memory.

    Kept as long as the members lie where they lay, and the module is built as it was.
    """

    def __init__(self) -> None:
        self._forms: list = []
        # Ids, and what has them.
        self._structure: tuple[list[int], list] = ([], [])
        self._places = Places([])
        self.parts: dict[Hashable, Part] = {}
        # Members by the ids of their parameters.
        self.index: dict[int, int] = {}
        self.layers: list[Layer] = []
        # Of what is written at once, in bytes.
        self.most = 0
        # What parameters hold while they are hidden, in the memory of these.
        self.blanks: list[Tensor] = []
        self._nans: list[Tensor] = []
        self.scratch = Scratch()

    def begin(self, module: nn.Module, members: list[Member], stored: list[Tensor]) -> None:
        """A view of these members of the module, as which their parameters are stored.

        Raises:
            ValueError: if the module reads them where it cannot be noticed, or no longer has them.
        """
        params = [member.param for member in members]
        residuals = [member.residual for member in members]
        dense = [vector for member in members for vector in member.dense]
        forms = [*map(id, params), *(member.tensor_id for member in members)]
        forms += ops.forms_of([*stored, *residuals, *dense])
        is_known = forms == self._forms
        if not is_known:
            self._forms, self.parts, self.scratch = [], {}, Scratch()
            self.index = {id(param): i for i, param in enumerate(params)}
            self._places = Places(params)
            self._nans, self.blanks = _blanks(stored)
        self._places.check(module)
        found = structure(module)
        if not is_known or found[0] != self._structure[0]:
            self._structure = [], []
            self.layers, self.most = layers(module, self.index)
            self._structure, self._forms = found, forms
        for nan in self._nans:
            # Who reads behind torch's back may write there too.
            nan.fill_(torch.nan)
        self.scratch.least = self.most

    def __reduce__(self) -> tuple:
        return Workspace, ()


@torch.inference_mode(False)
def _blanks(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of each dtype and device one element; and tensors of the same shapes in their memory."""
    kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
    nans = {kind: torch.empty((), dtype=kind[0], device=kind[1]) for kind in set(kinds)}
    blanks = [nans[kind].expand(t.shape) for kind, t in zip(kinds, tensors, strict=True)]
    return list(nans.values()), blanks
