"""Zeroth-order training by the Trainers of transformers and TRL."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import Trainer

from zokern.optim.base import ZOOptimizer, _FlushBefore
from zokern.optim.mezo import MeZO
from zokern.optim.randomness import RandomState

_Base: Any = Trainer if TYPE_CHECKING else object


class ZOMixin(_Base):
    """Makes a Trainer class train with a zeroth-order optimizer: forward passes only.

    It goes before the class: ``class ZODPOTrainer(ZOMixin, DPOTrainer)``, and so with TRL's SFT,
    KTO and Reward trainers and with Trainers of one's own that override ``compute_loss``. What the
    Trainer does around a step (schedulers, logs, callbacks, evaluation, checkpoints, resuming)
    stays as it is. A step's loss is that of all its micro-batches: by ``num_items_in_batch`` where
    the model divides by it, else their mean, also where the Trainer takes the sum because the model
    accepts ``num_items_in_batch`` and ignores it. They are kept on the device and evaluated anew at
    each point.

    Started as several processes (``torchrun``, ``accelerate launch``), each evaluates its own
    batches and they exchange losses; the model is not wrapped. Before the optimizer is made, all
    take rank 0's weights.

    Logged beside the loss: ``projected_gradient``, √Σ g² over the last step's directions, and
    ``evaluations_per_second``, of a step's loss; there is no ``grad_norm``, and ``max_grad_norm``
    clips nothing. ``on_pre_optimizer_step`` is called after the step.

    Args:
        *args, **kwargs: the Trainer's own. ``optimizers=(optimizer, scheduler)`` may give a
            :class:`zokern.ZOOptimizer` of the model's parameters.
        zo_optimizer: otherwise the class to make one of. It gets ``lr`` and ``weight_decay`` from
            the training arguments (biases and norms do not decay, as in the Trainer), ``seed`` from
            their ``seed``, the model as ``module``, and the group of all processes as
            ``process_group``, where there are several.
        zo_arguments: its other arguments; they go before these.
        zo_train_mode: evaluate in train mode, with dropout; otherwise as ``model.eval()`` does.

    Raises:
        ValueError, TypeError: for what cannot work without gradients or is not supported:
            DeepSpeed, FSDP, several GPUs in one process, fp16 with a loss scale, NEFTune without
            train mode, another kind of optimizer, or one that does not know of the other
            processes, trainers that generate what they learn from.
        TypeError: in training, for a model that computes its loss in half precision.
        RuntimeError: in training, where processes hold other weights than the others.
    """

    optimizer: Any

    def __init__(
        self,
        *args: Any,
        zo_optimizer: type[ZOOptimizer] = MeZO,
        zo_arguments: dict[str, Any] | None = None,
        zo_train_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        self._zo_optimizer = zo_optimizer
        self._zo_arguments = dict(zo_arguments or {})
        self._zo_train_mode = zo_train_mode
        self._micro_batches: list[tuple[Any, Any]] = []
        self._evaluations, self._seconds = 0, 0.0
        self._uses_items: bool | None = None
        super().__init__(*args, **kwargs)
        if self.optimizer is not None:
            if zo_arguments is not None or zo_optimizer is not MeZO:
                raise ValueError("give optimizers=, or zo_optimizer= and zo_arguments=, not both")
            _check_optimizer(self, self.optimizer)

    def create_accelerator_and_postprocess(self) -> None:
        _check_arguments(self)
        super().create_accelerator_and_postprocess()
        _check_accelerator(self)
        # Without gradients there is nothing that DistributedDataParallel would do.
        self.accelerator.prepare_model = partial(
            self.accelerator.prepare_model, evaluation_mode=True
        )

    def _validate_args(self) -> None:
        super()._validate_args()
        if self.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                f"{type(self).__name__} takes zo_optimizer= and zo_arguments= instead of "
                "optimizer_cls_and_kwargs"
            )

    @property
    def zo(self) -> ZOOptimizer:
        """The optimizer itself, without what accelerate wraps around it.

        Raises:
            RuntimeError: before training has begun, where none was given.
        """
        optimizer = self.optimizer
        if isinstance(optimizer, _Stepped):
            optimizer = optimizer.optimizer
        if optimizer is None:
            raise RuntimeError("the optimizer is made when training begins: call train() first")
        return optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, unless there is one, and keep the loop's own ``step()`` from it."""
        if self.optimizer is None:
            if self.accelerator.num_processes > 1:
                _take_over_weights(self.model)
            self.optimizer = self._make_optimizer(self.model if model is None else model)
        if not isinstance(self.optimizer, _Stepped):
            _check_optimizer(self, self.optimizer)
            if self.accelerator.num_processes > 1:
                self.optimizer.assert_in_sync()
            if self.optimizer.run["fuse_next"]:
                # It may have been made without module=.
                self.model.register_state_dict_pre_hook(_FlushBefore(self.optimizer))
            self.optimizer = _Stepped(self.optimizer)
        return self.optimizer

    def _make_optimizer(self, model: nn.Module) -> ZOOptimizer:
        arguments = {
            "lr": self.args.learning_rate,
            "weight_decay": self.args.weight_decay,
            "seed": self.args.seed,
            "module": self.model,
            "process_group": dist.group.WORLD if self.accelerator.num_processes > 1 else None,
            **self._zo_arguments,
        }
        decaying = set(self.get_decay_parameter_names(model))
        weight_decay = arguments.pop("weight_decay")
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": weight_decay},
            {"params": [], "weight_decay": 0.0},
        ]
        for name, param in model.named_parameters():
            if param.requires_grad:
                groups[name not in decaying]["params"].append((name, param))
        return self._zo_optimizer([group for group in groups if group["params"]], **arguments)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # A step that was broken off may have left some.
        self._micro_batches.clear()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Collect a micro-batch; with the last one of a step, make the step.

        Returns:
            The step's loss at the last micro-batch, and 0 before.
        """
        self._micro_batches.append((self._prepare_inputs(inputs), num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        start = time.perf_counter()
        try:
            with self._evaluation_mode():
                loss = self.zo.step(lambda: self._step_loss(model))
        finally:
            self._micro_batches.clear()
        self._seconds += time.perf_counter() - start
        return loss.to(self.args.device)

    def _step_loss(self, model: nn.Module) -> Tensor:
        """The loss of the micro-batches that were collected."""
        self._evaluations += 1
        losses = [self._loss(model, *micro_batch) for micro_batch in self._micro_batches]
        return torch.stack(losses).sum() / self._divisor(model)

    def _loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        with self.compute_loss_context_manager():
            # It may write to its inputs.
            loss = self.compute_loss(
                model, copy.copy(inputs), num_items_in_batch=num_items_in_batch
            )
        if loss.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"{type(self).__name__}: the model computes its loss in {loss.dtype}, which rounds "
                "the difference of two losses away: give the training arguments bf16=True, under "
                "which losses are float32, or a compute_loss_func of outputs.logits.float()"
            )
        return loss

    def _divisor(self, model: nn.Module) -> int:
        """What the sum of the losses of a step's micro-batches is divided by."""
        count = len(self._micro_batches)
        inputs, num_items_in_batch = self._micro_batches[0]
        if self.loss_is_scaled_for_ga is not None:
            return 1 if self.loss_is_scaled_for_ga else count
        if num_items_in_batch is None or self.compute_loss_func is not None:
            return count if self.compute_loss_func is None else 1
        # With other processes the Trainer multiplies what it takes for a share of all items.
        copies = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if count * copies == 1:
            return 1
        if self._uses_items is None:
            # Many a model accepts num_items_in_batch and makes nothing of it.
            state, losses = RandomState({self.args.device}), []
            for items in (num_items_in_batch, 2 * num_items_in_batch):
                with torch.no_grad():
                    losses.append(self._loss(model, inputs, items))
                state.restore()
            # A loss without a label is 0 in any case.
            self._uses_items = not torch.equal(*losses) if losses[0] != 0 else None
        return count * copies if self._uses_items is False else 1

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Eval mode for the forward pass; who asks the model outside of it sees it in training.

        TRL's trainers tell by that what they log from what they evaluate.
        """
        self.model.train()
        if self._zo_train_mode:
            yield
            return
        self.model.eval()
        self.model.training = True
        hooks = [
            self.model.register_forward_pre_hook(_sets_training(False)),
            self.model.register_forward_hook(_sets_training(True), always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.model.train()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.pop("grad_norm", None)
            last = self.zo.last
            if last is not None:
                logs["projected_gradient"] = math.hypot(*last.projected_gradient)
            if self._seconds > 0.0:
                logs["evaluations_per_second"] = round(self._evaluations / self._seconds, 3)
            self._evaluations, self._seconds = 0, 0.0
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._rest()

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        # On all ranks, of which one saves.
        self._rest()
        super().save_model(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._rest()
        return super().evaluation_loop(*args, **kwargs)

    def _load_best_model(self) -> None:
        self._rest()
        super()._load_best_model()
        # A run that is recorded ends here: a step after it says so.
        if not self.zo._recorder.has_begun:
            self.zo.refresh()

    def _rest(self) -> None:
        """Bring the weights to rest, where ``fuse_next`` has left them displaced."""
        if self.optimizer is not None:
            self.zo.flush()


class ZOTrainer(ZOMixin, Trainer):
    """transformers' Trainer with a zeroth-order optimizer; see :class:`ZOMixin`.

    Example::

        trainer = ZOTrainer(
            model,
            TrainingArguments("out", learning_rate=1e-6),
            train_dataset=dataset,
            zo_arguments={"eps": 1e-3, "samples": 2},
        )
        trainer.train()
    """


class _Stepped(AcceleratedOptimizer):
    """The optimizer as the Trainer's loop sees it: its steps have been made when it calls them."""

    # So that accelerate takes it as it is. It would load the state anew, which a trajectory takes
    # for a run that is resumed.
    _is_accelerate_prepared = True

    def __init__(self, optimizer: ZOOptimizer) -> None:
        super().__init__(optimizer, device_placement=False)
        for param, state in optimizer.state.items():
            # The model may have moved since the optimizer was made.
            state.update({key: tensor.to(param.device) for key, tensor in state.items()})

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            self.optimizer.step(closure)


