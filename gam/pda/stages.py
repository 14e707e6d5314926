"""Stages of a run: each is built once, in a folder named after what goes into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gam.pda.files import read_json, write_json
from gam.pda.libraries import library_versions
from gam.pda.provenance import digest


class Stages:
    """The stages in a folder.

    A stage is done once however often it is asked for, and again if anything in its inputs
    changed.

    Args:
        folder: Where the stages lie.
        say: Called with a line for each stage that is not there yet.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """Read and write nothing yet."""
        self.folder = folder
        self.say = say
        self.cpu_seconds = 0.0
        self._used: set[Path] = set()

    def get(
        self, kind: str, name: str, inputs: Mapping[str, Any], build: Callable[[Path], None]
    ) -> Path:
        """Return the folder of a stage; build it unless it is done.

        Args:
            kind: Folder of the stages of a kind.
            name: For people; no part of the stage's identity.
            inputs: Everything that can change the result, as JSON can hold it.
            build: Called with the folder to fill.
        """
        folder = self.folder / kind / digest([kind, inputs])[:12]
        record = folder / "done.json"
        if not record.exists():
            self.say(f"{kind}: {name}")
            folder.mkdir(parents=True, exist_ok=True)
            started = time.process_time()
            build(folder)
            done = {
                "name": name,
                "inputs": inputs,
                "cpu_seconds": round(time.process_time() - started, 2),
                "versions": library_versions(),
            }
            write_json(record, done)
        if folder not in self._used:
            self._used.add(folder)
            self.cpu_seconds += read_json(record)["cpu_seconds"]
        return folder
