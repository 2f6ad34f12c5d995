"""Whole checkpoints: ptq's own, and files as llm-compressor writes them."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import ptq
from ptq.checkpoint import CHECKPOINT_FORMATS, assert_same, convert, verify_files
from ptq.checkpoint.compressed_tensors import read, write
from ptq.config import Scheme, preset
from ptq.errors import CheckpointError, PTQError, UnsupportedError
from ptq.formats import INTEGERS
from ptq.modules import QuantLinear, quantized_layers
from tests.helpers import quant_linear, quantize_linears, tiny_bert, tiny_llama, tiny_tokens
from tests.tiny import tiny_tokenizer

DOWN = "model.layers.1.mlp.down_proj"
SCHEMES = (
    "w8a8",
    "w8a8-static",
    "w8a8-tensor",
    "w8a8-asym",
    "w4a8-g32",
    "w8a16",
    "w8a16-tensor",
    "w8a16-g32-asym",
    "w4a16",
    "w4a16-asym",
    "w4a16-g16",
    "w4a16-g32-asym",
    "w3a16-g32-asym",
    "w5a16-asym",
    "fp8",
    "fp8-a16",
    {"weights": {"format": "float8_e4m3fn", "granularity": "tensor"}},
    {"weights": {"format": "float8_e4m3fn", "group_size": 16}},
)


def exactly(model: nn.Module, directory: Path) -> None:
    CHECKPOINT_FORMATS["compressed-tensors"].write(model, directory)


def assert_same_codes(a: nn.Module, b: nn.Module) -> None:
    """Codes and zero points of all layers, bit for bit."""
    left, right = quantized_layers(a), quantized_layers(b)
    assert left.keys() == right.keys()
    for name, layer in left.items():
        assert torch.equal(layer.codes, right[name].codes), name
        zeros = layer.zero_point, right[name].zero_point
        assert (zeros[0] is None) == (zeros[1] is None)
        assert zeros[0] is None or torch.equal(*zeros), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_there_and_back(tmp_path: Path, scheme: str | dict[str, Any]) -> None:
    """ptq to compressed-tensors to ptq: the same bits where scales are kept."""
    wanted = scheme if isinstance(scheme, str) else Scheme.model_validate(scheme)
    model = quantize_linears(tiny_llama(tied=True, dtype=torch.bfloat16), wanted)
    ptq.save(model, tmp_path / "a", tokenizer=tiny_tokenizer())
    options: dict[str, Any] = {"engine": "transformers", "scales": "keep"}
    assert convert(tmp_path / "a", tmp_path / "ct", "compressed-tensors", **options) == []
    assert_same(model, ptq.load(tmp_path / "ct"))
    assert convert(tmp_path / "ct", tmp_path / "b", "ptq") == []
    back = ptq.load(tmp_path / "b")
    assert_same(model, back)
    assert torch.equal(model(tiny_tokens()).logits, back(tiny_tokens()).logits)
    assert verify_files(tmp_path / "b") == []
    for directory in ("ct", "b"):
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / directory / name).read_bytes() == (
                tmp_path / "a" / name
            ).read_bytes()


def test_what_was_read_is_saved_by_transformers_as_well(tmp_path: Path) -> None:
    exactly(quantize_linears(tiny_llama(), "w4a16-g16-asym"), tmp_path / "ct")
    model = ptq.load(tmp_path / "ct")
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(tmp_path / "again")
    assert_same(model, ptq.load(tmp_path / "again"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a16-g32-asym"])
def test_scales_in_the_models_dtype(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    model = quantize_linears(tiny_llama(dtype=dtype), scheme)
    notes = write(model, tmp_path / "out", engine="transformers")
    narrow = dtype != torch.float32 and not (dtype == torch.float16 and "g32" in scheme)
    assert [note.split(",")[0] for note in notes] == (
        [f"scales rounded to {str(dtype).removeprefix('torch.')}"] if narrow else []
    )
    loaded = ptq.load(tmp_path / "out")
    assert_same_codes(model, loaded)
    stored = load_file(tmp_path / "out/model.safetensors")
    for name, layer in quantized_layers(model).items():
        assert torch.equal(stored[f"{name}.weight_scale"], layer.scale.to(dtype))
        assert torch.equal(quantized_layers(loaded)[name].scale, layer.scale.to(dtype))
        eps = 0.5 * torch.finfo(dtype).eps
        a, b = (q.float_weight(torch.float32) for q in (layer, loaded.get_submodule(name)))
        assert ((a - b).abs() <= eps * a.abs() * 1.01).all()


def by_hand(model: nn.Module, directory: Path, names: str = "pack") -> dict[str, Tensor]:
    """A checkpoint as llm-compressor writes it, packed by the definition of the format."""
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        weight, bits = layer.quantized_weight, layer.scheme.weights.number_format.bits
        tensors[f"{name}.weight_scale"] = weight.scale
        if names in ("int", "float"):
            tensors[f"{name}.weight"] = weight.codes
            continue
        tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)
        tensors[f"{name}.weight_packed"] = nibbles(weight.codes, bits)
        if weight.zero_point is not None:
            words = nibbles(weight.zero_point.t(), bits).t().contiguous()
            tensors[f"{name}.weight_zero_point"] = words
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model).__name__]
    scheme = next(iter(layers.values())).scheme
    config["quantization_config"] = foreign_config(scheme, names)
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def nibbles(codes: Tensor, bits: int) -> Tensor:
    stored = codes.long() + (1 << (bits - 1))
    words = stored.reshape(codes.shape[0], -1, 32 // bits) << torch.arange(0, 32, bits)
    return words.sum(-1).to(torch.int32)


def foreign_config(scheme: Scheme, names: str) -> dict[str, Any]:
    """As version 0.19 of the package writes it, every key of it."""
    empty = {
        "actorder": None, "block_structure": None, "observer_kwargs": {}, "scale_dtype": None,
        "type": "float" if names == "float" else "int",
    }  # fmt: skip
    weights = {
        **empty,
        "num_bits": scheme.weights.number_format.bits,
        "symmetric": scheme.weights.symmetric,
        "strategy": scheme.weights.granularity,
        "group_size": scheme.weights.group_size,
        "dynamic": False,
        "observer": "memoryless_minmax",
        "zp_dtype": None if scheme.weights.symmetric else "torch.int8",
    }
    inputs = {
        **empty, "num_bits": 8, "symmetric": True, "strategy": "token", "group_size": None,
        "dynamic": True, "observer": None, "zp_dtype": None,
    }  # fmt: skip
    formats = {"pack": "pack-quantized", "int": "int-quantized", "float": "float-quantized"}
    fmt = (
        formats[names]
        if scheme.weights.format in INTEGERS or scheme.activations
        else "naive-quantized"
    )
    return {
        "config_groups": {
            "group_0": {
                "format": fmt,
                "input_activations": None if scheme.activations is None else inputs,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": weights,
            }
        },
        "format": fmt,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


@pytest.mark.parametrize(
    ("scheme", "names"),
    [
        ("w8a8", "int"),
        ("w8a16", "pack"),
        ("w4a16-g32", "pack"),
        ("w4a16-g32-asym", "pack"),
        ("w4a16-asym", "pack"),
        ("fp8", "float"),
        ("fp8-a16", "float"),
    ],
)
def test_files_of_another_writer(tmp_path: Path, scheme: str, names: str) -> None:
    """Float weights alone are called naive-quantized there."""
    model = quantize_linears(tiny_llama(tied=True), scheme)
    by_hand(model, tmp_path / "theirs", names)
    loaded = ptq.load(tmp_path / "theirs")
    assert_same(model, loaded)
    assert torch.equal(model(tiny_tokens()).logits, loaded(tiny_tokens()).logits)
    exactly(loaded, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key]), key


def test_integer_kernels_serve_what_was_read(tmp_path: Path) -> None:
    by_hand(quantize_linears(tiny_llama(tied=True), "w8a8"), tmp_path / "out", "int")
    layers = quantized_layers(ptq.load(tmp_path / "out"))
    assert len(layers) == 14
    assert {str(layer.scheme) for layer in layers.values()} == {"w8a8"}
    assert {layer.codes.dtype for layer in layers.values()} == {torch.int8}


def test_mixed_schemes(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    for number, block in enumerate(model.model.layers):
        quantize_linears(block, ("w8a8", "w4a16-g32-asym")[number])
    mlp = model.model.layers[0].mlp
    mlp.up_proj = quant_linear(nn.Linear(32, 64, bias=False), preset("w8a8-static"))
    mlp.gate_proj = nn.Linear(32, 64, bias=False)
    exactly(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert config["ignore"] == ["model.layers.0.mlp.gate_proj", "lm_head"]
    assert_same(model, ptq.load(tmp_path / "out"))
    assert_same(model, read(tmp_path / "out", model=tiny_llama(tied=True, seed=1)))


def test_an_encoder_with_biases_and_shards(tmp_path: Path) -> None:
    inputs = {"mode": "static", "symmetric": False}
    scheme = Scheme.model_validate({"weights": {"format": "int8"}, "activations": inputs})
    model = quantize_linears(tiny_bert(), scheme)
    ptq.save(model, tmp_path / "a")
    options: dict[str, Any] = {"engine": "transformers", "shard_bytes": 9000}
    convert(tmp_path / "a", tmp_path / "ct", "compressed-tensors", **options)
    assert len(list((tmp_path / "ct").glob("model-*.safetensors"))) > 2
    assert_same(model, ptq.load(tmp_path / "ct"))


def test_nothing_is_overwritten_and_nothing_is_left(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a8")
    ptq.save(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "ct", "compressed-tensors")
    before = sorted(tmp_path.rglob("*"))
    for source, target, to, pattern in (
        ("a", "ct", "compressed-tensors", "it stays as it is; choose another directory"),
        ("ct", "a", "ptq", "holds a ptq checkpoint already"),
        ("a", "new", "ptq", "is in the ptq format already"),
        ("ct", "new", "compressed-tensors", "is in the compressed-tensors format already"),
        ("nowhere", "new", "ptq", "no checkpoint at"),
    ):
        with pytest.raises(CheckpointError, match=pattern):
            convert(tmp_path / source, tmp_path / target, to)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_does_not_read_back_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize_linears(tiny_llama(), "w4a16-g32")

    def damaged(directory: Path) -> nn.Module:
        loaded = read(directory)
        loaded.get_submodule(DOWN).codes[3, 5] ^= 1
        return loaded

    writer = importlib.import_module("ptq.checkpoint.compressed_tensors.write")
    monkeypatch.setattr(writer, "_FORMAT", replace(writer._FORMAT, read=damaged))
    with pytest.raises(CheckpointError, match=rf"tensor {DOWN}\.codes does not read back"):
        write(model, tmp_path / "out", engine="transformers")
    assert list(tmp_path.iterdir()) == []


def test_pickles_and_code_stay_behind(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a8")
    write(model, tmp_path / "ct")
    for name in ("training_args.bin", "modeling.py", "LICENSE"):
        (tmp_path / "ct" / name).write_text(name)
    notes = convert(tmp_path / "ct", tmp_path / "b", "ptq")
    assert notes == ["left behind: modeling.py, training_args.bin"]
    assert (tmp_path / "b/LICENSE").read_text() == "LICENSE"
    assert verify_files(tmp_path / "b") == []


Edit = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (lambda t: t.pop(f"{DOWN}.weight_scale"), rf"tensor {DOWN}\.weight_scale.*not in"),
        (lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight.*not in"),
        (lambda t: t.update({f"{DOWN}.weight_g_idx": torch.zeros(64)}), r"weight_g_idx.*no place"),
        (
            lambda t: t.update(
                {f"{DOWN}.weight_packed": t[f"{DOWN}.weight_packed"][:, 1:].clone()}
            ),
            r"weight_packed is int32 \[32, 7\].*needs int32 \[32, 8\]",
        ),
        (
            lambda t: t.update({f"{DOWN}.weight_zero_point": torch.zeros(4, 2, dtype=torch.int8)}),
            r"weight_zero_point is int8 \[4, 2\].*needs int32",
        ),
        (
            lambda t: t[f"{DOWN}.weight_shape"].copy_(torch.tensor([64, 32])),
            rf"layer {DOWN}: weight_shape is \[64, 32\], the layer has \[32, 64\]",
        ),
        (
            lambda t: t[f"{DOWN}.weight_scale"].fill_(torch.nan),
            rf"layer {DOWN}: weight_scale has values that are not finite",
        ),
    ],
)
def test_damage(tmp_path: Path, edit: Edit, pattern: str) -> None:
    by_hand(quantize_linears(tiny_llama(tied=True), "w4a16-g32-asym"), tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=pattern):
        ptq.load(tmp_path / "out")


def test_codes_beyond_their_bits(tmp_path: Path) -> None:
    tensors = by_hand(quantize_linears(tiny_llama(tied=True), "w4a8-g32"), tmp_path / "out", "int")
    tensors[f"{DOWN}.weight"][0, 0] = 8
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match=f"layer {DOWN}: weight has codes beyond 4 bits"):
        ptq.load(tmp_path / "out")


def test_float8_codes_that_are_no_numbers(tmp_path: Path) -> None:
    tensors = by_hand(quantize_linears(tiny_llama(tied=True), "fp8"), tmp_path / "out", "float")
    for nan in (0x7F, -1):
        tensors[f"{DOWN}.weight"].view(torch.int8)[3, 5] = nan
        save_file(tensors, tmp_path / "out/model.safetensors")
        with pytest.raises(CheckpointError, match=f"layer {DOWN}: weight has codes that are no"):
            ptq.load(tmp_path / "out")


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_configs_that_do_not_fit(tmp_path: Path) -> None:
    root = tmp_path / "out"
    by_hand(quantize_linears(tiny_llama(tied=True), "w4a16-g32"), root)
    original = (root / "config.json").read_text()
    group = ("quantization_config", "config_groups", "group_0")

    def change(*path: str, value: Any) -> Callable[[dict[str, Any]], object]:
        def edit(data: dict[str, Any]) -> None:
            for key in path[:-1]:
                data = data[key]
            data[path[-1]] = value

        return edit

    for edit, pattern in (
        (
            change(*group, "weights", "group_size", value=24),
            "layer .*group size 24 does not divide",
        ),
        (change(*group, "targets", value=["Conv2d"]), "no group for any layer"),
        (change(*group, "targets", value=["LlamaMLP"]), "is a quantized LlamaMLP"),
        (change("architectures", value=["MyLlama"]), "MyLlama.*does not have.*model="),
        (change("quantization_config", value={"quant_method": "compressed-tensors"}), "required"),
    ):
        edit_config(root, edit)
        with pytest.raises(PTQError, match=pattern):
            ptq.load(root)
        (root / "config.json").write_text(original)
    ptq.load(root)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'.*nf4"),
        ({"load_in_8bit": True}, "'bitsandbytes'"),
        ({"quant_method": "torchao"}, "'torchao'.*tensor subclasses"),
        ({"quant_method": "hqq"}, "'hqq'.*fractions"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'gptq'.*'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "'awq'.*'gemv'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'.*a scale a block"),
        ({"quant_method": "of-tomorrow"}, "'of-tomorrow'"),
    ],
)
def test_other_formats_are_refused_by_name(
    tmp_path: Path, quantization: dict[str, Any], named: str
) -> None:
    tiny_llama().save_pretrained(tmp_path / "out")
    edit_config(tmp_path / "out", lambda data: data.update(quantization_config=quantization))
    for attempt in (ptq.load, lambda d: convert(d, tmp_path / "new", "ptq")):
        with pytest.raises(PTQError, match=f"{named}.*(quantize the float|and quantize it)"):
            attempt(tmp_path / "out")
    assert not (tmp_path / "new").exists()


def test_a_shard_outside_of_the_directory(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a8")
    write(model, tmp_path / "out", shard_bytes=20_000)
    index = tmp_path / "out/model.safetensors.index.json"
    data = json.loads(index.read_text())
    key = next(iter(data["weight_map"]))
    data["weight_map"][key] = "../x.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="not in its directory"):
        ptq.load(tmp_path / "out")


def test_unsupported_is_no_half_written_directory(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        write(quantize_linears(tiny_llama(), "w4a16-g32"), tmp_path / "a/b/out")
    assert list(tmp_path.iterdir()) == []
