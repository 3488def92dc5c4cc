"""The only place that touches private names of Lightning and torch; each use says what is missing in public."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

SHARDED = ("FSDPStrategy", "ModelParallelStrategy")
"""Strategies under which one process does not hold the whole module; of DeepSpeed's stages this is the third."""


def is_kind(value: object, *names: str) -> bool:
    """Returns whether an object is of a class with one of these names, of ``lightning`` or of ``pytorch_lightning``."""
    return is_a(type(value), *names)


def is_a(kind: type, *names: str) -> bool:
    """Returns whether a class is one with one of these names, or is derived from it."""
    return any(base.__name__ in names for base in kind.__mro__)


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Returns the callbacks of a trainer, for reading only."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def sharded_by(trainer: Trainer, module: nn.Module) -> str | None:
    """Returns what lets one process hold a part of the module only: a strategy, or FSDP2; None where it holds all."""
    strategy: Any = trainer.strategy
    if is_kind(strategy, *SHARDED) or (
        is_kind(strategy, "DeepSpeedStrategy") and getattr(strategy, "zero_stage_3", True)
    ):
        return type(strategy).__name__
    # a tensor of this kind can be made only where one of these is loaded, the second before torch 2.5
    places = (sys.modules.get(name) for name in ("torch.distributed.tensor", "torch.distributed._tensor"))
    kinds = tuple(kind for place in places if (kind := getattr(place, "DTensor", None)) is not None)
    if kinds and any(isinstance(parameter, kinds) for parameter in module.parameters()):
        return "FSDP2 or tensor parallelism"
    return None


def batch_step(trainer: Trainer, epoch_over: bool) -> int:
    """Returns the step that ``self.log`` writes at: the number of batches that led to an optimizer step.

    ``trainer.global_step`` counts the steps of all optimizers, so it is another axis.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped) - int(epoch_over)


def has_stepped(trainer: Trainer) -> bool:
    """Returns whether the batch that ends has led to an optimizer step, and not only to accumulated gradients."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def gradient_scale(trainer: Trainer, optimizer: torch.optim.Optimizer) -> float:
    """Returns the factor by which gradients are still multiplied when an optimizer is about to step.

    With ``precision="16-mixed"``, Lightning has divided them by it, except for fused optimizers, which do it in their step.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    handled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and handled else 1.0


def parts_of_nflows(flow: Any) -> tuple[Any, Any]:
    """Returns the transform and the distribution of a flow of nflows, which have no public names; None where it has none."""
    return getattr(flow, "_transform", None), getattr(flow, "_distribution", None)


# ---- logging ----


def is_board(experiment: object) -> bool:
    """Returns whether what a logger writes with is torch's writer for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    return isinstance(experiment, SummaryWriter)


def file_writer(writer: Any) -> Any:
    """Returns what a ``SummaryWriter`` writes summaries with, since its public methods take known kinds of data only."""
    return writer._get_file_writer()


