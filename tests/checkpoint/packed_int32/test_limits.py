"""What is refused before anything is written names the layer and the remedy."""

from pathlib import Path
from typing import Any

import pytest
import torch

import ptq
from ptq.checkpoint.packed_int32 import write
from ptq.config import Scheme
from ptq.errors import CheckpointError, UnsupportedError
from tests.checkpoint.compressed_tensors.test_limits import Q_PROJ, llama
from tests.helpers import quantize_linears, tiny_llama


def refuses(
    model: torch.nn.Module, layout: Any, pattern: str, tmp_path: Path, **options: Any
) -> None:
    with pytest.raises(UnsupportedError, match=pattern) as caught:
        write(model, tmp_path / "out", layout, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layout", "scheme"),
    [("gptq", "w4a16"), ("gptq", "w8a16-g128"), ("gptq-v2", "w4a16-g64"), ("awq", "w4a16-g32"),
     ("awq", "w4a16-g64-asym"), ("awq", "w4a16-asym")],
)  # fmt: skip
def test_vllm_loads(layout: Any, scheme: str, tmp_path: Path) -> None:
    write(quantize_linears(llama(), scheme), tmp_path / "out", layout)


@pytest.mark.parametrize(
    ("layout", "scheme", "pattern"),
    [
        ("gptq", "w4a16-g64-asym", "asymmetric weights of 4 bits: not.*choose symmetric weights"),
        ("gptq-v2", "w8a16-asym", "asymmetric weights of 8 bits: not.*choose symmetric weights"),
        ("gptq", "w3a16-g32", "symmetric weights of 3 bits: not loadable.*choose 4 or 8 bits"),
        ("gptq", "w4a16-g16", "group size 16: not loadable by vLLM; choose 32, 64, 128"),
        ("awq", "w4a16-g16", "group size 16: not loadable by vLLM; choose 32, 64, 128"),
    ],
)
def test_schemes_that_vllm_does_not_load(
    layout: Any, scheme: str, pattern: str, tmp_path: Path
) -> None:
    model = quantize_linears(llama(), scheme)
    refuses(model, layout, Q_PROJ + ".*" + pattern, tmp_path)
    write(model, tmp_path / "out", layout, engine="transformers")


def test_marlins_tiles(tmp_path: Path) -> None:
    """vLLM has other kernels for AWQ only."""
    narrow = quantize_linears(llama(hidden_size=192, num_attention_heads=4), "w4a16-g64")
    pattern = "has 192 input channels, no multiple of 128: not loadable by vLLM; leave it float"
    refuses(narrow, "gptq", pattern, tmp_path)
    write(narrow, tmp_path / "out", "awq")


@pytest.mark.parametrize(
    ("layout", "scheme", "pattern"),
    [
        ("gptq", "w8a8", "is w8a8, whose inputs are int8.*choose float inputs"),
        ("awq", "w4a8-g64", "is w4a8-g64, whose inputs are int8.*compressed-tensors"),
        ("awq", "w8a16", "has 8 bits, awq has 4; choose 4 bits"),
        ("gptq", "w5a16-g32", "has 5 bits, gptq has 2 or 3 or 4 or 8; choose"),
        ("gptq", "w8a16-tensor", "has one scale for the whole weight; choose per-channel"),
        ("gptq", "w4a16-g8", "has group size 8, for which GPTQModel.*16, 32, 64, 128, or per-"),
        ("awq", "w4a16-g8", "has group size 8, for which GPTQModel.*16, 32, 64, 128, or per-"),
    ],
)
def test_what_the_formats_cannot_hold(
    layout: Any, scheme: str, pattern: str, tmp_path: Path
) -> None:
    model = quantize_linears(llama(), scheme)
    refuses(model, layout, Q_PROJ + pattern, tmp_path, engine="transformers")


