"""What is written for the tab of TensorBoard during training."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from example_models.vae import VAE
from lightning_gendiag import (
    CollapseStopping,
    CosineMeanSimilarityMonitor,
    DiagnosticWarning,
    GenerativeDiagnostics,
    ModelAdapter,
    Observation,
)
from lightning_gendiag.callbacks import page
from lightning_gendiag.diagnostics.cosine_mean_similarity import plots
from lightning_gendiag.diagnostics.k_star import plots as k_star_plots
from lightning_gendiag.diagnostics.k_star.functional import k_star
from lightning_gendiag.plots import pictures
from lightning_gendiag.tensorboard import records
from lightning_gendiag.tensorboard.records import Record
from tests.helpers.logs import events
from tests.helpers.models import TinyGAN
from tests.helpers.running import batches, trainer


def written(folder: str | Path) -> dict[str, list[tuple[int, Record]]]:
    """All records of a log folder by tag, each with its step."""
    accumulator = events(folder)
    return {
        tag.removeprefix(f"{records.PREFIX}/"): [
            (event.step, records.unpacked(list(event.tensor_proto.string_val))) for event in accumulator.Tensors(tag)
        ]
        for tag in accumulator.Tags()["tensors"]
        if tag.startswith(records.PREFIX)
    }


def values_of(found: dict[str, list[tuple[int, Record]]], monitor: str) -> list[tuple[int, Record]]:
    tags = [tag for tag in found if tag.startswith(f"{monitor}/values_")]
    return [one for tag in sorted(tags, key=lambda tag: int(tag.split("_")[-1])) for one in found[tag]]


class Noted(Callback):
    """Notes what monitors observed at the end of each epoch."""

    def __init__(self, diagnostics: GenerativeDiagnostics) -> None:
        self.diagnostics = diagnostics
        self.seen: dict[str, dict[int, dict[str, float]]] = {}
        self.severities: dict[str, dict[int, list[Observation]]] = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for name, monitor in self.diagnostics.monitors.items():
            if monitor.latest is not None:
                values = {o.series.name: o.value for o in monitor.latest.observations}
                self.seen.setdefault(name, {})[monitor.latest.step] = values
                self.severities.setdefault(name, {})[monitor.latest.step] = monitor.latest.observations


@pytest.mark.filterwarnings("ignore:generated images span")
def test_every_diagnostic_writes_what_it_observed(tmp_path: Path) -> None:
    adapter = ModelAdapter(num_samples=64, num_reference=64)
    diagnostics = GenerativeDiagnostics(adapter=adapter, on_error="raise", max_overhead=None, action="warn")
    for monitor in diagnostics.monitors.values():
        monitor.every_n_epochs = 1
    noted, logger = Noted(diagnostics), TensorBoardLogger(tmp_path)
    trainer(diagnostics, noted, max_epochs=3, logger=logger).fit(VAE(3, width=2), batches(32))
    found = written(logger.log_dir)
    assert len(noted.seen) == 10
    for name, seen in noted.seen.items():
        [(_, setup)] = found[f"{name}/setup"]
        assert setup.fields["diagnostic"] == diagnostics.monitors[name].metric_class.__name__
        rows = values_of(found, name)
        assert [step for step, _ in rows] == list(seen) == [3, 7, 11]
        for step, record in rows:
            assert record.fields["step"] == step
            assert [one["name"] for one in setup.fields["series"]] == list(record.fields["values"])
            for o in noted.severities[name][step]:
                if o.series.role in page.COMPARED and math.isfinite(o.severity):
                    assert record.fields["severities"][o.series.name] == pytest.approx(o.severity, rel=1e-5)
            for series, value in seen[step].items():
                expected = pytest.approx(value, rel=1e-5) if math.isfinite(value) else None
                assert record.fields["values"][series] == expected
    # the regions, and pictures of the size of the data
    cms = diagnostics.monitors["cms"]
    assert isinstance(cms, CosineMeanSimilarityMonitor)
    assert cms.region_map is not None
    [(_, setup)] = found["cms/setup"]
    assert np.array_equal(setup.arrays["labels"], cms.region_map.labels.numpy())
    [(_, frame)] = found["cms/frame_3"]
    assert {name: (p.width, p.height) for name, p in (setup.pictures | frame.pictures).items()} == {
        "mean_real": (32, 32), "samples_real": (256, 128), "mean_generated": (32, 32), "samples": (256, 128),
    }  # fmt: skip
    shown = np.asarray(Image.open(io.BytesIO(setup.pictures["mean_real"].content)))
    images = cms.view.reference.images[:64].mean(0)[0]
    low, high = float(cms.view.reference.images.min()), float(cms.view.reference.images.max())
    assert np.abs(shown - 255 * ((images.numpy() - low) / (high - low))).max() <= 1
    # larger arrays
    assert found["manifold_entropy/frame_1"][0][1].arrays["mutual_information"].shape == (3, 3)
    assert found["k_star/frame_1"][0][1].arrays["histogram"].sum(1) == pytest.approx(1, abs=1e-2)
    assert found["latent_regions/frame_1"][0][1].arrays["points"].shape == (64, 3)
    assert found["generation_balance/frame_1"][0][1].fields["classes"] == list(range(10))
    primitives = found["regional_primitives/frame_1"][0][1]
    assert primitives.pictures["strip"].width == 32 * len(primitives.fields["names"])
    # the report at the end, as the file beside it
    step, report = found["report"][-1]
    assert report.fields["state"] == "not judged"
    assert report.fields["evaluations"]["cms"] == 3
    assert step == 11


def test_the_report_is_written_when_it_changes_and_now_and_then(tmp_path: Path) -> None:
    stopping, logger = CollapseStopping(action="warn"), TensorBoardLogger(tmp_path)
    monitor = CosineMeanSimilarityMonitor(num_regions=2)
    trainer(monitor, stopping, max_epochs=24, logger=logger).fit(TinyGAN(), batches())
    reports = [record.fields for _, record in written(logger.log_dir)["report"]]
    counts = [fields["evaluations"]["cms"] for fields in reports]
    # all of the first, then each time their number has grown by a tenth, and at the end
    assert counts[:11] == list(range(1, 12))
    assert counts[-1] == 24
    assert len(counts) < 24
    assert all(later <= max(earlier + 1, 1.1 * earlier) for earlier, later in itertools.pairwise(counts))
    states = [fields["state"] for fields in reports]
    assert states[0] == "not judged"
    assert states[-1] == stopping.report()["state"]


def test_an_evaluation_that_replaces_one_has_a_place_of_its_own() -> None:
    seen: list[str] = []
    logger: Any = type("Notes", (), {"log_record": lambda _, tag, record: seen.append(tag)})()
    own = page.Page("x", "X")
    for number in (*range(1, 11), 10, 11):
        own.write_values(evaluation(number), Record, {}, logger)
    tags = [tag for tag in seen if "/values_" in tag]
    # TensorBoard surely keeps ten of a tag
    assert max(tags.count(tag) for tag in set(tags)) == records.BLOCK
    assert len(tags) == 12


def test_each_fit_writes_to_its_own_folder(tmp_path: Path) -> None:
    monitor, stopping, module = CosineMeanSimilarityMonitor(num_regions=2), CollapseStopping("warn"), TinyGAN()
    tags = []
    for name in ("first", "second"):
        logger = TensorBoardLogger(tmp_path, name=name)
        trainer(monitor, stopping, max_epochs=2, logger=logger).fit(module, batches())
        tags.append({tag.partition("_")[0] for tag in written(logger.log_dir)})
    assert tags == [{"cms/setup", "cms/values", "cms/frame", "report"}] * 2


@pytest.mark.parametrize("case", ["no pictures", "no board"])
def test_what_is_not_wanted_is_not_written(tmp_path: Path, case: str) -> None:
    monitor = CosineMeanSimilarityMonitor(num_regions=2, log_images=case != "no pictures")
    logger = TensorBoardLogger(tmp_path) if case == "no pictures" else CSVLogger(tmp_path)
    trainer(monitor, logger=logger).fit(TinyGAN(), batches())
    assert monitor.evaluations == 2
    if case == "no pictures":
        assert {tag.partition("_")[0] for tag in written(logger.log_dir or "")} == {"cms/setup", "cms/values"}
    else:
        assert list(tmp_path.rglob("*tfevents*")) == []


def test_a_failure_ends_the_page_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Record:
        raise RuntimeError("no picture today")

    monkeypatch.setattr(CosineMeanSimilarityMonitor, "page_frame", fail)
    monitor, logger = CosineMeanSimilarityMonitor(num_regions=2), TensorBoardLogger(tmp_path)
    with pytest.warns(
        DiagnosticWarning, match="goes on with its part of the tab switched off: .*no picture today"
    ) as caught:
        trainer(monitor, max_epochs=3, logger=logger).fit(TinyGAN(), batches())
    assert len([one for one in caught if one.category is DiagnosticWarning]) == 1
    assert monitor.evaluations == 3
    assert monitor.enabled
    assert len(events(logger.log_dir).Scalars("gendiag/cms/image")) == 3


def test_pictures_are_bounded_in_number_and_values_in_tags_of_ten() -> None:
    own, count = page.Page("x", "X"), 0
    logger: Any = type("Nothing", (), {"log_record": lambda *_: None})()
    for number in range(1, 2001):
        if own.is_due(number):
            count += 1
            own.write_frame(evaluation(number), Record(), logger)
    assert 30 <= count <= 50
    tags = [records.values_tag("x", place) for place in range(2000)]
    assert max(tags.count(tag) for tag in set(tags)) == records.BLOCK
    # an evaluation that replaces one is another, although it has its number
    one = evaluation(2001)
    own.write_frame(one, Record(), logger)
    assert own.has_frame(one)
    assert not own.has_frame(evaluation(2001))


def evaluation(number: int) -> Any:
    from lightning_gendiag import Evaluation

    return Evaluation(number, number, 0, [])


def test_new_series_are_added_to_the_setup() -> None:
    from lightning_gendiag import Evaluation, Series

    seen: list[tuple[str, Record]] = []
    logger: Any = type("Notes", (), {"log_record": lambda _, tag, record: seen.append((tag, record))})()
    own = page.Page("x", "X")
    for number, names in enumerate((["a"], ["a"], ["b"]), 1):
        observations = [Observation(Series(name), 1.0, 0.0) for name in names]
        own.write_values(Evaluation(number, number, 0, observations), Record, {}, logger)
    setups = [record.fields["series"] for tag, record in seen if tag.endswith("setup")]
    assert [[one["name"] for one in series] for series in setups] == [["a"], ["a", "b"]]


def test_pictures_hold_the_images_in_rows() -> None:
    images = torch.rand(7, 3, 4, 5)
    grid = pictures.grid(images, 3)
    assert grid.shape == (3, 8, 15)
    for n in range(6):
        r, c = divmod(n, 3)
        assert torch.equal(grid[:, 4 * r : 4 * r + 4, 5 * c : 5 * c + 5], images[n])
    assert pictures.shrunk(images, 5) is images
    assert pictures.shrunk(torch.rand(2, 1, 8, 100), 50).shape == (2, 1, 4, 50)
    pixels = pictures.pixels(grid, 0.0, 1.0)
    assert np.abs(pixels - 255 * grid.permute(1, 2, 0).numpy()).max() <= 0.51
    assert pictures.pixels(grid[:1], 0.0, 1.0).shape == (8, 15)


@pytest.mark.parametrize("shape", [(28, 28), (300, 200), (1, 700)])
def test_maps_are_shrunk_and_keep_their_regions(shape: tuple[int, int]) -> None:
    labels = (torch.arange(shape[0])[:, None] * 2 // max(2, shape[0])) * 2 + torch.arange(shape[1]) * 2 // shape[1]
    small = plots.page_labels(labels)
    assert max(small.shape) == min(max(shape), plots.LARGEST_MAP)
    shares = np.bincount(small.flatten()) / small.size
    assert shares == pytest.approx(np.bincount(labels.flatten()) / labels.numel(), abs=0.02)


def test_histograms_count_the_values_of_each_class() -> None:
    source = torch.Generator().manual_seed(0)
    result = k_star(torch.randn(57, 2, generator=source), torch.arange(57) % 3 * 7)
    found = k_star_plots.histograms(result)
    for place, c in enumerate(result.classes.tolist()):
        values = result.values[result.labels == c].double().numpy()
        # bins that hold their upper end
        expected = np.histogram(-values, np.linspace(-1, 0, k_star_plots.BINS + 1))[0][::-1] / len(values)
        assert found[place].numpy() == pytest.approx(expected)


@pytest.mark.parametrize(("side", "kind"), [(28, "image/png"), (400, "image/jpeg")])
def test_large_pictures_are_compressed_with_loss(side: int, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)
    encoded = records.picture(pixels)
    assert (encoded.kind, encoded.width, encoded.height) == (kind, side, side)
    shown = np.asarray(Image.open(io.BytesIO(encoded.content)))
    assert np.abs(shown.astype(int) - pixels).mean() <= (0 if kind == "image/png" else 60)


def test_records_are_what_was_written_or_are_refused() -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False])}
    one = records.picture(np.zeros((2, 3), np.uint8))
    record = Record({"step": 1, "values": {"x": math.inf}, "list": [1, None, "text"]}, arrays, {"p": one})
    parts = records.packed(record)
    again = records.unpacked(parts)
    assert again.fields == {"step": 1, "values": {"x": None}, "list": [1, None, "text"]}
    assert all(np.array_equal(again.arrays[name], array) for name, array in arrays.items())
    assert again.pictures == {"p": one}
    for damaged in ([], parts[:1], [b"x", *parts[1:]], [parts[0], b"x", *parts[2:]], [parts[0], parts[2], parts[1]]):
        with pytest.raises(ValueError, match="damaged"):
            records.unpacked(damaged)


def test_records_of_a_newer_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "VERSION", 2)
    newer = records.packed(Record({}))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version must be at most 1, got 2"):
        records.unpacked(newer)
