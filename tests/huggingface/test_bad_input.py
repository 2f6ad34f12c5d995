"""What is wrong with a checkpoint is an error of one line with the file, the key and the remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from ptq.checkpoint import save
from ptq.errors import CheckpointError, PTQError, UnsupportedError
from ptq.huggingface.plugin import PtqConfig
from tests.helpers import quantize_linears, tiny_bert, tiny_llama

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(quantize_linears(tiny_llama(tied=True), "w4a16-g32-asym"), tmp_path / "out")
    return tmp_path / "out"


def refuses(directory: Path, *parts: str, error: type[PTQError] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        AutoModelForCausalLM.from_pretrained(directory)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def edit_section(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_another_version(checkpoint: Path, version: object) -> None:
    edit_section(checkpoint, lambda section: section.update(format_version=version))
    where = f"{checkpoint}/config.json: quantization_config.format_version is {version!r}"
    refuses(checkpoint, where, "this ptq reads 1", "pip install -U")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.update(groups=7), "groups: Input should be"),
        (lambda s: s.update(groups=[]), "groups: no layer is named"),
        (lambda s: s.update(groups=s["groups"] * 2), "is named twice"),
        (lambda s: s["groups"][0].update(layers=UP), "groups.0.layers: "),
        (lambda s: s["groups"][0]["scheme"]["weights"].update(format="int9"), "weights.format: "),
        (lambda s: s["groups"][0]["scheme"]["weights"].update(group_size=-1), "group_size: "),
        (lambda s: s["groups"][0].pop("scheme"), "groups.0.scheme: Field required"),
        (lambda s: s.update(bits=4), "bits: Extra inputs"),
        (lambda s: s.update(aliases={"a": 1}), "aliases.a: "),
        (lambda s: s.update(aliases={"a": "b", "b": "c"}), "a is said to be b, which is not"),
        (lambda s: s.update(aliases={f"{UP}.codes": f"{UP}.scale"}), "differ in shape or dtype"),
    ],
)
def test_a_damaged_section(checkpoint: Path, edit: Any, message: str) -> None:
    edit_section(checkpoint, edit)
    refuses(checkpoint, f"{checkpoint}/config.json: quantization_config.", message, "copy it again")


def test_of_an_early_ptq(checkpoint: Path) -> None:
    edit_section(checkpoint, lambda section: section.pop("groups"))
    refuses(checkpoint, "groups is missing", f"ptq.save(ptq.load('{checkpoint}'), 'NEW')")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.9.mlp.up_proj", "has none"),
        ("model.norm", "has a LlamaRMSNorm there"),
        ("score", "has none"),
        ("", "has a LlamaForCausalLM there"),
    ],
)
def test_a_layer_that_the_model_does_not_have(checkpoint: Path, name: str, found: str) -> None:
    edit_section(checkpoint, lambda section: section["groups"][0]["layers"].append(name))
    refuses(checkpoint, f"config.json: quantization_config.groups names the layer {name}", found)


def test_a_layer_of_the_base_that_another_class_does_not_have(checkpoint: Path) -> None:
    """A missing head may be left out, a missing block may not."""
    name = "model.layers.9.mlp.up_proj"
    edit_section(checkpoint, lambda section: section["groups"][0]["layers"].append(name))
    with pytest.raises(CheckpointError, match=r"layer model\.layers\.9\.mlp\.up_proj, but"):
        AutoModel.from_pretrained(checkpoint)


def test_a_layer_that_is_not_named(checkpoint: Path) -> None:
    """It would be float, and random."""
    edit_section(checkpoint, lambda section: section["groups"][0]["layers"].remove(UP))
    needs = f"model.safetensors: tensor {UP}.weight, which LlamaForCausalLM needs, is missing"
    refuses(checkpoint, needs, "copy")


@pytest.mark.parametrize(
    "key", [f"{UP}.codes", f"{UP}.scale", f"{UP}.zero_point", "model.norm.weight"]
)
@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel])
def test_a_missing_tensor(checkpoint: Path, key: str, cls: Any) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop(key))
    name = key.removeprefix("model.") if cls is AutoModel else key
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name}, which"):
        cls.from_pretrained(checkpoint)


def test_a_missing_tied_tensor(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    refuses(checkpoint, "tensor model.embed_tokens.weight, which")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.float32])
def test_a_tensor_of_another_dtype(checkpoint: Path, dtype: torch.dtype) -> None:
    key = f"{UP}.codes"
    edit_tensors(checkpoint, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    name = str(dtype).removeprefix("torch.")
    refuses(checkpoint, f"model.safetensors: tensor {key} is {name} [64, 16]", "needs uint8")


def test_a_scale_of_another_dtype(checkpoint: Path) -> None:
    key = f"{UP}.scale"
    edit_tensors(checkpoint, lambda tensors: tensors.update({key: tensors[key].float()}))
    refuses(checkpoint, f"tensor {key} is float32 [64, 1], but the model needs float16 [64, 1]")


def test_integers_for_a_float_tensor(checkpoint: Path) -> None:
    key = "model.norm.weight"
    edit_tensors(checkpoint, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    refuses(checkpoint, f"tensor {key} is int8 [32], but the model needs float32 [32]")


@pytest.mark.parametrize("key", [f"{UP}.codes", "model.norm.weight"])
def test_a_tensor_of_another_shape(checkpoint: Path, key: str) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    refuses(checkpoint, f"model.safetensors: tensor {key} is ", "of one checkpoint, copy it again")


def test_a_file_that_is_cut_off(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refuses(checkpoint, f"{path} is not a whole safetensors file", "copy it again")


def test_the_config_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    save(quantize_linears(tiny_bert(), "w8a16"), tmp_path / "bert")
    text = (tmp_path / "bert/config.json").read_text()
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tensor .*, which BertModel needs, is missing"):
        AutoModel.from_pretrained(checkpoint)


def test_a_state_dict_instead_of_files(checkpoint: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    state = load_file(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\.safetensors files.*without state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)


def test_a_float_model_is_not_quantized_on_the_way(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    with pytest.raises(UnsupportedError, match=r"load the float model, then ptq\.quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=PtqConfig())
