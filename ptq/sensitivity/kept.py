"""Predicted sensitivities in a file: they take minutes, and serve many budgets."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ptq.calibrate import TokenSet
from ptq.config import Scheme
from ptq.errors import CalibrationError
from ptq.model import read_layers
from ptq.sensitivity.fisher import Prediction

_FORMAT = "ptq-sensitivity-2"


def origin_of(model: nn.Module, tokens: TokenSet, how: str = "") -> str:
    """A hash of the text and of each linear layer's weight (its sum), which a prediction is of.

    Args:
        how: it was made, besides.
    """
    digest = hashlib.sha256((tokens.sha256 + how).encode())
    parameters = dict(model.named_parameters())
    for info in read_layers(model):
        weight = parameters.get(f"{info.name}.weight")
        if info.is_linear and weight is not None:
            digest.update(f"{info.name} {weight.double().sum().item():.6e}\n".encode())
    return digest.hexdigest()


def save_prediction(prediction: Prediction, path: str | os.PathLike[str]) -> None:
    """Write a prediction, whole or not at all."""
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    index = [[layer, s.model_dump(mode="json")] for layer, s in prediction.products]
    metadata = {
        "format": _FORMAT,
        "index": json.dumps(index),
        "tokens": str(prediction.tokens),
        "draws": str(prediction.draws),
        "origin": prediction.origin,
    }
    products = torch.stack(list(prediction.products.values()))
    slopes = torch.tensor(
        [prediction.slopes[key] for key in prediction.products], dtype=torch.float64
    )
    save_file({"products": products, "slopes": slopes}, temporary, metadata)
    os.replace(temporary, target)


def load_prediction(path: str | os.PathLike[str]) -> Prediction:
    """Read what :func:`save_prediction` wrote.

    Raises:
        CalibrationError: it is something else, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
            products, slopes = file.get_tensor("products"), file.get_tensor("slopes")
        index = [
            (layer, Scheme.model_validate(scheme))
            for layer, scheme in json.loads(metadata["index"])
        ]
        return Prediction(
            int(metadata["tokens"]),
            dict(zip(index, products, strict=True)),
            dict(zip(index, slopes.tolist(), strict=True)),
            int(metadata["draws"]),
            metadata["origin"],
        )
    except (OSError, SafetensorError, ValidationError, ValueError, KeyError) as error:
        problem = str(error).splitlines()[0]
        raise CalibrationError(
            f"{path} cannot be read as predicted sensitivities: {problem}; delete it, and it is "
            "made anew"
        ) from None


def refuse_other(
    prediction: Prediction,
    origin: str,
    wanted: Iterable[tuple[str, Scheme]],
    path: str | os.PathLike[str],
) -> None:
    """Whether a kept prediction is of this model and text, and has what is wanted.

    Raises:
        CalibrationError: it is not, or has not.
    """
    if prediction.origin != origin:
        raise CalibrationError(
            f"{path} is of another model or text, or of other codes; delete it, and it is made anew"
        )
    for layer, scheme in wanted:
        if (layer, scheme) not in prediction.products:
            raise CalibrationError(
                f"{path} has no prediction for {scheme} in layer {layer}; delete it, and it is "
                "made anew"
            )
