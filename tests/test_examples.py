from __future__ import annotations

from pathlib import Path

import pytest

from example_models import gan, vae
from example_models.data import digits
from tests.test_board_and_panels import events


def test_digits_are_real_images_in_the_generators_range() -> None:
    images, labels = digits(32)
    assert images.shape == (1797, 1, 32, 32)
    assert -1 <= float(images.min()) < float(images.max()) <= 1
    assert labels.bincount().min() > 170


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:GPU available")
def test_the_demo_is_stopped_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopping = gan.main(["--fault", "noise", "--start", "14", "--epochs", "18", "--runs", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "STOPPED in epoch" in printed
    assert "bottom right collapsed" in printed
    assert "The fault was planted: noise" in printed
    assert "tensorboard --logdir" in printed
    assert stopping.findings[0].where == "bottom right"
    accumulator = events(next(tmp_path.rglob("events*")).parent)
    assert "gendiag/alarm_1/picture" in accumulator.Tags()["images"]


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="fault must be one of frozen, blurred"):
        gan.FaultyGAN("upside down")


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:GPU available")
def test_a_vae_in_two_dimensions_has_all_of_its_diagnostics_and_a_latent_that_vanishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--fault", "ignored", "--start", "10", "--epochs", "16", "--latent-dim", "2", "--runs", str(tmp_path)]
    stopping = vae.main(arguments)
    assert "STOPPED in epoch" in capsys.readouterr().out
    assert {"posterior_kl", "manifold_entropy"} & {finding.diagnostic for finding in stopping.findings}
    tags = set(events(next(tmp_path.rglob("events*")).parent).Tags()["images"])
    stems = ("cms", "generation_balance", "k_star", "latent_regions", "manifold_entropy", "posterior_kl")
    assert {f"gendiag/{stem}/panel" for stem in stems} <= tags
