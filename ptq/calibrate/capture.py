"""Running a model over calibration batches while observers watch its layers' inputs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibrate.inputs import all_finite, batches_of, call, padding_mask, unmasked_rows
from ptq.calibrate.inside import watching
from ptq.config import ActivationScheme, Plugin
from ptq.errors import CalibrationError
from ptq.model import eval_mode
from ptq.observers import Observer, make_observer

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What calibration saw of one layer's input.

    Args:
        low, high: the observer's range, float32: [1], or [C] per channel.
        rows: number of rows (tokens) seen, padding not counted.
    """

    low: Tensor
    high: Tensor
    rows: int


@dataclass
class _Watch:
    """The observers, and the batch that is running."""

    observers: dict[str, Observer]
    rows: dict[str, int]
    batches: int = 0
    mask: Tensor | None = field(default=None, repr=False)

    def see(self, name: str, x: Tensor) -> None:
        rows = unmasked_rows(x.detach(), self.mask)
        if not all_finite(rows):
            raise CalibrationError(
                f"layer {name}: its input has NaN or Inf in calibration batch {self.batches - 1} "
                "(counted from 0); run the float model on it to find out why, or leave the layer "
                "in float"
            )
        self.observers[name].update(rows)
        self.rows[name] += rows.shape[0]


@torch.no_grad()  # not inference_mode: a model may keep a tensor, which must stay an ordinary one
def collect(
    model: nn.Module,
    layers: Mapping[str, ActivationScheme],
    data: Iterable[Any],
    observer: Plugin,
    *,
    per_channel: bool = False,
    progress: Progress = iter,
) -> dict[str, LayerStatistics]:
    """Observe the inputs of the named linear layers; the model is left as it was found.

    Args:
        layers: by name, what the ranges are for.
        data: batches: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. Where a mapping has an ``attention_mask`` [B, T], inputs of shape [B, T, C]
            or [B * T, C] are seen without the rows it masks.
        per_channel: one range for each input channel.

    Raises:
        CalibrationError: no batch, or not a batch; NaN or Inf (layer and batch are named); a
            layer that is not there or was not reached.
        ConfigError: no such observer or option.
    """
    modules = {name: _linear(model, name) for name in layers}
    observers = {
        name: make_observer(observer, layers[name], linear.in_features if per_channel else None)
        for name, linear in modules.items()
    }
    watch = _Watch(observers, dict.fromkeys(modules, 0))
    batches = progress(batches_of(data))
    with watching(modules, watch.see), eval_mode(model):
        for index, batch in enumerate(batches):
            watch.batches, watch.mask = index + 1, padding_mask(batch)
            call(model, batch, index)
    _refuse_unreached(watch)
    return {name: LayerStatistics(*observers[name].range(), watch.rows[name]) for name in modules}


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CalibrationError(f"there is no layer {name} in the {type(model).__name__}") from None
    if not isinstance(module, nn.Linear):
        raise CalibrationError(f"layer {name} is a {type(module).__name__}, not an nn.Linear")
    return module


def _refuse_unreached(watch: _Watch) -> None:
    if watch.batches == 0:
        raise CalibrationError("calibration got no batches; give some, and a generator only once")
    unreached = [name for name, rows in watch.rows.items() if rows == 0]
    if unreached:
        raise CalibrationError(
            f"calibration gave no rows to {', '.join(unreached[:5])}"
            f"{f' and {len(unreached) - 5} others' if len(unreached) > 5 else ''} in "
            f"{watch.batches} batches: they cannot have static scales; give data that reaches "
            "them (padding does not count), or a rule with dynamic activations or float"
        )
