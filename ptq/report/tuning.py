"""What ptq.tune measured and chose."""

import html
from dataclasses import dataclass
from typing import Any

Times = dict[str, dict[int, float]]
"""Milliseconds by kernel and number of rows; ``float`` is the float layer in the same dtype."""


@dataclass(frozen=True)
class TunedLayers:
    """Layers of equal shape and scheme.

    Args:
        names: of the layers.
        shape: (out_features, in_features).
        times: what each kernel took.
        choice: (first row, kernel) in ascending order.
        cached: the times are those of an earlier measurement.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    scheme: str
    times: Times
    choice: tuple[tuple[int, str], ...]
    cached: bool

    def kernel(self, m: int) -> str:
        """The kernel chosen for m rows."""
        return next(name for first, name in reversed(self.choice) if first <= m)

    def speed(self, m: int) -> float:
        """Speed over the float layer at a measured number of rows."""
        return self.times["float"][m] / self.times[self.kernel(m)][m]


@dataclass(frozen=True)
class Tuning:
    """The measured choice of kernels for a model, for one device and dtype of activations."""

    device: str
    dtype: str
    rows: tuple[int, ...]
    layers: tuple[TunedLayers, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "dtype": self.dtype,
            "layers": [
                {
                    "names": list(group.names),
                    "shape": list(group.shape),
                    "scheme": group.scheme,
                    "cached": group.cached,
                    "kernels": [
                        {"first_row": first, "kernel": name} for first, name in group.choice
                    ],
                    "milliseconds": {n: {str(m): t for m, t in v.items()}
                                     for n, v in group.times.items()},
                    "speed_over_float": {str(m): group.speed(m) for m in self.rows},
                }
                for group in self.layers
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [
            f"Measured on {self.device} for {self.dtype} activations "
            f"(M rows: kernel, speed over {self.dtype} float):"
        ]
        for group in self.layers:
            n, k = group.shape
            source = ", measured earlier" if group.cached else ""
            lines.append(
                f"{n}x{k} {group.scheme}, {len(group.names)} layers such as "
                f"{group.names[0]}{source}"
            )
            for m in self.rows:
                slower = "   slower than float" if group.speed(m) < 1 else ""
                lines.append(f"  M={m:<5} {group.kernel(m):12} {group.speed(m):5.2f}x{slower}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
