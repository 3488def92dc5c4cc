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
from tests.helpers.versions import needs_fsdp2

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


def reports(script: str, folder: Path, *arguments: str, processes: int) -> list[Any]:
    """Runs a script of this package, and returns what each of its processes saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_PORT": str(port), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{script}", str(folder), *arguments, str(processes)],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    paths = [folder / f"report_{rank}.pt" for rank in range(processes)]
    assert all(path.exists() for path in paths), done.stderr[-3000:]
    return [torch.load(path, weights_only=True) for path in paths]


@pytest.mark.parametrize("fault", ["frozen"])
def test_two_processes_stop_together_and_name_the_region(tmp_path: Path, fault: str) -> None:
    one, two = reports("run_on_two", tmp_path, fault, processes=2)
    assert one == two
    assert [alarm["label"] for alarm in one["alarms"]] == ["bottom right"]
    assert one["epoch"] < 29
    (single,) = reports("run_on_two", tmp_path / "alone", fault, processes=1)
    assert single["epoch"] == one["epoch"]
    for where, value in single["observations"].items():
        assert value == pytest.approx(one["observations"][where], abs=1e-6)


def test_all_monitors_give_the_same_scalars_on_one_and_two_processes(tmp_path: Path) -> None:
    (single,) = reports("all_on_two", tmp_path / "1", processes=1)
    assert set(single) >= {
        "codebook",
        "cms",
        "generation_balance",
        "latent_regions",
        "posterior_kl",
        "regional_primitives",
    }
    for other in reports("all_on_two", tmp_path / "2", processes=2):
        for name, scalars in single.items():
            assert other[name] == pytest.approx(scalars, abs=1e-6, rel=1e-6, nan_ok=True), name


def test_two_processes_watch_all_training_data_and_agree_on_what_moved(tmp_path: Path) -> None:
    (single,) = reports("data_on_two", tmp_path / "1", processes=1)
    one, two = reports("data_on_two", tmp_path / "2", processes=2)
    assert one == two
    for report in (single, one):
        ((epoch, message),) = report["alarms"]
        assert epoch == 2
        assert message.startswith("class 3 has not been in the last 1,0")
        # what Lightning and torchmetrics have to say about our numbers would be wrong
        assert report["warned"] == []
    for name in ("class_distance", "low", "high", "moved_classes", "invalid"):
        # the sampler of two processes repeats one image where they do not divide evenly
        assert one["scalars"][name] == pytest.approx(single["scalars"][name], abs=2e-3), name


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one process, and then each of two, report of flows that invert themselves or not."""
    folder = tmp_path_factory.mktemp("flows")
    return [r for n in (1, 2) for r in reports("flow_on_two", folder / str(n), processes=n)]


class TestFlows:
    @pytest.mark.parametrize("fault", ["", "shift", "sign"])
    def test_the_inverse_and_the_volume_of_a_flow_are_the_same_on_one_and_two_processes(
        self, flows: list[Any], fault: str
    ) -> None:
        single, one, two = (report[fault] for report in flows)
        assert one == two
        # layers are judged by the worst rows of each process, which are others on two
        whole = {name for name in single["scalars"] if not name.startswith("layer_")}
        assert whole == {"data_error", "latent_error", "noise_error", "invalid", "condition", "log_det_error"}
        for name in whole:
            assert one["scalars"][name] == pytest.approx(single["scalars"][name], rel=1e-4, abs=1e-6), name

    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            ("shift", ("does not return data that it encodes", "self.layers.2 (FaultyCoupling) alone has an error")),
            ("sign", ("the log-determinant of self.layers.2 (FaultyCoupling) is wrong",)),
        ],
    )
    def test_the_layer_of_a_flow_is_named_on_one_and_two_processes(
        self, flows: list[Any], fault: str, words: tuple[str, ...]
    ) -> None:
        for report in flows:
            epoch, message = report[fault]["alarms"][0]
            # the third evaluation confirms it
            assert epoch == 2
            assert all(word in message for word in words)
            assert report[""]["alarms"] == []

    def test_both_processes_add_their_rows_to_the_layers(self, flows: list[Any]) -> None:
        for report in flows:
            errors = {
                name: value for name, value in report["shift"]["scalars"].items() if name.startswith("layer_error")
            }
            assert len(errors) == 6
            assert [name for name, value in errors.items() if value > 1e-4] == ["layer_error_2"]


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one process, and then each of two, report of models that the two see differently."""
    folder = tmp_path_factory.mktemp("ways")
    return [r for n in (1, 2) for r in reports("ways_on_two", folder / str(n), processes=n)]


class TestWays:
    @pytest.mark.parametrize("case", ["reconstructions", "labels"])
    def test_uneven_data_and_labels_give_the_same_scalars_on_one_and_two_processes(
        self, ways: list[Any], case: str
    ) -> None:
        single, *both = ways
        for report in both:
            assert report[case] == pytest.approx(single[case], abs=1e-6, rel=1e-5, nan_ok=True)

    def test_a_way_that_fails_on_one_process_is_used_on_none(self, ways: list[Any]) -> None:
        assert [report["way"] for report in ways[1:]] == ["self.forward from normal noise (n, 4)"] * 2

    def test_the_prior_of_a_sampler_that_fails_on_one_process_is_known_on_none(self, ways: list[Any]) -> None:
        expected = ("reconstructions", False, "self.decode of self.encode(images)")
        assert [report["source"] for report in ways[1:]] == [expected] * 2

    def test_a_sampler_that_the_user_names_and_that_fails_on_one_process_is_left_out_with_the_reason(
        self, ways: list[Any]
    ) -> None:
        _, one, two = ways
        assert one["named"] == two["named"]
        attached, reason = one["named"]
        assert "cms" not in attached
        assert "self.sample(n) fails (RuntimeError: a file is missing)" in reason

    @pytest.mark.parametrize("name", ["Gathering", "Waiting", "Reducing"])
    def test_a_sampler_that_waits_for_other_processes_is_left_out_and_training_is_the_same(
        self, ways: list[Any], name: str
    ) -> None:
        for report in ways[1:]:
            reason, together, alone = report[name]
            assert "an evaluation must not wait for other processes" in reason
            assert all(map(torch.equal, together, alone))

    @needs_fsdp2
    def test_a_sharded_module_is_left_out_with_one_reason_and_trains_as_without(self, ways: list[Any]) -> None:
        for report in ways[1:]:
            attached, left_out = report["sharded"]
            # it needs no module
            assert attached == ["training_data"]
            assert len(left_out) == 12
            assert set(left_out.values()) == {report["refused"]}
            assert all(map(torch.equal, report["with"], report["without"]))

    @needs_fsdp2
    def test_one_monitor_refuses_a_sharded_module_before_training(self, ways: list[Any]) -> None:
        _, one, two = ways
        assert one["refused"] == two["refused"]
        assert "sharded by ModelParallelStrategy" in one["refused"]

    @needs_fsdp2
    def test_sharded_parameters_are_known_under_any_strategy(self, ways: list[Any]) -> None:
        assert [report["sharded by"] for report in ways[1:]] == ["FSDP2 or tensor parallelism"] * 2
