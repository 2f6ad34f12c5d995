"""Where measurements of kernels are kept between runs."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ptq.errors import ConfigError
from ptq.report import Times, environment


@dataclass
class TuningCache:
    """A JSON file of measurements, by machine and by what was measured.

    In ``$XDG_CACHE_HOME/ptq`` or ``~/.cache/ptq``. What was measured on another processor, with
    another version of torch or of ptq or another number of threads is not found.
    """

    path: Path
    machine: str
    content: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls) -> "TuningCache":
        """Read the file, if there is one.

        Raises:
            ConfigError: it is not what was written.
        """
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "ptq" / "tuning.json"
        found = environment()
        packages = found["packages"]
        device = found["cuda"] or found["processor"]
        cache = cls(
            path,
            f"{device}, {torch.get_num_threads()} threads, torch {packages['torch']}, "
            f"ptq {packages['ptq-toolkit']}",
        )
        if path.exists():
            try:
                cache.content = json.loads(path.read_text())
                cache._check()
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise ConfigError(f"{path} is damaged ({error}): delete it") from None
        return cache

    def get(self, key: str) -> Times | None:
        """Milliseconds by kernel and rows, or None."""
        found = self.content.get(self.machine, {}).get(key)
        if found is None:
            return None
        return {name: {int(m): t for m, t in rows.items()} for name, rows in found.items()}

    def put(self, key: str, times: Times) -> None:
        """Keep a measurement; the file is replaced as a whole.

        Raises:
            ConfigError: the file cannot be written.
        """
        self.content.setdefault(self.machine, {})[key] = {
            name: {str(m): t for m, t in rows.items()} for name, rows in times.items()
        }
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.content, indent=1))
            temporary.replace(self.path)
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written: {error}; set XDG_CACHE_HOME, or cache=False"
            ) from None

    def _check(self) -> None:
        for measured in self.content.values():
            for times in measured.values():
                for rows in times.values():
                    for m, milliseconds in rows.items():
                        if int(m) < 1 or not milliseconds > 0:
                            raise ValueError(f"{m} rows take {milliseconds} ms")
