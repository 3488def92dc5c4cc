"""What an isolated copy of a module costs: ``python -m benchmarks.module_copy``.

Seconds and memory of the first copy, which allocates, and of the next ones, which use its memory again, for the example
GAN and for a module of 100 million parameters; beside ``copy.deepcopy`` in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.benchmark import Timer

from example_models.gan import GAN
from lightning_gendiag.model.copying import copy_module


class Large(LightningModule):
    """100 million parameters in 96 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1021, 1020) for _ in range(96))


def seconds(statement: str, **names: Any) -> float:
    """Returns the median time of a statement."""
    return float(Timer(statement, globals=names).blocked_autorange(min_run_time=1.0).median)


def measured(module: LightningModule) -> dict[str, float]:
    """Returns seconds of copies, and the memory of the one that is kept, in MiB."""
    first = copy_module(module)
    state = {"previous": first}
    again = "state['previous'] = copy_module(module, state['previous'])"
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "first_copy_s": seconds("copy_module(module)", copy_module=copy_module, module=module),
        "next_copy_s": seconds(again, copy_module=copy_module, module=module, state=state),
        "deepcopy_s": seconds("copy.deepcopy(module)", copy=copy, module=module),
        "memory_mib": sum(t.numel() * t.element_size() for t in first.tensors.values()) / 2**20,
    }


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {name: measured(make()) for name, make in {"example GAN": GAN, "100 million": Large}.items()}
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    print(f"{'module':12} {'parameters':>12} {'first copy':>11} {'next copy':>11} {'deepcopy':>11} {'memory':>9}")
    for name, f in figures.items():
        print(
            f"{name:12} {f['parameters']:12,.0f} {f['first_copy_s']:9.4f} s {f['next_copy_s']:9.4f} s "
            f"{f['deepcopy_s']:9.4f} s {f['memory_mib']:5.0f} MiB"
        )


if __name__ == "__main__":
    main()
