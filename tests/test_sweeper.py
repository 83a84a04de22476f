"""A Sweeper does what perturb_ does, and notices when the tensors are not what they were."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zokern import ops

IDS = [11, 22, 33]


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(40).to(dtype), torch.randn(3, 7).to(dtype), torch.randn(4, 5).to(dtype).t()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_sweeps_are_those_of_perturb(backend, dtype):
    sweeper = ops.Sweeper()
    mine = tensors(dtype)
    other = copy.deepcopy(mine)
    rounds = None if dtype == torch.float32 else 0
    for step in range(4):
        numbers = {
            "draws": [step, 7 + step],
            "coeffs": [[0.1 * step, 0.2], [0.3, 0.4], [0.5, -0.1]] if step % 2 else [0.5, 0.25],
            "scales": None if step < 2 else [0.9, 1.0],
            "seed": step,
            "rounding": None if rounds is None else rounds + step,
        }
        sweeper.perturb_(mine, tensor_ids=IDS, **numbers)
        ops.perturb_(other, tensor_ids=IDS, **numbers)
        assert all(map(torch.equal, mine, other))


def test_all_forms_in_turn():
    sweeper = ops.Sweeper()
    weights, momenta = tensors(), tensors()
    outs = [torch.empty(t.shape) for t in weights]
    dense = tensors()
    forms = (
        {},
        {"outs": outs},
        {"dense": [dense], "draws": [1, -1], "coeffs": [0.5, 0.25]},
        {"update": ops.Update([1.0], 0.9, -0.1, momenta)},
        {"masters": [t.clone() for t in weights], "rest": 0},
    )
    for form in (*forms, *forms):
        other = copy.deepcopy((weights, form))
        arguments = {"draws": [3], "coeffs": [0.5], "seed": 1} | form
        sweeper.perturb_(weights, tensor_ids=IDS, **arguments)
        ops.perturb_(other[0], tensor_ids=IDS, **(arguments | other[1]))
        assert all(map(torch.equal, weights, other[0]))
        assert all(map(torch.equal, form.get("outs", []), other[1].get("outs", [])))


def test_a_parameter_with_other_memory():
    param = torch.nn.Parameter(torch.zeros(100))
    sweeper = ops.Sweeper()
    sweeper.perturb_([param], [0], [1.0], seed=0)
    before = param.data
    known = before.clone()
    for data in (torch.zeros(100), torch.zeros(50, 2).t(), torch.zeros(64).bfloat16()):
        param.data = data
        wanted = data.clone()
        sweeper.perturb_([param], [0], [1.0], seed=0)
        ops.perturb_([wanted], [0], [1.0], seed=0)
        assert torch.equal(param.detach(), wanted)
    assert torch.equal(before, known)
    param.data = before[::2]
    with pytest.raises(ValueError, match=r"params\[0\].*leave holes"):
        sweeper.perturb_([param], [0], [1.0], seed=0)
    assert torch.equal(before, known)


def test_the_same_memory_as_another_type():
    memory = torch.zeros(64)
    param = torch.nn.Parameter(memory)
    sweeper = ops.Sweeper()
    sweeper.perturb_([param], [0], [1.0], seed=0)
    param.data = memory.view(torch.bfloat16).zero_()
    wanted = torch.zeros(128).bfloat16()
    sweeper.perturb_([param], [0], [1.0], seed=0)
    ops.perturb_([wanted], [0], [1.0], seed=0)
    assert torch.equal(param.detach(), wanted)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"coeffs": [float("nan")]}, ValueError, "coeffs must be finite"),
        ({"coeffs": [1.0, 2.0]}, ValueError, "coeffs must be 1 numbers"),
        ({"draws": [-1]}, ValueError, "there are 0 dense directions"),
        ({"draws": []}, ValueError, "draws is empty"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"law": "uniform32"}, ValueError, "gives no directions"),
        ({"rest": 2}, ValueError, "rest must be between 0 and the 1"),
        ({"tensor_ids": [1]}, ValueError, "tensor_ids has 1 entries for 3 params"),
        ({"rounding": 0}, ValueError, "rounding must be None"),
    ],
)
def test_wrong_arguments_for_tensors_that_are_known(wrong, error, message):
    sweeper = ops.Sweeper()
    mine = tensors()
    arguments = {"draws": [0], "coeffs": [1.0], "seed": 0, "tensor_ids": IDS}
    sweeper.perturb_(mine, **arguments)
    before = copy.deepcopy(mine)
    with pytest.raises(error, match=message):
        sweeper.perturb_(mine, **(arguments | wrong))
    assert all(map(torch.equal, mine, before))


def test_a_momentum_that_shares_memory_is_found():
    sweeper = ops.Sweeper()
    param = torch.zeros(10)
    sweeper.perturb_([param], [0], [1.0], seed=0, update=ops.Update([1.0], 0.9, 0.1, [param + 1]))
    with pytest.raises(ValueError, match="share memory"):
        sweeper.perturb_([param], [0], [1.0], seed=0, update=ops.Update([1.0], 0.9, 0.1, [param]))


def test_stale_saved_tensors_are_noticed():
    weight = torch.ones(3)
    x = torch.ones(3, requires_grad=True)
    sweeper = ops.Sweeper()
    sweeper.perturb_([weight], [0], [1.0], seed=0)
    y = (x * weight).sum()
    sweeper.perturb_([weight], [0], [1.0], seed=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_it_holds_no_tensor():
    sweeper = ops.Sweeper()
    weight = torch.zeros(10)
    sweeper.perturb_([weight], [0], [1.0], seed=0)
    seen = weakref.ref(weight)
    del weight
    gc.collect()
    assert seen() is None
    assert sweeper.__reduce__() == (ops.Sweeper, ())


def test_a_dispatch_mode_sees_the_operator():
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    sweeper = ops.Sweeper()
    weight, other = torch.zeros(10), torch.zeros(10)
    with Seen() as seen:
        sweeper.perturb_([weight], [0], [1.0], seed=0)
    assert seen.names == ["zokern::perturb_"]
    ops.perturb_([other], [0], [1.0], seed=0)
    assert torch.equal(weight, other)


@pytest.mark.parametrize("perturb_", [ops.perturb_, ops.Sweeper().perturb_])
def test_what_cannot_be_swept(perturb_):
    freed = torch.ones(100)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"params\[0\].*memory was freed"):
        perturb_([freed], [0], [1.0], seed=0)
    with pytest.raises(ValueError, match=r"masters\[0\].*memory was freed"):
        perturb_([torch.ones(100)], [0], [1.0], seed=0, masters=[freed])
    with pytest.raises(TypeError, match="only strided tensors"):
        perturb_([torch.ones(8).to_sparse()], [0], [1.0], seed=0)
    perturb_([torch.ones(8, device="meta")], [0], [1.0], seed=0)


def test_lists_that_their_owner_changes():
    sweeper = ops.Sweeper()
    mine, ids, shards = torch.zeros(10), [1], [(0, 10, 10)]
    for _ in range(2):
        other = mine.clone()
        sweeper.perturb_([mine], [0], [1.0], seed=0, tensor_ids=ids, shards=shards)
        ops.perturb_([other], [0], [1.0], seed=0, tensor_ids=ids, shards=shards)
        assert torch.equal(mine, other)
        ids[0], shards[0] = 2, (80, 10, 10)
