"""Inner products with noise: the same on every backend, in any cut, and right."""

import pytest
import torch

import zokern
from tests.conftest import choose
from tests.test_perturb import DIRECTIONS, make_operands
from zokern import noise, ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("law", DIRECTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backends_agree(native_backend, law, dtype):
    check_agreement(law, dtype)


@pytest.mark.parametrize(
    ("law", "dtype"), [*zip(DIRECTIONS, [*FLOATS, torch.float32], strict=True)], ids=str
)
def test_triton_agrees(monkeypatch, law, dtype):
    """Its interpreter takes its time: every law and dtype once."""
    choose("triton", monkeypatch)
    check_agreement(law, dtype)


def check_agreement(law: str, dtype: torch.dtype) -> None:
    vectors, _, shards = make_operands("fp32")
    vectors = [vector.nan_to_num(0, 1, -1).clamp(-9, 9).to(dtype) for vector in vectors]
    arguments = {"seed": 2**63 + 5, "law": law, "shards": shards}
    got = ops.inner_products(vectors, 77, **arguments)
    with zokern.use_backend("reference"):
        wanted = ops.inner_products(vectors, 77, **arguments)
    assert got.shape == (len(vectors), 3)
    assert torch.equal(got.float(), wanted.float())
    assert torch.allclose(got, wanted, rtol=1e-15, atol=0)


def test_they_are_those_of_the_sampled_noise(backend):
    v = torch.randn(40, 31)
    z = noise.sample("gauss16", v.numel(), seed=3, draw=9, tensor_id=4).double()
    got = ops.inner_products([v], 9, seed=3, tensor_ids=[4])[0]
    w = v.double().flatten()
    wanted = torch.stack([w @ w, w @ z, z @ z])
    assert torch.allclose(got, wanted, rtol=1e-12)


def test_shards_add_up(backend):
    v = torch.randn(10_001)
    whole = ops.inner_products([v], 0, seed=1, tensor_ids=[5])
    cut = ops.inner_products(
        [v[:777], v[777:]],
        0,
        seed=1,
        tensor_ids=[5, 5],
        shards=[(0, 777, 777), (777, 9224, 9224)],
    )
    assert torch.allclose(cut.sum(0, keepdim=True), whole, rtol=1e-15)


def test_cancellation_leaves_the_sum_exact(backend):
    """The large terms cancel; what is left is far below the rounding of a float64 sum of them."""
    v = torch.full((4096,), 2.0**30)
    v[1::2] = -(2.0**30)
    v[0] += 2.0**10
    z = noise.sample("rademacher", 4096, seed=1, draw=0)
    got = ops.inner_products([v * z], 0, seed=1, law="rademacher")
    assert got[0, 1] == 2.0**10
    assert got[0, 2] == 4096


def test_many_threads_agree_with_one(monkeypatch):
    v = torch.randn(300_000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.inner_products([v[:1000], v], 3, seed=1))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_it_passes_opcheck():
    vectors = [torch.randn(5, 3), torch.randn(7)]
    arguments = (vectors, 3, -7, "gauss16", [1, 2], [0, 15, 15, 0, 7, 7])
    torch.library.opcheck(torch.ops.zokern.inner_products, arguments)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"vectors\[0\].*dtype"):
        ops.inner_products([torch.zeros(3, dtype=torch.int64)], 0, seed=0)
    with pytest.raises(ValueError, match="draw"):
        ops.inner_products([torch.zeros(3)], -1, seed=0)
    with pytest.raises(ValueError, match="no directions"):
        ops.inner_products([torch.zeros(3)], 0, seed=0, law="uniform32")
    assert ops.inner_products([], 0, seed=0).shape == (0, 3)
