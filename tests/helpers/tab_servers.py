"""TensorBoard's own application with the tab, on either of its back ends, called without a network of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from tensorboard.backend import application
from tensorboard.backend.event_processing import data_ingester, data_provider, plugin_event_multiplexer
from tensorboard.data import grpc_provider, server_ingester
from tensorboard.plugins import base_plugin
from werkzeug.test import Client, TestResponse

from lightning_gendiag.tensorboard.loader import GenDiagLoader

BACK_ENDS = ["rust", "python"]
"""The data server that TensorBoard uses where it can, and what ``--load_fast=false`` selects."""


class CountingProvider:
    """A data provider that remembers the tags that were read from it."""

    def __init__(self, provider: Any) -> None:
        self.provider = provider
        self.tags: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.provider, name)

    def read_tensors(self, ctx: Any, *, run_tag_filter: Any, **options: Any) -> Any:
        self.tags += run_tag_filter.tags
        return self.provider.read_tensors(ctx, run_tag_filter=run_tag_filter, **options)


class TabServer:
    """The application on a log directory, with all that lies there now."""

    def __init__(self, logdir: Path, back_end: str, path_prefix: str = "") -> None:
        self._end: Any = lambda: None
        self.reload: Any = lambda: None
        """Reads what was written since."""
        provider = self._rust(logdir) if back_end == "rust" else self._python(logdir)
        self.provider = CountingProvider(provider)
        plugin = GenDiagLoader().load(base_plugin.TBContext(data_provider=self.provider))
        self._client = Client(application.TensorBoardWSGI([plugin], path_prefix, data_provider=self.provider))
        self._path = f"{path_prefix}/data/plugin/gendiag/"

    def _rust(self, logdir: Path) -> Any:
        try:
            binary = server_ingester.get_server_binary().path
        except server_ingester.NoDataServerError as error:
            pytest.skip(f"TensorBoard has no data server here: {error}")
        server = subprocess.Popen(
            [binary, f"--logdir={logdir}", "--reload=1", "--port=0", "--die-after-stdin", "--verbose"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert server.stdout
        lines = iter(server.stdout)
        address = next(line.split()[-1] for line in lines if line.startswith("listening on"))

        def wait(cycles: int = 2) -> None:
            # the cycle that runs now may have missed what was written last
            for _ in range(cycles):
                next(line for line in lines if "Finished load cycle" in line)

        wait(1)
        channel = grpc.secure_channel(address, grpc.local_channel_credentials())

        def end() -> None:
            channel.close()
            server.communicate(timeout=10)

        self.reload, self._end = wait, end
        return grpc_provider.GrpcDataProvider(address, grpc_provider.make_stub(channel))

    def _python(self, logdir: Path) -> Any:
        multiplexer = plugin_event_multiplexer.EventMultiplexer(size_guidance=data_ingester.DEFAULT_SIZE_GUIDANCE)

        def load() -> None:
            multiplexer.AddRunsFromDirectory(str(logdir))
            multiplexer.Reload()

        load()
        self.reload = load
        return data_provider.MultiplexerDataProvider(multiplexer, str(logdir))

    def get(self, route: str, **query: Any) -> TestResponse:
        """Requests a route of the tab."""
        return self._client.get(self._path + route, query_string=query or None)

    def json(self, route: str, **query: Any) -> Any:
        """Requests a route of the tab that answers with JSON, in which NaN is an error."""
        response = self.get(route, **query)
        assert response.status_code == 200, response.text
        assert response.content_type == "application/json"
        return json.loads(response.data, parse_constant=pytest.fail)

    def listing(self) -> Any:
        """Returns the entry of the tab in TensorBoard's list of plugins."""
        path = self._path.removesuffix("plugin/gendiag/") + "plugins_listing"
        return json.loads(self._client.get(path).data)["gendiag"]

    def close(self) -> None:
        """Ends the data server."""
        self._end()
