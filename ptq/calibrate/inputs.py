"""Calibration batches as a user may give them, and how a model is called with one."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import CalibrationError


def batches_of(data: Any) -> Iterable[Any]:
    """``data`` as it is, if it is an iterable of batches: a list, a ``DataLoader``, a generator.

    What one batch may be, says :func:`call`.

    Raises:
        CalibrationError: it is one batch and not several, or no batch at all.
    """
    kind = type(data).__name__
    if isinstance(data, str | bytes):
        raise CalibrationError(
            f"calibration batches: found {kind}; text goes into the configuration, as "
            "'calibration: {data: FILE}', and needs a tokenizer"
        )
    if isinstance(data, Tensor | Mapping):
        raise CalibrationError(
            f"calibration batches: found a single {kind}, expected several; "
            "pass a list of batches, as in calibration=[batch]"
        )
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration batches: {kind} is not iterable; pass a list or a DataLoader"
        )
    return data


def call(model: nn.Module, batch: Any, index: int, **options: Any) -> Any:
    """Run the model on one batch, moved to the device of its parameters.

    Args:
        batch: a tensor (the one argument), a tuple or list (positional arguments), or a mapping
            (keyword arguments; a model with ``config.use_cache`` also gets ``use_cache=False``).
        index: its number, for the error.
        options: further keyword arguments of the model.

    Returns:
        What the model returns.

    Raises:
        CalibrationError: the batch is something else.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        arguments = {key: _to(value, device) for key, value in batch.items()} | options
        if hasattr(getattr(model, "config", None), "use_cache"):
            arguments.setdefault("use_cache", False)
        return model(**arguments)
    if isinstance(batch, tuple | list):
        return model(*[_to(value, device) for value in batch], **options)
    if isinstance(batch, Tensor):
        return model(batch.to(device), **options)
    raise CalibrationError(
        f"calibration batch {index} is a {type(batch).__name__}; expected a tensor, a tuple "
        "of positional arguments or a mapping of keyword arguments"
    )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def padding_mask(batch: Any) -> Tensor | None:
    """bool [B, T], false where padded; None where the batch has no such mask or no padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


def unmasked_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [R, C] of a layer's input that are not padding.

    Only an input of shape [B, T, C] or [B * T, C] can be matched with a mask [B, T]; the rows of
    any other are all kept.
    """
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or not (
        x.shape[:-1] == mask.shape or (x.dim() == 2 and x.shape[0] == mask.numel())
    ):
        return rows
    return rows[mask.reshape(-1).to(x.device)]


def all_finite(rows: Tensor) -> bool:
    """No NaN and no infinity; one pass, without a copy."""
    if rows.numel() == 0:
        return True
    # aminmax passes NaN on.
    return bool(torch.stack(rows.aminmax()).isfinite().all())
