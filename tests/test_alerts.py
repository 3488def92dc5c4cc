"""Alarms that reach people."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from example_models.data import digits
from lightning_gendiag import (
    Alarm,
    CollapseStopping,
    CollapseWarning,
    CosineMeanSimilarityMonitor,
    DiagnosticWarning,
    GenerativeDiagnostics,
    ModelAdapter,
)
from lightning_gendiag.callbacks import alerts
from lightning_gendiag.callbacks.alerts import Alerts
from tests.helpers.alarms import alarm
from tests.helpers.faults import QUADRANTS, planted
from tests.helpers.models import ScriptedGenerator
from tests.helpers.running import batches, trainer


class Run:
    """A W&B run as far as alerts go."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, str]] = []

    def alert(self, title: str, text: str, level: str | None = None, wait_duration: float | None = None) -> None:
        self.alerts.append({"title": title, "text": text})


class Server(HTTPServer):
    """Keeps the bodies that are posted to it."""

    def __init__(self, status: int = 200, delay: float = 0.0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.kinds: list[str] = []
        self.arrived = threading.Semaphore(0)
        owner, answer = self, status

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                time.sleep(delay)
                owner.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                owner.kinds.append(self.headers["Content-Type"])
                self.send_response(answer)
                self.end_headers()
                owner.arrived.release()

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


@pytest.fixture
def server() -> Iterator[Server]:
    own = Server()
    yield own
    own.shutdown()
    own.server_close()


def fake(*experiments: Any, zero: bool = True, dev: bool = False) -> Any:
    loggers = [SimpleNamespace(experiment=one, log_dir="runs/version_3") for one in experiments]
    return SimpleNamespace(is_global_zero=zero, fast_dev_run=dev, loggers=loggers)


def test_an_alarm_is_an_alert_of_the_logger_and_calls_the_function() -> None:
    run, seen = Run(), []
    one = alarm()
    Alerts(seen.append).send(fake(object(), run), one, "Training stops.")
    assert seen == [one]
    assert run.alerts == [{"title": "centre collapsed", "text": f"{one.message} Training stops."}]


@pytest.mark.parametrize("where", [{"zero": False}, {"dev": True}])
def test_other_processes_and_trial_runs_send_nothing(where: dict[str, bool]) -> None:
    run, seen = Run(), []
    Alerts(seen.append).send(fake(run, **where), alarm(), "")
    assert run.alerts == seen == []


def test_trackio_alerts_by_a_function_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    package = ModuleType("trackio")
    package.alert = lambda title, text=None, level="warn", webhook_url=None: sent.append(title)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", package)
    experiment = type("Run", (), {"__module__": "trackio.run"})()
    Alerts().send(fake(experiment, object()), alarm(), "")
    assert sent == ["centre collapsed"]


def test_a_webhook_gets_the_alarm_as_json(server: Server) -> None:
    own = Alerts(webhook=server.address)
    one = alarm(after=float("nan"), contributions={"centre": 1.0})
    own.send(fake(object()), one, "Training stops.")
    own.finish(fake())
    [body] = server.bodies
    assert server.kinds == ["application/json"]
    assert body["text"] == body["content"] == f"{one.message} Training stops."
    assert body["run"] == "runs/version_3"
    assert body["alarm"]["label"] == "centre"
    assert body["alarm"]["after"] is None
    assert body["alarm"]["contributions"] == {"centre": 1.0}
    assert body["alarm"]["message"] == one.message


@pytest.mark.parametrize("fault", ["function", "logger", "refused", "unreachable"])
def test_failures_are_named_once_and_contained(fault: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of reach")

    refusing = Server(500)
    own, run = {
        "function": lambda: (Alerts(fail), None),
        "logger": lambda: (Alerts(), SimpleNamespace(alert=fail)),
        "refused": lambda: (Alerts(webhook=refusing.address), None),
        "unreachable": lambda: (Alerts(webhook="http://127.0.0.1:9/"), None),
    }[fault]()
    with pytest.warns(DiagnosticWarning, match="failed and the run goes on") as caught:
        for _ in range(2):
            own.send(fake(run), alarm(), "")
            own.finish(fake())
    assert len(caught) == 1
    refusing.shutdown()
    refusing.server_close()


def test_messages_are_limited_and_those_held_back_are_counted() -> None:
    now, run, seen = [0.0], Run(), []
    own = Alerts(seen.append, clock=lambda: now[0])
    for _ in range(alerts.MOST_PER_HOUR + 3):
        own.send(fake(run), alarm(), "")
    assert len(run.alerts) == alerts.MOST_PER_HOUR
    assert len(seen) == alerts.MOST_PER_HOUR + 3
    # one that stops the run is never held back
    own.send(fake(run), alarm(is_critical=True), "Training stops.")
    assert run.alerts.pop()["text"].endswith("Training stops. 3 alarms were not sent before it.")
    now[0] = 3599
    own.send(fake(run), alarm(), "")
    now[0] = 3601
    own.send(fake(run), alarm(), "Training stops.")
    assert len(run.alerts) == alerts.MOST_PER_HOUR + 1
    assert run.alerts[-1]["text"].endswith("Training stops. 1 alarm was not sent before it.")
    own.send(fake(run), alarm(), "")
    for _ in range(alerts.MOST_PER_HOUR):
        own.send(fake(run), alarm(), "")
    count = len(run.alerts)
    own.finish(fake(run))
    assert len(run.alerts) == count + 1
    assert run.alerts[-1]["text"] == "2 alarms were not sent, since at most 10 an hour are."


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"on_alarm": 3}, "on_alarm must be a callable or None, got 3"),
        ({"webhook": "slack"}, "webhook must be an http"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        CollapseStopping(**arguments)
    with pytest.raises(ValueError, match=error):
        GenerativeDiagnostics(**arguments)


class OwnLogger(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.experiment = Run()

    name, version = "own", 0

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        pass


def test_a_run_sends_its_alarms(server: Server) -> None:
    seen: list[Alarm] = []
    logger = OwnLogger()
    stopping = CollapseStopping(on_alarm=seen.append, webhook=server.address)
    monitor = CosineMeanSimilarityMonitor(
        QUADRANTS, adapter=ModelAdapter(reference=digits(16)[0], num_samples=200), log_images=False
    )
    own = trainer(monitor, stopping, max_epochs=30, logger=logger)
    with pytest.warns(CollapseWarning, match="top left collapsed"):
        own.fit(ScriptedGenerator(planted("frozen", "top left", 14)), batches(16, 32))
    assert own.current_epoch < 30
    assert seen == stopping.alarms
    assert len(seen) == 1
    assert [one["title"] for one in logger.experiment.alerts] == ["top left collapsed"]
    assert "Training stops." in logger.experiment.alerts[0]["text"]
    assert server.bodies[0]["alarm"]["names"] == ["top left"]


def test_training_does_not_wait_for_a_slow_service() -> None:
    slow = Server(delay=3.0)
    own = Alerts(webhook=slow.address)
    started = time.monotonic()
    own.send(fake(object()), alarm(), "")
    assert time.monotonic() - started < 1
    own.finish(fake())
    assert len(slow.bodies) == 1
    slow.shutdown()
    slow.server_close()


def test_the_end_of_a_run_waits_a_little_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "LAST_SECONDS", 0.2)
    slow = Server(delay=3.0)
    own = Alerts(webhook=slow.address)
    own.send(fake(object()), alarm(), "")
    started = time.monotonic()
    own.finish(fake())
    assert time.monotonic() - started < 1
    slow.shutdown()
    slow.server_close()


def test_a_logger_that_cannot_be_reached_ends_nothing() -> None:
    class Broken:
        @property
        def experiment(self) -> Any:
            raise RuntimeError("no server")

        log_dir = property(lambda self: 1 / 0)

    trainer: Any = SimpleNamespace(is_global_zero=True, fast_dev_run=False, loggers=[Broken()])
    own = Alerts(webhook="http://127.0.0.1:9/")
    with pytest.warns(DiagnosticWarning, match="an alert failed and the run goes on: ZeroDivisionError"):
        own.send(trainer, alarm(), "")


def test_the_address_is_not_shown() -> None:
    address = "https://hooks.slack.com/services/T00/B00/secret"
    for one in (CollapseStopping(webhook=address), GenerativeDiagnostics(webhook=address)):
        assert "secret" not in repr(one)
        assert "https://hooks.slack.com/..." in repr(one)


def test_alerts_without_anything_that_alarms_are_refused() -> None:
    with pytest.raises(ValueError, match="on_alarm and webhook must go with an action, got None"):
        GenerativeDiagnostics(None, on_alarm=print)


def test_what_sends_can_be_copied_and_pickled(server: Server) -> None:
    own = Alerts(print, server.address)
    own.send(fake(object()), alarm(), "")
    for again in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert again.webhook == server.address
    own.finish(fake())
