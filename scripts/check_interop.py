#!/usr/bin/env python
"""Compare ptq with the toolkits whose formats it has, on checkpoints of a tiny random Llama.

llm-compressor: the compressed-tensors format

written  ptq quantizes and writes, the peer's compressor decompresses, transformers loads and runs
made     llm-compressor quantizes and writes, ptq reads and runs
back     what was made is converted to ptq and to compressed-tensors again
experts  the first two for Mixtral and Qwen3-MoE; asked for by name

gptqmodel (with optimum and accelerate): GPTQ and AWQ

written  ptq quantizes and writes; GPTQModel packs the same weights itself; transformers loads and
         runs what ptq wrote on GPTQModel's kernels, in float16
made     GPTQModel quantizes and writes, ptq reads and runs, and writes it again by way of ptq

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import packed_interop
import torch
from arguments import script_parser
from interop import Comparison, Row
from peer_checkpoint import MADE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import ptq
from ptq.checkpoint import convert
from ptq.command import run_command
from ptq.errors import ConfigError
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
    "fp8": "vllm",
    "fp8-a16": "vllm",
    "w8a16-tensor": "transformers",
    "w8a8-asym": "transformers",
    "w4a8-g64": "transformers",
    "w3a16-g32-asym": "transformers",
}
"""Schemes, and the engine whose limits they keep."""
EXPERTS = ("w4a16-g32", "w8a16", "fp8")
"""Schemes for mixtures; transformers does not load int8 experts (w8a8)."""
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--peer",
        required=True,
        metavar="NAME=PYTHON",
        help="llm-compressor or gptqmodel, and an interpreter that has it",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the float model (default: bfloat16; gptqmodel: float16)",
    )
    parser.add_argument("--scales", default="model", choices=("model", "keep"))
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["written", "made"],
        choices=("written", "made", "experts"),
        help="experts: mixtures, with llm-compressor",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the checkpoints here")
    return parser.parse_args(arguments)


def peer_of(text: str) -> tuple[str, Path]:
    """The name and the interpreter of ``NAME=PYTHON``.

    Raises:
        ConfigError: another name, or no such file.
    """
    name, _, python = text.partition("=")
    if name not in PEERS or not Path(python).is_file():
        raise ConfigError(
            f"--peer {text}: give {' or '.join(f'{known}=PYTHON' for known in PEERS)}, an "
            "interpreter that has it"
        )
    return name, Path(python)


def float_model(directory: Path, dtype: torch.dtype) -> None:
    """Two blocks that keep vLLM's limits, with random weights and a tied head."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    LlamaForCausalLM._from_config(config, dtype=dtype).save_pretrained(directory)


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


def experts(work: Comparison, scales: str) -> Iterator[Row]:
    """Mixtures: what ptq writes, read by the peer, and the other way round."""
    sizes = {**SIZES, "num_experts_per_tok": 2}
    mixtures = (
        MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)),
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=128, head_dim=64)
        ),
    )
    for model in mixtures:
        name = model.config.model_type
        model.to(work.dtype).save_pretrained(work.root / name)
        for scheme in EXPERTS:
            quantized, _ = ptq.load_float(work.root / name)
            ptq.quantize(quantized, scheme)
            source, target = work.root / f"{name}-{scheme}", work.root / f"{name}-{scheme}-ct"
            ptq.save(quantized, source)
            engine = "transformers" if "a16" in scheme else "vllm"
            convert(source, target, "compressed-tensors", engine=engine, scales=scales)
            yield work.row("written", f"{name} {scheme}", target, work.peer("read", target))
        for scheme in EXPERTS:
            theirs = work.root / f"{name}-{scheme}-made"
            more = ("--model", str(work.root / name), "--scheme", scheme)
            yield work.row("made", f"{name} {scheme}", theirs, work.peer("make", theirs, *more))


@dataclass(frozen=True)
class Peer:
    """A toolkit: the script that runs in its environment, the dtype of its checkpoints, and what is
    compared, by the names of ``--ways``."""

    script: Path
    dtype: str
    ways: Mapping[str, Callable[[Comparison, str], Iterator[Row]]]


PEERS = {
    "llm-compressor": Peer(
        _SCRIPT, "bfloat16", {"written": written, "made": made, "experts": experts}
    ),
    "gptqmodel": Peer(
        packed_interop.SCRIPT,
        "float16",
        {"written": packed_interop.written, "made": packed_interop.made},
    ),
}


def table_row(row: Row) -> str:
    """A row of the table."""
    cells = (f"{v:.2g}" if isinstance(v, float) else v for v in astuple(row))
    return f"| {' | '.join(cells)} |"


def check(options: argparse.Namespace, console: Console) -> None:
    name, python = peer_of(options.peer)
    peer = PEERS[name]
    rows = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        dtype = getattr(torch, options.dtype or peer.dtype)
        work = Comparison(root, python, dtype, peer.script, rows)
        console.say(
            "| | scheme | dtype | weights, ulp | kernels | reference | transformers loaded |"
        )
        console.say("|---|---|---|---|---|---|---|")
        (root / "tokens.json").write_text(json.dumps(rows), encoding="utf-8")
        float_model(root / "float", work.dtype)
        for way in options.ways:
            if way not in peer.ways:
                raise ConfigError(f"--ways {way}: {name} has {', '.join(peer.ways)}")
            for row in peer.ways[way](work, options.scales):
                console.say(table_row(row))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: check(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
