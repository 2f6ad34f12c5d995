"""What check_interop.py compares with GPTQModel: GPTQ and AWQ checkpoints, tensor by tensor."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from interop import Comparison, Row
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ptq
from ptq.checkpoint import convert
from ptq.modules import quantized_layers

SCRIPT = Path(__file__).with_name("peer_packed.py")
WRITTEN = (
    ("w4a16-g64", "gptq"),
    ("w4a16", "gptq"),
    ("w8a16-g32", "gptq"),
    ("w8a16", "gptq"),
    ("w4a16-g64-asym", "gptq"),
    ("w3a16-g32", "gptq"),
    ("w4a16-g128", "gptq-v2"),
    ("w4a16-g64-asym", "gptq-v2"),
    ("w8a16-g64-asym", "gptq-v2"),
    ("w3a16-g32-asym", "gptq-v2"),
    ("w2a16-g32-asym", "gptq-v2"),
    ("w4a16-g64", "awq"),
    ("w4a16-g128-asym", "awq"),
    ("w4a16-asym", "awq"),
)
"""Schemes, and the format that each is written in."""
MADE = (
    "gptq w4a16-g64",
    "gptq w8a16-g32",
    "gptq w4a16",
    "gptq-v2 w4a16-g64-asym",
    "gptq w4a16-g64-asym",
    "gptq w4a16-g64 (act-order)",
    "awq w4a16-g64-asym",
)
"""Formats and schemes that the peer's script knows."""
_OWN = ("qweight", "qzeros", "scales", "g_idx")


def written(work: Comparison, scales: str) -> Iterator[Row]:
    """What ptq writes: packed by the peer from the same weights, and loaded by it."""
    for scheme, layout in WRITTEN:
        model, _ = ptq.load_float(work.root / "float")
        ptq.quantize(model, scheme, calibration=[torch.tensor(work.rows)])
        source, target = work.root / scheme, work.root / f"{scheme}-{layout}"
        if not source.exists():
            ptq.save(model, source)
        convert(source, target, layout, engine="transformers", scales=scales)
        weights = work.root / "weights.safetensors"
        save_file(unpacked(ptq.load(target)), weights)
        tensors, loaded = work.peer("read", target, "--weights", str(weights))
        packed = {
            key.removeprefix("packed."): tensors.pop(key)
            for key in list(tensors)
            if key.startswith("packed.")
        }
        same = equal(packed, stored(target))
        yield work.row("written", f"{layout} {scheme}", target, (tensors, f"{loaded}; {same}"))


def made(work: Comparison, _: str) -> Iterator[Row]:
    """What the peer makes: read by ptq, and written again by way of ptq's own format."""
    for number, scheme in enumerate(MADE):
        theirs, there = work.root / f"made-{number}", work.root / f"ptq-{number}"
        back = work.root / f"back-{number}"
        more = ("--model", str(work.root / "float"), "--scheme", scheme)
        tensors, loaded = work.peer("make", theirs, *more)
        convert(theirs, there, "ptq")
        convert(there, back, scheme.split()[0], engine="transformers", scales="keep")
        same = equal(stored(theirs), stored(back))
        yield work.row("made", scheme, theirs, (tensors, f"{loaded}; {same}"))


def unpacked(model: nn.Module) -> dict[str, Tensor]:
    """What a packer is given: of each layer the float weight, scales, and zero points without sign;
    [out, in] and twice [out, groups], float32."""
    found = {}
    for name, layer in quantized_layers(model).items():
        weight, middle = layer.quantized_weight, 1 << (layer.scheme.weights.int_format.bits - 1)
        zeros = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
        found[f"{name}.weight"] = weight.dequantize()
        found[f"{name}.scales"] = weight.scale.float()
        found[f"{name}.zeros"] = zeros.float() + middle
    return found


def stored(directory: Path) -> dict[str, Tensor]:
    """The tensors of the quantized layers in a directory."""
    tensors: dict[str, Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
    return {key: t for key, t in tensors.items() if key.rpartition(".")[2] in _OWN}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str:
    """How many of the tensors of both are equal in dtype and bits, in words."""
    names = a.keys() | b.keys()
    same = [
        key
        for key in a.keys() & b.keys()
        if a[key].dtype == b[key].dtype and torch.equal(a[key], b[key])
    ]
    return f"{len(same)} of {len(names)} tensors bit-equal"
