"""Whether the numbers of a quantized layer mean something; their hashes say only who wrote them."""

from collections.abc import Mapping

from torch import Tensor, nn

from ptq.config import Scheme
from ptq.errors import CheckpointError
from ptq.formats import IntFormat
from ptq.modules import QuantEmbedding, QuantLinear

_DAMAGED = "the checkpoint is damaged, quantize the float model again"


def check_layers(layers: Mapping[str, QuantLinear | QuantEmbedding]) -> None:
    """Every scale is a number other than zero, of a sign that the scheme allows, every zero point
    is a code, and no code of a floating-point format is NaN.

    Layers on the meta device are left out.

    Raises:
        CheckpointError: the tensor is named.
    """
    for name, layer in layers.items():
        if not layer.codes.is_meta:
            _check(name, layer, layer.scheme)


def check_computed_size(model: nn.Module, root: object, stored_bytes: int) -> None:
    """Buffers that are computed from the config, and are in no file, may be as large as it says.

    Raises:
        CheckpointError: those of the model, on the meta device, are much larger than the files.
    """
    kept = model.state_dict().keys()
    size = sum(b.nbytes for n, b in model.named_buffers() if b.is_meta and n not in kept)
    if size > 10 * stored_bytes + _SOME:
        raise CheckpointError(
            f"config.json of {root} asks for {size:,} bytes of buffers, for a checkpoint of "
            f"{stored_bytes:,}; it is damaged or of another model, copy it again"
        )


_SOME = 256_000_000  # bytes of position tables and masks, which any model may have


def _check(name: str, layer: nn.Module, scheme: Scheme) -> None:
    weights = scheme.weights
    buffers = layer._buffers
    _check_scale(f"{name}.scale", buffers["scale"], weights.symmetric and weights.signed_scale)
    zero_point, fmt = buffers["zero_point"], weights.number_format
    if isinstance(fmt, IntFormat):
        _check_range(f"{name}.zero_point", zero_point, fmt.qmin, fmt.qmax)
    else:
        _check_float_codes(f"{name}.codes", buffers["codes"])
    _check_scale(f"{name}.input_scale", buffers.get("input_scale"), False)
    _check_range(f"{name}.input_zero_point", buffers.get("input_zero_point"), -128, 127)


def _check_scale(name: str, scale: Tensor | None, signed: bool) -> None:
    if scale is None:
        return
    problem = None
    if not bool(scale.isfinite().all()):
        problem = "NaN or infinite"
    elif not bool(scale.all()):
        problem = "zero"
    elif not signed and bool((scale < 0).any()):
        problem = "negative"
    if problem is not None:
        raise CheckpointError(f"tensor {name} has scales that are {problem}; {_DAMAGED}")


def _check_range(name: str, codes: Tensor | None, low: int, high: int) -> None:
    if codes is None or not codes.numel():
        return
    if int(codes.min()) < low or int(codes.max()) > high:
        raise CheckpointError(f"tensor {name} has values outside of {low} to {high}; {_DAMAGED}")


def _check_float_codes(name: str, codes: Tensor | None) -> None:
    assert codes is not None
    if bool(((codes & 0x7F) == 0x7F).any()):  # of float8_e4m3fn
        raise CheckpointError(f"tensor {name} has codes that are NaN; {_DAMAGED}")
