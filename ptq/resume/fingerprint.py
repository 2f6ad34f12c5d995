"""What the bits of a result depend on: work is gone on with only where all of it is the same."""

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ptq.calibrate import TokenSet
from ptq.config import QuantizationConfig
from ptq.model import ModelSource

_NOT_ASKED = {"output", "evaluation", "generation", "kv_cache"}  # these change no code and no scale


def fingerprint(
    config: QuantizationConfig,
    source: ModelSource,
    model: PretrainedConfig,
    calibration: TokenSet | None,
) -> dict[str, Any]:
    """Configuration, model, calibration tokens, versions and processor, as JSON holds them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "config": config.model_dump(mode="json", exclude=_NOT_ASKED),
        "model": _identity(source, model),
        "calibration tokens": None if calibration is None else calibration.sha256,
        "versions": {
            "ptq": _own_sources(),
            "torch": str(torch.__version__),
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
        },
        "machine": {
            "threads": torch.get_num_threads(),
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        },
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The parts of two fingerprints that differ, such as ``config.scheme``."""
    found = []
    for key in dict.fromkeys((*new, *old)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{part}" for part in {**b, **a} if a.get(part) != b.get(part)]
        elif a != b:
            found.append(key)
    return found


def _identity(source: ModelSource, model: PretrainedConfig) -> Any:
    """Files with sizes and times of a local model; the commit of one from the hub."""
    path = Path(source.path)
    if not path.is_dir():
        return [source.path, getattr(model, "_commit_hash", None) or source.options.revision]
    paths = [path / source.gguf_file] if source.gguf_file is not None else sorted(path.iterdir())
    stats = {p.name: p.stat() for p in paths if p.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


@cache
def _own_sources() -> str:
    """SHA-256 over ptq's own code, which tells versions apart that have one number."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
