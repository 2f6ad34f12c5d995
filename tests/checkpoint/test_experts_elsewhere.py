"""Mixtures and Conv1D in formats of other toolkits: the float files' names, the same codes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ptq
from ptq.checkpoint import (
    CHECKPOINT_FORMATS,
    assert_same,
    compressed_tensors,
    convert,
    packed_int32,
    vllm,
)
from ptq.errors import CheckpointError, UnsupportedError
from ptq.modules import quantized_layers
from tests.huggingface.families import float_model, output

MIXTURES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
"""What the files of each call the gate, what it gates, and the way back."""
FORMATS = [
    ("compressed-tensors", "w4a16-g16"),
    ("compressed-tensors", "w8a16"),
    ("compressed-tensors", "w8a16-tensor"),
    ("compressed-tensors", "fp8"),
    ("gptq", "w4a16-g32"),
    ("gptq-v2", "w4a16-g32"),
    ("awq", "w4a16-g32-asym"),
]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def owners(directory: Path) -> set[str]:
    return {key.rpartition(".")[0] for key in stored(directory)}


@pytest.fixture(autouse=True)
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models are too narrow for Marlin's tiles, which test_limits.py is about."""
    monkeypatch.setattr(vllm, "_COLUMNS", 1)
    monkeypatch.setattr(vllm, "_ROWS", 1)


def write(model: nn.Module, directory: Path, name: Any) -> None:
    """For who loads it: vLLM where transformers does not load experts."""
    if name in packed_int32.LAYOUTS:
        packed_int32.write(model, directory, name, scales="keep")
    else:
        CHECKPOINT_FORMATS[name].write(model, directory)


