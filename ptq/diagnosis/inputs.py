"""What the float model's layers read: signal to noise, saturation, and outlier channels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq.algorithms import round_to_nearest
from ptq.calibrate import inputs_of, inputs_of_model
from ptq.diagnosis.ranges import Limits, input_limits
from ptq.diagnosis.suspect import Suspect, decibels
from ptq.sensitivity import InPlace, round_trip

_SHOWN = 5  # channels of a layer


@dataclass(frozen=True)
class Channel:
    """An input channel that is much larger than the others.

    Args:
        magnitude: its largest absolute value, in the coordinates in which the input is rounded.
        ratio: to the median of the channels' largest absolute values.
    """

    index: int
    magnitude: float
    ratio: float


@dataclass(frozen=True)
class InputFindings:
    """What was seen of one layer's input, in the coordinates in which it is rounded.

    Args:
        sqnr_db: of the input; None where it stays float.
        output_sqnr_db: of the layer's output for the float model's inputs.
        saturated: share of the input's values beyond a static range.
        used: of a static range, the largest share that a value reaches on its side (above 1:
            beyond it); None where the range is dynamic, or the input float.
        channels: the outliers, the largest first.
        rows: tokens seen.
        excess: float [N], the squared error that the weights alone make in each output channel,
            relative to that of the same weight rounded to nearest; infinite where no row was seen.
    """

    sqnr_db: float | None
    output_sqnr_db: float | None
    saturated: float
    used: float | None
    channels: tuple[Channel, ...]
    rows: int
    excess: Tensor = field(repr=False)


@dataclass(eq=False)
class _Seen:
    """Sums over the batches."""

    suspect: Suspect
    limits: Limits | None
    rows: int = 0
    energy: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("x", "dx", "y", "dy", "outside"), 0.0)
    )
    largest: Tensor | None = None
    low: float = 0.0
    high: float = 0.0
    errors: Tensor = field(init=False)  # float64 [2, N]: by the weights alone, and rounded anew

    def __post_init__(self) -> None:
        self.errors = torch.zeros(2, self.suspect.layer.out_features, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        if rows.shape[0] == 0:
            return
        layer, e = self.suspect.layer, self.energy
        weight = layer.quantized_weight
        inside = self.suspect.space.enter(rows.float())
        read = round_trip(
            inside, layer.scheme.activations, weight.input_scale, weight.input_zero_point
        )
        exact = nn.functional.linear(inside, self.suspect.target)
        made = nn.functional.linear(read, weight.dequantize())
        for key, value in (
            ("x", inside),
            ("dx", read - inside),
            ("y", exact),
            ("dy", made - exact),
        ):
            e[key] += value.square().sum().item()
        nearest = round_to_nearest(self.suspect.target, layer.scheme.weights).dequantize()
        for place, tried in enumerate((weight.dequantize(), nearest)):
            error = nn.functional.linear(inside, tried - self.suspect.target)
            self.errors[place] += error.square().sum(0).cpu()
        if self.limits is not None:
            e["outside"] += self.limits.outside(inside).sum().item()
        found = inside.abs().amax(0)
        self.largest = found if self.largest is None else torch.maximum(self.largest, found)
        self.low, self.high = (
            min(self.low, inside.min().item()),
            max(self.high, inside.max().item()),
        )
        self.rows += rows.shape[0]

    def finish(self, ratio: float) -> InputFindings:
        e, count = self.energy, max(1, self.rows * self.suspect.layer.in_features)
        quantized = self.suspect.layer.scheme.activations is not None
        restored = self.suspect.layer.quantized_weight.restored
        return InputFindings(
            decibels(e["x"], e["dx"]) if quantized else None,
            decibels(e["y"], e["dy"]),
            e["outside"] / count,
            self._used(),
            () if self.largest is None else outliers(restored(self.largest), ratio),
            self.rows,
            self._excess(),
        )

    def _excess(self) -> Tensor:
        if self.rows == 0:
            return torch.full_like(self.errors[0], torch.inf)
        # A channel that happens to have next to none counts as the mean one.
        return self.errors[0] / torch.maximum(self.errors[1], 0.1 * self.errors[1].mean())

    def _used(self) -> float | None:
        if self.limits is None or self.rows == 0:
            return None
        low, high = self.limits.low.item(), self.limits.high.item()
        shares = [
            reached / end
            for reached, end in ((self.low, low), (self.high, high))
            if end != 0 and abs(reached) > 0
        ]
        return max(shares, default=0.0)


def outliers(largest: Tensor, ratio: float) -> tuple[Channel, ...]:
    """The channels at least ``ratio`` times as large as the median one, the largest first.

    Args:
        largest: float [K], the largest absolute value of each channel.
    """
    median = largest.median().item()
    order = largest.argsort(descending=True)[:_SHOWN].tolist()
    return tuple(
        Channel(i, size, size / median if median else float("inf"))
        for i in order
        if (size := largest[i].item()) > ratio * median
    )


@torch.no_grad()
def watch_inputs(
    in_place: InPlace, suspects: Mapping[str, Suspect], ratio: float
) -> dict[str, InputFindings]:
    """What the layers read in the float model, in one pass over the data.

    Args:
        ratio: from which a channel is an outlier.
    """
    seen = {name: _Seen(s, input_limits(s)) for name, s in suspects.items()}
    for rows in inputs(in_place, suspects):
        for name, x in rows.items():
            seen[name].update(x)
    return {name: each.finish(ratio) for name, each in seen.items()}


def inputs(in_place: InPlace, names: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """The rows [R, K] that the float model's layers read, some layers and batches at a time."""
    model = in_place.model
    layers = {name: model.get_submodule(name) for name in names}
    chain = in_place.chain
    blocks = [] if chain is None else chain.names
    for position, block in enumerate(blocks):
        start = f"{block}."
        inside = {n.removeprefix(start): m for n, m in layers.items() if n.startswith(start)}
        if inside:
            module, stream = model.get_submodule(block), in_place.stream_at(position)
            for rows in inputs_of(stream, position, module, inside):
                yield {f"{start}{name}": x for name, x in rows.items()}
    rest = {name: layer for name, layer in layers.items() if in_place.block_of(name) is None}
    for index, batch in enumerate(in_place.batches if rest else ()):
        yield inputs_of_model(model, rest, batch, index)
