"""What bench_model.py times: float models and quantized ones, each loaded from its own files."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from make_random_checkpoint import model_config, parse_arguments, write
from model_turns import Turns, own_memory, weight_bytes
from racing import timed
from transformers import AutoModelForCausalLM

from ptq.config import QuantizationConfig, as_config, torch_dtype
from ptq.recipe import make_recipe
from ptq.report import Console

RANDOM = {
    "llama-1b": {"layers": 16, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv-heads": 8},
    "llama-8b": {"layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv-heads": 8},
    "tiny": {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv-heads": 2,
             "vocab": 96, "positions": 64},
}  # fmt: skip
"""Shapes of models with random weights: of Llama 3.2 1B and 3.1 8B, and one to try a benchmark
with."""


@dataclass
class Candidate:
    """A model that takes turns.

    Args:
        turn: kind and tokens to seconds, as :class:`Turns`.
        weight_bytes: of what it holds now, the kernels' own forms included.
        load_seconds: from files to a model that can run; None where it is not measured.
        packages: versions of what it needs.
        more: what else is to be known of it.
    """

    name: str
    turn: Callable[[str, int], float]
    weight_bytes: Callable[[], int]
    load_seconds: float | None
    packages: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """How models are made.

    Args:
        dtype: of what stays float in the quantized models.
        head: scheme of the output head, or None.
        embeddings: scheme of the embeddings and a head that is tied to them, or None.
        memory: of ``ptq.tune``; None: the rule of thumb.
        longest: tokens that a turn may take.
        device: that the models run on.
    """

    dtype: str
    head: str | None
    embeddings: str | None
    memory: float | None
    longest: int
    device: torch.device

    def configuration(self, scheme: str, recipe: Any) -> QuantizationConfig:
        """Of ``ptq.quantize``."""
        asked = {"scheme": scheme, "recipe": recipe, "embeddings": self.embeddings}
        config = as_config(asked)
        if self.head is not None:
            asked["rules"] = [{"layers": "lm_head", "scheme": self.head}]
        if self.head is not None or make_recipe(config.recipe, config.scheme).unties:
            asked["tied_embeddings"] = "untie"
        return as_config(asked)


def random_in_memory(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A float model of random weights that no file has."""
    config = model_config(_random_request(name))
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_model(name: str, dtype: str, directory: Path) -> None:
    """Write a float model of random weights, one block at a time."""
    write(_random_request(name, "--out", str(directory), "--dtype", dtype))


def _random_request(name: str, *words: str) -> argparse.Namespace:
    """What make_random_checkpoint.py is asked for, of these sizes."""
    sizes = [word for key, size in RANDOM[name].items() for word in (f"--{key}", str(size))]
    return parse_arguments([*(words or ("--out", "")), *sizes])


def float_candidate(directory: Path, dtype: str, longest: int, device: torch.device) -> Candidate:
    """The float model in a dtype."""
    import ptq

    made: list[Any] = []
    seconds = timed(
        lambda: made.append(own_memory(ptq.load_float(directory, dtype=dtype)[0]).to(device))
    )
    return _candidate(dtype, made[0], longest, seconds)


def quantized_candidate(
    directory: Path, scheme: str, recipe: Any, request: Request, console: Console
) -> Candidate:
    """The float model quantized, saved, and loaded from what was saved.

    Recipes that look at data get random tokens: what they decide may depend on that.
    """
    import ptq

    made: list[Any] = []
    with TemporaryDirectory() as folder:
        quantized, _ = ptq.load_float(directory, dtype=request.dtype)
        config = request.configuration(scheme, recipe)
        tokens = random_tokens(quantized.config.get_text_config().vocab_size)
        ptq.quantize(quantized, config, calibration=tokens, console=console)
        out = Path(folder) / "out"
        ptq.save(quantized, out)
        del quantized
        seconds = timed(lambda: made.append(ptq.load(out, device=request.device)))
    name = scheme if recipe == "rtn" else f"{scheme} {make_recipe(config.recipe, config.scheme)}"
    candidate = _candidate(name, made[0], request.longest, seconds)
    if request.memory is not None:
        dtype = torch_dtype(request.dtype)
        tuning = ptq.tune(made[0], memory=request.memory, dtype=dtype, progress=console.bar("tune"))
        candidate.more["tuning"] = tuning.to_dict()
    return candidate


def random_tokens(vocabulary: int) -> list[torch.Tensor]:
    """Four sequences of 256 token ids."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, 256), generator=generator) for _ in range(4)]


def _candidate(name: str, model: Any, longest: int, seconds: float) -> Candidate:
    return Candidate(name, Turns(model, longest), lambda: weight_bytes(model), seconds)
