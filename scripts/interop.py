"""What comparing with a peer takes: its figures for a checkpoint beside those of ptq."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peers import run_peer
from safetensors.torch import load_file
from torch import Tensor, nn

import ptq
from ptq.errors import ConfigError
from ptq.formats import INTEGERS
from ptq.model import FileNames, replace_module
from ptq.modules import QuantLinear, quantized_layers


@dataclass(frozen=True)
class Row:
    """One checkpoint, compared."""

    way: str
    scheme: str
    dtype: str
    weights_ulp: float
    kernels: float
    reference: float
    loaded: str


def ulps(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """The largest difference, in units of the last place of ``wanted`` in ``dtype``."""
    _, exponent = torch.frexp(wanted.double())
    unit = torch.finfo(dtype).eps * torch.exp2((exponent - 1).double())
    unit = torch.where(wanted == 0, torch.finfo(dtype).smallest_normal, unit)
    return float(((found.double() - wanted.double()).abs() / unit).max())


def weights_ulp(model: nn.Module, weights: dict[str, Tensor]) -> float:
    """The largest difference of any quantized layer's weight from the peer's.

    Args:
        weights: by their names in files, where experts have layers of their own.

    Raises:
        ConfigError: the peer has not the same layers.
    """
    names, wanted = FileNames(model), {}
    for name, layer in quantized_layers(model).items():
        known = [f"{part}.weight" in weights for part in names.parts(name)]
        parts = names.parts(name) if all(known) else names.usual_parts(name)
        weight = layer.float_weight(layer.scale.dtype)
        for part, rows in zip(parts, weight.chunk(len(parts)), strict=True):
            wanted[f"{part}.weight"] = rows
    if wanted.keys() != weights.keys():
        raise ConfigError("the peer found other quantized layers than ptq")
    return max(ulps(weights[key], rows, rows.dtype) for key, rows in wanted.items())


class Reference(nn.Module):
    """A quantized layer in float32, its input rounded to codes as the peer's emulation does it."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.float_weight(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        activations = self.layer.scheme.activations
        if activations is not None:
            assert activations.symmetric
            scale = self.layer.input_scale
            largest = x.abs().amax(-1, keepdim=True)
            if activations.format not in INTEGERS:
                scale = largest / 448
                x = (x / scale).to(torch.float8_e4m3fn).float() * scale
            else:
                scale = largest / 127.5 if scale is None else scale
                x = (x / scale).round().clamp(-128, 127) * scale
        return nn.functional.linear(x, self.weight, self.layer.bias)


@dataclass(frozen=True)
class Comparison:
    """What all rows share: the directory, the peer's interpreter and script, and the tokens."""

    root: Path
    python: Path
    dtype: torch.dtype
    script: Path
    rows: list[list[int]]

    def peer(self, action: str, directory: Path, *more: str) -> tuple[dict[str, Tensor], str]:
        """What the peer's script gives for a checkpoint: weights and logits, and how it loaded.

        Raises:
            ConfigError: it failed (its last line).
        """
        output = self.root / "peer.safetensors"
        command = [str(self.python), str(self.script), action, str(directory), *more]
        command += ["--tokens", str(self.root / "tokens.json"), "--output", str(output)]
        loaded = run_peer(command, f"the peer failed to {action} {directory.name}")["loaded"]
        return load_file(output), loaded

    def row(
        self, way: str, scheme: str, directory: Path, peer: tuple[dict[str, Tensor], str]
    ) -> Row:
        """ptq's reading of a checkpoint beside the peer's."""
        tensors, loaded = peer
        logits = tensors.pop("logits")
        model = ptq.load(directory)
        weights = weights_ulp(model, tensors)
        kernels = self.apart(model.to(torch.float32), logits)
        for name, layer in quantized_layers(model).items():
            replace_module(model, name, Reference(layer))
        dtype = str(self.dtype).removeprefix("torch.")
        return Row(way, scheme, dtype, weights, kernels, self.apart(model, logits), loaded)

    def apart(self, model: nn.Module, logits: Tensor) -> float:
        """How far the model's logits are from these, relative to the largest."""
        with torch.no_grad():
            own = model(torch.tensor(self.rows)).logits
        return float((own - logits).abs().max() / logits.abs().max())
