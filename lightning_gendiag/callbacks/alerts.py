"""Sends alarms to people: by the loggers' own alerts, by a webhook, and by a function of the user's."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from lightning_gendiag.callbacks.logging import DiagnosticWarning
from lightning_gendiag.detection.alarm import Alarm, counted
from lightning_gendiag.model.isolation import exits_as_errors
from lightning_gendiag.model.warning import warn
from lightning_gendiag.tensorboard.records import finite

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

MOST_PER_HOUR = 10
"""Largest number of messages in an hour; what is held back is counted in the next one."""

LONGEST = 2000
"""Largest number of characters of a message on Discord."""

HEADERS = {"Content-Type": "application/json", "User-Agent": "lightning_gendiag"}
"""Some services refuse what Python calls itself by default."""

TIMEOUT, LAST_SECONDS = 10.0, 5.0
"""Seconds that a webhook may take, and that the end of a run waits for it."""


class Alerts:
    """Sends alarms, without delay for the training and without ending it where that fails.

    Args:
        on_alarm: Called with each alarm on the first process; not limited in number.
        webhook: Address to which a JSON body is posted: ``text`` (which Slack shows), ``content`` (Discord), ``run`` and
            ``alarm`` with all its fields. It is sent by a thread of its own.
        clock: Seconds; for tests.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        on_alarm: Callable[[Alarm], object] | None = None,
        webhook: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if on_alarm is not None and not callable(on_alarm):
            raise ValueError(
                f"on_alarm must be a callable or None, got {on_alarm!r}. To fix this, pass a function of an alarm."
            )
        if webhook is not None and urlsplit(webhook).scheme not in ("http", "https"):
            raise ValueError(
                f"webhook must be an http or https address, got {webhook!r}. To fix this, pass https://...."
            )
        self.on_alarm, self.webhook, self._clock = on_alarm, webhook, clock
        self._sent: deque[float] = deque()
        self._held_back = 0
        self._threads: list[threading.Thread] = []
        self._failures: list[Exception] = []
        self._warned: set[str] = set()

    def send(self, trainer: Trainer, alarm: Alarm, effect: str) -> None:
        """Sends an alarm everywhere, on the first process only; one that stops the run is never held back.

        Args:
            trainer: Whose loggers alert.
            alarm: The alarm.
            effect: What it means for the run, in a sentence.
        """
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.on_alarm is not None:
            self._contained("on_alarm", self.on_alarm, alarm)
        if not self._may_send() and not alarm.is_critical:
            self._held_back += 1
            return
        earlier = f" {self._held()} not sent before it." if self._held_back else ""
        text = f"{alarm.message} {effect}{earlier}"
        fields = finite({**asdict(alarm), "message": alarm.message})
        self._contained("an alert", self._send, trainer, f"{alarm.label} {alarm.event}", text, fields)

    def finish(self, trainer: Trainer) -> None:
        """Says how many alarms were held back, and waits a little for messages that are still under way."""
        if self._held_back:
            text = f"{self._held()} not sent, since at most {MOST_PER_HOUR} an hour are."
            self._contained("an alert", self._send, trainer, "more alarms", text, None)
        deadline = time.monotonic() + LAST_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = []
        self._report_failures()

    def _held(self) -> str:
        held_back, self._held_back = self._held_back, 0
        return f"{counted(held_back, 'alarm')} {'was' if held_back == 1 else 'were'}"

    def _send(self, trainer: Trainer, title: str, text: str, alarm: Any) -> None:
        for name, alert in _alerting(trainer):
            self._contained(f"the alert of {name}", alert, title=title, text=text)
        if self.webhook is not None:
            run = next((str(logger.log_dir) for logger in trainer.loggers if getattr(logger, "log_dir", None)), None)
            # Discord takes no longer content
            body = json.dumps({"text": text, "content": text[:LONGEST], "run": run, "alarm": alarm}, default=str)
            thread = threading.Thread(target=self._post, args=(self.webhook, body.encode()), daemon=True)
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()
        self._report_failures()

    def _may_send(self) -> bool:
        now = self._clock()
        while self._sent and now - self._sent[0] >= 3600:
            self._sent.popleft()
        if len(self._sent) >= MOST_PER_HOUR:
            return False
        self._sent.append(now)
        return True

    def _post(self, address: str, body: bytes) -> None:
        try:
            request = Request(address, body, HEADERS, method="POST")
            with urlopen(request, timeout=TIMEOUT):
                pass
        except Exception as error:
            # warnings of another thread would be lost
            self._failures.append(error)

    def _report_failures(self) -> None:
        while self._failures:
            self._warn("the webhook", self._failures.pop(0))

    def _contained(self, name: str, call: Callable[..., object], *args: Any, **named: Any) -> None:
        try:
            with exits_as_errors():
                call(*args, **named)
        except Exception as error:
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        """Names a failure, once for each channel."""
        if name not in self._warned:
            self._warned.add(name)
            warn(f"{name} failed and the run goes on: {type(error).__name__}: {error}", category=DiagnosticWarning)

    def __getstate__(self) -> dict[str, Any]:
        # threads cannot be copied
        return {**vars(self), "_threads": []}


def without_secret(webhook: str | None) -> str | None:
    """Returns the address of a webhook without what is secret in it.

    Example:
        >>> without_secret("https://hooks.slack.com/services/T0/B0/secret")
        'https://hooks.slack.com/...'
    """
    return None if webhook is None else f"{urlsplit(webhook).scheme}://{urlsplit(webhook).hostname}/..."


def _alerting(trainer: Trainer) -> Iterator[tuple[str, Callable[..., object]]]:
    """Yields the name and the alert function of each logger that has one, such as W&B's and Trackio's."""
    for logger in trainer.loggers:
        try:
            experiment = getattr(logger, "experiment", None)
        except Exception:
            # a logger that cannot be reached alerts nobody
            continue
        # which alerts by a function of the package
        trackio = sys.modules.get("trackio") if type(experiment).__module__.startswith("trackio") else None
        for holder in (experiment, trackio):
            alert = getattr(holder, "alert", None)
            if callable(alert):
                yield type(logger).__name__, alert
                break
