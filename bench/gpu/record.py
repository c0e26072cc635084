"""What a stage found, on disk after every finding; and the report made of all stages."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, TIMED_OUT = "passed", "FAILED", "skipped", "OUT OF TIME"
SCHEMA = 1
_WORST_FIRST = (FAILED, TIMED_OUT, PASSED, SKIPPED)


class Record:
    """A stage's findings: items {name, status, detail} and data. Rewritten at every change: what is
    there when the stage is ended from outside counts."""

    def __init__(self, out: Path, stage: str, deadline: float = float("inf")) -> None:
        self._file = out / "stages" / f"{stage}.json"
        self.out, self._deadline, self._start = out, deadline, time.monotonic()
        self.finished = False
        self.items: list[dict[str, Any]] = []
        self.data: dict[str, Any] = {}
        self.seconds = 0.0
        self._save()

    @classmethod
    def resume(cls, out: Path, stage: str) -> Record:
        """The record another process has left."""
        file = out / "stages" / f"{stage}.json"
        left = json.loads(file.read_text()) if file.exists() else {}
        record = cls(out, stage)
        record.items, record.data = left.get("items", []), left.get("data", {})
        record.finished = left.get("finished", False)
        return record

    def _save(self) -> None:
        content = {
            "finished": self.finished,
            "seconds": self.seconds,
            "items": self.items,
            "data": self.data,
        }
        half = self._file.with_suffix(".tmp")
        half.write_text(json.dumps(content, indent=1, default=str))
        half.replace(self._file)

    def left(self) -> float:
        """Seconds until the stage should come to its end."""
        return self._deadline - time.monotonic()

    def item(self, name: str, status: str, detail: str = "") -> None:
        """Note a finding."""
        self.items.append({"name": name, "status": status, "detail": detail})
        print(f"{status}: {name}: {detail}", flush=True)
        self._save()

    def expect(self, name: str, passed: bool, detail: str = "") -> None:
        """Note a check."""
        self.item(name, PASSED if passed else FAILED, detail)

    def put(self, **data: Any) -> None:
        """Note figures."""
        self.data.update(data)
        self._save()

    def finish(self, seconds: float | None = None) -> None:
        """The stage is over."""
        self.seconds = time.monotonic() - self._start if seconds is None else seconds
        self.finished = True
        self._save()


def status_of(result: Mapping[str, Any]) -> str:
    """The status of a stage: that of its worst item; a stage that checked nothing has failed."""
    found = {item["status"] for item in result["items"]}
    return next((status for status in _WORST_FIRST if status in found), FAILED)


def read_all(out: Path, names: Sequence[str]) -> dict[str, Any]:
    """The records there are, by stage."""
    files = {name: out / "stages" / f"{name}.json" for name in names}
    return {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}


def write(out: Path, results: Mapping[str, Any], dry: bool) -> None:
    """gpu.json and gpu.md."""
    from . import table

    stages = {name: {"status": status_of(r), **r} for name, r in results.items()}
    content = {"schema": SCHEMA, "dry_run": dry, "stages": stages}
    (out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "gpu.md").write_text(table.markdown(stages, dry))
