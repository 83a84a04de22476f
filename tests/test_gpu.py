"""On a GPU: the native and Triton kernels against the reference on the CPU, streams, devices."""

import copy
import random
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import zokern
from tests import merging_cases, test_merge, test_merge_deltas, zo
from tests.same_bits import same_bits
from tests.test_mezo import loss_of, make_model, same_weights
from tests.test_perturb import DIRECTIONS, STORAGES, clone, make_operands
from tests.test_sweep_forms import CASES, FORMS, make_case
from tests.zo import METHODS
from zokern import noise, ops
from zokern.merging import METHODS as MERGES
from zokern.sweep import Shard

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["native", "triton", "reference"])
def gpu_backend(request, monkeypatch):
    reason = zokern.backends.load(request.param).why_not(torch.device("cuda"))
    assert reason is None, reason
    monkeypatch.setenv("ZOKERN_BACKEND", request.param)
    return request.param


def to_gpu(tensors):
    if tensors is None:
        return None
    return [None if t is None else torch.empty_like(t, device="cuda").copy_(t) for t in tensors]


@pytest.mark.parametrize("k", [1, 2, 4, 16])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("law", DIRECTIONS)
def test_sweeps_are_those_of_the_reference(gpu_backend, law, storage, k):
    choose = random.Random(f"{law}{storage}{k}")
    params, residuals, shards = make_operands(storage)
    arguments = {
        "draws": [choose.getrandbits(32) for _ in range(k)],
        "coeffs": [[choose.uniform(-0.1, 0.1) for _ in range(k)] for _ in params],
        "scales": [[choose.choice([1.0, 0.9]) for _ in range(k)] for _ in params],
        "seed": choose.getrandbits(64),
        "law": law,
        "tensor_ids": [choose.getrandbits(56) for _ in params],
        "shards": shards,
    }
    got, got_residuals = to_gpu(params), to_gpu(residuals)
    ops.perturb_(got, residuals=got_residuals, **arguments)
    wanted, wanted_residuals = clone(params), clone(residuals)
    with zokern.use_backend("reference"):
        ops.perturb_(wanted, residuals=wanted_residuals, **arguments)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert same_bits(a.cpu(), b), f"params[{i}]"
    for i, (a, b) in enumerate(zip(got_residuals, wanted_residuals, strict=True)):
        assert a is b or same_bits(a.cpu(), b), f"residuals[{i}]"


@pytest.mark.parametrize(("law", "storage", "form"), CASES)
def test_forms_of_sweeps_are_those_of_the_reference(gpu_backend, law, storage, form):
    case = make_case(law, storage, FORMS[form])
    update = case.update
    if update is not None:
        update = replace(update, momenta=to_gpu(update.momenta))
    arguments = case.arguments | {
        "dense": [to_gpu(vectors) for vectors in case.arguments["dense"]],
        "rows": to_gpu(case.arguments["rows"]),
    }
    on_gpu = replace(
        case,
        params=to_gpu(case.params),
        residuals=to_gpu(case.residuals),
        masters=to_gpu(case.masters),
        momenta=to_gpu(case.momenta),
        arguments=arguments,
        update=update,
    )
    got = on_gpu.run()
    with zokern.use_backend("reference"):
        wanted = case.run()
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.is_cuda
        assert same_bits(a.cpu(), b), f"operand {i}"


