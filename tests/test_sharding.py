"""Parts of DTensors: which elements of the full tensor a rank has."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from zokern import sharding
from zokern.backends.reference.perturb import elements_of

SHAPES = [(7, 5), (3,), (8, 6, 3), (2, 5, 3), (1, 9), (0, 4), ()]


@pytest.fixture(params=range(4))
def rank(request) -> Iterator[int]:
    """Of four ranks that exchange nothing."""
    dist.init_process_group("fake", rank=request.param, world_size=4, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def placements_of(shape: tuple[int, ...]) -> list[tuple]:
    dims = range(len(shape))
    alone = [((4,), [Replicate()]), *(((4,), [Shard(dim)]) for dim in dims)]
    both = [((2, 2), [Shard(0), Shard(dim)]) for dim in dims]
    half = [((2, 2), [Shard(dim), Replicate()]) for dim in dims]
    return [*alone, *both, *half]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_part_is_described_by_offset_row_length_and_row_stride(rank, shape):
    full = numbered(shape)
    for mesh_shape, placements in placements_of(shape):
        mesh = init_device_mesh("cpu", mesh_shape)
        tensor = distribute_tensor(full.clone(), mesh, placements, src_data_rank=None)
        part = sharding.local(tensor)
        assert torch.equal(sharding.part_of(full, tensor), part)
        if part.numel():
            elements = elements_of(part, sharding.shard_of(tensor))
            assert elements.flatten().tolist() == part.flatten().tolist()
        same = sharding.like(tensor, part)
        assert same.shape == tensor.shape
        assert same.placements == tensor.placements


def test_parts_that_are_no_rows_at_equal_distances_are_refused(rank):
    mesh = init_device_mesh("cpu", (2, 2))
    tensor = distribute_tensor(numbered((8, 6, 4)), mesh, [Shard(1), Shard(2)], src_data_rank=None)
    with pytest.raises(ValueError, match="not rows at equal distances"):
        sharding.shard_of(tensor)


def test_partial_sums_are_refused(rank):
    mesh = init_device_mesh("cpu", (4,))
    tensor = DTensor.from_local(torch.zeros(3), mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match="partial sums"):
        sharding.shard_of(tensor)


def test_a_plain_tensor_is_whole():
    tensor = torch.zeros(3, 4)
    assert sharding.local(tensor) is tensor
    assert sharding.shard_of(tensor) == (0, 12, 12)
    assert sharding.groups_of(tensor) == ()
