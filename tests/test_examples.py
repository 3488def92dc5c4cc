from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from example_models import gan, vae
from example_models.data import digits, mnist
from tests.helpers.logs import events


def test_digits_are_in_the_range_of_the_generator() -> None:
    images, labels = digits(32)
    assert images.shape == (1797, 1, 32, 32)
    assert -1 <= float(images.min()) < float(images.max()) <= 1
    assert labels.bincount().min() > 170


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:GPU available")
def test_the_faulty_gan_is_stopped_and_the_alarm_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopping = gan.main(["--fault", "noise", "--start", "15", "--epochs", "19", "--runs", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "The run stopped in epoch" in printed
    assert re.search(r"bottom right( \(2\))? collapsed", printed)
    assert "A fault was planted from epoch 15 on: noise" in printed
    assert "tensorboard --logdir" in printed
    assert stopping.alarms[0].label.startswith("bottom right")
    accumulator = events(next(tmp_path.rglob("events*")).parent)
    names = ("cms", "generation_balance", "k_star", "regional_primitives")
    expected = {"gendiag/alarm_1/picture", *(f"gendiag/{name}/panel" for name in names)}
    assert expected <= set(accumulator.Tags()["images"])


def test_an_unknown_fault_raises_an_error() -> None:
    with pytest.raises(ValueError, match="fault must be one of frozen, blurred"):
        gan.FaultyGAN("upside down")


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:GPU available")
def test_a_vae_with_two_latent_dimensions_logs_all_panels_and_its_collapse_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--fault", "ignored", "--start", "10", "--epochs", "16", "--latent-dim", "2", "--runs", str(tmp_path)]
    stopping = vae.main(arguments)
    assert "The run stopped in epoch" in capsys.readouterr().out
    assert {"posterior_kl", "manifold_entropy"} & {alarm.diagnostic for alarm in stopping.alarms}
    tags = set(events(next(tmp_path.rglob("events*")).parent).Tags()["images"])
    names = ("cms", "generation_balance", "k_star", "latent_regions", "manifold_entropy", "posterior_kl")
    assert {f"gendiag/{name}/panel" for name in names} <= tags


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read(tmp_path: Path, packed: bool) -> None:
    images, labels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28), np.array([3, 8], dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        content = head + array.tobytes()
        path = tmp_path / f"t10k-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    images_read, labels_read = mnist(tmp_path)
    assert images_read.shape == (2, 1, 32, 32)
    assert labels_read.tolist() == [3, 8]
    np.testing.assert_allclose(images_read[:, 0, 2:-2, 2:-2].numpy(), images / 127.5 - 1, atol=1e-6)
    assert (images_read[:, :, :2] == -1).all()
    with pytest.raises(FileNotFoundError, match="folder must hold train-images-idx3-ubyte or"):
        mnist(tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"something else")
    with pytest.raises(ValueError, match="must be an idx file of bytes"):
        mnist(tmp_path, "train")
