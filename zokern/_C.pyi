"""The native core (csrc/bindings.cpp). Pointers and streams are integers, enumerators too."""

from collections.abc import Sequence

# An address and the enumerator of an element type.
_Dense = tuple[int, int]

class SweepTensors:
    def __init__(
        self,
        *,
        params: list[int],
        residuals: list[int],
        masters: list[int],
        outs: list[int],
        dense: list[list[_Dense]],
        numels: list[int],
        offsets: list[int],
        row_lengths: list[int],
        row_strides: list[int],
        rows: list[int],
        tensor_ids: list[int],
        storages: list[int],
    ) -> None: ...

class Sweep:
    def __init__(
        self,
        *,
        tensors: SweepTensors,
        outs: int,
        momenta: list[int],
        coeff_rows: list[int],
        decays: Sequence[float],
        steps: Sequence[float],
        law: int,
        seed: int,
        draws: list[int],
        coeffs: list[float],
        scales: list[float],
        rest: int,
        sign: bool,
        gradient: list[float],
        rounding: int,
        plain: bool,
    ) -> None: ...
    def renumber(
        self, outs: int, seed: int, draws: list[int], coeffs: list[float], scales: list[float]
    ) -> None: ...

class Products:
    def __init__(
        self,
        *,
        vectors: list[_Dense],
        numels: list[int],
        offsets: list[int],
        row_lengths: list[int],
        row_strides: list[int],
        tensor_ids: list[int],
        law: int,
        seed: int,
        draw: int,
    ) -> None: ...

class TauTensor:
    def __init__(self, values: _Dense, starts: int, places: int, /) -> None: ...

class MergeStep:
    def __init__(
        self,
        *,
        params: list[int],
        residuals: list[int],
        masters: list[int],
        storages: list[int],
        values: Values,
        masks: Masks,
        taus: list[TauTensor],
        method: int,
    ) -> None: ...

class Values:
    def __init__(
        self,
        *,
        tensors: list[_Dense],
        numels: list[int],
        bases: list[_Dense],
        rounded: bool,
        exp_avgs: list[_Dense],
        exp_avg_sqs: list[_Dense],
        cached: list[int],
        numbers: int,
        merges: int,
    ) -> None: ...

class Masks:
    def __init__(
        self,
        *,
        thresholds: int,
        cuts: int,
        draws: int,
        limits: int,
        offsets: list[int],
        row_lengths: list[int],
        row_strides: list[int],
        tensor_ids: list[int],
        seed: int,
    ) -> None: ...

class Selection:
    def __init__(self, *, values: Values, k: Sequence[int], joined: bool) -> None: ...

class L1Sums:
    def __init__(self, *, values: Values, masks: Masks) -> None: ...

class DeltaMerge:
    def __init__(
        self,
        *,
        outs: list[_Dense],
        bases: list[_Dense],
        models: list[list[_Dense]],
        numels: list[int],
        tensor_ids: list[int],
        weights: Sequence[float],
        ratios: int,
        thresholds: int,
        cuts: int,
        limits: Sequence[int],
        draws: Sequence[int],
        seed: int,
        rounded: bool,
        votes: int,
        zero_up: bool,
        combine: int,
        divisor: float,
        scale: float,
    ) -> None: ...

def cpu_capabilities() -> list[str]: ...
def cpu_sweep(sweep: Sweep, capability: str, threads: int, /) -> None: ...
def cpu_merge_step(step: MergeStep, capability: str, threads: int, /) -> None: ...
def cpu_inner_products(products: Products, out: int, capability: str, threads: int, /) -> None: ...
def cpu_sample(
    law: int,
    numel: int,
    seed: int,
    draw: int,
    tensor_id: int,
    offset: int,
    out: int,
    capability: str,
    threads: int,
    /,
) -> None: ...
def cpu_values(law: int, words: int, groups: int, out: int, capability: str, /) -> None: ...
def cpu_select(
    selection: Selection,
    thresholds: int,
    cuts: int,
    largest: int,
    capability: str,
    threads: int,
    /,
) -> None: ...
def cpu_l1_sums(sums: L1Sums, out: int, capability: str, threads: int, /) -> None: ...
def cpu_histogram(
    values: Values,
    lows: int,
    shift: int,
    bins: int,
    out: int,
    capability: str,
    threads: int,
    /,
) -> None: ...
def cpu_equal_counts(
    values: Values,
    magnitudes: int,
    edges: int,
    ranges: int,
    out: int,
    capability: str,
    threads: int,
    /,
) -> None: ...
def cpu_merge_deltas(merge: DeltaMerge, capability: str, threads: int, /) -> None: ...

# The bodies of the CUDA kernels, run on the host over a simulated grid.
def host_grid_sweep(sweep: Sweep, /) -> None: ...
def host_grid_merge_deltas(merge: DeltaMerge, /) -> None: ...
def host_grid_merge_step(step: MergeStep, /) -> None: ...
def host_grid_inner_products(products: Products, out: int, /) -> None: ...
def host_grid_sample(
    law: int, numel: int, seed: int, draw: int, tensor_id: int, offset: int, out: int, /
) -> None: ...
def host_grid_select(
    selection: Selection, thresholds: int, cuts: int, largest: int, shared_bytes: int, /
) -> None: ...
def host_grid_l1_sums(sums: L1Sums, out: int, /) -> None: ...
def cuda_architectures() -> list[int]: ...

# Only in a build with CUDA, that is where cuda_architectures() is not empty.
def cuda_why_not(device: int, /) -> str: ...
def cuda_sweep(sweep: Sweep, device: int, stream: int, /) -> None: ...
def cuda_merge_deltas(merge: DeltaMerge, device: int, stream: int, /) -> None: ...
def cuda_merge_step(step: MergeStep, device: int, stream: int, /) -> None: ...

# The partial sums, six float64 each, are added up on the host.
def count_partials(products: Products, /) -> int: ...
def cuda_inner_products(products: Products, partials: int, device: int, stream: int, /) -> None: ...
def sum_partials(products: Products, partials: int, out: int, /) -> None: ...
def cuda_sample(
    law: int,
    numel: int,
    seed: int,
    draw: int,
    tensor_id: int,
    offset: int,
    out: int,
    device: int,
    stream: int,
    /,
) -> None: ...

# Bytes of device memory, zeros for a selection, whose largest magnitudes must be zeros too.
def cuda_select_scratch(selection: Selection, device: int, /) -> int: ...
def cuda_select(
    selection: Selection,
    thresholds: int,
    cuts: int,
    largest: int,
    scratch: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def l1_scratch(sums: L1Sums, /) -> int: ...
def cuda_l1_sums(sums: L1Sums, out: int, scratch: int, device: int, stream: int, /) -> None: ...
