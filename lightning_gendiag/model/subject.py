"""The module that is trained, and the isolated copy of it that is evaluated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_gendiag.model import compat
from lightning_gendiag.model.averages import load_own_average
from lightning_gendiag.model.copying import ModuleCopy, copy_module, fits_in_memory
from lightning_gendiag.model.generators import Generator, own_generators
from lightning_gendiag.model.isolation import contained
from lightning_gendiag.model.warning import warn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Subject:
    """Keeps one copy of the module of a trainer, and renews it when it is asked for after the module may have changed.

    Args:
        trained: The module that is trained; it is read and never changed.
        trainer: Its trainer.
    """

    def __init__(self, trained: LightningModule, trainer: Trainer) -> None:
        self.trained, self.trainer = trained, trainer
        # what is sharded is not evaluated, which ModelView.attach says
        self.in_place = compat.sharded_by(trainer, trained) is None and not fits_in_memory(trained)
        """Whether the module itself is evaluated, since no copy can be made."""
        self.own_average: str | None = None
        """What holds the averaged weights of the module's own that the copy has; None where it has none of them."""
        self._copy: ModuleCopy | None = None
        self._average: nn.Module | None = None
        self._own = False
        self._current = False
        self._generators: list[Generator] | None = None
        self._surrounding: list[Generator] | None = None
        if self.in_place:
            self._say("it is larger than half of the free memory")

    @property
    def module(self) -> LightningModule:
        """The copy, made when it is first asked for; the module itself where no copy can be made."""
        if self._copy is None and not self.in_place:
            self._renew()
        return self.trained if self._copy is None else self._copy.module

    @property
    def generators(self) -> list[Generator]:
        """The random generators of the module, looked for once as long as it does not change, and the surrounding ones."""
        if self._generators is None:
            self._generators = own_generators((self.trained, *self.surrounding))
        return self._generators

    @property
    def surrounding(self) -> list[Generator]:
        """The random generators of the data and of the user's callbacks, which a module reaches through its trainer."""
        if self._surrounding is None:
            self._surrounding = own_generators(compat.owners_beside(self.trainer))
        return self._surrounding

    def begin(self) -> None:
        """Notes that training begins, with loaders that did not exist before."""
        self._surrounding = self._generators = None

    def expire(self) -> None:
        """Notes that the module may have changed."""
        self._current, self._generators = False, None

    def refresh(self, average: nn.Module | None = None, own: bool = True) -> None:
        """Renews the copy where the module may have changed.

        Args:
            average: Averaged weights that the copy gets.
            own: Whether it otherwise gets averaged weights that the module keeps inside itself, if there are any.
        """
        own = own and average is None
        if not self.in_place and not (self._current and self._average is average and self._own == own):
            self._average, self._own = average, own
            self._renew()

    def counterpart(self, value: Any) -> Any:
        """Returns a part of the module, a method of it, or a function that refers to it, as it is on the copy."""
        return value if self._copy is None else self._copy.counterpart(value)

    def release(self) -> None:
        """Frees the copy's memory."""
        if self._copy is not None:
            self._copy.release()
        self._copy, self._average, self._own, self._current, self.own_average = None, None, False, False, None

    def _renew(self) -> None:
        previous, self._copy, self.own_average = self._copy, None, None
        try:
            # a class that says how its objects are copied may call its constructor
            with contained(self.trained.device, *self.generators):
                self._copy = copy_module(self.trained, previous)
                compat.be_silent(self._copy.module, self.trainer, self.trained)
                if self._average is not None:
                    compat.load_average(self._average, self._copy.module)
                elif self._own:
                    self.own_average = load_own_average(self._copy.module)
            self._current = True
        except Exception as error:
            self._copy, self.in_place = None, True
            self._say(f"{type(error).__name__}: {error}")

    def _say(self, reason: str) -> None:
        warn(
            f"{type(self.trained).__name__} cannot be copied ({reason}), so evaluations use the module itself and restore "
            "its modes, buffers and plain attributes afterwards. Layers that act in train() or eval() may notice. Averaged "
            "weights that it keeps inside itself are not used.",
            category=UserWarning,
        )
