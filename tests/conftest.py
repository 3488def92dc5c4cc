from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits

# tiny networks run faster on one thread, and bit for bit the same
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run in a folder of its own; fail where a test leaves gradients off, another dtype or precision."""
    monkeypatch.chdir(tmp_path)
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    yield
    assert torch.is_grad_enabled()
    assert torch.get_float32_matmul_precision() == precision
    assert torch.get_default_dtype() == dtype


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class TinyGAN(LightningModule):
    """BatchNorm, dropout, a frozen part, manual optimization and two optimizers: all that a probe can disturb."""

    def __init__(self, size: int = 8, latent_dim: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.latent_dim, self.size = latent_dim, size
        self.generator = nn.Sequential(
            nn.Linear(latent_dim, 16),
            nn.BatchNorm1d(16),
            nn.Dropout(0.1),
            nn.ReLU(),
            nn.Linear(16, size * size),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(size * size, 16), nn.LeakyReLU(), nn.Linear(16, 1))
        self.still = nn.BatchNorm1d(3).eval()

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z).view(-1, 1, self.size, self.size)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0] if isinstance(batch, (list, tuple)) else batch["image"] if isinstance(batch, dict) else batch
        d, g = self.optimizers()
        fake = self(torch.randn(len(real), self.latent_dim, device=self.device))
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        d.zero_grad()
        self.manual_backward(loss)
        d.step()
        loss = F.softplus(-self.discriminator(fake)).mean()
        g.zero_grad()
        self.manual_backward(loss)
        g.step()
        self.log("loss_g", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.discriminator, self.generator)]


class ScriptedGenerator(LightningModule):
    """Trains next to nothing; draws real digits, changed by ``script(images, epoch)``: the truth about a fault is known."""

    def __init__(self, script: Any = None, size: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.script = script
        self.pool = digits(size)[0]

    def sample(self, n: int) -> Tensor:
        # each epoch draws other images, so a healthy run fluctuates as measurements do
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) + self.current_epoch)
        images = self.pool[torch.randint(len(self.pool), (n,), generator=generator)]
        return images if self.script is None else self.script(images, self.current_epoch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.weight * 0).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(size: int = 8, n: int = 64, batch_size: int = 16, shuffle: bool = True) -> DataLoader[Any]:
    images, labels = digits(size)
    return DataLoader(TensorDataset(images[:n], labels[:n]), batch_size=batch_size, shuffle=shuffle)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*available but not used.*")
        return Trainer(callbacks=list(callbacks), **options)
