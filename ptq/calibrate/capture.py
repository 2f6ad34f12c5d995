"""Running a model over calibration batches while observers watch its layers' inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq.config import Plugin
from ptq.core import is_finite
from ptq.errors import CalibrationError
from ptq.observers import Observer, make_observer

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
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
    batch: int = 0
    mask: Tensor | None = field(default=None, repr=False)

    def see(self, name: str, x: Tensor) -> None:
        rows = _unmasked(x.detach(), self.mask)
        if not is_finite(rows):
            raise CalibrationError(
                f"layer {name}: its input has NaN or Inf in calibration batch {self.batch}; "
                "run the float model on it to find out why, or leave the layer in float"
            )
        self.observers[name].update(rows)
        self.rows[name] += rows.shape[0]


@torch.no_grad()
def collect(
    model: nn.Module,
    layers: Sequence[str],
    data: Iterable[Any],
    observer: Plugin,
    *,
    per_channel: bool = False,
    progress: Progress = iter,
) -> dict[str, LayerStatistics]:
    """Observe the inputs of the named linear layers.

    Args:
        data: batches: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. Where a mapping has an ``attention_mask`` [B, T], inputs of shape [B, T, C]
            or [B * T, C] are seen without the rows it masks.
        per_channel: one range for each input channel.

    Raises:
        CalibrationError: no batch; NaN or Inf (layer and batch are named); a layer not reached.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    observers = {
        name: make_observer(observer, int(m.in_features) if per_channel else None)  # type: ignore[arg-type]
        for name, m in modules.items()
    }
    watch = _Watch(observers, dict.fromkeys(layers, 0))
    with _watching(modules, watch), _in_eval_mode(model):
        for index, batch in enumerate(progress(data)):
            watch.batch = index
            _run(model, batch, watch)
    _refuse_unreached(watch)
    return {name: LayerStatistics(*observers[name].range(), watch.rows[name]) for name in layers}


@contextmanager
def _watching(modules: Mapping[str, nn.Module], watch: _Watch) -> Iterator[None]:
    """Hooks on the layers, taken off whatever happens."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: watch.see(name, inputs[0])

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _run(model: nn.Module, batch: Any, watch: _Watch) -> None:
    parameter = next(model.parameters())
    watch.mask = None
    if isinstance(batch, Mapping):
        arguments = {k: _to(v, parameter.device) for k, v in batch.items()}
        mask = arguments.get("attention_mask")
        watch.mask = None if mask is None else mask.bool()
        if hasattr(getattr(model, "config", None), "use_cache"):
            arguments.setdefault("use_cache", False)
        model(**arguments)
    elif isinstance(batch, tuple | list):
        model(*[_to(v, parameter.device) for v in batch])
    else:
        model(_to(batch, parameter.device))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows [R, C] of x that are not padding."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    if x.shape[:-1] == mask.shape or (x.dim() == 2 and x.shape[0] == mask.numel()):
        return rows[mask.reshape(-1)]
    return rows


def _refuse_unreached(watch: _Watch) -> None:
    unreached = [name for name, rows in watch.rows.items() if rows == 0]
    if len(unreached) == len(watch.rows):
        raise CalibrationError("calibration saw no rows: there are no batches, or all are masked")
    if unreached:
        raise CalibrationError(
            f"calibration never reached {', '.join(unreached[:5])}"
            f"{' and others' if len(unreached) > 5 else ''}: they cannot have static scales; "
            "give data that reaches them, or a rule with dynamic activations or float"
        )