def _sets_training(mode: bool) -> Callable[..., None]:
    """A hook that changes the mode of a module alone, not of those in it."""

    def hook(module: nn.Module, *_: Any) -> None:
        module.training = mode

    return hook


def _check_arguments(trainer: Trainer) -> None:
    args, name = trainer.args, type(trainer).__name__
    if args.deepspeed:
        raise ValueError(f"{name} does not work with DeepSpeed, which owns parameters and steps")
    if args.fsdp:
        raise ValueError(f"{name} does not work with FSDP: the parameters must be whole")
    if args.fp16:
        raise ValueError(
            f"{name} does not take fp16=True, which scales losses for their gradients: take "
            "bf16=True, or load the model in half precision"
        )
    if args.neftune_noise_alpha is not None and not trainer._zo_train_mode:
        raise ValueError(
            f"{name} evaluates in eval mode, where neftune_noise_alpha adds no noise: give "
            "zo_train_mode=True, which leaves dropout on too, or leave it out"
        )
    if hasattr(type(trainer), "_generate_and_score_completions"):
        raise TypeError(
            f"{name}: ZOMixin replaces the training_step by which this trainer paces what it "
            "generates; mix it into trainers whose compute_loss is all there is to a step"
        )


def _check_accelerator(trainer: Trainer) -> None:
    # accelerate launch may have chosen what the arguments do not say.
    name, accelerator = type(trainer).__name__, trainer.accelerator
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(f"{name} works without DeepSpeed and FSDP: the parameters must be whole")
    if accelerator.scaler is not None:
        raise ValueError(f"{name} does not take mixed_precision='fp16': take 'bf16'")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{name} trains on one GPU a process, not on {trainer.args.n_gpu}: start a process for "
            "each with torchrun --nproc-per-node, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    is_sharded = getattr(trainer.model, "is_distributed_loading_by_transformers", False)
    sizes = trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()
    if is_sharded or max(sizes) > 1:
        raise ValueError(
            f"{name} shares batches among its processes, not the model or a sequence: leave "
            "shards and tensor, context and sequence parallelism out"
        )
    if accelerator.num_processes > 1 and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{name} needs torch.distributed for {accelerator.num_processes} processes, and "
            f"{accelerator.distributed_type} is without"
        )


def _check_optimizer(trainer: Trainer, optimizer: Any) -> None:
    if not isinstance(optimizer, ZOOptimizer):
        raise TypeError(
            f"{type(trainer).__name__} needs a zokern.ZOOptimizer such as zokern.MeZO, not "
            f"{type(optimizer).__name__}; optimizers with gradients need no ZOMixin"
        )
    ranks, processes = optimizer._ranks, trainer.accelerator.num_processes
    if ranks.size != processes:
        raise ValueError(
            f"{type(trainer).__name__} runs in {processes} processes, and the optimizer knows of "
            f"{ranks.size}: give it process_group=torch.distributed.group.WORLD"
        )
    if processes > 1 and ranks.parallel != "data":
        raise ValueError(
            f"{type(trainer).__name__} gives each process batches of its own, and "
            f"parallel={ranks.parallel!r} needs one batch for all: take parallel='data'"
        )


def _take_over_weights(model: nn.Module) -> None:
    """Rank 0's weights and buffers on all ranks, as DistributedDataParallel does it."""
    for tensor in (*model.parameters(), *model.buffers()):
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, 0)
        tensor.detach().copy_(whole)
