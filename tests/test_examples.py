from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from example_models import gan, vae
from example_models.data import digits, mnist
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
    stems = ("cms", "generation_balance", "k_star", "regional_primitives")
    wanted = {"gendiag/alarm_1/picture", *(f"gendiag/{stem}/panel" for stem in stems)}
    assert wanted <= set(accumulator.Tags()["images"])


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


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read(tmp_path: Path, packed: bool) -> None:
    images, labels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28), np.array([3, 8], dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        held = head + array.tobytes()
        path = tmp_path / f"t10k-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(held) if packed else held)
    read, told = mnist(tmp_path)
    assert read.shape == (2, 1, 32, 32)
    assert told.tolist() == [3, 8]
    np.testing.assert_allclose(read[:, 0, 2:-2, 2:-2].numpy(), images / 127.5 - 1, atol=1e-6)
    assert (read[:, :, :2] == -1).all()
    with pytest.raises(FileNotFoundError, match="folder must hold train-images-idx3-ubyte or"):
        mnist(tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"something else")
    with pytest.raises(ValueError, match="must be an idx file of bytes"):
        mnist(tmp_path, "train")
