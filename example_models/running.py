"""What all examples do around their model: options, a trainer with the callbacks, and a verdict in words."""

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
    """Options that all examples have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--fault", choices=faults, help="break something in the middle of the run")
    parser.add_argument("--start", type=int, default=start, help="epoch at which it breaks")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that TensorBoard reads")
    return parser


def seeded(seed: int) -> None:
    """Seed everything, before the model is made."""
    seed_everything(seed, verbose=False)


def watched_run(
    name: str, model: LightningModule, data: DataLoader[Any], monitors: Sequence[Monitor], options: argparse.Namespace
) -> CollapseStopping:
    """Train with the monitors and a stopper attached, on the CPU, and print how it ended."""
    # advice on workers and on other products does not help with data that is in memory
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
        # told below
        warnings.simplefilter("ignore", CollapseWarning)
        trainer.fit(model, data)

    print()
    if stopping.findings:
        print(f"STOPPED in epoch {stopping.findings[0].epoch}:")
        for finding in stopping.findings:
            print(f"  {finding}")
    else:
        print(f"HEALTHY: {trainer.current_epoch} epochs, and nothing fell from its level.")
    return stopping


def closing_words(name: str, options: argparse.Namespace, planted: str) -> None:
    """What was planted, how to see the other run, and how to look at both."""
    if options.fault:
        print(f"The fault was planted: {planted}, from epoch {options.start} on.")
        print(f"The run without it:  .venv/bin/python -m example_models.{name}")
    else:
        print(f"A run with a fault:  .venv/bin/python -m example_models.{name} --fault ...   (--help names them)")
    print(f"TensorBoard:         .venv/bin/tensorboard --logdir {options.runs}   (look at Images and Custom Scalars)")