@pytest.mark.parametrize("layout", ["gptq", "gptq-v2", "awq"])
def test_layers_that_no_reader_would_find_or_run(layout: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"engine": "transformers"}
    model = quantize_linears(llama(), "w4a16-g32")
    layer = model.model.layers[0].mlp.down_proj
    layer.scheme = layer.scheme.model_copy(update={"input_rotation": "hadamard"})
    refuses(model, layout, "down_proj rotates its input.*'rotation'", tmp_path, **options)
    model = llama(tie_word_embeddings=True)
    ptq.quantize(model, {"scheme": "w4a16-g32", "embeddings": "w8a16"})
    refuses(model, layout, "embed_tokens is a quantized embedding", tmp_path, **options)
    model = quantize_linears(llama(), "w4a16-g32", head=True)
    refuses(model, layout, "layer lm_head is (the output head|not in)", tmp_path, **options)
    model = quantize_linears(llama(), "w4a16-g32")
    model.model.layers[0].mlp = quantize_linears(llama(), "w4a16-g64").model.layers[0].mlp
    refuses(model, layout, "gate_proj is w4a16-g64, .*q_proj is w4a16-g32", tmp_path, **options)
    plain = quantize_linears(torch.nn.Sequential(torch.nn.Linear(32, 8)), "w4a16-g32")
    refuses(plain, layout, "Sequential is no transformers model", tmp_path, **options)
    with pytest.raises(CheckpointError, match="nothing in this LlamaForCausalLM is quantized"):
        write(tiny_llama(), tmp_path / "out", layout)


@pytest.mark.parametrize(
    ("sizes", "layout", "scheme", "pattern"),
    [
        ({"intermediate_size": 396}, "gptq", "w4a16", "gate_proj has 396 output.*multiple of 8"),
        ({"intermediate_size": 396}, "awq", "w4a16", "gate_proj has 396 output.*multiple of 8"),
        ({"intermediate_size": 394}, "gptq", "w8a16", "gate_proj has 394 output.*multiple of 4"),
        ({"intermediate_size": 392}, "gptq", "w2a16", "gate_proj has 392 output.*multiple of 16"),
        ({"intermediate_size": 400}, "gptq", "w3a16", "gate_proj has 400 output.*multiple of 32"),
    ],
)
def test_sizes_that_fill_no_words(
    sizes: dict[str, int], layout: Any, scheme: str, pattern: str, tmp_path: Path
) -> None:
    model = quantize_linears(llama(**sizes), scheme)
    refuses(model, layout, pattern + "; leave it float", tmp_path, engine="transformers")


def test_inputs_that_fill_no_words(tmp_path: Path) -> None:
    """Only GPTQ packs along them."""
    model = llama(intermediate_size=396)
    mlp = model.model.layers[0].mlp
    kept = mlp.gate_proj, mlp.up_proj
    quantize_linears(model, "w4a16")
    mlp.gate_proj, mlp.up_proj = kept
    pattern = "down_proj has 396 input channels, no multiple of 8; leave it float"
    refuses(model, "gptq", pattern, tmp_path, engine="transformers")
    write(model, tmp_path / "out", "awq", engine="transformers")


def test_a_zero_point_that_version_1_cannot_hold(tmp_path: Path) -> None:
    model = quantize_linears(llama(), "w4a16-g32-asym")
    model.model.layers[0].mlp.down_proj.zero_point[5, 1] = -8
    pattern = "down_proj has a zero point 0, which version 1 cannot hold; choose --format gptq-v2"
    refuses(model, "gptq", pattern, tmp_path, engine="transformers")
    for layout in ("gptq-v2", "awq"):
        write(model, tmp_path / layout, layout, engine="transformers")


def test_a_float_layer_whose_name_is_a_part_of_anothers(tmp_path: Path) -> None:
    """Readers of AWQ look for substrings."""
    model = quantize_linears(llama(), "w4a16-g32")
    model.model.layers[0].mlp.down = torch.nn.Linear(8, 8)
    pattern = r"down_proj has a name that contains model\.layers\.0\.mlp\.down, which is float"
    refuses(model, "awq", pattern, tmp_path)


def test_what_to_know_of_asymmetric_version_1(tmp_path: Path) -> None:
    scheme = Scheme.model_validate(
        {"weights": {"format": "int4", "symmetric": False, "group_size": 32}}
    )
    model = quantize_linears(llama(), scheme)
    notes = write(model, tmp_path / "out", "gptq", engine="transformers")
    assert len(notes) == 1 and "asymmetric version 1" in notes[0]
    assert write(model, tmp_path / "v2", "gptq-v2", engine="transformers") == []
