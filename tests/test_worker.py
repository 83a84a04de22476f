"""Workers' weights follow their driver's bit for bit, from messages alone."""

import json
import multiprocessing

import pytest
import torch
from torch import nn

import zokern
from tests.zo import METHODS, X, loss_of, make_model, same, vectors, weights
from zokern.worker import Driver, Worker

PRECISIONS = {
    "float32": (torch.float32, {}),
    "float32, master": (torch.float32, {"precision": "master"}),
    "float32, layerwise": (torch.float32, {"layerwise": True}),
    "bfloat16, split": (torch.bfloat16, {"precision": "split"}),
    "bfloat16, split8": (torch.bfloat16, {"precision": "split8"}),
    "bfloat16, master": (torch.bfloat16, {"precision": "master"}),
    "bfloat16, layerwise": (torch.bfloat16, {"layerwise": True}),
    "float16, split": (torch.float16, {"precision": "split"}),
}


def drive(driver: Driver, model: nn.Module) -> None:
    result = None
    while result is None:
        result = driver.tell([loss_of(model)().item() for _ in driver.ask()])


class Pair:
    """A driver's model and a worker's, which gets messages as JSON."""

    def __init__(self, method: str = "mezo", dtype=torch.float32, **arguments) -> None:
        self.model, self.copy = make_model(dtype), make_model(dtype)
        self.optimizer = METHODS[method].make(
            self.model, eps=0.05, **({"module": self.model} | arguments)
        )
        rounds = [tuple(vectors(self.copy).values())]
        self.worker = Worker(self.copy, rounds=rounds)
        self.visited = 0
        self.driver = Driver(self.optimizer, self.send)

    def send(self, message: dict) -> None:
        self.worker.apply(json.loads(json.dumps(message)))
        assert same(weights(self.model), weights(self.copy))
        if not self.optimizer._displacement.at_rest:
            # Layer by layer a point is seen in the forward pass alone.
            with torch.no_grad():
                x = X.to(self.model[0].weight.dtype)
                assert torch.equal(self.model(x), self.copy(x))
            self.visited += 1


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_follows_every_method(method):
    pair = Pair(method, weight_decay=0.1)
    before = weights(pair.copy)
    for _ in range(4):
        drive(pair.driver, pair.model)
    pair.driver.check()
    assert pair.visited >= 4 * (METHODS[method].evaluations - 1)
    assert not same(weights(pair.copy), before)


FUSED = [(name, fuse_next) for name in PRECISIONS for fuse_next in (False, "layerwise" not in name)]


@pytest.mark.parametrize(("precision", "fuse_next"), dict.fromkeys(FUSED))
def test_a_worker_follows_in_every_precision(precision, fuse_next):
    dtype, arguments = PRECISIONS[precision]
    pair = Pair("momentum", dtype, fuse_next=fuse_next, **arguments)
    schedule = torch.optim.lr_scheduler.ExponentialLR(pair.optimizer, 0.5)
    for _ in range(4):
        drive(pair.driver, pair.model)
        schedule.step()
    pair.driver.flush()
    assert pair.optimizer._displacement.at_rest
    pair.driver.check()


@pytest.mark.parametrize("precision", ["float32, master", "bfloat16, master"])
def test_with_masters_a_worker_need_not_go_to_every_point(precision):
    """Messages of points may be left out where nothing at rest depends on them."""
    dtype, arguments = PRECISIONS[precision]
    model, copy = make_model(dtype), make_model(dtype)
    optimizer = METHODS["mezo"].make(model, **arguments)
    messages: list[dict] = []
    driver, worker = Driver(optimizer, messages.append), Worker(copy)
    for _ in range(3):
        drive(driver, model)
    needed = [m for m in messages if "run" in m or "step" in m]
    assert len(needed) == 4
    for number, message in enumerate(needed):
        worker.apply(message | {"number": number})
    assert same(weights(model), weights(copy))


def test_a_skipped_step_and_a_dropped_one_are_followed():
    pair = Pair(fuse_next=True)
    drive(pair.driver, pair.model)
    with pytest.warns(RuntimeWarning, match="not finite"):
        pair.driver.tell([float("nan") for _ in pair.driver.ask()])
    next(pair.driver.ask())
    pair.driver.flush()
    drive(pair.driver, pair.model)
    pair.driver.check()


def test_settings_that_change_are_followed():
    pair = Pair("momentum")
    for i in range(4):
        pair.optimizer.param_groups[0] |= {"weight_decay": 0.1 * i, "maximize": i == 2}
        drive(pair.driver, pair.model)
    pair.driver.check()


def test_what_a_worker_cannot_follow_is_an_error():
    pair = Pair()
    messages: list[dict] = []
    driver = Driver(METHODS["mezo"].make(make_model()), messages.append)
    driver.check()
    with pytest.raises(RuntimeError, match="message 1 came where 0 was due"):
        Worker(make_model()).apply(messages[1])
    other = make_model()
    with torch.no_grad():
        other[0].weight += 1
    with pytest.raises(zokern.TrajectoryError, match=r"checksum of 0.weight differs"):
        Worker(other).apply(messages[0])
    worker = Worker(copy := make_model())
    for message in messages[:-1]:
        worker.apply(message)
    with torch.no_grad():
        copy[3].bias += 1
    with pytest.raises(RuntimeError, match=r"\['3.bias'\] are not those of the driver"):
        worker.apply(messages[-1])

    pair.model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="other parameters are trained"):
        next(pair.driver.ask())
    layerwise = Pair(layerwise=True)
    begun: list[dict] = []
    Driver(layerwise.optimizer, begun.append)
    with pytest.raises(TypeError, match="give the worker a module, not dict"):
        Worker(dict(make_model().named_parameters())).apply(begun[0])
    with pytest.raises(ValueError, match="take fuse_next=False"):
        Pair("zopro", fuse_next=True)
    trained = METHODS["momentum"].make(model := make_model())
    trained.step(loss_of(model))
    with pytest.raises(zokern.TrajectoryError, match="hold part of it already"):
        Driver(trained, begun.append)


def follow(pipe) -> None:
    """A process of its own: answers each message with the bits of its weights."""
    model = make_model()
    worker = Worker(model)
    while (text := pipe.recv()) is not None:
        worker.apply(json.loads(text))
        pipe.send([w.numpy().tobytes() for w in weights(model)])


def test_two_processes_hold_the_same_bits():
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=follow, args=(theirs,))
    process.start()
    theirs.close()
    model = make_model()
    optimizer = zokern.MeZO(model.named_parameters(), 0.01, samples=2, seed=5, momentum=0.5)
    seen = []

    def send(message: dict) -> None:
        ours.send(json.dumps(message))
        bits = ours.recv()
        assert bits == [w.numpy().tobytes() for w in weights(model)]
        seen.append(bits)

    try:
        driver = Driver(optimizer, send)
        for _ in range(3):
            drive(driver, model)
        driver.check()
    finally:
        ours.send(None)
        process.join(30)
    assert process.exitcode == 0
    # The description; four points and a step, three times; at rest; the check.
    assert len(seen) == 1 + 3 * 5 + 2
    assert seen[0] != seen[1] != seen[-1]
