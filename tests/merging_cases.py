"""Random steps of merging optimizers, for tests that compare backends."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import zokern
from tests.same_bits import same_bits
from tests.test_perturb import STORAGES
from zokern import ops
from zokern.backends.reference import adam
from zokern.merging import AdamNumbers, AdamSteps, Mask, MergeStep, SparseTau, sparse_tau
from zokern.sweep import Shard

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Where values go that are not numbers, infinite, zero or denormal, in tensors that are long enough.
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -3e-39, 3e38)
PAD = 77


@dataclass(frozen=True)
class Case:
    """What a random step is like.

    Attributes:
        sizes: the tensors' numbers of elements.
        storage: a name of ``test_perturb.STORAGES``; a parameter that is not split may have a
            master.
        tau: the dtype of τ, or None for a step without it.
        steps_k: whether Δ is cached between merges.
        shards: for each tensor, or None for whole tensors.
        starts: the element of its memory that an operand begins with; operands take them in turn.
        seed: of the random numbers.
    """

    method: str = "dare"
    sizes: Sequence[int] = (1, 7, 300, 0, 1537, 513)
    storage: str = "fp32"
    master: bool = False
    grad: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    tau: torch.dtype | None = torch.float32
    steps_k: bool = False
    sparse: bool = False
    shards: Sequence[tuple[int, int, int]] | None = None
    starts: Sequence[int] = (0,)
    seed: int = 0


class Memory:
    """Operands in memory of their own, with a margin that nobody may write to."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.tensors: dict[str, Tensor] = {}

    def place(self, name: str, value: Tensor, start: int) -> Tensor:
        whole = torch.full((start + value.numel() + 9,), PAD, dtype=value.dtype)
        whole[start : start + value.numel()] = value
        self.tensors[name] = whole.to(self.device)
        return self.tensors[name][start : start + value.numel()]


def make_step(case: Case, memory: Memory | None = None) -> MergeStep:
    """The same step whenever it is called, on the memory's device (the CPU without one)."""
    memory = memory or Memory("cpu")
    choose = random.Random(repr(case))
    generator = torch.Generator().manual_seed(choose.getrandbits(32))
    dtype, residual_dtype = STORAGES[case.storage]

    def place(kind: str, values: list[Tensor]) -> list[Tensor]:
        kinds = ("param", "residual", "master", "grad", "exp_avg", "exp_avg_sq", "cached", "tau")
        start = case.starts[kinds.index(kind) % len(case.starts)]
        return [memory.place(f"{kind} {i}", value, start) for i, value in enumerate(values)]

    def values(scale: float, at: int, spacing: int = 1) -> list[Tensor]:
        """Of each tensor; every third element is the first one's, so that magnitudes are equal."""
        tensors = [torch.randn(n, generator=generator) * scale for n in case.sizes]
        for value in tensors:
            value[::3] = value[:1].clone()
            if len(value) >= 200:
                value[at : at + len(SPECIAL) * spacing : spacing] = torch.tensor(SPECIAL)
        return tensors

    floats = values(0.02, 8)
    params = [value.to(dtype) for value in floats]
    masters = residuals = None
    if case.master:
        masters = place("master", [value + 1e-5 for value in floats])
    elif residual_dtype is not None:
        residuals = place("residual", [_residual(p, residual_dtype, generator) for p in params])
    squares = [value.square() for value in values(1e-4, 32)]
    cached = place("cached", values(1e-3, 40)) if case.steps_k else None
    steps = AdamSteps(
        grads=place("grad", [value.to(case.grad) for value in values(1e-4, 16)]),
        exp_avgs=place("exp_avg", [value.to(case.state) for value in values(1e-4, 24)]),
        exp_avg_sqs=place("exp_avg_sq", [value.to(case.state) for value in squares]),
        cached=cached,
        numbers=torch.tensor([_numbers(choose) for _ in case.sizes]).to(memory.device),
        merges=torch.tensor([(i + 1) % 3 > 0 for i in range(len(case.sizes))], dtype=torch.int64),
    )
    taus: list[Tensor | SparseTau] | None = None
    if case.tau is not None:
        dense = [
            (value * (torch.rand(value.shape, generator=generator) < 0.2)).to(case.tau)
            for value in values(1e-3, 48, 2)
        ]
        taus = [*place("tau", dense)]
        if case.sparse:
            taus = [SparseTau(*(t.to(memory.device) for t in sparse_tau(tau))) for tau in dense]
    return MergeStep(
        params=place("param", params),
        residuals=[None] * len(params) if residuals is None else [*residuals],
        masters=masters,
        steps=steps,
        taus=taus,
        mask=_mask(case, steps, choose),
        method=case.method,
    )


def _residual(param: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype == torch.float16:
        noise = torch.randn(param.shape, generator=generator) * 1e-3
    else:
        info = torch.iinfo(dtype)
        noise = torch.randint(info.min, info.max + 1, param.shape, generator=generator)
    return torch.where(param.isfinite(), noise, 0).to(dtype)


def _numbers(choose: random.Random) -> AdamNumbers:
    return AdamNumbers(
        sign=choose.choice([1.0, -1.0]),
        step=choose.uniform(5e-4, 2e-3),
        decay=choose.choice([0.0, 1e-3]),
        alpha=choose.uniform(0.1, 0.9),
        weight=choose.uniform(0.1, 0.9),
        scale=choose.choice([1.0, 2.0, 1 / 0.3]),
        ratio=choose.choice([1.0, 1.1]),
        clip=choose.choice([float("inf"), 1.5e-3]),
    )


def _mask(case: Case, steps: AdamSteps, choose: random.Random) -> Mask:
    """For ``ties`` the threshold is the magnitude of the first element, and of its equals."""
    thresholds = cuts = None
    if case.method.startswith("ties"):
        first = [
            adam.delta(steps, i)[0].abs().cpu() if n > 0 else torch.zeros(())
            for i, n in enumerate(case.sizes)
        ]
        thresholds = torch.stack(first)
        cuts = torch.tensor([choose.choice([0, n // 2, n // 2 + 1, n + 5]) for n in case.sizes])
    # Where little is kept, backends may go another way.
    limits = (1 << 30, 3 << 30, 1 << 32, 0, 1 << 27, (1 << 32) - 1, 1 << 28)
    shards = case.shards or [(0, n, n) for n in case.sizes]
    return Mask(
        thresholds=thresholds,
        cuts=cuts,
        draws=torch.tensor([choose.getrandbits(31) for _ in case.sizes]),
        limits=torch.tensor([limits[i % len(limits)] for i in range(len(case.sizes))]),
        shards=[Shard(*shard) for shard in shards],
        tensor_ids=[choose.getrandbits(56) for _ in case.sizes],
        seed=choose.getrandbits(64),
    )


Change = Callable[[MergeStep], MergeStep]


def memory_after(
    case: Case, backend: str, device: str = "cpu", change: Change | None = None
) -> dict[str, Tensor]:
    """The operands and their margins after the step, on the CPU."""
    memory = Memory(device)
    step = make_step(case, memory)
    with zokern.use_backend(backend):
        ops.merge_step_(step if change is None else change(step))
    return {name: tensor.cpu() for name, tensor in memory.tensors.items()}


def check(case: Case, backend: str, device: str = "cpu", change: Change | None = None) -> None:
    """A backend leaves the same bits as the reference on the CPU."""
    got = memory_after(case, backend, device, change)
    wanted = memory_after(case, "reference", "cpu", change)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert same_bits(got[name], tensor), name
