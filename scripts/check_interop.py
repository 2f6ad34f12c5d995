#!/usr/bin/env python
"""Compare ptq with llm-compressor and compressed-tensors on checkpoints of a tiny random Llama.

written  ptq quantizes and writes, the peer's compressor decompresses, transformers loads and runs
made     llm-compressor quantizes and writes, ptq reads and runs
back     what was made is converted to ptq and to compressed-tensors again

weights is the largest difference from ptq's own dequantized weights, in ulps of the scale's dtype.
kernels and reference are the largest differences of ptq's logits from the peer's, in float32,
relative to the largest logit: by ptq's kernels, and by float layers with the weights that ptq read,
whose inputs are rounded to int8 as the peer does it (a dynamic scale is max|x| / 127.5 there, / 127
in ptq).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from arguments import script_parser
from peer_checkpoint import MADE
from peers import run_peer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ptq
from ptq.checkpoint import convert
from ptq.command import run_command
from ptq.errors import ConfigError
from ptq.model import replace_module
from ptq.modules import QuantLinear, quantized_layers
from ptq.report import Console

_SCRIPT = Path(__file__).with_name("peer_checkpoint.py")
WRITTEN = {
    "w8a8": "vllm",
    "w8a8-static": "vllm",
    "w8a16": "vllm",
    "w8a16-g128": "vllm",
    "w4a16": "vllm",
    "w4a16-g32": "vllm",
    "w4a16-g128": "vllm",
    "w4a16-g64-asym": "vllm",
    "w4a16-asym": "vllm",
    "w8a8-tensor": "vllm",
    "w8a16-tensor": "transformers",
    "w8a8-asym": "transformers",
    "w4a8-g64": "transformers",
    "w3a16-g32-asym": "transformers",
}
"""Schemes, and the engine whose limits they keep."""


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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--peer", required=True, metavar="llm-compressor=PYTHON", help="an environment that has it"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--scales", default="model", choices=("model", "keep"))
    parser.add_argument(
        "--ways", nargs="+", default=["written", "made"], choices=("written", "made")
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the checkpoints here")
    return parser.parse_args(arguments)


def interpreter(text: str) -> Path:
    """The interpreter of ``llm-compressor=PYTHON``.

    Raises:
        ConfigError: another name, or no such file.
    """
    name, _, python = text.partition("=")
    if name != "llm-compressor" or not Path(python).is_file():
        raise ConfigError(f"--peer {text}: give llm-compressor=PYTHON, an interpreter that has it")
    return Path(python)


def ulps(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """The largest difference, in units of the last place of ``wanted`` in ``dtype``."""
    _, exponent = torch.frexp(wanted.double())
    unit = torch.finfo(dtype).eps * torch.exp2((exponent - 1).double())
    unit = torch.where(wanted == 0, torch.finfo(dtype).smallest_normal, unit)
    return float(((found.double() - wanted.double()).abs() / unit).max())


def weights_ulp(model: nn.Module, weights: dict[str, Tensor]) -> float:
    """The largest difference of any quantized layer's weight from the peer's.

    Raises:
        ConfigError: the peer has not the same layers.
    """
    layers = quantized_layers(model)
    if {f"{name}.weight" for name in layers} != weights.keys():
        raise ConfigError("the peer found other quantized layers than ptq")
    worst = 0.0
    for name, layer in layers.items():
        wanted = layer.float_weight(layer.scale.dtype)
        worst = max(worst, ulps(weights[f"{name}.weight"], wanted, layer.scale.dtype))
    return worst


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
            if scale is None:
                scale = x.abs().amax(-1, keepdim=True) / 127.5
            x = (x / scale).round().clamp(-128, 127) * scale
        return nn.functional.linear(x, self.weight, self.layer.bias)


def float_model(directory: Path, dtype: torch.dtype) -> None:
    """Two blocks that keep vLLM's limits, with random weights and a tied head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM._from_config(config, dtype=dtype).save_pretrained(directory)


@dataclass(frozen=True)
class Comparison:
    """What all rows share."""

    root: Path
    python: Path
    dtype: torch.dtype
    rows: list[list[int]]

    def peer(self, action: str, directory: Path, *more: str) -> tuple[dict[str, Tensor], str]:
        """What the peer's script gives for a checkpoint: weights and logits, and how it loaded.

        Raises:
            ConfigError: it failed (its last line).
        """
        output = self.root / "peer.safetensors"
        command = [str(self.python), str(_SCRIPT), action, str(directory), "--output", str(output)]
        command += ["--tokens", str(self.root / "tokens.json"), *more]
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


def written(work: Comparison, scales: str) -> Iterator[Row]:
    """What ptq writes, read by the peer."""
    for scheme, engine in WRITTEN.items():
        model, _ = ptq.load_float(work.root / "float")
        ptq.quantize(model, scheme, calibration=[torch.tensor(work.rows)])
        source, target = work.root / scheme, work.root / f"{scheme}-ct"
        ptq.save(model, source)
        convert(source, target, "compressed-tensors", engine=engine, scales=scales)
        yield work.row("written", scheme, target, work.peer("read", target))


def made(work: Comparison, scales: str) -> Iterator[Row]:
    """What the peer makes, read by ptq, and converted there and back."""
    for number, scheme in enumerate(MADE):
        theirs = work.root / f"made-{number}"
        more = ("--model", str(work.root / "float"), "--scheme", scheme)
        yield work.row("made", scheme, theirs, work.peer("make", theirs, *more))
    for number, scheme in enumerate(MADE):
        theirs = work.root / f"made-{number}"
        there, back = work.root / f"ptq-{number}", work.root / f"back-{number}"
        convert(theirs, there, "ptq")
        convert(there, back, "compressed-tensors", scales=scales)
        yield work.row("back", scheme, back, work.peer("read", back))


def table_row(row: Row) -> str:
    """A row of the table."""
    cells = (f"{v:.2g}" if isinstance(v, float) else v for v in astuple(row))
    return f"| {' | '.join(cells)} |"


def check(options: argparse.Namespace, console: Console) -> None:
    python = interpreter(options.peer)
    rows = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        work = Comparison(root, python, getattr(torch, options.dtype), rows)
        console.say(
            "| | scheme | dtype | weights, ulp | kernels | reference | transformers loaded |"
        )
        console.say("|---|---|---|---|---|---|---|")
        (root / "tokens.json").write_text(json.dumps(rows), encoding="utf-8")
        float_model(root / "float", work.dtype)
        for way in options.ways:
            for row in {"written": written, "made": made}[way](work, options.scales):
                console.say(table_row(row))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: check(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
