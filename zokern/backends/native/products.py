"""Inner products with noise, by the native core."""

import torch
from torch import Tensor

import zokern._C as _C
from zokern.backends.native.capability import cpu_capability
from zokern.backends.native.perturb import address
from zokern.laws import LAWS
from zokern.sweep import InnerProducts


def inner_products(products: InnerProducts) -> Tensor:
    vectors = [vector.contiguous() for vector in products.vectors]
    packed = pack(products, vectors)
    out = torch.empty(len(vectors), 3, dtype=torch.float64)
    device = vectors[0].device
    if device.type == "cpu":
        _C.cpu_inner_products(packed, out.data_ptr(), cpu_capability(), torch.get_num_threads())
    else:
        partials = partial_sums(packed, device)
        _C.sum_partials(packed, partials.data_ptr(), out.data_ptr())
    return out


def partial_sums(packed: _C.Products, device: torch.device) -> Tensor:
    """The sums of each block, copied to the CPU."""
    with torch.cuda.device(device):
        partials = torch.empty(_C.count_partials(packed), 6, dtype=torch.float64, device=device)
        stream = torch.cuda.current_stream().cuda_stream
        _C.cuda_inner_products(packed, partials.data_ptr(), device.index, stream)
        return partials.cpu()


def pack(products: InnerProducts, vectors: list[Tensor]) -> _C.Products:
    """The same products for the native core, of contiguous vectors, which must outlive it."""
    return _C.Products(
        vectors=[address(vector) for vector in vectors],
        numels=[v.numel() for v in vectors],
        offsets=[s.offset for s in products.shards],
        row_lengths=[s.row_length for s in products.shards],
        row_strides=[s.row_stride for s in products.shards],
        tensor_ids=products.tensor_ids,
        law=LAWS[products.law].code,
        seed=products.seed,
        draw=products.draw,
    )
