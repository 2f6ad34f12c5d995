"""Whether the memory of this machine is enough for what is predicted."""

from pathlib import Path

from ptq.errors import ConfigError
from ptq.preflight.facts import Facts
from ptq.preflight.memory import Stage

_SURE = 1.15  # a prediction that is more than this over what there is leaves no doubt


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that a process can still get, of the machine or of its control group; None where the
    system does not say.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    meminfo = root / "proc" / "meminfo"
    if not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    sizes = {key: int(value.split()[0]) * 1024 for key, value in fields.items()}
    free = sizes["MemAvailable"] + sizes.get("SwapFree", 0)
    group = root / "sys" / "fs" / "cgroup"
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def check_memory(facts: Facts, peak: Stage, process: int, available: int | None) -> str | None:
    """Compare the predicted peak with what there is.

    Args:
        process: bytes that the process has already.
        available: bytes that it can still get; None: not known.

    Returns:
        A warning where it will be close, else None.

    Raises:
        ConfigError: it cannot be enough; the message has the remedy.
    """
    if available is None:
        return None
    needed = peak.total - process
    if needed <= 0.9 * available:
        return None
    text = (
        f"the run will need some {needed / 1e9:.1f} GB of memory more in '{peak.name}', and "
        f"{available / 1e9:.1f} GB are available: {_remedy(facts, peak)}"
    )
    if needed > _SURE * available:
        raise ConfigError(text)
    return text


def _remedy(facts: Facts, peak: Stage) -> str:
    """What makes the largest of the terms smaller that a key of the configuration decides."""
    largest = max(peak.terms, key=lambda name: peak.terms[name])
    if "calibration batch" in largest:
        return "lower calibration.batch_size"
    if "hidden states" in largest:
        return "lower calibration.samples, or set model.stream: true"
    if "logits" in largest or "probabilities" in largest:
        return "lower evaluation.context, or leave the evaluation section out"
    if facts.streamed:
        return "take a machine with more memory"
    if facts.source.gguf:
        return "set model.dtype: bfloat16, or take a safetensors model, which can be streamed"
    others = [k for k in ("evaluation", "generation") if getattr(facts.config, k) is not None]
    without = f", without {' and '.join(others)}" if others else ""
    return f"set model.stream: true{without}"
