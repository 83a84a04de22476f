"""Inner products of tensors with noise."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zokern import backends
from zokern.arguments import (
    Shards,
    by_device,
    check_flat,
    check_length,
    integer,
    integers,
    pick,
    shard_list,
    signed,
    tensor_list,
    unsigned,
)
from zokern.checks import check_direction_law, check_vector
from zokern.ops.dtensors import shards_of
from zokern.sharding import any_dtensor, exact_totals, groups_of, local
from zokern.sweep import InnerProducts, Shard

torch.library.define(
    "zokern::inner_products",
    "(Tensor[] vectors, int draw, int seed, str law, int[] tensor_ids, int[] shards) -> Tensor",
)


def inner_products(
    vectors: Iterable[Tensor],
    draw: int,
    *,
    seed: int,
    law: str = "gauss16",
    tensor_ids: Sequence[int] | None = None,
    shards: Shards | None = None,
) -> Tensor:
    """Inner products of tensors with each other's noise, which is drawn on the way.

    Accumulated so exactly that every backend and every sharding gives the same sums once they are
    rounded to float32.

    Of a DTensor the sums are those of the full tensor: all ranks that hold parts of it must call
    this, with the same vectors in the same order. Of other tensors with ``shards`` they are those
    of the elements that are given.

    Args:
        vectors: float32, bfloat16 or float16 tensors v, in any memory format, or DTensors of such.
        draw: 0 ≤ draw < 2^32, whose noise is z.
        seed, law, tensor_ids, shards: as for :func:`perturb_`.

    Returns:
        A float64 tensor of shape (len(vectors), 3) on the CPU: v·v, v·z and z·z for each tensor.

    Raises:
        TypeError, ValueError: for an argument out of range, naming it.
    """
    vectors = tensor_list("vectors", vectors)
    count = len(vectors)
    ids = list(range(count)) if tensor_ids is None else integers("tensor_ids", tensor_ids, bits=56)
    check_length("tensor_ids", ids, count)
    groups = None
    if any_dtensor(vectors):
        shards = shards_of("vectors", vectors, shards)
        groups = [groups_of(vector) for vector in vectors]
        vectors = [local(vector) for vector in vectors]
    numbers = shard_list(shards, vectors)
    draw = integer("draw", draw, bits=32)
    seed = signed(integer("seed", seed, bits=64))
    sums = torch.zeros(count, 3, dtype=torch.float64)
    with torch.no_grad():
        for members in by_device(vectors).values():
            sums[members] = torch.ops.zokern.inner_products(
                pick(vectors, members),
                draw,
                seed,
                law,
                pick(ids, members),
                [n for i in members for n in numbers[i]],
            )
    return sums if groups is None else exact_totals(sums, groups)


@torch.library.impl("zokern::inner_products", "CompositeExplicitAutograd")
def _inner_products_kernel(vectors: list[Tensor], *arguments) -> Tensor:
    products = _products(vectors, *arguments)
    if not vectors:
        return torch.zeros(0, 3, dtype=torch.float64)
    return backends.select(vectors[0].device).inner_products(products)


@torch.library.register_fake("zokern::inner_products")
def _inner_products_fake(vectors: list[Tensor], *arguments) -> Tensor:
    _products(vectors, *arguments)
    return torch.empty(len(vectors), 3, dtype=torch.float64)


def _products(
    vectors: list[Tensor],
    draw: int,
    seed: int,
    law: str,
    tensor_ids: list[int],
    shards: list[int],
) -> InnerProducts:
    """The flat arguments of the schema, checked."""
    check_direction_law(law)
    count = len(vectors)
    check_flat(count, tensor_ids=(tensor_ids, 1), shards=(shards, 3))
    products = InnerProducts(
        vectors=vectors,
        shards=[Shard(*shards[3 * i : 3 * i + 3]) for i in range(count)],
        tensor_ids=integers("tensor_ids", tensor_ids, bits=56),
        draw=integer("draw", draw, bits=32),
        seed=unsigned(seed),
        law=law,
    )
    for i in range(count):
        check_vector(products, i)
    return products
