"""The report of a run: what was measured, as JSON, and a short summary drawn from it."""

import json
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ptq.checkpoint.target import REPORT
from ptq.evaluation import require_none
from ptq.planning import megabytes


@dataclass
class Report:
    """Sections by name, filled stage by stage."""

    sections: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(self.sections, indent=2, allow_nan=False)

    def write(self, directory: str | Path) -> Path:
        """Write ``report.json`` into the directory, whole or not at all."""
        target = Path(directory) / REPORT
        temporary = target.with_suffix(".json.tmp")
        temporary.write_text(self.to_json() + "\n", encoding="utf-8")
        os.replace(temporary, target)
        return target

    def check_gate(self) -> None:
        """Refuse a run whose figures violate a condition of ``evaluation.fail_if``.

        Raises:
            GateError: a line for each.
        """
        require_none(self.sections.get("gate", {}).get("violations", ()))

    def __str__(self) -> str:
        return "\n".join(_summary(self.sections))


def _summary(s: dict[str, Any]) -> list[str]:
    plan, lines = s["plan"], []
    lines.append(
        f"size       {megabytes(plan['bytes_before'])} -> {megabytes(plan['bytes_after'])} of "
        f"tensors ({plan['compression']:.2f}x); {100 * plan['quantized_share_of_parameters']:.1f}% "
        "of the parameters quantized"
    )
    if "checkpoint" in s:
        c = s["checkpoint"]
        lines.append(
            f"checkpoint {c['directory']} ({megabytes(c['weight_file_bytes'])} of weights)"
        )
        lines.append(f"verified   bit-equal: {c['bit_equal']}")
    if "evaluation" in s and "kind" in s["evaluation"]:
        lines.append(f"quality    {_other_quality(s['evaluation'])}")
    elif "evaluation" in s:
        e = s["evaluation"]
        high = "unknown" if e["ratio_high"] is None else f"{e['ratio_high']:.4f}"
        lines.append(
            f"quality    perplexity {e['float_perplexity']:.3f} -> "
            f"{e['quantized_perplexity']:.3f}, ratio {e['ratio']:.4f} "
            f"[{e['ratio_low']:.4f}, {high}]; "
            f"KL {e['kl_mean']:.4f}, top-1 agreement {100 * e['top1_agreement']:.1f}%"
        )
    else:
        lines.append("quality    not measured (no evaluation section in the config)")
    if "gate" in s:
        failed = s["gate"]["violations"]
        lines += [f"gate       FAILED {line}" for line in failed]
        if not failed:
            lines.append(f"gate       passed: not {'; not '.join(s['gate']['fail_if'])}")
    if "kv_cache" in s:
        e, cache = s["kv_cache"], s["kv_cache"]["cache"]
        settings = s.get("config", {}).get("kv_cache") or {}
        static = ", static scales" if settings.get("mode") == "static" else ""
        lines.append(
            f"kv cache   perplexity {e['quantized_perplexity']:.3f}, ratio {e['ratio']:.4f} "
            f"through it; {cache['bytes_per_token']:,.0f} bytes a token at {cache['tokens']:,}, "
            f"{cache['fraction']:.3f} of bfloat16's{static}"
        )
    lines += [f"note       {note}" for note in s.get("notes", [])]
    if "generation" in s:
        for g in s["generation"]["samples"]:
            lines += [
                f"prompt     {_short(g['prompt'])}",
                f"float      {_short(g['float'])}",
                f"quantized  {_short(g['quantized'])}",
            ]
    if "resources" in s:
        r = s["resources"]
        lines.append(f"cost       {r['seconds']:.0f} s, {r['peak_memory_bytes'] / 1e9:.2f} GB peak")
    if "measured" in s.get("preflight", {}):
        lines.append(f"predicted  {_predicted(s['preflight'])}")
    return lines


def _other_quality(e: dict[str, Any]) -> str:
    """Of a model that predicts no next token."""
    if e["kind"] == "encoder":
        return (
            f"cosine with the float embeddings {e['cosine_mean']:.5f}, worst 1% "
            f"{e['cosine_p01']:.5f}, Spearman of similarities {e['spearman']:.5f} "
            f"({e['texts']} texts)"
        )
    return (
        f"top-1 agreement {100 * e['top1_agreement']:.1f}%, "
        f"top-5 {100 * e['top5_agreement']:.1f}%, KL {e['kl_mean']:.4f} ({e['images']} images)"
    )


def _predicted(p: dict[str, Any]) -> str:
    """What the preflight said, each figure with its error."""
    errors = p["error_percent"]
    size = f"{megabytes(p['checkpoint_bytes'])} ({errors['checkpoint_bytes']:+.1f}%)"
    peak = f"{p['peak_memory_bytes'] / 1e9:.2f} GB ({errors['peak_memory_bytes']:+.0f}%)"
    if p["seconds"] is None:
        return f"{size}, {peak}"
    cpu = f"; {errors['cpu_seconds']:+.0f}% of processor time" if "cpu_seconds" in errors else ""
    return f"{size}, {peak}, {p['seconds']:.0f} s ({errors['seconds']:+.0f}%{cpu})"


def _short(text: str) -> str:
    """One line of at most some 160 characters."""
    return repr(text if len(text) <= 160 else text[:157] + "...")


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


def cpu_seconds() -> float:
    """Processor time of this process and of those that it started and that ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far (whole process, as the system counts it)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int:
    """Resident set of this process now; its peak where the system does not tell (macOS)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_memory_bytes()
    return int(statm.read_text().split()[1]) * resource.getpagesize()
