"""Pods of the tests' node as a Prometheus without Kubernetes discovery, such as Debian's, finds them: in files.

The network policies that would keep it out are not enforced on this node.
"""

import json
import os
import threading
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from cluster.kubernetes import Node
from on_prometheus import Prometheus, monitors, scrape, targets_of

LOOK_SECONDS = 1.0
Object = dict[str, Any]


class Discovery:
    """While it is entered, files of `folder` name the pods that the chart's PodMonitors select, and `pages` holds the
    newest page of each, as it is: Prometheus keeps only a part of it."""

    def __init__(self, node: Node, folder: Path) -> None:
        folder.mkdir()
        self.pages: dict[str, str] = {}  # by pod
        self._node, self._left = node, threading.Event()
        self._monitors = {folder / f"{monitor['metadata']['name']}.json": monitor for monitor in monitors()}
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._broke: BaseException | None = None

    def prometheus(self, folder: Path) -> Prometheus:
        """One that scrapes them as the PodMonitors say."""
        files = {file: {"file_sd_configs": [{"files": [str(file)]}]} for file in self._monitors}
        return Prometheus(folder, [scrape(monitor, files[file]) for file, monitor in self._monitors.items()])

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        if self._broke is not None:
            raise self._broke

    def _follow(self) -> None:
        try:
            while not self._left.wait(LOOK_SECONDS):
                self._look()
        except BaseException as error:
            self._broke = error

    def _look(self) -> None:
        status, answer = self._node.request("GET", "/api/v1/pods")
        assert status == 200, answer
        for file, monitor in self._monitors.items():
            targets = targets_of(monitor, answer["items"])
            unfinished = file.with_suffix(".new")
            unfinished.write_text(json.dumps(targets))
            os.replace(unfinished, file)
            for target in targets:
                self._read(target)

    def _read(self, target: Mapping[str, Any]) -> None:
        (address,) = target["targets"]
        with suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            self.pages[target["labels"]["pod"]] = answer.read().decode()