@pytest.mark.parametrize("law", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inner_products_are_those_of_the_reference(gpu_backend, law, dtype):
    vectors, _, shards = make_operands("fp32")
    vectors = [vector.nan_to_num(0, 1, -1).clamp(-9, 9).to(dtype) for vector in vectors]
    arguments = {"seed": 2**63 + 5, "law": law, "shards": shards}
    got = ops.inner_products(to_gpu(vectors), 77, **arguments)
    with zokern.use_backend("reference"):
        wanted = ops.inner_products(vectors, 77, **arguments)
    assert got.device.type == "cpu"
    assert torch.equal(got.float(), wanted.float())
    assert torch.allclose(got, wanted, rtol=1e-15, atol=0)


def test_inner_products_of_a_large_tensor(gpu_backend):
    if gpu_backend == "reference":
        pytest.skip("the reference would take too long")
    numel = (1 << 26) + 77
    ones = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    vv, vz, zz = ops.inner_products([ones], 5, seed=1, law="rademacher")[0].tolist()
    assert vv == zz == numel
    z = noise.sample("rademacher", numel, seed=1, draw=5, device="cuda")
    assert vz == z.sum(dtype=torch.float64).item()


@pytest.mark.parametrize("masks", ["none", "random", "magnitude"])
@pytest.mark.parametrize(("votes", "combine"), test_merge_deltas.RULES)
@pytest.mark.parametrize("dtype", test_merge_deltas.DTYPES, ids=str)
def test_merges_are_those_of_the_reference(gpu_backend, dtype, votes, combine, masks):
    test_merge_deltas.check_rules(gpu_backend, "cuda", dtype, votes, combine, masks)


@pytest.mark.parametrize("semantics", ["mergekit", "peft", "ties"])
def test_models_merge_on_a_gpu_as_on_a_cpu(gpu_backend, semantics):
    base, models = test_merge.states()
    given = {"density": 0.3, "semantics": semantics}
    got = zokern.merge.ties(models, base=base, device="cuda", **given)
    on_gpu = [{name: tensor.cuda() for name, tensor in model.items()} for model in models]
    there = zokern.merge.ties(on_gpu, base=on_gpu[0], **given)
    with zokern.use_backend("reference"):
        wanted = zokern.merge.ties(models, base=base, **given)
        own = zokern.merge.ties(models, base=models[0], **given)
    for name in base:
        assert same_bits(got[name], wanted[name])
        assert same_bits(there[name].cpu(), own[name])


@pytest.mark.parametrize("law", noise.LAWS)
def test_samples_are_those_of_the_reference(gpu_backend, law):
    arguments = {"seed": 1 << 63, "draw": 7, "tensor_id": 1 << 55, "offset": (1 << 33) + 3}
    for numel in (0, 1, 7, 100_003):
        got = noise.sample(law, numel, device="cuda", **arguments)
        with zokern.use_backend("reference"):
            assert same_bits(got.cpu(), noise.sample(law, numel, **arguments))


@pytest.mark.parametrize("method", MERGES)
@pytest.mark.parametrize("storage", STORAGES)
def test_merging_steps_are_those_of_the_reference(gpu_backend, storage, method):
    case = merging_cases.Case(method, storage=storage, steps_k=method != "ema", grad=torch.bfloat16)
    merging_cases.check(case, gpu_backend, "cuda")
    shards = [(8 * i + i % 3, n, n) for i, n in enumerate(case.sizes)]
    others = replace(case, state=torch.bfloat16, sparse=True, starts=(0, 1), shards=shards)
    merging_cases.check(others, gpu_backend, "cuda")


@pytest.mark.parametrize("method", ["dare_paper", "ties"])
@pytest.mark.parametrize(("offset", "rows", "length", "stride"), [(8, 90, 64, 72), (3, 40, 7, 9)])
def test_merging_steps_of_rows_and_masters(gpu_backend, method, offset, rows, length, stride):
    shards = [(offset, length, stride)] * 2
    case = merging_cases.Case(method, [rows * length] * 2, "bf16", master=True, shards=shards)
    merging_cases.check(case, gpu_backend, "cuda")


@pytest.mark.parametrize(("grad", "state", "tau"), [*product(merging_cases.FLOATS, repeat=3)])
def test_merging_steps_of_every_dtype(gpu_backend, grad, state, tau):
    case = merging_cases.Case(sizes=[100_003], grad=grad, state=state, tau=tau)
    merging_cases.check(case, gpu_backend, "cuda")
    merging_cases.check(replace(case, sparse=True), gpu_backend, "cuda")


def test_a_merging_step_of_many_tensors(gpu_backend):
    sizes = [1 + (i * 7919) % 5000 for i in range(500)]
    merging_cases.check(merging_cases.Case("ties", sizes, "bf16"), gpu_backend, "cuda")


def test_a_merging_step_waits_for_nothing(gpu_backend):
    """Where its tables are on the device."""
    if gpu_backend == "reference":
        pytest.skip("the reference reads the tables on the host")
    step = merging_cases.make_step(merging_cases.Case(), merging_cases.Memory("cuda"))
    mask = replace(step.mask, draws=step.mask.draws.cuda(), limits=step.mask.limits.cuda())
    steps = replace(step.steps, merges=step.steps.merges.cuda())
    step = replace(step, mask=mask, steps=steps)
    ops.merge_step_(step)  # what is compiled once has been
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.merge_step_(step)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_merging_step_of_more_than_two_to_the_31_elements(gpu_backend):
    if gpu_backend == "reference":
        pytest.skip("the reference would take too long")
    numel, bf16 = (1 << 31) + 100, torch.bfloat16
    end = merging_cases.Case(
        "dare", [200], "bf16", grad=bf16, state=bf16, tau=None, shards=[(numel - 200, 200, 200)]
    )
    wanted = merging_cases.make_step(end)

    def whole(tensors):
        memory = torch.zeros(numel, dtype=bf16, device="cuda")
        memory[-200:] = tensors[0]
        return [memory]

    steps = wanted.steps
    got = replace(
        wanted,
        params=whole(wanted.params),
        steps=replace(
            steps,
            grads=whole(steps.grads),
            exp_avgs=whole(steps.exp_avgs),
            exp_avg_sqs=whole(steps.exp_avg_sqs),
        ),
        mask=replace(wanted.mask, shards=[Shard(0, numel, numel)]),
    )
    ops.merge_step_(got)
    with zokern.use_backend("reference"):
        ops.merge_step_(wanted)
    for (name, _, a), (_, _, b) in zip(got.written(), wanted.written(), strict=True):
        assert same_bits(a[-200:].cpu(), b), name


def test_many_tensors_of_a_large_model(gpu_backend):
    sizes = [1 + (i * 7919) % 5000 for i in range(1500)]
    got = [torch.zeros(n, device="cuda") for n in sizes]
    wanted = [torch.zeros(n) for n in sizes]
    ops.perturb_(got, [3], [1.0], seed=1)
    with zokern.use_backend("native"):
        ops.perturb_(wanted, [3], [1.0], seed=1)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))