def log_metrics(logger: Any, values: Mapping[str, float], step: int) -> None:
    """Logs numbers; to Lightning's ``TensorBoardLogger`` all in one record.

    Its writer's queue holds ten records, for which training would wait if there were one for each number.
    """
    own = next((kind for kind in type(logger).__mro__ if "log_metrics" in vars(kind)), object)
    if own.__name__ != "TensorBoardLogger" or not is_board(logger.experiment):
        logger.log_metrics(values, step=step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
    numbers = [Summary.Value(tag=prefix + name, simple_value=value) for name, value in values.items()]
    file_writer(logger.experiment).add_summary(Summary(value=numbers), step)


def log_values(module: LightningModule, values: Mapping[str, float]) -> None:
    """Writes numbers to ``trainer.callback_metrics``, where ``ModelCheckpoint`` and other callbacks look for them.

    ``self.log`` takes a third of a millisecond for each number, a module may override it, and it resets what the user has
    logged in the same hook; to read the public dictionary would compute the user's own metrics.
    """
    if module.trainer.barebones:
        return
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    for name, value in values.items():
        module.trainer._logger_connector._callback_metrics[name] = torch.tensor(
            value, device=module.device, dtype=dtype
        )


OURS = ("lightning", "pytorch_lightning", "lightning_gendiag")
"""Packages whose callbacks keep no generators."""


def owners_beside(trainer: Trainer) -> list[Any]:
    """Returns what a module may reach through its trainer and what may keep generators: data, and the user's callbacks."""
    own = (c for c in callbacks_of(trainer) if type(c).__module__.partition(".")[0] not in OURS)
    return [getattr(trainer, "datamodule", None), trainer.train_dataloader, trainer.val_dataloaders, *own]


class TrainerView:
    """What a copy of a module sees as its trainer: everything can be read; nothing is logged, stopped or changed.

    Optimizers, schedulers, callbacks and the datamodule are stand-ins, made when they are first asked for.

    Args:
        trainer: The trainer.
        module: The copy.
        trained: What it is a copy of.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, trained: nn.Module) -> None:
        vars(self).update(
            _gendiag_trainer=trainer, _gendiag_trained=trained, should_stop=trainer.should_stop, logger=None, loggers=[],
            _results=None, model=module, lightning_module=module, strategy=StrategyView(trainer, self),
            save_checkpoint=_silent,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        held = getattr(vars(self)["_gendiag_trainer"], name)
        if name in ("optimizers", "lr_scheduler_configs"):
            vars(self).update(self._stepping())
        elif name in ("callbacks", "datamodule"):
            twins = [stand_in(one, trainer=self) for one in (held if name == "callbacks" else [held])]
            vars(self)[name] = twins if name == "callbacks" else twins[0]
        else:
            return held
        return vars(self)[name]

    def _stepping(self) -> dict[str, list[Any]]:
        """Stand-ins of optimizers, which have the weights of the copy, and of the schedulers of these."""
        trainer, trained = vars(self)["_gendiag_trainer"], vars(self)["_gendiag_trained"]
        weights = dict(zip(map(id, trained.parameters()), self.model.parameters(), strict=False))
        optimizers = {id(one): stand_in(one, zero_grad=_silent) for one in trainer.optimizers}
        for optimizer in optimizers.values():
            optimizer.param_groups = [
                {**group, "params": [weights.get(id(weight), weight) for weight in group["params"]]}
                for group in optimizer.param_groups
            ]
            # to look up a weight adds it
            optimizer.state = defaultdict(
                dict, {weights.get(id(w), w): {**held} for w, held in optimizer.state.items()}
            )
        configs = []
        for config in trainer.lr_scheduler_configs:
            optimizer = optimizers.get(id(getattr(config.scheduler, "optimizer", None)))
            configs.append(stand_in(config, scheduler=stand_in(config.scheduler, optimizer=optimizer)))
        return {"optimizers": list(optimizers.values()), "lr_scheduler_configs": configs}


class StrategyView:
    """What a copy of a module sees as the strategy of its trainer, which waits for no other process.

    Args:
        trainer: The trainer.
        view: What the copy sees of it.
    """

    def __init__(self, trainer: Trainer, view: TrainerView) -> None:
        vars(self).update(_gendiag_strategy=trainer.strategy, _gendiag_view=view)
        if trainer.world_size > 1:
            vars(self).update(dict.fromkeys(COLLECTIVES, refuse_collective))

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizers", "_optimizers", "_lightning_optimizers"):
            return vars(self)["_gendiag_view"].optimizers
        if name in ("lr_scheduler_configs", "model", "lightning_module"):
            return getattr(vars(self)["_gendiag_view"], name)
        return getattr(vars(self)["_gendiag_strategy"], name)


COLLECTIVES = ("all_gather", "all_reduce", "barrier", "broadcast", "reduce", "reduce_boolean_decision")
"""Methods of strategies for which each process waits for the others."""


def refuse_collective(*args: Any, **kwargs: Any) -> Any:
    """Takes the place of a method that waits for other processes.

    Raises:
        RuntimeError: In any case.
    """
    raise RuntimeError(
        "an evaluation must not wait for other processes, since each draws its own share of the samples, but "
        "self.all_gather, a method of the strategy or a function of torch.distributed was called. To fix this, pass "
        "ModelAdapter(sample=lambda module, n: ...) without it"
    )


SHORT = 256
"""Largest number of items of a container of which a stand-in has its own."""


def stand_in(value: Any, **instead: Any) -> Any:
    """Returns an object that reads as another one does, whose attributes can be set without changing that one.

    It is a shallow copy, with short containers of its own, whose ``step`` does nothing.

    Args:
        value: The object.
        instead: Attributes that it has instead, where the object has them, or methods of the object.
    """
    if not hasattr(value, "__dict__"):
        return value
    twin = object.__new__(type(value))
    own = {
        name: type(held)(held) if type(held) in (dict, list, set) and len(held) <= SHORT else held
        for name, held in vars(value).items()
    }
    vars(twin).update(own, **{name: held for name, held in instead.items() if hasattr(value, name)})
    if hasattr(value, "step"):
        vars(twin)["step"] = _silent
    return twin


def be_silent(module: LightningModule, trainer: Trainer, trained: nn.Module) -> None:
    """Gives a copy of a module, and those in it, a trainer to read from, and lets what acts on the run do nothing."""
    view = TrainerView(trainer, module, trained)
    for part in module.modules():
        if is_kind(part, "LightningModule"):
            vars(part).update(dict.fromkeys(ACTING, _silent), _trainer=view)


ACTING = ("log", "log_dict", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
"""Methods by which a module acts on the run."""


def _silent(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a method that must do nothing."""


# ---- weights ----


def averaging_of(trainer: Trainer) -> Any | None:
    """Returns Lightning's ``WeightAveraging`` callback, or None."""
    return next((c for c in callbacks_of(trainer) if is_kind(c, "WeightAveraging")), None)


def average_model(averaging: Any) -> nn.Module | None:
    """Returns the averaged model of a ``WeightAveraging`` callback; None before training starts."""
    model: nn.Module | None = averaging._average_model
    return model


def load_average(average: nn.Module, module: nn.Module) -> None:
    """Copies averaged parameters and buffers into a copy of the module, as Lightning does before validation."""
    inner: Any = average.module
    with torch.no_grad():
        pairs = zip(_tensors(inner), _tensors(module), strict=False)
        for averaged, current in pairs:
            current.data.copy_(averaged.data)


def swap_average(averaging: Any, module: LightningModule) -> None:
    """Swaps the weights of a module with the averaged ones in place, where no copy can be made."""
    averaging._swap_models(module)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


# ---- the parts of a module ----


def own_tensors(part: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns a module's own parameters, buffers and children, as the dictionaries that it keeps them in."""
    return part._parameters, part._buffers, part._modules


PLAIN_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Names of the attributes that every module has, of which most are empty dictionaries of its own."""


COMPILED_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""Methods that Lightning replaces on the module itself where all of it was compiled."""


def skipped_attributes(part: nn.Module) -> tuple[str, ...]:
    """Returns attributes that a copy must not have: compiled calls, which are bound to the module that is trained."""
    compiled = COMPILED_STEPS if vars(part).get("_compiler_ctx") is not None else ()
    return ("_compiled_call_impl", "_trainer", "_fabric", "_compiler_ctx", *compiled)


def unset_attributes(part: nn.Module) -> dict[str, None]:
    """Returns those of them that must exist all the same, and their value."""
    return {
        name: None for name in ("_trainer", "_fabric", "_compiler_ctx", "_compiled_call_impl") if name in vars(part)
    }


def uncompiled(part: nn.Module) -> nn.Module:
    """Returns what a module was compiled from, or the module itself."""
    # not by getattr, which a wrapper may pass on to what it wraps
    inner = vars(part).get("_modules", {}).get("_orig_mod")
    return part if inner is None else inner


def without_compiling() -> AbstractContextManager[Any]:
    """Runs compiled functions as they are: other sizes would make them compile anew, and training with other numbers."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


@contextmanager
def forward_mode_uncompiled() -> Iterator[None]:
    """Lets forward mode begin without rules that torch otherwise compiles when it is first used, in 0.1 to 0.3 s.

    Only the backward passes of normalizations need these rules, which a module may run within its forward pass. Without the
    rules, they raise the error of operations that have no derivative. There is no public way to leave the rules out.
    """
    if "torch._decomp.decompositions_for_jvp" in sys.modules or not hasattr(forward_ad, "_maybe_load_decompositions"):
        yield
        return
    load = forward_ad._maybe_load_decompositions
    forward_ad._maybe_load_decompositions = _silent
    try:
        yield
    finally:
        forward_ad._maybe_load_decompositions = load


# ---- callbacks that monitor our keys ----


class Follower(NamedTuple):
    """A callback of Lightning's that acts on fresh evaluations only."""

    key: str
    act: Callable[[Trainer], None] | None
    """What it does after an evaluation, where it is not called after all monitors by itself."""
    lacks_checkpoint: Callable[[], bool]
    """Whether it is to save checkpoints and has saved none."""
    undo: Callable[[], None]
    """Lets it go on as it was."""


def following(callback: Any, prefix: str, is_fresh: Callable[[str], bool]) -> Follower | None:
    """Lets a ``ModelCheckpoint`` or an ``EarlyStopping`` that monitors our keys act on fresh evaluations only.

    Lightning keeps the last value of a key for ever and has no way to say that an epoch had none, so a rare key would be
    chosen, saved and counted again and again. A checkpoint that is saved once an epoch is saved right after evaluations, which
    may take place within epochs only; a stopper, which Lightning may call before the monitors, is called after them.

    Args:
        callback: Any callback of the trainer.
        prefix: Of our keys.
        is_fresh: From a key to whether it was evaluated for the weights that the module has now.

    Returns:
        How it follows; None for a callback that monitors other keys.
    """
    key = getattr(callback, "monitor", None)
    if not (isinstance(key, str) and key.startswith(prefix)):
        return None
    if is_kind(callback, "EarlyStopping"):
        act = callback._run_early_stopping_check
        vars(callback)["_run_early_stopping_check"] = _silent
        return Follower(key, act, lambda: False, lambda: vars(callback).pop("_run_early_stopping_check", None))
    if not is_kind(callback, "ModelCheckpoint"):
        return None
    save, when, end_batch = (
        callback._save_topk_checkpoint,
        callback._save_on_train_epoch_end,
        callback.on_train_batch_end,
    )

    def save_if_fresh(*args: Any) -> None:
        if is_fresh(key):
            save(*args)

    def end_batch_and_save(trainer: Trainer, module: LightningModule, *args: Any, **kwargs: Any) -> None:
        end_batch(trainer, module, *args, **kwargs)
        # in its own turn, so that the other callbacks have ended the batch as well; the epoch's last batch waits for
        # validation, whose numbers may be in the name of the file
        if is_fresh(key) and not trainer.is_last_batch:
            callback.on_train_epoch_end(trainer, module)

    def undo() -> None:
        vars(callback).pop("_save_topk_checkpoint", None)
        vars(callback).pop("on_train_batch_end", None)
        callback._save_on_train_epoch_end = when

    vars(callback).update(_save_topk_checkpoint=save_if_fresh, on_train_batch_end=end_batch_and_save)
    callback._save_on_train_epoch_end = True
    return Follower(key, None, lambda: callback.save_top_k != 0 and not callback.best_model_path, undo)
