"""The plugin that serves the tab "GenDiag": its routes, which check parameters and leave all reading to ``runs``."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

if TYPE_CHECKING:
    from lightning_gendiag.tensorboard.runs import Reader, Source

STATIC = Path(__file__).parent / "static"
"""Folder of the page."""

MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css"}
"""Of the files that are served, by suffix; other files of the folder are not."""

POINTS = 600
"""Number of evaluations of a monitor that a reply has at most, unless the page asks for another."""

PICTURE_TYPES = {"image/png", "image/jpeg", "image/gif", "image/webp"}
"""Media types of pictures. Others are sent as plain bytes, since a browser would run a page or an SVG file."""

HOUR = 3600

App = Callable[[wrappers.Request], wrappers.Response]


class GenDiagPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """The tab "GenDiag" of TensorBoard."""

    plugin_name = "gendiag"

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        self._lock = threading.Lock()
        self._opened: Reader | None = None

    def get_plugin_apps(self) -> dict[str, Any]:
        """Returns the routes: data, the files of the page that exist now, and the chart library."""
        routes: dict[str, App] = {
            "/runs": self._runs,
            "/run": self._run,
            "/frame": self._frame,
            "/picture": self._picture,
            "/plotly.min.js": self._plotly,
        }
        for path in sorted(STATIC.glob("*")):
            if path.suffix in MEDIA_TYPES:
                routes[f"/{path.name}"] = self._file(path)
        return {route: wrappers.Request.application(app) for route, app in routes.items()}

    def is_active(self) -> bool:
        """Returns False; TensorBoard shows the tab as soon as a run has data of this plugin."""
        return False

    def frontend_metadata(self) -> Any:
        """Returns the name of the tab and the module that draws it."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="GenDiag")

    @property
    def _reader(self) -> Reader:
        # reading needs more modules than TensorBoard has loaded at its start
        from lightning_gendiag.tensorboard.runs import Reader

        with self._lock:
            if self._opened is None:
                self._opened = Reader()
            return self._opened

    def _source(self, request: wrappers.Request) -> Source:
        from lightning_gendiag.tensorboard.runs import Source

        environ = request.environ
        return Source(self._provider, plugin_util.context(environ), plugin_util.experiment_id(environ))

    def _runs(self, request: wrappers.Request) -> wrappers.Response:
        return _json(request, self._reader.runs(self._source(request)))

    def _run(self, request: wrappers.Request) -> wrappers.Response:
        points = _number(request, "points", POINTS)
        if points < 1:
            raise errors.InvalidArgumentError(f"points must be at least 1, got {points}")
        return _json(request, self._reader.run(self._source(request), _text(request, "run"), points))

    def _frame(self, request: wrappers.Request) -> wrappers.Response:
        run, monitor, step = _text(request, "run"), _text(request, "monitor"), _number(request, "step")
        return _json(request, self._reader.frame(self._source(request), run, monitor, step))

    def _picture(self, request: wrappers.Request) -> wrappers.Response:
        run, monitor, name = _text(request, "run"), _text(request, "monitor"), _text(request, "name")
        step = None if _text(request, "step") == "setup" else _number(request, "step")
        picture = self._reader.picture(self._source(request), run, monitor, name, step)
        kind = picture.kind if picture.kind in PICTURE_TYPES else "application/octet-stream"
        return _respond(request, picture.content, kind, expires=HOUR)

    def _plotly(self, request: wrappers.Request) -> wrappers.Response:
        path = plotly_file()
        if path is None:
            raise errors.NotFoundError('The charts need plotly. To fix this, run pip install "lightning_gendiag[tab]".')
        return _respond(request, path.read_bytes(), MEDIA_TYPES[".js"], expires=HOUR)

    @staticmethod
    def _file(path: Path) -> App:
        return lambda request: _respond(request, path.read_bytes(), MEDIA_TYPES[path.suffix])


def plotly_file() -> Path | None:
    """Returns the path of the chart library in the plotly package, which is not imported, or None without it."""
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "package_data" / "plotly.min.js"
    return path if path.is_file() else None


def _json(request: wrappers.Request, content: str) -> wrappers.Response:
    return _respond(request, content, "application/json")


def _respond(request: wrappers.Request, content: str | bytes, kind: str, expires: int = 0) -> wrappers.Response:
    response: wrappers.Response = http_util.Respond(request, content, kind, expires=expires)
    return response


def _text(request: wrappers.Request, name: str) -> str:
    value = request.args.get(name)
    if value is None:
        raise errors.InvalidArgumentError(f"the parameter {name!r} is missing")
    return value


def _number(request: wrappers.Request, name: str, default: int | None = None) -> int:
    if default is not None and name not in request.args:
        return default
    text = _text(request, name)
    try:
        return int(text)
    except ValueError:
        raise errors.InvalidArgumentError(f"{name} must be a whole number, got {text[:40]!r}") from None
