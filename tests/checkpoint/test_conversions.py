"""From every format to every other one, codes as they are; and formats that are only recognised."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import ptq
from ptq.checkpoint import CHECKPOINT_FORMATS, CONVERSIONS, assert_same, convert, vllm
from ptq.checkpoint.foreign import READ, REMEDIES, method_of
from ptq.errors import CheckpointError, UnsupportedError
from tests.helpers import quantize_linears, tiny_llama
from tests.huggingface.families import float_model

OPTIONS: dict[str, Any] = {"engine": "transformers", "scales": "keep"}


@pytest.mark.parametrize("first", CONVERSIONS)
def test_every_pair(tmp_path: Path, first: str) -> None:
    """The same bits, whatever was in between."""
    model = quantize_linears(tiny_llama(tied=True), "w4a16-g32")
    CHECKPOINT_FORMATS[first].write(model, tmp_path / first)
    for other in CONVERSIONS:
        if other != first:
            convert(tmp_path / first, tmp_path / other, other, **OPTIONS)
            assert_same(model, ptq.load(tmp_path / other))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_one_after_the_other(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures as vLLM loads them, but for its tiles."""
    scheme = "w4a16-g32" if family == "mixtral" else "w4a16-g16-asym"
    engine = "vllm" if family == "mixtral" else "transformers"
    monkeypatch.setattr(vllm, "_COLUMNS", 1)
    monkeypatch.setattr(vllm, "_ROWS", 1)
    model = float_model(family)
    ptq.quantize(model, scheme)
    ptq.save(model, tmp_path / "0")
    chain = ("compressed-tensors", "gptq-v2", "awq", "gptq", "compressed-tensors", "ptq")
    for number, name in enumerate(chain):
        options = {**OPTIONS, "engine": engine}
        convert(tmp_path / str(number), tmp_path / str(number + 1), name, **options)
    assert_same(model, ptq.load(tmp_path / str(len(chain))))


@pytest.mark.parametrize(
    ("scheme", "to", "remedy"),
    [
        ("w8a8", "gptq", "choose float inputs.*or --format compressed-tensors"),
        ("w8a8", "awq", "choose float inputs.*or --format compressed-tensors"),
        ("fp8-a16", "gptq-v2", "choose --format compressed-tensors"),
        ("w8a16", "awq", "choose 4 bits, or --format compressed-tensors"),
        ("w5a16", "gptq", "choose 2 or 3 or 4 or 8 bits, or --format compressed-tensors"),
        ("w8a16-tensor", "gptq", "choose per-channel scales or groups"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, scheme: str, to: str, remedy: str) -> None:
    ptq.save(quantize_linears(tiny_llama(), scheme), tmp_path / "a")
    with pytest.raises(UnsupportedError, match=f"layer .*{remedy}"):
        convert(tmp_path / "a", tmp_path / "b", to, engine="transformers")
    assert not (tmp_path / "b").exists()


def test_every_format_of_transformers_has_its_remedy(tmp_path: Path) -> None:
    """By name, with nothing but a config.json there: no weight is looked at."""
    names = {method_of({"quant_method": name}) for name in AUTO_QUANTIZER_MAPPING}
    for name in sorted(str(n) for n in names - {"ptq", *READ}):
        (tmp_path / "config.json").write_text(
            json.dumps({"quantization_config": {"quant_method": name}})
        )
        with pytest.raises(CheckpointError, match=f"in the {name!r} format.*ptq cannot load") as e:
            ptq.load(tmp_path)
        assert str(e.value).endswith(REMEDIES[name]) and "\n" not in str(e.value)
