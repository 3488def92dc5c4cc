"""Trainers, data, and what tests do around a run."""

from __future__ import annotations

import random
import warnings
from inspect import signature
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import (
    ModelAdapter,
)
from lightning_gendiag.model.adapters.base import Need
from lightning_gendiag.model.subject import Subject
from lightning_gendiag.model.view import ModelView
from tests.helpers.models import TinyGAN


def batches(size: int = 8, n: int = 64, batch_size: int = 16, shuffle: bool = True) -> DataLoader[Any]:
    images, labels = digits(size)
    return DataLoader(TensorDataset(images[:n], labels[:n]), batch_size=batch_size, shuffle=shuffle)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*available but not used.*")
        return Trainer(callbacks=list(callbacks), **options)


def loading(weights_only: bool = True) -> dict[str, Any]:
    """Returns how ``Trainer.fit`` loads a checkpoint; Lightning before 2.6 cannot be asked to load plain values only."""
    return {"weights_only": weights_only} if "weights_only" in signature(Trainer.fit).parameters else {}


class Numbers(Callback):
    """Records the scalars of the diagnostics in ``callback_metrics`` after each epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.rows.append({key: float(v) for key, v in trainer.callback_metrics.items() if key.startswith("gendiag")})


def state_after_training(*callbacks: Any, module: Any = TinyGAN, size: int = 8) -> list[Any]:
    seed_everything(3, verbose=False)
    model = module()
    own = trainer(*callbacks, max_epochs=3)
    own.fit(model, batches(size))
    optimizers = [optimizer.state_dict()["state"] for optimizer in own.optimizers]
    return [
        model.state_dict(),
        optimizers,
        [part.training for part in model.modules()],
        [parameter.grad for parameter in model.parameters()],
        torch.get_rng_state(),
        torch.tensor([random.random(), np.random.rand()]),
    ]


def attached(module: LightningModule, adapter: ModelAdapter, needs: tuple[Need, ...] = ("sample",)) -> ModelView:
    own = trainer()
    own.strategy.connect(module)
    view = ModelView(adapter, Subject(module, own), own)
    view.attach()
    view.find(*needs)
    return view
