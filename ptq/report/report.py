"""The report of a run: what was measured, as JSON, and a short summary drawn from it."""

import json
import os
import platform
import resource
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FILE_NAME = "report.json"


@dataclass
class Report:
    """Sections by name, filled stage by stage."""

    sections: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(self.sections, indent=2)

    def write(self, directory: str | Path) -> Path:
        """Write ``report.json`` into the directory, whole or not at all."""
        target = Path(directory) / FILE_NAME
        temporary = target.with_suffix(".json.tmp")
        temporary.write_text(self.to_json() + "\n", encoding="utf-8")
        os.replace(temporary, target)
        return target

    def __str__(self) -> str:
        return "\n".join(_summary(self.sections))


def _summary(s: dict[str, Any]) -> list[str]:
    plan, lines = s["plan"], []
    lines.append(
        f"size       {plan['bytes_before'] / 1e6:.1f} MB -> {plan['bytes_after'] / 1e6:.1f} MB of "
        f"tensors ({plan['compression']:.2f}x); {100 * plan['quantized_share_of_parameters']:.1f}% "
        "of the parameters quantized"
    )
    if "checkpoint" in s:
        c = s["checkpoint"]
        lines.append(
            f"checkpoint {c['directory']} ({c['weight_file_bytes'] / 1e6:.1f} MB of weights)"
        )
        lines.append(f"verified   read back, bit-equal: {c['bit_equal']}")
    if "evaluation" in s:
        e = s["evaluation"]
        lines.append(
            f"quality    perplexity {e['float_perplexity']:.3f} -> "
            f"{e['quantized_perplexity']:.3f}, ratio {e['ratio']:.4f} "
            f"[{e['ratio_low']:.4f}, {e['ratio_high']:.4f}]; "
            f"KL {e['kl_mean']:.4f}, top-1 agreement {100 * e['top1_agreement']:.1f}%"
        )
    else:
        lines.append("quality    not measured (no evaluation section in the config)")
    if "generation" in s:
        g = s["generation"]
        lines += [
            f"prompt     {g['prompt']!r}",
            f"float      {g['float']!r}",
            f"quantized  {g['quantized']!r}",
        ]
    if "resources" in s:
        r = s["resources"]
        lines.append(f"cost       {r['seconds']:.0f} s, {r['peak_memory_bytes'] / 1e9:.2f} GB peak")
    return lines


def environment() -> dict[str, Any]:
    """Versions, processor and threads."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {
            name: _version(name)
            for name in ("ptq-toolkit", "torch", "transformers", "safetensors", "datasets", "gguf")
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Model name of the processor, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far (whole process, as the system counts it)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