def test_more_than_two_to_the_31_elements(gpu_backend):
    if gpu_backend == "reference":
        pytest.skip("the reference would take too long")
    numel = (1 << 31) + 100
    tensor = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    ops.perturb_([tensor], [0], [1.0], seed=1)
    tail = noise.sample("gauss16", 200, seed=1, draw=0, offset=numel - 200)
    assert torch.equal(tensor[-200:].cpu(), tail.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_of_mezo_is_the_same_bits_given_the_same_losses(gpu_backend, dtype):
    on_gpu, on_cpu = make_model(dtype).cuda(), make_model(dtype)
    optimizers = [
        zokern.MeZO(model.named_parameters(), lr=0.01, seed=3, samples=2, weight_decay=0.1)
        for model in (on_gpu, on_cpu)
    ]
    losses = random.Random(0)
    for _ in range(50):
        told = [losses.uniform(0, 1) for _ in range(4)]
        for optimizer in optimizers:
            with zokern.use_backend(None if optimizer is optimizers[0] else "reference"):
                list(optimizer.ask())
                optimizer.tell(told)
    assert same_weights(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("precision", ["split", "master"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_steps_of_every_method_are_those_of_the_reference(gpu_backend, method, precision):
    """Told the same losses, in bfloat16, also through a replay on the GPU."""
    models = zo.make_model(torch.bfloat16).cuda(), zo.make_model(torch.bfloat16)
    trajectory = zokern.Trajectory()
    optimizers = [
        method.make(model, weight_decay=0.1, precision=precision, trajectory=recorded)
        for model, recorded in zip(models, (trajectory, None), strict=True)
    ]
    losses = random.Random(0)
    for _ in range(5):
        result = None
        while result is None:
            told = [losses.uniform(0, 1) for _ in optimizers[0].ask()]
            result = optimizers[0].tell(told)
            with zokern.use_backend("reference"):
                list(optimizers[1].ask())
                optimizers[1].tell(told)
    on_gpu, on_cpu = (zo.weights(model.cpu()) for model in models)
    assert zo.same(on_gpu, on_cpu)
    if precision == "master":
        base = zo.make_model(torch.bfloat16).cuda()
        given = zo.vectors(base)
        zokern.replay(base, trajectory, rounds=[tuple(given.values())])
        assert zo.same(zo.weights(base.cpu()), on_cpu)


def test_dropout_on_a_gpu_is_the_same_for_all_points_of_a_step():
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Dropout(0.5)).cuda()
    x = torch.randn(64, 100, device="cuda")
    optimizer = zokern.MeZO(model.named_parameters(), lr=0.0, eps=1e-6, seed=1)
    optimizer.step(lambda: model(x).square().mean())
    assert optimizer.last.losses[0] == pytest.approx(optimizer.last.losses[1], rel=1e-4)


def test_it_runs_on_the_current_stream(gpu_backend):
    tensor = torch.zeros(1 << 24, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        tensor.fill_(1.0)
        ops.perturb_([tensor], [0], [1.0], seed=1)
        moved = tensor.clone()
    side.synchronize()
    z = noise.sample("gauss16", 1 << 24, seed=1, draw=0)
    assert torch.equal(moved.cpu(), 1 + z)


def test_several_devices_in_one_call(gpu_backend):
    tensors = [torch.zeros(1000, device="cuda"), torch.zeros(1000)]
    with zokern.use_backend(None if gpu_backend == "triton" else gpu_backend):
        ops.perturb_(tensors, [0], [1.0], seed=1, tensor_ids=[5, 5])
    assert torch.equal(tensors[0].cpu(), tensors[1])


def test_mezo_learns_on_a_gpu(gpu_backend):
    from tests import test_mezo

    model = make_model().cuda()
    inputs, labels = test_mezo.INPUTS.cuda(), test_mezo.LABELS.cuda()
    optimizer = zokern.MeZO(model.named_parameters(), lr=0.02, seed=3)

    def closure():
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    before = closure().item()
    for _ in range(300):
        optimizer.step(closure)
    assert closure().item() < 0.7 * before
    assert loss_of(model.cpu())().item() < 0.7 * before


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_losses_are_those_of_a_sweep_in_place(gpu_backend, dtype):
    model = zo.make_model(dtype).cuda()
    rest = copy.deepcopy(model)
    x, y = zo.X.to("cuda", dtype), zo.Y.cuda()
    optimizer = zokern.MeZO(
        model.named_parameters(), lr=1e-3, seed=3, precision="inplace", module=model,
        layerwise=True, stochastic_rounding=False,
    )  # fmt: skip
    ids = [noise.tensor_id(name) for name, _ in model.named_parameters()]
    for move in optimizer.ask():
        there = copy.deepcopy(rest)
        ops.perturb_(there.parameters(), move.draws, move.coeffs, seed=3, tensor_ids=ids)
        loss, wanted = (F.cross_entropy(m(x).float(), y) for m in (model, there))
        assert torch.equal(loss, wanted)
    optimizer.flush()
    assert zo.same(zo.weights(model), zo.weights(rest))
