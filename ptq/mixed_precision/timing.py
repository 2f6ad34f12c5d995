"""What a layer takes under each scheme, by the fastest kernel of this machine (ptq.tune)."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ptq.algorithms import round_to_nearest
from ptq.config import Scheme
from ptq.errors import ConfigError
from ptq.modules import QuantLinear
from ptq.tuning import tune

Shape = tuple[int, int]
_COLD_BYTES = 64_000_000  # copies of a layer that take turns exceed a last-level cache


def layer_times(
    shapes: Mapping[str, Shape],
    schemes: Iterable[Scheme | None],
    *,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[tuple[Shape, Scheme | None], float]:
    """Milliseconds of one call, by shape (out, in) and scheme; None is float.

    Each shape is measured on made-up weights, as many layers of it as the model has (at most 64 MB
    of them), so that weights come from memory as they do in the model.

    Args:
        shapes: of the layers, by name.
        rows: tokens in a call: 1 when a sequence is generated.
        dtype: of the activations.

    Raises:
        ConfigError: rows is below one, or a scheme has static activations.
    """
    found: dict[tuple[Shape, Scheme | None], float] = {}
    wanted = [scheme for scheme in dict.fromkeys(schemes) if scheme is not None]
    for shape, count in Counter(shapes.values()).items():
        for scheme in wanted:
            if not _fits(scheme, shape):
                continue
            layers = _layers(shape, scheme, count, device)
            measured = tune(layers, rows=(rows,), dtype=dtype).layers[0]
            found[shape, scheme] = measured.times[measured.kernel(rows)][rows]
            found.setdefault((shape, None), measured.times["float"][rows])
    return found


def _fits(scheme: Scheme, shape: Shape) -> bool:
    if scheme.activations is not None and scheme.activations.mode == "static":
        raise ConfigError(
            f"budget of time: scheme {scheme} has static activations; give dynamic ones"
        )
    size = scheme.weights.group_size
    return size is None or shape[1] % size == 0


def _layers(shape: Shape, scheme: Scheme, count: int, device: torch.device) -> nn.ModuleList:
    """Layers of equal random weights, each with memory of its own."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / math.sqrt(shape[1])
    first = QuantLinear(round_to_nearest(weight.to(device), scheme.weights), scheme)
    copies = min(count, max(2, math.ceil(_COLD_BYTES / first.quantized_weight.nbytes)))
    made = nn.ModuleList()
    for _ in range(max(1, copies)):
        layer = QuantLinear(first.quantized_weight, scheme)
        for name, buffer in list(layer.named_buffers()):
            setattr(layer, name, buffer.clone())
        made.append(layer)
    return made