@pytest.mark.parametrize(("name", "scheme"), FORMATS)
@pytest.mark.parametrize("family", MIXTURES)
def test_there_and_back(tmp_path: Path, family: str, name: str, scheme: str) -> None:
    """The files have the layers that transformers writes of the float model, and no others."""
    model = float_model(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    ptq.quantize(model, scheme)
    write(model, tmp_path / "out", name)
    assert owners(tmp_path / "out") == owners(tmp_path / "float")
    back = ptq.load(tmp_path / "out")
    assert_same(model, back)
    assert torch.equal(output(model), output(back))


@pytest.mark.parametrize("family", MIXTURES)
def test_each_part_has_the_codes_of_its_rows(tmp_path: Path, family: str) -> None:
    """By the definition: the gate's rows come first, and int8 codes are stored as they are."""
    model = float_model(family)
    ptq.quantize(model, "w8a8")
    compressed_tensors.write(model, tmp_path / "out")
    files = stored(tmp_path / "out")
    gate, up, down = MIXTURES[family]
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    for number in range(4):
        expert = f"model.layers.1.{block}.experts.{number}"
        own = model.get_submodule(f"model.layers.1.mlp.experts.{number}")
        half = own.gate_up_proj.codes.shape[0] // 2
        for part, rows in ((gate, slice(half)), (up, slice(half, None))):
            assert torch.equal(files[f"{expert}.{part}.weight"], own.gate_up_proj.codes[rows])
            scale = files[f"{expert}.{part}.weight_scale"]
            assert torch.equal(scale, own.gate_up_proj.scale[rows])
        assert torch.equal(files[f"{expert}.{down}.weight"], own.down_proj.codes)


@pytest.mark.parametrize("family", MIXTURES)
def test_files_with_the_names_of_another_writer(tmp_path: Path, family: str) -> None:
    """llm-compressor calls an expert's layers the same in every model, and so does its config."""
    model = float_model(family)
    ptq.quantize(model, {"scheme": "w8a8", "rules": [{"layers": "*.experts.*", "scheme": "w8a16"}]})
    root = tmp_path / "out"
    compressed_tensors.write(model, root, engine="transformers", scales="keep")
    usual = dict(zip(MIXTURES[family], MIXTURES["qwen3_moe"], strict=True))
    renamed = {
        re.sub(r"(experts\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{usual[m[2]]}.", key): tensor
        for key, tensor in stored(root).items()
    }
    save_file(renamed, root / "model.safetensors")
    config = json.loads((root / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    for group in groups.values():
        if any("experts" in target for target in group["targets"]):
            group["targets"] = [r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$", *group["targets"]]
            group["targets"] = [t for t in group["targets"] if not t.startswith("re:^")]
    (root / "config.json").write_text(json.dumps(config))
    assert_same(model, ptq.load(root))


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq-v2", "awq"])
def test_experts_that_stay_float(tmp_path: Path, family: str, name: str) -> None:
    """All of a block, or one of them, apart in the files; and the routers are said to be float."""
    model = float_model(family)
    model.save_pretrained(tmp_path / "float")
    rules = [
        {"layers": "*.1.mlp.experts.*", "scheme": "float"},
    ]
    if name == "compressed-tensors":  # vLLM has all experts of a block in one way
        rules.append({"layers": "*.1.mlp.experts.2.gate_up_proj", "scheme": "w4a16-g32"})
    if family == "mixtral":
        rules.append({"layers": "*.0.mlp.experts.*", "scheme": "float"})
    ptq.quantize(model, {"scheme": "w4a16-g32", "rules": rules})
    before = {name: type(module) for name, module in model.named_modules()}
    want = output(model)
    write(model, tmp_path / "out", name)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(output(model), want)
    assert owners(tmp_path / "out") == owners(tmp_path / "float")
    back = ptq.load(tmp_path / "out")
    assert_same(model, back)
    assert torch.equal(output(back), want)
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    keys = {"compressed-tensors": "ignore", "gptq-v2": "dynamic", "awq": "modules_to_not_convert"}
    kept = " ".join(section[keys[name]]).replace("\\", "")
    gate, up, down = MIXTURES[family]
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    for layer in ("gate", f"experts.0.{gate}", f"experts.2.{down}", "experts.0.up_proj"):
        assert f"model.layers.1.{block}.{layer}" in kept
    part = f"model.layers.1.{block}.experts.2.{up}"
    assert (part in kept) == (name != "compressed-tensors")


def test_parts_that_are_not_alike(tmp_path: Path) -> None:
    model = float_model("mixtral")
    ptq.quantize(model, "w8a16-tensor")
    root = tmp_path / "out"
    write(model, root, "compressed-tensors")
    files = stored(root)
    part = "model.layers.1.block_sparse_moe.experts.2.w3"
    files[f"{part}.weight_scale"] *= 2
    save_file(files, root / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"2\.w1 and .*2\.w3 are one.*a scale of its own"):
        ptq.load(root)
    del files[f"{part}.weight_scale"]
    save_file(files, root / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor .*2\.w3\.weight_scale.*not in the check"):
        ptq.load(root)
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*experts.1.w3")
    (root / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"1\.w1 and .*1\.w3 are one layer.*different sch"):
        ptq.load(root)


def test_two_tensors_that_are_the_same(tmp_path: Path) -> None:
    model = float_model("mixtral")
    ptq.quantize(model, "w4a16-g16")
    write(model, tmp_path / "out", "compressed-tensors")
    files = stored(tmp_path / "out")
    files["model.layers.0.mlp.gate.weight"] = torch.zeros(4, 32)
    save_file(files, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match=r"two tensors .*layers\.0\.mlp\.gate\.weight"):
        ptq.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq"])
def test_experts_that_files_hold_as_one(tmp_path: Path, name: str) -> None:
    model = float_model("gpt_oss")
    ptq.quantize(model, "w4a16-g16")
    with pytest.raises(UnsupportedError, match=r"of GptOssForCausalLM hold as one.*ptq\.save"):
        write(model, tmp_path / "out", name)
    float_experts = {"layers": "*.experts.*", "scheme": "float"}
    model = float_model("gpt_oss")
    ptq.quantize(model, {"scheme": "w4a16-g16", "rules": [float_experts]})
    CHECKPOINT_FORMATS[name].write(model, tmp_path / "out")
    assert_same(model, ptq.load(tmp_path / "out"))


@pytest.mark.parametrize(
    ("scheme", "experts", "pattern"),
    [
        ("w8a8", "w4a16-g32-asym", "has asymmetric.*for experts.*choose symmetric"),
        ("w8a8", "fp8-a16", "is fp8-a16: for experts it takes fp8 inputs.*choose fp8"),
        ("w8a8", "w8a8-static", "is w8a8-static: for experts.*choose w8a8"),
        ("w8a8", "w8a8-tensor", "is w8a8-tensor: for experts.*choose w8a8"),
    ],
)  # fmt: skip
def test_experts_that_vllm_does_not_load(
    tmp_path: Path, scheme: str, experts: str, pattern: str
) -> None:
    model = float_model("mixtral")
    rules = [{"layers": "*.experts.*", "scheme": experts}]
    data = [{"input_ids": torch.arange(3, 43)[None]}]
    ptq.quantize(model, {"scheme": scheme, "rules": rules}, calibration=data)
    with pytest.raises(UnsupportedError, match=rf"experts\.0\.gate_up_proj {pattern}"):
        compressed_tensors.write(model, tmp_path / "out")


def test_experts_of_one_block_are_alike_in_vllm(tmp_path: Path) -> None:
    model = float_model("mixtral")
    ptq.quantize(model, {"scheme": "w8a8", "rules": [{"layers": "*.0.*.3.down*", "scheme": "fp8"}]})
    with pytest.raises(UnsupportedError, match=r"3\.down_proj is fp8: not.*one scheme"):
        compressed_tensors.write(model, tmp_path / "out")


def test_experts_that_transformers_does_not_load(tmp_path: Path) -> None:
    for scheme in ("w8a8", "w4a16-g16-asym"):
        model = float_model("mixtral")
        ptq.quantize(model, scheme)
        with pytest.raises(UnsupportedError, match=f"is {scheme} and part of fused.*engine vllm"):
            compressed_tensors.write(model, tmp_path / "out", engine="transformers")
    model = float_model("mixtral")
    ptq.quantize(model, "w4a16-g32")
    for layout in packed_int32.LAYOUTS:
        with pytest.raises(UnsupportedError, match=f"does not load from {layout}.*--engine vllm"):
            packed_int32.write(model, tmp_path / "out", layout, engine="transformers")
    model = float_model("mixtral")
    ptq.quantize(model, {"scheme": "w8a16", "rules": [{"layers": "*.1.*_proj", "scheme": "fp8"}]})
    with pytest.raises(UnsupportedError, match="is fp8, others are w8a16.*one scheme"):
        compressed_tensors.write(model, tmp_path / "out", engine="transformers")


@pytest.mark.parametrize("layout", ["gptq", "gptq-v2"])
def test_conv1d(tmp_path: Path, layout: Any) -> None:
    """Codes are of the transposed weight, as GPTQModel packs it; a float one stays as it is."""
    model = float_model("gpt2")
    rules = [{"layers": "*.0.attn.*", "scheme": "float"}]
    ptq.quantize(model, {"scheme": "w4a16-g16", "rules": rules})
    packed_int32.write(model, tmp_path / "out", layout, engine="transformers", scales="keep")
    files = stored(tmp_path / "out")
    assert files["transformer.h.1.mlp.c_fc.qweight"].shape == (32 // 8, 128)
    assert files["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    back = ptq.load(tmp_path / "out")
    assert_same(model, back)
    assert torch.equal(output(model), output(back))
    assert len(quantized_layers(back)) == 6


@pytest.mark.parametrize("family", ["llava", "vit", "gpt_neox", "clip"])
def test_layers_that_files_call_otherwise(tmp_path: Path, family: str) -> None:
    model = float_model(family)
    model.save_pretrained(tmp_path / "float")
    ptq.quantize(model, "w8a8")
    compressed_tensors.write(model, tmp_path / "out", scales="keep")
    assert owners(tmp_path / "out") == owners(tmp_path / "float")
    assert_same(model, ptq.load(tmp_path / "out"))
    convert(tmp_path / "out", tmp_path / "back", "ptq")
    assert_same(model, ptq.load(tmp_path / "back"))
