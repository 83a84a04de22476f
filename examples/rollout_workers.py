"""Balance a pole by rewards that workers collect in processes of their own.

The reward is how long a pole on a cart stays up, which has no gradient. The driver asks for points;
workers, who hold copies of the policy, go there by messages of a few numbers, play, and send back a
reward whenever they are done. Weights are never sent, and are the driver's bit for bit at the end.

    python examples/rollout_workers.py --workers 2 --steps 60
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from multiprocessing.queues import Queue

import torch
from torch import nn
from tqdm import tqdm

import zokern
from zokern.worker import Driver, Message, Worker

EPISODES = 32
LONGEST = 200  # moments; an episode ends there


def make_policy() -> nn.Module:
    """The same in every process. From position, velocity, angle and its velocity to a push."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


@torch.no_grad()
def play(policy: nn.Module, seed: int) -> float:
    """The mean time that the pole stays up (Barto, Sutton and Anderson's cart, 0.02 s a moment)."""
    state = 0.05 * (2 * torch.rand(EPISODES, 4, generator=torch.Generator().manual_seed(seed)) - 1)
    alive, lasted = torch.ones(EPISODES, dtype=torch.bool), torch.zeros(EPISODES)
    for _ in range(LONGEST):
        _, speed, angle, turn = state.T
        push = 10.0 * policy(state)[:, 0].sign()
        sine, cosine = angle.sin(), angle.cos()
        force = (push + 0.05 * turn**2 * sine) / 1.1
        turning = (9.8 * sine - cosine * force) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        moving = force - 0.05 * turning * cosine / 1.1
        state = state + 0.02 * torch.stack([speed, moving, turn, turning], dim=1)
        alive &= (state[:, 0].abs() < 2.4) & (state[:, 2].abs() < 0.21)
        lasted += alive
    return lasted.mean().item()


def work(rank: int, workers: int, messages: Queue, rewards: Queue) -> None:
    """Follow the driver; play at every so-manieth of its points, each step the same episodes."""
    torch.set_num_threads(1)
    policy = make_policy()
    worker = Worker(policy)
    while (message := messages.get()) is not None:
        worker.apply(message)
        is_point = "at" in message and "step" not in message and message["to"]
        if is_point and message["number"] % workers == rank:
            rewards.put((message["number"], play(policy, seed=message["at"])))


def train(args: argparse.Namespace, inboxes: list[Queue], rewards: Queue) -> None:
    policy = make_policy()
    optimizer = zokern.MeZO(
        policy.named_parameters(),
        lr=args.lr,
        eps=args.eps,
        samples=args.samples,
        seed=args.seed,
        maximize=True,
    )
    sent: list[int] = []

    def send(message: Message) -> None:
        sent.append(message["number"])
        for inbox in inboxes:
            inbox.put(message)

    driver = Driver(optimizer, send)
    with tqdm(range(args.steps), unit="step") as progress:
        for _ in progress:
            # All points are sent before the first reward is back.
            numbers = [sent[-1] for _ in driver.ask()]
            found = dict(rewards.get(timeout=120) for _ in numbers)
            driver.tell([found[number] for number in numbers])
            mean = statistics.fmean(found.values())
            progress.set_postfix(reward=f"{mean:.1f}")
            if mean > 0.95 * LONGEST:
                break
    driver.check()
    before, after = (play(which, seed=1 << 20) for which in (make_policy(), policy))
    print(f"{optimizer.run['step']} steps; in episodes that were not trained on the pole stays up")
    print(f"{after:.0f} moments of {LONGEST}, by the policy of before {before:.0f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that play")
    parser.add_argument("--steps", type=int, default=60, help="at most")
    parser.add_argument("--samples", type=int, default=8, help="directions a step")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    spawn = multiprocessing.get_context("spawn")
    inboxes, rewards = [spawn.Queue() for _ in range(args.workers)], spawn.Queue()
    processes = [
        spawn.Process(target=work, args=(rank, args.workers, inbox, rewards), daemon=True)
        for rank, inbox in enumerate(inboxes)
    ]
    for process in processes:
        process.start()
    train(args, inboxes, rewards)
    for inbox, process in zip(inboxes, processes, strict=True):
        inbox.put(None)
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a worker's weights are not the driver's")


if __name__ == "__main__":
    main()
