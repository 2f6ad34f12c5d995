"""What is refused before anything is written names the layer and the remedy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ptq
from ptq.checkpoint.compressed_tensors import write
from ptq.config import Scheme
from ptq.errors import CheckpointError, UnsupportedError
from ptq.modules import QuantLinear
from tests.helpers import quantize_linears, tiny_llama


def llama(**changes: Any) -> LlamaForCausalLM:
    """One block that keeps vLLM's limits: all sizes are multiples of 128."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def refuses(model: torch.nn.Module, pattern: str, tmp_path: Path, **options: Any) -> None:
    with pytest.raises(UnsupportedError, match=pattern) as caught:
        write(model, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


Q_PROJ = r"layer model\.layers\.0\.self_attn\.q_proj "


@pytest.mark.parametrize(
    "scheme",
    [
        "w8a8",
        "w8a8-static",
        "w8a8-tensor",
        "w8a16",
        "w8a16-g128",
        "w4a16",
        "w4a16-g64-asym",
        "fp8",
        "fp8-a16",
    ],
)
def test_vllm_loads(scheme: str, tmp_path: Path) -> None:
    write(quantize_linears(llama(), scheme), tmp_path / "out")


@pytest.mark.parametrize(
    ("scheme", "pattern"),
    [
        ("w3a16-g32", "symmetric weights of 3 bits: not loadable by vLLM; choose 4 or 8 bits"),
        ("w8a16-asym", "asymmetric weights of 8 bits: not loadable by vLLM; choose 4 bits"),
        ("w8a16-tensor", "one scale for the whole weight.*per-channel"),
        ("w4a16-g16", "group size 16: not loadable by vLLM; choose 32, 64, 128, or per-channel"),
        ("w8a8-asym", "is w8a8-asym: with int8 activations it takes symmetric int8"),
        ("w4a8-g64", "is w4a8-g64: with int8 activations it takes symmetric int8"),
    ],
)
def test_schemes_that_vllm_does_not_load(scheme: str, pattern: str, tmp_path: Path) -> None:
    model = quantize_linears(llama(), scheme)
    refuses(model, Q_PROJ + ".*" + pattern, tmp_path)
    write(model, tmp_path / "out", engine="transformers")


def test_float8_in_groups(tmp_path: Path) -> None:
    grouped = {"weights": {"format": "float8_e4m3fn", "group_size": 32}}
    model = quantize_linears(llama(), Scheme.model_validate(grouped))
    refuses(model, Q_PROJ + "is fp8-a16-g32: it takes fp8 with a scale per.*choose fp8", tmp_path)
    write(model, tmp_path / "out", engine="transformers")


def test_float8_has_no_tiles_to_fill(tmp_path: Path) -> None:
    narrow = llama(hidden_size=192, num_attention_heads=4)
    write(quantize_linears(narrow, "fp8-a16"), tmp_path / "out")


def test_group_size_48(tmp_path: Path) -> None:
    model = quantize_linears(llama(hidden_size=192, num_attention_heads=4), "w4a16-g48")
    refuses(
        model, "has group size 48: not loadable by vLLM; choose 32, 64, or per-channel", tmp_path
    )


def test_shapes_that_vllm_does_not_load(tmp_path: Path) -> None:
    narrow = quantize_linears(llama(hidden_size=192, num_attention_heads=4), "w4a16-g64")
    refuses(narrow, "has 192 input channels, no multiple of 128.*choose w8a8", tmp_path)
    together = llama(num_attention_heads=4, num_key_value_heads=1)  # 128 + 32 + 32 rows
    write(quantize_linears(together, "w4a16-g32"), tmp_path / "out")
    odd = quantize_linears(llama(num_attention_heads=8, num_key_value_heads=1), "w4a16-g32")
    with pytest.raises(
        UnsupportedError, match=Q_PROJ + "has 160 output channels with its siblings"
    ):
        write(odd, tmp_path / "odd")


def test_siblings_that_become_one(tmp_path: Path) -> None:
    model = quantize_linears(llama(), "w8a8")
    attention = model.model.layers[0].self_attn
    attention.k_proj = torch.nn.Linear(128, 128, bias=False)
    refuses(model, "q_proj is w8a8, model.layers.0.self_attn.k_proj is float.*one scheme", tmp_path)
    model = quantize_linears(llama(), "w8a8-static")
    model.model.layers[0].mlp.up_proj.input_scale *= 2
    refuses(model, "gate_proj becomes one with its siblings, whose input_scale", tmp_path)


def test_a_quantized_head(tmp_path: Path) -> None:
    model = quantize_linears(llama(), "w8a8", head=True)
    refuses(model, "layer lm_head is the output head", tmp_path)
    write(model, tmp_path / "out", engine="transformers")
    assert isinstance(ptq.load(tmp_path / "out").lm_head, QuantLinear)


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    options = {"engine": "transformers"}
    model = quantize_linears(llama(), "w8a8")
    layer = model.model.layers[0].mlp.down_proj
    layer.scheme = layer.scheme.model_copy(update={"input_rotation": "hadamard"})
    refuses(
        model, r"down_proj rotates its input.*leave the step 'rotation' out", tmp_path, **options
    )
    model = llama(tie_word_embeddings=True)
    ptq.quantize(model, {"scheme": "w8a16", "embeddings": "w8a16"})
    refuses(model, "embed_tokens is a quantized embedding.*embeddings: float", tmp_path, **options)
    tensor = {"format": "int4", "symmetric": False, "granularity": "tensor"}
    scheme = Scheme.model_validate({"weights": tensor})
    refuses(quantize_linears(llama(), scheme), "one zero point for the whole", tmp_path, **options)
    plain = quantize_linears(torch.nn.Sequential(torch.nn.Linear(32, 8)), "w8a8")
    refuses(plain, "Sequential is no transformers model", tmp_path, **options)
    with pytest.raises(CheckpointError, match="nothing in this LlamaForCausalLM is quantized"):
        write(tiny_llama(), tmp_path / "out")


def test_scales_that_the_models_dtype_cannot_hold(tmp_path: Path) -> None:
    model = quantize_linears(llama().half(), "w8a8")
    model.model.layers[0].mlp.down_proj.scale.fill_(1e-9)
    refuses(model, "down_proj has scales that float16, the model's dtype, cannot hold", tmp_path)
    write(model, tmp_path / "out", scales="keep")
