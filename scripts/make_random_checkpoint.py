#!/usr/bin/env python
"""Write a Llama-shaped float checkpoint with random weights, one shard at a time.

No more than one block is in memory, so the checkpoint can be larger than that. It shows, without a
download, what quantizing a model of some size takes; what the model says is noise. The default
sizes are those of a model of 3 billion parameters (6.4 GB).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from arguments import add_sizes, script_parser
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from ptq.command import run_command
from ptq.config import ModelConfig, torch_dtype
from ptq.errors import ConfigError
from ptq.model import ModelSource, load_tokenizer
from ptq.report import Console

INDEX = "model.safetensors.index.json"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    sizes = {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "kv-heads": 8}
    add_sizes(parser, sizes | {"vocab": 128256, "positions": 4096})
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="stored"
    )
    parser.add_argument("--untied", action="store_true", help="give the head its own weight")
    parser.add_argument("--tokenizer", help="save this model's tokenizer along: directory or id")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def model_config(options: argparse.Namespace) -> LlamaConfig:
    """The sizes as transformers writes them.

    Raises:
        ConfigError: they do not go together.
    """
    if options.hidden % options.heads or (options.hidden // options.heads) % 2:
        raise ConfigError(f"--hidden {options.hidden} is no even multiple of {options.heads} heads")
    if options.heads % options.kv_heads:
        raise ConfigError(f"--heads {options.heads} is no multiple of {options.kv_heads} kv-heads")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocab,
        max_position_embeddings=options.positions,
        tie_word_embeddings=not options.untied,
        dtype=options.dtype,
        bos_token_id=None,
        eos_token_id=None,
    )


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of one block, by their names in it."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (hidden // config.num_attention_heads)
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def shards(config: LlamaConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of the tensors of each shard, by name: embeddings, each block, the end."""
    table = (config.vocab_size, config.hidden_size)
    yield {"model.embed_tokens.weight": table}
    for i in range(config.num_hidden_layers):
        yield {f"model.layers.{i}.{name}": shape for name, shape in block_shapes(config).items()}
    end: dict[str, tuple[int, ...]] = {"model.norm.weight": (config.hidden_size,)}
    yield end if config.tie_word_embeddings else {**end, "lm_head.weight": table}


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A norm's ones, or a matrix of normal values with the spread of an initialized model."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)


def write(options: argparse.Namespace) -> None:
    """The whole checkpoint, its index last.

    Raises:
        ConfigError: the sizes do not go together, or the directory is in use.
    """
    config = model_config(options)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"--out {options.out} exists and is not an empty directory")
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(ModelSource.resolve(ModelConfig(id=options.tokenizer)))
        if tokenizer is None or len(tokenizer) > config.vocab_size:
            found = "none" if tokenizer is None else f"one of {len(tokenizer)} tokens"
            raise ConfigError(
                f"--tokenizer {options.tokenizer}: expected one of at most {config.vocab_size} "
                f"tokens (--vocab), found {found}"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(options.out)
    if tokenizer is not None:
        tokenizer.save_pretrained(options.out)
    total = write_shards(config, options)
    print(f"{total / 1e9:.2f} GB in {options.out}")


def write_shards(config: LlamaConfig, options: argparse.Namespace) -> int:
    """The tensors and their index; returns their bytes."""
    generator = torch.Generator().manual_seed(options.seed)
    dtype, count, total = torch_dtype(options.dtype), config.num_hidden_layers + 2, 0
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards(config), 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        tensors = {key: random_tensor(shape, dtype, generator) for key, shape in shapes.items()}
        save_file(tensors, options.out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: write(options), Console())


if __name__ == "__main__":
    sys.exit(main())
