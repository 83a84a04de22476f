"""What is audited: kernels as they are launched in practice, and the work that each does."""

from collections import Counter
from dataclasses import dataclass, field, replace

from benchmarks.audit.paths import Work

STORAGES = {"fp32": 0, "bf16": 1, "fp16": 2, "split": 3, "split8": 4, "fp16-split": 5}
LAWS = {"gauss16": 0, "gauss32": 1, "rademacher": 2, "normal": 5}
# Of a parameter and its residual.
SIZES = {"fp32": (4,), "bf16": (2,), "fp16": (2,), "split": (2, 2), "split8": (2, 1),
         "fp16-split": (2, 2)}  # fmt: skip
# Of a draw, for an octet.
NOISE = {
    "gauss16": {"sums": 8, "groups": 1},
    "gauss32": {"sums": 8, "groups": 2},
    "rademacher": {"groups": 1},
    "normal": {"groups": 2},
}


@dataclass(frozen=True)
class Variant:
    """A case of a kernel.

    Attributes:
        form: what is launched: plain sweeps, updates, …
        reads, writes: bytes of an element, for each operand.
        counts: what else is done for an octet; see :class:`benchmarks.audit.paths.Work`.
        on_cuda: what CUDA's kernel does besides: DP4A adds random bytes.
        k: directions.
        apart: a sweep out of place.
        exact: no approximate function may be used, not even as the start of an exact one.
        joins: threads hand each other results, in shared memory.
        backends: those whose kernel has a main path that can be told by its work.
    """

    form: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    counts: dict[str, int] = field(default_factory=dict)
    on_cuda: dict[str, int] = field(default_factory=dict)
    storage: str = "bf16"
    law: str = "gauss16"
    k: int = 1
    apart: bool = False
    exact: bool = True
    joins: bool = False
    backends: tuple[str, ...] = ("cuda", "triton")

    def work(self, backend: str) -> Work:
        def vectors(sizes: tuple[int, ...]) -> tuple[int, int]:
            return sum(size // 2 for size in sizes), sum(size == 1 for size in sizes)

        counts = Counter(self.counts) + Counter(self.on_cuda if backend == "cuda" else {})
        return Work(*vectors(self.reads), *vectors(self.writes), **counts)

    @property
    def bytes(self) -> int:
        """Moved for a parameter."""
        return sum(self.reads) + sum(self.writes)


def _sweep(storage: str = "bf16", law: str = "gauss16", k: int = 1, apart: bool = False) -> Variant:
    sizes = SIZES[storage]
    noise = {kind: k * number for kind, number in NOISE[law].items()}
    return Variant(
        "sweep", sizes, sizes[:1] if apart else sizes, noise, storage=storage, law=law, k=k,
        apart=apart, exact=law != "normal",
    )  # fmt: skip


def _update(form: str, reads: tuple[int, ...], writes: tuple[int, ...], storage: str = "bf16",
            **noise: int) -> Variant:  # fmt: skip
    return Variant(form, reads, writes, NOISE["gauss16"] | noise, storage=storage)


# bf16 parameters, gradients and τ, float32 moments.
_MOMENTS = (2, 4, 4)

VARIANTS = {
    "sweep-bf16": _sweep(),
    "sweep-bf16-2": _sweep(k=2),
    "sweep-bf16-4": _sweep(k=4),
    "sweep-bf16-apart": _sweep(apart=True),
    "sweep-fp16": _sweep("fp16"),
    "sweep-fp32": _sweep("fp32"),
    "sweep-split": _sweep("split"),
    "sweep-split-apart": _sweep("split", apart=True),
    "sweep-split8": _sweep("split8"),
    "sweep-split8-apart": _sweep("split8", apart=True),
    "sweep-fp16-split": _sweep("fp16-split"),
    "sweep-gauss32": _sweep(law="gauss32"),
    "sweep-rademacher": _sweep(law="rademacher"),
    "sweep-normal": _sweep(law="normal"),
    "round-bf16": _update("round", (2,), (2,), groups=2),
    "round-split8": replace(
        _update("round", (2, 1), (2, 1), "split8", groups=2), on_cuda={"sums": 8}
    ),
    "master-evaluate": _update("master-evaluate", (4,), (2,)),
    "master-update": _update("master-update", (4,), (4, 2)),
    "momentum-fp32": _update("momentum", (4, 4), (4, 4), "fp32"),
    "ondare": Variant("dare", (2, *_MOMENTS, 2), (2, 4, 4), {"groups": 2}, exact=False),
    "onties": Variant("ties", (2, *_MOMENTS, 2), (2, 4, 4), exact=False),
    "products-bf16": Variant("products", (2,), (), NOISE["gauss16"], joins=True),
    "select-fp32": Variant("select", (4,), (), {"atomics": 8}, storage="fp32", joins=True),
    "select-adam": Variant(
        "select-adam", _MOMENTS, (), {"atomics": 8}, exact=False, joins=True, backends=("triton",)
    ),
}  # fmt: skip


def cuda_kernel(variant: Variant) -> tuple[str, str]:
    """The source file, and a pattern of the mangled name."""
    law, storage = LAWS[variant.law], STORAGES[variant.storage]
    update = f"update_globalILNS_3LawE{law}ELNS_7StorageE{storage}ELb"
    if variant.form == "sweep":
        name = f"sweep_globalILNS_3LawE{law}ELNS_7StorageE{storage}ELi{variant.k}E"
        return f"sweep_{variant.law}.cu", name
    return {
        "round": ("sweep_gauss16.cu", f"{update}0"),
        "master-evaluate": ("sweep_gauss16.cu", f"{update}1"),
        "master-update": ("sweep_gauss16.cu", f"{update}1"),
        "momentum": ("sweep_gauss16.cu", f"{update}0"),
        "dare": ("merge_step.cu", f"merge_globalILNS_7StorageE{storage}ELb0"),
        "ties": ("merge_step.cu", f"merge_globalILNS_7StorageE{storage}ELb0"),
        "products": ("cuda.cu", f"product_globalILNS_3LawE{law}E"),
        "select": ("select.cu", "select_first_digit"),
        "select-adam": ("select.cu", "select_first_digit"),
    }[variant.form]
