"""Everything that is timed, by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zokern.bench import merges, merging, mezo, sweeps
from zokern.bench.comparison import Comparison, Setting

HALF = ("bf16", "fp16")
ALL = ("fp32", *HALF)


@dataclass(frozen=True)
class Operation:
    """What is timed under one name.

    Attributes:
        title: its line in the table.
        dtypes: those that it is for.
    """

    title: str
    build: Callable[[Setting], Comparison]
    dtypes: tuple[str, ...] = ALL


OPERATIONS = {
    "sweep": Operation("sweep, one direction", sweeps.in_place(1)),
    "sweep-2": Operation("sweep, two directions", sweeps.in_place(2)),
    "sweep-4": Operation("sweep, four directions", sweeps.in_place(4)),
    "normal": Operation("sweep, normal law", sweeps.in_place(1, law="normal")),
    "gauss32": Operation("sweep, gauss32 law", sweeps.in_place(1, law="gauss32")),
    "rademacher": Operation("sweep, rademacher law", sweeps.in_place(1, law="rademacher")),
    "out-of-place": Operation("sweep, out of place", sweeps.out_of_place),
    "stochastic": Operation("sweep, stochastic rounding", sweeps.stochastic_rounding, ("bf16",)),
    "split8": Operation("sweep, split8", sweeps.residual(torch.int8), ("bf16",)),
    "split": Operation("sweep, split", sweeps.residual(torch.int16), ("bf16",)),
    "master": Operation("sweep, master", sweeps.master, HALF),
    "mezo": Operation("MeZO step, optimizer alone", mezo.on_one_tensor),
    "mezo-model": Operation("MeZO step, a model's tensors", mezo.on_a_model),
    "zopro": Operation("ZOPrO's inner products", sweeps.inner_products),
    "ondare": Operation("OnDARE step", merging.ondare),
    "onties": Operation("OnTIES step", merging.onties),
    "select": Operation("threshold of the largest tenth", sweeps.selection),
    "merge-linear": Operation("merge, task arithmetic", merges.BUILD["linear"]),
    "merge-dare": Operation("merge, DARE", merges.BUILD["dare"]),
    "merge-dare-ties": Operation("merge, DARE and TIES", merges.BUILD["dare-ties"]),
    "merge-ties": Operation("merge, TIES", merges.BUILD["ties"]),
    "merge-ties-peft": Operation("merge of adapters, TIES", merges.BUILD["ties-peft"]),
}
# Whole steps of a model: zokern.bench.end_to_end.
END_TO_END = "step"
