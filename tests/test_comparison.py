"""Two runs compared."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from lightning_gendiag import CollapseStopping, CosineMeanSimilarityMonitor, compare_runs
from lightning_gendiag.__main__ import main
from lightning_gendiag.detection.comparison import LEAST, WINDOW, Track, compared, in_words
from lightning_gendiag.tensorboard.files import read_run
from tests.helpers.models import TinyGAN
from tests.helpers.running import batches, trainer
from tests.tab_runs import Run, labels


def noise(runs: int, correlation: float, seed: int = 0, length: int = 30) -> torch.Tensor:
    """(runs, length) of AR(1) with variance 1."""
    innovations = torch.randn(runs, length + 50, generator=torch.Generator().manual_seed(seed)).double()
    value, series = torch.zeros(runs).double(), []
    for column in innovations.T:
        value = correlation * value + math.sqrt(1 - correlation**2) * column
        series.append(value)
    return torch.stack(series[50:], 1)


def track(values: torch.Tensor, **options: float) -> Track:
    return Track([-value for value in values.tolist()], values.tolist(), "quantity", **options)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_runs_that_differ_by_chance_alone_are_rarely_told_apart(correlation: float) -> None:
    names, pairs = ["a", "b", "c"], 500
    rows = noise(2 * pairs * len(names), correlation).view(pairs, 2, len(names), -1)
    wrong = 0
    for first, second in rows:
        changes = compared(*(dict(zip(names, map(track, run), strict=True)) for run in (first, second)))
        wrong += any(change.verdict != "no sure difference" for change in changes)
    # the stated rate is 5 % over all series
    assert wrong <= 0.05 * pairs + 3 * math.sqrt(0.05 * pairs)
    # a comparison that never tells anything apart would pass too
    found = [compared({"a": track(one)}, {"a": track(other + 6)})[0].verdict for one, other in rows[:, :, 0]]
    assert found.count("worse") >= 0.9 * pairs


def test_the_interval_is_that_of_welch_with_fewer_values() -> None:
    one, other = noise(2, 0.3, seed=4, length=WINDOW)
    [change] = compared({"a": track(one)}, {"a": track(other)}, confidence=0.9)

    def mean_of(values: torch.Tensor) -> tuple[float, float]:
        """Squared error of the mean and degrees of freedom, with the number of values that independent ones would need."""
        n, away = len(values), values - values.mean()
        found = float((away[1:] * away[:-1]).sum() / away.square().sum())
        correlation = min(max(((found * n + 1) / (n - 3) * n + 0.5 * 5) / (n + 5), 0.0), 0.85)
        count = n * (1 - correlation) / (1 + correlation)
        return float(away.square().mean()) / (1 - 1 / count) / count, count - 1

    (a, m), (b, n) = mean_of(one), mean_of(other)
    freedom = (a + b) ** 2 / (a**2 / m + b**2 / n)
    assert change.difference == pytest.approx(float(other.mean() - one.mean()))
    assert change.margin == pytest.approx(stats.t.ppf(0.95, freedom) * math.sqrt(a + b))


def test_what_does_not_matter_or_is_not_known_is_no_difference() -> None:
    calm = torch.zeros(20).double()
    assert compared({"a": track(calm)}, {"a": track(calm + 0.1)})[0].verdict == "worse"
    assert compared({"a": track(calm)}, {"a": track(calm - 0.1)})[0].verdict == "better"
    assert compared({"a": track(calm, min_delta=0.2)}, {"a": track(calm + 0.1)})[0].verdict == "no sure difference"
    assert compared({"a": track(calm, min_std=0.2)}, {"a": track(calm + 0.1)})[0].verdict == "no sure difference"
    short = compared({"a": track(calm)}, {"a": track(calm[: LEAST - 1])})[0]
    assert short.verdict == "not compared"
    assert math.isnan(short.difference)
    nan = calm.clone()
    nan[8:] = math.nan
    for broken in (nan, calm * math.nan):
        assert compared({"a": track(calm)}, {"a": track(broken)})[0].verdict == "worse"
        assert compared({"a": track(broken)}, {"a": track(calm)})[0].verdict == "better"
        assert compared({"a": track(broken)}, {"a": track(broken)})[0].verdict in ("not compared", "no sure difference")
    words = in_words({"cms": compared({"a": track(calm)}, {"a": track(nan)})})
    assert words == "Worse: a (quantity nan or inf, was 0.000)."
    other = track(calm)._replace(quantity="quantity of reconstructions")
    assert compared({"a": track(calm)}, {"a": other}) == []
    assert compared({"a": track(calm)}, {"b": track(calm)}) == []


def test_only_the_newest_evaluations_count() -> None:
    values = torch.zeros(40).double()
    values[:-WINDOW] = 9
    [change] = compared({"a": track(values)}, {"a": track(values * 0)})
    assert change.verdict == "no sure difference"


def test_the_words_name_what_is_worst_first() -> None:
    calm = 0.01 * noise(1, 0.0)[0]
    tracks = {name: track(calm) for name in ("left", "right", "top", "bottom")}
    other = {"left": track(calm + 1), "right": track(calm + 3), "top": track(calm - 1), "bottom": track(calm)}
    words = in_words({"cms": compared(tracks, other)})
    assert words.index("Worse: right (quantity") < words.index("left (quantity") < words.index("Better: top")
    assert words.endswith("No sure difference in 1 other series.")
    assert in_words({}) == "The runs have no series in common."
    assert in_words({"cms": compared(tracks, {name: track(calm[:2]) for name in tracks})}) == (
        "4 series have too few evaluations, or none that is finite."
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, broken_at in (("healthy", None), ("broken", 40)):
        Run(folder / name, broken_at=broken_at).writer.close()
    return folder / "healthy", folder / "broken"


def test_two_runs_are_compared_by_their_event_files(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(*runs)
    worse = {
        (monitor, one.name) for monitor, some in comparison.changes.items() for one in some if one.verdict == "worse"
    }
    assert worse == {
        ("cms", "bottom right"),
        ("cms", "image"),
        ("generation_balance", "class 3"),
        ("generation_balance", "all classes"),
        ("codebook", "usage"),
        ("codebook", "the codebook"),
    }
    assert comparison.states == ("healthy", "unhealthy")
    assert "bottom right (cosine mean similarity 0.3" in comparison.summary
    assert "| cms | bottom right | cosine mean similarity | 0.9" in comparison.table
    assert comparison.figure().shape[2] == 3
    # the other way round, what was worse is better
    back = compare_runs(*runs[::-1])
    better = {(monitor, one.name) for monitor, some in back.changes.items() for one in some if one.verdict == "better"}
    assert better == worse
    same = compare_runs(runs[0], runs[0])
    assert {one.verdict for some in same.changes.values() for one in some} == {"no sure difference"}


def test_the_values_are_those_of_the_event_files(runs: tuple[Path, Path]) -> None:
    change = next(one for one in compare_runs(*runs).changes["cms"] if one.name == "top left")
    read = read_run(runs[0]).monitors["cms"]
    values = [fields["values"]["top left"] for fields in read.evaluations]
    assert len(values) == 60
    assert change.first == pytest.approx(sum(values[-WINDOW:]) / WINDOW)


def test_a_resumed_run_is_read_without_what_it_gave_up(tmp_path: Path) -> None:
    Run(tmp_path, evaluations=30, broken_at=25).writer.close()
    for path in tmp_path.glob("*tfevents*"):
        path.rename(tmp_path / "events.out.tfevents.1.before")
    Run(tmp_path, evaluations=28, broken_at=None, first=21).writer.close()
    evaluations = read_run(tmp_path).monitors["cms"].evaluations
    assert [fields["number"] for fields in evaluations] == list(range(1, 29))
    assert min(fields["values"]["bottom right"] for fields in evaluations[10:]) > 0.7


def test_regions_of_another_map_are_not_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    Run(tmp_path / "other", regions=labels().T[::-1].copy()).writer.close()
    comparison = compare_runs(runs[0], tmp_path / "other")
    assert [one.name for one in comparison.changes["cms"]] == ["image"]
    assert "Not in both: the same regions in cms." in comparison.summary


def test_the_command_line(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", str(runs[1])]) == 0
    assert capsys.readouterr().out.startswith("Unhealthy: bottom right collapsed")
    figure = tmp_path / "figure.png"
    assert main(["compare", *map(str, runs), "--table", "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "bottom right (cosine mean similarity" in out.partition("Worse: ")[2]
    assert "| diagnostic | series |" in out
    with Image.open(figure) as image:
        assert image.size[0] > 400
    assert main(["report", str(runs[0].parent)]) == 1
    error = capsys.readouterr().err
    assert f"run must be a folder with event files, got {runs[0].parent}. To fix this, pass one of {runs[1]}" in error
    with SummaryWriter(str(tmp_path / "empty")):
        pass
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "run must have evaluations, got none" in capsys.readouterr().err


def test_a_wrong_confidence_is_refused(runs: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 1"):
        compare_runs(*runs, confidence=1)


@pytest.mark.filterwarnings("ignore:generated images span")
def test_a_trained_run_can_be_compared(tmp_path: Path) -> None:
    folders = []
    for name in ("one", "other"):
        logger = TensorBoardLogger(tmp_path, name=name)
        monitor = CosineMeanSimilarityMonitor(num_regions=2)
        trainer(monitor, CollapseStopping("warn"), max_epochs=5, logger=logger).fit(TinyGAN(), batches())
        folders.append(logger.log_dir)
    changes = compare_runs(*folders).changes["cms"]
    assert len(changes) == 3
    assert all(math.isfinite(one.margin) for one in changes)
