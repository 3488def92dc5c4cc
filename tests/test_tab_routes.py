"""The routes of the TensorBoard tab on both back ends, how it is loaded, and what the wheel holds."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import textwrap
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.plugins import base_plugin
from torch.utils.tensorboard import SummaryWriter

import lightning_gendiag
from lightning_gendiag.tensorboard import loader, plugin, records, runs
from tests.helpers.tab_servers import BACK_ENDS, TabServer
from tests.tab_runs import NOBODY, REGIONS, Run, labels, sheet

ROOT = Path(lightning_gendiag.__file__).parent.parent
FRAMES = {
    "cms", "codebook", "generation_balance", "k_star", "latent_regions", "manifold_entropy", "memorization",
    "regional_primitives",
}  # fmt: skip
"""Monitors of the synthetic runs that have frames."""

Serve = Callable[..., TabServer]


def write_run(folder: Path, **options: Any) -> None:
    Run(folder, **options).writer.close()


def packed(*parts: Any) -> list[bytes]:
    """Returns a record of fields, arrays and pictures as byte strings."""
    return records.packed(records.Record(*parts))


def write_record(writer: SummaryWriter, tag: str, step: int, parts: list[bytes]) -> None:
    writer._get_file_writer().add_summary(records.summary(tag, parts), step)


def values_record(number: int, values: dict[str, Any], step: int | None = None) -> list[bytes]:
    step = 10 * number if step is None else step
    return packed({"step": step, "epoch": 0, "number": number, "averaged": False, "values": values, "extra": {}})


def age(folder: Path) -> None:
    """Gives the event files of a folder names that sort before those of files that are still to be written."""
    for number, path in enumerate(sorted(folder.glob("events.out.tfevents.*"))):
        path.rename(folder / f"events.out.tfevents.{number:010}.before")


def raw_record(header: Any) -> list[bytes]:
    return [zlib.compress(json.dumps(header).encode())]


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that no test changes: one that breaks, two without faults, and one with a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "version_10")
    write_run(folder / "version_2", evaluations=12, broken_at=None)
    write_run(folder / NOBODY, evaluations=3)
    return folder


@pytest.fixture(scope="module", params=BACK_ENDS)
def server(request: pytest.FixtureRequest, logdir: Path) -> Iterator[TabServer]:
    served = TabServer(logdir, request.param)
    yield served
    served.close()


@pytest.fixture(params=BACK_ENDS)
def serve(request: pytest.FixtureRequest) -> Iterator[Serve]:
    """Starts TensorBoard's application on a folder."""
    started = []

    def start(folder: Path, **options: Any) -> TabServer:
        started.append(TabServer(folder, request.param, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def serve_python(folder: Path) -> TabServer:
    return TabServer(folder, "python")


def test_tensorboard_enables_the_tab_where_there_are_records(server: TabServer) -> None:
    listing = server.listing()
    assert (listing["enabled"], listing["tab_name"]) == (True, "GenDiag")
    assert listing["loading_mechanism"] == {"type": "IFRAME", "module_path": "/data/plugin/gendiag/index.js"}


def test_runs_are_in_natural_order_with_state_step_and_alarms(server: TabServer) -> None:
    reply = server.json("runs")
    assert reply["note"] == ""
    assert [
        (run["run"], run["state"], run["step"], run["alarms"]) for run in reply["runs"] if run["run"] != NOBODY
    ] == [("version_2", "healthy", 120, 0), ("version_10", "unhealthy", 600, 1)]
    assert all(FRAMES | {"posterior_kl", "training_data"} == set(run["monitors"]) for run in reply["runs"])
    assert reply["runs"][-1]["summary"].startswith("Unhealthy: bottom right collapsed")


def test_a_run_has_each_diagnostic_with_all_its_series(server: TabServer) -> None:
    reply = server.json("run", run="version_10")
    monitors = reply["monitors"]
    assert {name: one["diagnostic"] for name, one in monitors.items()} == {
        "cms": "CosineMeanSimilarity", "generation_balance": "GenerationBalance", "manifold_entropy": "ManifoldEntropy",
        "posterior_kl": "PosteriorKL", "k_star": "KStar", "latent_regions": "LatentRegions",
        "regional_primitives": "RegionalPrimitives", "training_data": "TrainingData", "codebook": "CodebookUsage",
        "memorization": "Memorization",
    }  # fmt: skip
    for name, one in monitors.items():
        assert one["steps"] == list(range(10, 601, 10))
        assert one["epochs"] == [number // 4 for number in range(1, 61)]
        assert set(one["values"]) == {series["name"] for series in one["series"]}
        assert all(len(values) == 60 for values in one["values"].values())
        drawn = [10 * number for number in range(1, 61) if number <= 20 or number % 5 == 0]
        assert one["frames"] == (drawn if name in FRAMES else [])

    setup = monitors["cms"]["setup"]
    assert setup["labels"] == labels().tolist()
    assert (setup["background"], setup["columns"]) == (4, 8)
    assert [series["name"] for series in monitors["cms"]["series"]] == [*REGIONS, "image"]
    collapsed = monitors["cms"]["values"]["bottom right"]
    assert min(collapsed[20:39]) > 0.9
    assert max(collapsed[39:]) < 0.5
    assert len(monitors["cms"]["extra"]["distance"][7]) == 5
    assert len(monitors["generation_balance"]["extra"]["intervals"][59]) == 10
    assert monitors["generation_balance"]["setup"]["real"] == [0.1] * 10

    setup, extra = monitors["codebook"]["setup"], monitors["codebook"]["extra"]
    assert (setup["sizes"], len(setup["rows"])) == ([60], 60)
    assert [len(line) for line in extra["use"]] == [60] * 60
    assert [seen for (seen,) in extra["seen"]] == [60] * 39 + [30] * 21
    extra = monitors["memorization"]["extra"]
    copies = monitors["memorization"]["values"]["copies"]
    assert all(low <= share <= high for share, (low, high) in zip(copies, extra["interval"], strict=True))
    # surely more samples are copies than real images from soon after the run broke on
    surely = [low > real[2] for (low, _), real in zip(extra["interval"], extra["real"], strict=True)]
    assert surely == [False] * 42 + [True] * 18
    assert extra["images"][-1] == [33, 50]

    report = reply["report"]
    assert report["state"] == "unhealthy"
    assert report["alarms"][0]["indices"] == [3]


def test_the_time_of_a_report_is_exact_although_a_record_has_six_digits_of_a_number(
    serve: Serve, tmp_path: Path
) -> None:
    written = 1_700_001_234.5
    with SummaryWriter(str(tmp_path)) as writer:
        summary = records.summary(records.REPORT, packed({"state": "healthy", "time": written}))
        writer._get_file_writer().add_summary(summary, 10, walltime=written)
    assert serve(tmp_path).json("run", run=".")["report"]["time"] == written


def test_numbers_that_are_not_finite_are_null(server: TabServer) -> None:
    duplicates = server.json("run", run="version_10")["monitors"]["training_data"]["values"]["duplicates"]
    assert duplicates == [0.0, None] * 30


def picture_of(server: TabServer, address: dict[str, Any]) -> np.ndarray:
    response = server.get(address["url"])
    assert response.status_code == 200
    assert response.content_type in ("image/png", "image/jpeg")
    assert "max-age=" in response.headers["Cache-Control"]
    pixels = np.array(Image.open(io.BytesIO(response.data)))
    assert pixels.shape == (address["height"], address["width"])
    return pixels


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether pictures differ by no more than their compression."""
    return bool(np.abs(one.astype(int) - other).mean() < 3)


@pytest.mark.parametrize(
    ("monitor", "fields", "arrays", "pictures"),
    [
        ("cms", set(), {}, {"mean_generated": (28, 28), "samples": (112, 224)}),
        ("generation_balance", {"classes"}, {}, {"classes": (280, 224)}),
        ("manifold_entropy", {"dimensions"}, {"mutual_information": (8, 8)}, {}),
        ("k_star", {"classes", "patterns"}, {"histogram": (10, 20), "rivals": (10, 10)}, {}),
        ("latent_regions", set(), {"points": (300, 2), "classes": (300,), "grey": (300,), "means": (4, 2)}, {}),
        ("regional_primitives", {"names"}, {"curve": (16,)}, {"strip": (28, 168)}),
        ("codebook", {"codes", "dead", "died"}, {"use": (8, 8), "died": (8, 8)}, {}),
        ("memorization", {"numbers", "closeness"}, {}, {"copies": (56, 224)}),
    ],
)
def test_a_frame_has_the_arrays_and_pictures_of_its_diagnostic(
    server: TabServer, monitor: str, fields: set[str], arrays: dict[str, Any], pictures: dict[str, Any]
) -> None:
    frame = server.json("frame", run="version_10", monitor=monitor, step=234)
    assert frame["step"] == 200
    assert fields <= set(frame)
    assert {name: np.shape(array) for name, array in frame["arrays"].items()} == arrays
    numbers = [
        float(x) for array in frame["arrays"].values() for line in array for x in np.ravel(line) if x is not None
    ]
    assert numbers == [float(f"{number:.6g}") for number in numbers]
    assert {name: picture_of(server, one).shape for name, one in frame["pictures"].items()} == pictures


def test_pictures_are_those_that_were_written(server: TabServer) -> None:
    setup = server.json("run", run="version_10")["monitors"]["cms"]["setup"]
    assert alike(picture_of(server, setup["pictures"]["samples_real"]), sheet(4, 8, 0))
    assert (picture_of(server, setup["pictures"]["mean_real"]) == sheet(1, 1, 1)).all()
    frame = server.json("frame", run="version_10", monitor="cms", step=150)
    assert alike(picture_of(server, frame["pictures"]["samples"]), sheet(4, 8, 15))
    assert not alike(picture_of(server, frame["pictures"]["samples"]), sheet(4, 8, 16))


@pytest.mark.parametrize(
    ("asked", "step"), [(0, 10), (10, 10), (19, 10), (200, 200), (249, 200), (250, 250), (10**9, 600)]
)
def test_a_frame_is_the_newest_at_or_before_the_step(server: TabServer, asked: int, step: int) -> None:
    assert server.json("frame", run="version_10", monitor="cms", step=asked)["step"] == step


def test_a_hostile_name_stays_data(server: TabServer) -> None:
    assert NOBODY in [run["run"] for run in server.json("runs")["runs"]]
    response = server.get("run", run=NOBODY)
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.content_type == "application/json"
    frame = server.json("frame", run=NOBODY, monitor="cms", step=30)
    assert "<" not in frame["pictures"]["samples"]["url"]
    assert picture_of(server, frame["pictures"]["samples"]).shape == (112, 224)


@pytest.mark.parametrize(
    ("route", "status"),
    [
        ("run", 400),
        ("run?run=version_10&points=many", 400),
        ("run?run=version_10&points=0", 400),
        ("run?run=version_11", 404),
        ("run?run=..", 404),
        ("frame", 400),
        ("frame?run=version_10&monitor=cms", 400),
        ("frame?run=version_10&monitor=cms&step=last", 400),
        ("frame?run=version_10&monitor=cms&step=" + "9" * 5000, 400),
        ("frame?run=version_11&monitor=cms&step=1", 404),
        ("frame?run=version_10&monitor=other&step=1", 404),
        ("frame?run=version_10&monitor=posterior_kl&step=1", 404),
        ("picture?run=version_10&monitor=cms&step=10", 400),
        ("picture?run=version_10&monitor=cms&name=samples", 400),
        ("picture?run=version_10&monitor=cms&name=samples&step=first", 400),
        ("picture?run=version_10&monitor=cms&name=samples&step=11", 404),
        ("picture?run=version_10&monitor=cms&name=other&step=10", 404),
        ("picture?run=version_10&monitor=cms&name=samples&step=setup", 404),
        ("picture?run=version_10&monitor=other&name=samples&step=setup", 404),
        ("picture?run=version_11&monitor=cms&name=samples&step=10", 404),
        ("nothing", 404),
        ("", 404),
    ],
)
def test_wrong_parameters_are_400_and_unknown_names_404(server: TabServer, route: str, status: int) -> None:
    response = server.get(route)
    assert response.status_code == status
    assert response.content_type.startswith("text/plain")


def test_downsampling_keeps_the_last_evaluation_and_those_of_alarms(server: TabServer) -> None:
    monitors = server.json("run", run="version_10", points=4)["monitors"]
    # 400 is where the alarm began, 410 where it was raised; the others are even
    assert monitors["cms"]["steps"] == [10, 210, 400, 410, 600]
    assert all(one["steps"] == monitors["cms"]["steps"] for one in monitors.values())
    full = server.json("run", run="version_10")["monitors"]["cms"]
    assert monitors["cms"]["values"]["image"] == [
        value for step, value in zip(full["steps"], full["values"]["image"], strict=True) if step in (10, 210, 400, 410, 600)
    ]  # fmt: skip
    assert server.json("run", run="version_10", points=1)["monitors"]["cms"]["steps"] == [400, 410, 600]
    assert len(monitors["cms"]["frames"]) == 28


def test_an_empty_log_directory_is_said_in_words(serve: Serve, tmp_path: Path) -> None:
    served = serve(tmp_path)
    reply = served.json("runs")
    assert reply["runs"] == []
    assert "No run in this log directory" in reply["note"]
    assert not served.listing()["enabled"]


def test_runs_without_records_of_ours_are_left_out(serve: Serve, tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "other")) as writer:
        writer.add_scalar("gendiag/cms/region_0", 1.0, 1)
    served = serve(tmp_path)
    assert served.json("runs")["runs"] == []
    assert served.get("run", run="other").status_code == 404


def test_a_resumed_run_goes_on_where_it_was_resumed(serve: Serve, tmp_path: Path) -> None:
    write_run(tmp_path, evaluations=15, broken_at=12)
    age(tmp_path)
    write_run(tmp_path, evaluations=13, broken_at=None, first=12)
    served = serve(tmp_path)
    (entry,) = served.json("runs")["runs"]
    assert (entry["run"], entry["step"], entry["state"]) == (".", 130, "healthy")
    monitors = served.json("run", run=".")["monitors"]
    for name, one in monitors.items():
        assert one["steps"] == list(range(10, 131, 10))
        assert one["frames"] == (one["steps"] if name in FRAMES else [])
    # the branch that was given up is broken from evaluation 12 on
    assert min(monitors["cms"]["values"]["bottom right"][10:]) > 0.8
    frame = served.json("frame", run=".", monitor="cms", step=150)
    assert frame["step"] == 130
    assert alike(picture_of(served, frame["pictures"]["samples"]), sheet(4, 8, 13))


def test_a_resumed_run_loses_no_evaluation(serve: Serve, tmp_path: Path) -> None:
    write_run(tmp_path, evaluations=60)
    age(tmp_path)
    # the Python back end keeps ten records of a tag
    write_run(tmp_path, evaluations=62, first=41)
    steps = serve(tmp_path).json("run", run=".")["monitors"]["cms"]["steps"]
    assert steps == list(range(10, 621, 10))


def test_a_frame_that_a_resumed_run_did_not_draw_again_is_gone(serve: Serve, tmp_path: Path) -> None:
    def write(numbers: dict[int, int], frames: set[int]) -> None:
        with SummaryWriter(str(tmp_path)) as writer:
            for number, step in numbers.items():
                fields = {"step": step, "epoch": 0, "number": number}
                write_record(
                    writer, records.values_tag("cms", number - 1), step, values_record(number, {"a": 1.0}, step)
                )
                if number in frames:
                    write_record(writer, records.frame_tag("cms", number), step, packed(fields))

    write({1: 10, 2: 20, 3: 30, 4: 40}, {1, 2, 3, 4})
    age(tmp_path)
    # the third evaluation is sooner this time
    write({3: 25, 4: 45}, {3})
    served = serve(tmp_path)
    one = served.json("run", run=".")["monitors"]["cms"]
    assert one["steps"] == [10, 20, 25, 45]
    assert one["frames"] == [10, 20, 25]
    assert served.json("frame", run=".", monitor="cms", step=45)["step"] == 25


@pytest.mark.parametrize(
    "damaged",
    [
        [b"no zlib"],
        [],
        raw_record([1, 2]),
        raw_record({"version": 1, "fields": [], "arrays": [], "pictures": []}),
        raw_record({"version": 1, "fields": {}, "arrays": [["a", "<f4", [3]]], "pictures": []}),
        [*raw_record({"version": 1, "fields": {}, "arrays": [["a", "O", [1]]], "pictures": []}), zlib.compress(b"12345678")],
        raw_record({"version": 1, "fields": {}, "arrays": [], "pictures": [["a", "image/png"]]}),
        [zlib.compress(b"[" * 100_000)],
    ],
    ids=["compression", "empty", "header", "fields", "missing", "objects", "picture", "depth"],
)  # fmt: skip
def test_a_damaged_record_is_left_out_and_counted(tmp_path: Path, damaged: list[bytes]) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for number in (1, 2, 3):
            good = values_record(number, {"a": float(number)})
            write_record(writer, records.values_tag("cms", number - 1), 10 * number, damaged if number == 2 else good)
            frame = packed({"number": number})
            write_record(writer, records.frame_tag("cms", number), 10 * number, damaged if number == 2 else frame)
        write_record(writer, records.REPORT, 30, damaged)
        write_record(writer, records.setup_tag("cms"), 30, damaged)
    served = serve_python(tmp_path)
    (entry,) = served.json("runs")["runs"]
    assert (entry["state"], entry["step"], entry["alarms"]) == ("not judged", 30, 0)
    reply = served.json("run", run=".")
    assert reply["report"] is None
    assert reply["note"].startswith("3 records were left out.")
    assert (reply["monitors"]["cms"]["steps"], reply["monitors"]["cms"]["values"]) == ([10, 30], {"a": [1.0, 3.0]})
    assert served.json("frame", run=".", monitor="cms", step=20)["step"] == 10
    assert served.json("runs")["note"].startswith("4 records were left out.")


def test_records_of_a_newer_version_are_left_out_with_the_way_out(serve: Serve, tmp_path: Path) -> None:
    newer = raw_record({"version": records.VERSION + 1, "fields": {}, "arrays": [], "pictures": []})
    with SummaryWriter(str(tmp_path)) as writer:
        for tag in (
            records.setup_tag("cms"),
            records.values_tag("cms", 0),
            records.frame_tag("cms", 1),
            records.REPORT,
        ):
            write_record(writer, tag, 10, newer)
    served = serve(tmp_path)
    reply = served.json("run", run=".")
    assert reply["monitors"]["cms"]["steps"] == []
    assert served.get("frame", run=".", monitor="cms", step=10).status_code == 404
    assert "update lightning_gendiag" in served.json("runs")["note"]


def test_parts_that_are_missing_are_left_out(serve: Serve, tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        write_record(writer, records.values_tag("cms", 0), 10, values_record(1, {"a": 1.0, "b": 2.0}))
        write_record(writer, records.values_tag("cms", 1), 20, values_record(2, {"a": 3.0}))
        write_record(writer, records.frame_tag("k_star", 1), 10, packed({}, {"rivals": np.float16([[np.nan, 0.1]])}))
    served = serve(tmp_path)
    (entry,) = served.json("runs")["runs"]
    assert (entry["state"], entry["summary"], entry["monitors"]) == ("not judged", "", ["cms", "k_star"])
    reply = served.json("run", run=".")
    assert reply["report"] is None
    cms, k_star = reply["monitors"]["cms"], reply["monitors"]["k_star"]
    assert (cms["diagnostic"], cms["setup"], cms["frames"]) == (None, {}, [])
    assert cms["values"] == {"a": [1.0, 3.0], "b": [2.0, None]}
    assert [series["role"] for series in cms["series"]] == ["record", "record"]
    assert (k_star["steps"], k_star["frames"]) == ([], [10])
    assert served.json("frame", run=".", monitor="k_star", step=99)["arrays"] == {"rivals": [[None, 0.0999756]]}


def test_contents_of_the_wrong_kind_do_no_harm(tmp_path: Path) -> None:
    def with_nan(fields: Any) -> list[bytes]:
        return raw_record({"version": 1, "fields": fields, "arrays": [], "pictures": []})

    with SummaryWriter(str(tmp_path)) as writer:
        setup = {"diagnostic": 3, "series": [7, {"name": 1}, {"name": "a"}], "columns": float("nan")}
        write_record(writer, records.setup_tag("cms"), 0, with_nan(setup))
        write_record(writer, records.values_tag("cms", 0), 10, with_nan({"values": [1], "extra": "x"}))
        write_record(writer, records.values_tag("cms", 1), 20, with_nan({"values": {"a": float("inf"), "b": "<b>"}}))
        write_record(writer, records.REPORT, 20, with_nan({"state": 5, "alarms": [3, {"step": "x"}], "summary": None}))
        page = packed(
            {},
            {"c": np.array([1j]), "a": np.arange(2)},
            {"page": records.Picture(b"<script>alert(1)</script>", "text/html", 1, 1)},
        )
        write_record(writer, records.frame_tag("cms", 1), 10, page)
    served = serve_python(tmp_path)
    assert served.json("runs")["runs"][0]["state"] == "not judged"
    one = served.json("run", run=".", points=1)["monitors"]["cms"]
    assert one["setup"]["columns"] is None
    assert (one["steps"], one["values"]) == ([20], {"a": [None], "b": [None]})
    frame = served.json("frame", run=".", monitor="cms", step=10)
    assert frame["arrays"] == {"a": [0, 1]}
    assert served.get(frame["pictures"]["page"]["url"]).content_type == "application/octet-stream"


def test_a_live_run_grows_and_only_what_is_new_is_read(serve: Serve, tmp_path: Path) -> None:
    run = Run(tmp_path, evaluations=25, broken_at=None)
    served = serve(tmp_path)
    before, (entry,) = served.json("run", run="."), served.json("runs")["runs"]
    assert before["version"] == entry["version"]
    served.provider.tags.clear()
    assert served.json("run", run=".") == before
    assert served.provider.tags == []
    served.json("frame", run=".", monitor="cms", step=250)

    run.evaluate(26)
    run.evaluate(30)
    run.report(30)
    run.writer.close()
    served.reload()
    served.provider.tags.clear()
    # a page may ask for a frame before it asks for the run
    assert served.json("frame", run=".", monitor="cms", step=300)["step"] == 300
    after = served.json("run", run=".")
    assert after["version"] != before["version"]
    assert after["version"] == served.json("runs")["runs"][0]["version"]
    assert {tag for tag in served.provider.tags if "/frame_" not in tag} == {records.REPORT} | {
        records.values_tag(monitor, 25, "1") for monitor in after["monitors"]
    }
    assert after["monitors"]["cms"]["steps"] == [*before["monitors"]["cms"]["steps"], 260, 300]


def test_neighbouring_frames_are_read_at_once(logdir: Path) -> None:
    served = serve_python(logdir)
    served.json("frame", run="version_10", monitor="cms", step=200)
    served.provider.tags.clear()
    for step in (190, 200, 250):
        for monitor in FRAMES:
            served.json("frame", run="version_10", monitor=monitor, step=step)
    assert served.provider.tags == []


def test_runs_that_were_put_away_are_read_again(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "OPEN_RUNS", 1)
    monkeypatch.setattr(runs, "FRAMES_KEPT", 1)
    served = serve_python(logdir)
    first = served.json("run", run="version_10")
    for _ in range(2):
        assert len(served.json("run", run="version_2")["monitors"]["cms"]["steps"]) == 12
        assert served.json("run", run="version_10") == first
        for step in (10, 20):
            assert served.json("frame", run="version_10", monitor="cms", step=step)["step"] == step
    assert len(served.json("runs")["runs"]) == 3


def test_the_tab_works_below_a_path_prefix(serve: Serve, logdir: Path) -> None:
    served = serve(logdir, path_prefix="/proxy/7")
    assert served.listing()["enabled"]
    frame = served.json("frame", run="version_2", monitor="cms", step=50)
    assert picture_of(served, frame["pictures"]["samples"]).shape == (112, 224)
    assert served.get("index.js").status_code == 200


def test_the_files_of_the_page_are_served_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("index.js", "more.js", "page.css", "secret.txt"):
        (tmp_path / name).write_text(f"/* {name} */")
    served = serve_python(tmp_path / "empty")
    assert "render" in served.get("index.js").text
    assert served.get("more.js").status_code == 404

    monkeypatch.setattr(plugin, "STATIC", tmp_path)
    served = serve_python(tmp_path / "empty")
    for name, kind in (("index.js", "text/javascript"), ("more.js", "text/javascript"), ("page.css", "text/css")):
        response = served.get(name)
        assert (response.text, response.mimetype) == (f"/* {name} */", kind)
    for name in ("secret.txt", "../plugin.py", "..%2fplugin.py", "static/index.js", "%2e%2e/runs.py"):
        assert served.get(name).status_code == 404, name


def test_the_chart_library_comes_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    served = serve_python(tmp_path)
    response = served.get("plotly.min.js")
    assert response.mimetype == "text/javascript"
    assert len(response.data) > 1_000_000
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    response = served.get("plotly.min.js")
    assert response.status_code == 404
    assert 'pip install "lightning_gendiag[tab]"' in response.text


@pytest.mark.parametrize("fault", ["import", "constructor"])
def test_a_broken_plugin_is_one_warning(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "import":
        monkeypatch.setitem(sys.modules, plugin.__name__, None)
    context = types.SimpleNamespace() if fault == "constructor" else base_plugin.TBContext()
    monkeypatch.setattr(logging.getLogger("tensorboard"), "propagate", True)
    assert loader.GenDiagLoader().load(context) is None
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("tensorboard", "WARNING")
    assert "The tab GenDiag is not available" in record.getMessage()


def printed_by(code: str, path: Path, *arguments: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *arguments]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=60).stdout)


def test_importing_the_loader_imports_next_to_nothing() -> None:
    loaded = printed_by(
        """
        import json, sys
        import lightning_gendiag.tensorboard.loader
        print(json.dumps(sorted(sys.modules)))
        """,
        ROOT,
    )
    assert "lightning_gendiag.tensorboard.loader" in loaded
    assert not {"torch", "lightning", "torchmetrics", "numpy", "scipy", "PIL", "werkzeug", "plotly"} & set(loaded)
    assert "lightning_gendiag.tensorboard.plugin" not in loaded


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel."""
    builder = pytest.importorskip(
        "hatchling.builders.wheel", reason="hatchling, which builds the wheel, is not installed"
    )
    (built,) = builder.WheelBuilder(str(ROOT)).build(
        directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"]
    )
    return Path(built)


def test_the_wheel_holds_the_page_and_names_the_loader(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        text = archive.read(points).decode()
    files = {path.relative_to(ROOT).as_posix() for path in plugin.STATIC.iterdir() if path.is_file()}
    assert "lightning_gendiag/tensorboard/static/index.js" in files
    assert files <= set(names)
    assert "[tensorboard_plugins]\ngendiag = lightning_gendiag.tensorboard.loader:GenDiagLoader" in text


def test_tensorboard_finds_the_tab_of_the_wheel_without_importing_torch(
    wheel: Path, tmp_path: Path, logdir: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    listing, source, modules = printed_by(
        """
        import json, sys, urllib.request
        from tensorboard import default, program
        board = program.TensorBoard(default.get_plugins())
        board.configure(argv=["tensorboard", "--logdir", sys.argv[1], "--port", "0", "--load_fast", "false"])
        address = board.launch()
        get = lambda path: urllib.request.urlopen(address + path, timeout=20).read().decode()
        listing = json.loads(get("data/plugins_listing"))["gendiag"]
        runs = json.loads(get("data/plugin/gendiag/runs"))
        loaded = [name for name in ("torch", "lightning", "torchmetrics", "plotly") if name in sys.modules]
        import lightning_gendiag
        print(json.dumps([listing, lightning_gendiag.__file__, loaded]))
        """,
        tmp_path,
        str(logdir),
    )
    assert listing["tab_name"] == "GenDiag"
    assert Path(source).is_relative_to(tmp_path)
    assert modules == []


def test_the_page_learns_which_way_a_series_is_worse(serve: Serve, server: TabServer, tmp_path: Path) -> None:
    monitors = server.json("run", run="version_10")["monitors"]
    assert {one["worse"] for one in monitors["cms"]["series"]} == {"down"}
    assert [one["worse"] for one in monitors["generation_balance"]["series"]] == ["down"] * 10 + ["up"]
    assert monitors["cms"]["severities"] == {}
    with SummaryWriter(str(tmp_path)) as writer:
        for number in (1, 2, 3):
            fields = {"step": number, "epoch": 0, "number": number, "values": {"a": 1.0, "b": 2.0}}
            fields["severities"] = {"a": [0.5, None, -0.25][number - 1]}
            write_record(writer, records.values_tag("x", number - 1), number, packed(fields))
    one = serve(tmp_path).json("run", run=".")["monitors"]["x"]
    assert {series["name"]: series["worse"] for series in one["series"]} == {"a": "severe", "b": ""}
    assert one["severities"] == {"a": [0.5, None, -0.25]}
