"""What a search found: a scheme for each layer, the curve of what else was possible, and proof."""

import html
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptq.config import QuantizationConfig
from ptq.planning import megabytes


@dataclass(frozen=True)
class Point:
    """An allocation: bytes of the whole checkpoint's tensors, bits on average of the layers that
    were free, and the predicted divergence in nats."""

    bytes: int
    bits: float
    kl: float


@dataclass(frozen=True)
class Measured:
    """A configuration that was carried out and compared with the float model.

    Args:
        kl: mean KL(float || quantized) in nats.
        ratio, ratio_low, ratio_high: of the perplexities, with the paired 95% interval.
        predicted_kl: of the search; None for uniform schemes.
    """

    name: str
    bytes: int
    kl: float
    ratio: float
    ratio_low: float
    ratio_high: float
    predicted_kl: float | None
    windows: int

    def __str__(self) -> str:
        predicted = "" if self.predicted_kl is None else f" (predicted {self.predicted_kl:.4f})"
        return (
            f"{self.name}: {megabytes(self.bytes)}, KL {self.kl:.4f}{predicted}, perplexity ratio "
            f"{self.ratio:.4f} [{self.ratio_low:.4f}, {self.ratio_high:.4f}], "
            f"{self.windows} windows"
        )


@dataclass(frozen=True)
class LayerChoice:
    """One layer's scheme, or ``float``; bytes and predicted KL of the whole group of layers that
    had to agree count at the first of them."""

    layer: str
    scheme: str
    bytes: int
    kl: float


@dataclass(frozen=True)
class SearchResult:
    """What :func:`ptq.search` found.

    Args:
        budget: as it was given.
        config: the configuration found.
        yaml: the same as a file that people can read, edit and run.
        points: the best allocations of other sizes, by bytes.
        milliseconds: that the linear layers take, where that was asked for.
    """

    budget: tuple[str, ...]
    config: QuantizationConfig
    yaml: str
    chosen: Point
    points: tuple[Point, ...]
    layers: tuple[LayerChoice, ...]
    measured: tuple[Measured, ...] = ()
    milliseconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": ", ".join(self.budget),
            "points": [asdict(point) for point in self.points],
            "chosen": asdict(self.chosen),
            "milliseconds": self.milliseconds,
            "measured": [asdict(m) for m in self.measured],
            "layers": [asdict(layer) for layer in self.layers],
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the configuration, whole or not at all."""
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(self.yaml, encoding="utf-8")
        os.replace(temporary, target)
        return target

    def __str__(self) -> str:
        counts = Counter(layer.scheme for layer in self.layers)
        shares = ", ".join(f"{count} x {scheme}" for scheme, count in counts.most_common())
        lines = [
            f"budget     {', '.join(self.budget)}",
            f"chosen     {megabytes(self.chosen.bytes)}, {self.chosen.bits:.2f} bits a weight on "
            f"average; predicted KL {self.chosen.kl:.4f}",
            f"layers     {shares}",
        ]
        if self.milliseconds is not None:
            lines.append(f"time       {self.milliseconds:.2f} ms for the linear layers")
        lines += [f"measured   {m}" for m in self.measured]
        lines += ["curve      MB       bits   predicted KL"]
        lines += [
            f"           {p.bytes / 1e6:<8.1f} {p.bits:<6.2f} {p.kl:.5f}" for p in self.points
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
