"""What holds on a GPU as well: the same numbers, the same training, and a collapse that is found; skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from example_models.data import digits
from lightning_gendiag import CollapseWarning, GenerativeDiagnostics
from tests.helpers.cases import Case, all_cases
from tests.helpers.faults import planted
from tests.helpers.metrics import close, filled
from tests.helpers.models import ScriptedGenerator, SmallVAE, TinyGAN
from tests.helpers.running import batches, trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CASES = all_cases()


def on_gpu(value: Any) -> Any:
    """Moves tensors, also in lists, to the GPU."""
    if isinstance(value, list):
        return [on_gpu(one) for one in value]
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_metrics_give_the_same_numbers_as_on_the_cpu(case: Case) -> None:
    metric = case.make().cuda()
    for update in case.updates:
        metric.update(**{name: on_gpu(value) for name, value in update.items()})
    scalars = {name: value.cpu() for name, value in metric.compute().scalars().items()}
    close(scalars, filled(case).compute().scalars(), 1e-3)


@pytest.mark.parametrize("module", [TinyGAN, SmallVAE])
def test_training_is_bit_for_bit_the_same(module: Any) -> None:
    states = []
    for callbacks in ([], [GenerativeDiagnostics(max_overhead=None)]):
        seed_everything(3, verbose=False)
        model = module()
        trainer(*callbacks, max_epochs=3, accelerator="gpu", devices=1, deterministic=True).fit(model, batches(8))
        states.append(({name: value.cpu() for name, value in model.state_dict().items()}, torch.cuda.get_rng_state()))
    (plain, random), (watched, random_watched) = states
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(random, random_watched)


def test_a_broken_region_stops_the_run() -> None:
    diagnostics = GenerativeDiagnostics(max_overhead=None, reference=digits(16)[0], num_samples=500)
    own = trainer(diagnostics, max_epochs=30, accelerator="gpu", devices=1)
    script = planted("frozen", "bottom right", 14)
    with pytest.warns(CollapseWarning, match="Training stops"):
        own.fit(
            ScriptedGenerator(lambda images, epoch: script(images.cpu(), epoch).to(own.strategy.root_device)),
            batches(16, 32),
        )
    assert 15 <= own.current_epoch <= 20
