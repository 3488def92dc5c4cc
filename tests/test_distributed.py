"""Compares two processes with one: every metric, every monitor, and a run that is stopped."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers.cases import all_cases
from tests.helpers.metrics import close, filled

SPLITS = {
    "even": lambda index, rank: index % 2 == rank,
    "uneven": lambda index, rank: (index % 5 == 0) == bool(rank),
    "idle": lambda index, rank: rank == 0,
    "idle first": lambda index, rank: rank == 1,
}


def child(rank: int, folder: str) -> None:
    """Saves the results of one rank, and exits at once, since gloo sometimes aborts when the interpreter ends."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        report: Any = {}
        for name, case in all_cases().items():
            for split, mine in SPLITS.items():
                metric = filled(case, [u for i, u in enumerate(case.updates) if mine(i, rank)])
                metric.compute_with_cache = False
                result = tuple(metric.compute())
                # each process has its own rows again after a synchronization, so that a second one gives the same result
                report[name, split] = (result, tuple(metric.compute()))
                with metric.sync_context():
                    assert torch.equal(metric.configuration, case.make().configuration)
    except Exception:
        report = traceback.format_exc()
    torch.save(report, f"{folder}/report_{rank}.pt")
    os._exit(0)


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    processes = [context.Process(target=child, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for rank in range(2):
        report = torch.load(tmp_path / f"report_{rank}.pt", weights_only=True)
        assert isinstance(report, dict), report
        for name, case in all_cases().items():
            expected = tuple(filled(case).compute())
            for split in SPLITS:
                for result in report[name, split]:
                    close(result, expected, case.tolerance)


@pytest.mark.parametrize("fault", ["frozen"])
def test_two_processes_stop_together_and_name_the_region(tmp_path: Path, fault: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_PORT": str(port), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_on_two", str(tmp_path), fault],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    reports = [tmp_path / f"report_{rank}.pt" for rank in range(2)]
    assert all(path.exists() for path in reports), done.stderr[-3000:]
    one, two = (torch.load(path, weights_only=True) for path in reports)
    assert one == two
    assert [alarm["label"] for alarm in one["alarms"]] == ["bottom right"]
    assert one["epoch"] < 29
    alone = subprocess.run(
        [sys.executable, "-m", "tests.run_on_two", str(tmp_path / "alone"), fault, "1"],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    path = tmp_path / "alone" / "report_0.pt"
    assert path.exists(), alone.stderr[-3000:]
    single = torch.load(path, weights_only=True)
    assert single["epoch"] == one["epoch"]
    for where, value in single["observations"].items():
        assert value == pytest.approx(one["observations"][where], abs=1e-6)


def test_all_monitors_give_the_same_scalars_on_one_and_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_PORT": str(port), "PYTHONPATH": str(Path(__file__).parent.parent)}
    reports = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = subprocess.run(
            [sys.executable, "-m", "tests.all_on_two", str(folder), str(processes)],
            env=environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        paths = [folder / f"report_{rank}.pt" for rank in range(processes)]
        assert all(path.exists() for path in paths), done.stderr[-3000:]
        reports += [torch.load(path, weights_only=True) for path in paths]
    assert set(reports[0]) >= {"cms", "generation_balance", "latent_regions", "posterior_kl", "regional_primitives"}
    for other in reports[1:]:
        for name, scalars in reports[0].items():
            assert other[name] == pytest.approx(scalars, abs=1e-6, rel=1e-6, nan_ok=True), name
