"""Code that all examples share: their options, the training with the callbacks, and the report at the end."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_gendiag import CollapseStopping, CollapseWarning, Monitor


def options_parser(
    description: str, faults: Sequence[str], epochs: int = 40, start: int = 20
) -> argparse.ArgumentParser:
    """Returns a parser of the options that all examples have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--fault", choices=faults, help="plant a fault in the middle of the run")
    parser.add_argument("--start", type=int, default=start, help="epoch at which the fault begins")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that TensorBoard reads")
    return parser


def seeded(seed: int) -> None:
    """Seeds all random number generators, so that the model and the run are reproducible."""
    seed_everything(seed, verbose=False)


def monitored_run(
    name: str,
    model: LightningModule,
    data: DataLoader[Any],
    monitors: Sequence[Monitor[Any, Any]],
    options: argparse.Namespace,
) -> CollapseStopping:
    """Trains on the CPU with the monitors and ``CollapseStopping``, prints how the run ended, and returns the stopper."""
    # the data are in memory, where Lightning's advice on workers does not help
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    stopping = CollapseStopping()
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        callbacks=[*monitors, stopping],
        logger=TensorBoardLogger(options.runs, name=f"{name}_{options.fault or 'healthy'}"),
        log_every_n_steps=10,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        # the alarms are printed below
        warnings.simplefilter("ignore", CollapseWarning)
        trainer.fit(model, data)

    print()
    if stopping.alarms:
        ended = f"stopped in epoch {stopping.stopped_epoch}" if stopping.stopped_epoch else "ran to its end"
        print(f"The run {ended}. Alarms:")
        for alarm in stopping.alarms:
            print(f"  {alarm.message}")
    else:
        print(f"The run ended after {trainer.current_epoch} epochs. {stopping.report(trainer)['summary']}")
    return stopping


def print_next_steps(name: str, options: argparse.Namespace, planted: str) -> None:
    """Prints which fault was planted, how to train the other run, and how to open both in TensorBoard."""
    if options.fault:
        print(f"A fault was planted from epoch {options.start} on: {planted}.")
        print(f"To train without the fault: .venv/bin/python -m example_models.{name}")
    else:
        print(
            f"To train with a fault:      .venv/bin/python -m example_models.{name} --fault ...   (--help lists them)"
        )
    print(f"To open TensorBoard:        .venv/bin/tensorboard --logdir {options.runs}   (see GenDiag)")
