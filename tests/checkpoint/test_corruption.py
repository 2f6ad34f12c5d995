"""Every way in which a checkpoint can be wrong is an error that names what is wrong."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ptq.checkpoint import load, read_manifest, save, verify_files
from ptq.errors import CheckpointError
from tests.helpers import quantize_linears

CODES = "1.codes"


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    model = quantize_linears(plain_model(), "w8a16")
    save(model, directory / "single", extra_files={"README.md": "hello"})
    save(model, directory / "sharded", shard_bytes=600)
    return directory


@pytest.fixture
def single(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine / "single", tmp_path / "single"))


@pytest.fixture
def sharded(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine / "sharded", tmp_path / "sharded"))


def refuses(directory: Path, pattern: str, *, verify: bool = True, listed: bool = True) -> None:
    """load raises an error that matches, in one line, and verify_files finds it too."""
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load(directory, model=plain_model(), verify=verify)
    assert "\n" not in str(caught.value)
    if listed:
        assert any(re.search(pattern, problem) for problem in verify_files(directory))


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the right hash, as one who knows the format would."""
    path = directory / "ptq_manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    data.pop("manifest_sha256")
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    data["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(data))


def edit_shard(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_the_pristine_ones_load(single: Path, sharded: Path) -> None:
    for directory in (single, sharded):
        assert verify_files(directory) == []
        load(directory, model=plain_model())


def test_every_flipped_byte_of_the_data_names_its_tensor(single: Path) -> None:
    path = single / "model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    del header["__metadata__"]
    assert len(header) == 8
    for key, entry in header.items():
        first, end = entry["data_offsets"]
        for offset in (first, (first + end) // 2, end - 1):
            flip(path, start + offset)
            refuses(single, rf"tensor {re.escape(key)} in .*model\.safetensors is damaged")
            flip(path, start + offset)
    load(single, model=plain_model())


def test_without_verify_damage_is_not_looked_for(single: Path) -> None:
    flip(single / "model.safetensors", -1)
    load(single, model=plain_model(), verify=False)


def test_every_flipped_byte_of_the_header_is_an_error(single: Path) -> None:
    """Except in the value of its metadata, {"format": "pt"}, which means nothing to us."""
    path = single / "model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    metadata = range(raw.index(b"format"), raw.index(b"}"))
    for offset in range(0, start, 2):
        if offset not in metadata:
            flip(path, offset)
            refuses(single, r"model\.safetensors|tensor ", verify=False)
            flip(path, offset)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard(single: Path, keep: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuses(single, r"model\.safetensors is not a whole safetensors file", verify=False)


def test_a_shard_that_is_too_long(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    refuses(single, r"model\.safetensors is not a whole safetensors file", verify=False)


def test_a_missing_shard(sharded: Path) -> None:
    name = read_manifest(sharded).tensors[CODES].shard
    (sharded / name).unlink()
    refuses(sharded, rf"shard .*{name} is missing", verify=False)


def test_swapped_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    refuses(sharded, r"tensor \S+ is missing from .*00001-of-", verify=False)


def test_a_tensor_missing_from_its_shard(single: Path) -> None:
    edit_shard(single, lambda tensors: tensors.pop(CODES))
    refuses(single, r"tensor 1\.codes is missing from .*model\.safetensors", verify=False)


def test_a_tensor_too_many_in_a_shard(single: Path) -> None:
    edit_shard(single, lambda tensors: tensors.update(extra=torch.zeros(1)))
    refuses(single, "holds tensor extra, which ptq_manifest.json does not list", verify=False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_a_tensor_of_another_dtype(single: Path, dtype: torch.dtype) -> None:
    edit_shard(single, lambda tensors: tensors.update({CODES: tensors[CODES].to(dtype)}))
    name = str(dtype).removeprefix("torch.")
    refuses(single, rf"tensor 1\.codes is {name} \[16, 32\].*says int8 \[16, 32\]", verify=False)


def test_a_tensor_of_another_shape(single: Path) -> None:
    edit_shard(single, lambda tensors: tensors.update({CODES: tensors[CODES].reshape(32, 16)}))
    refuses(single, r"tensor 1\.codes is int8 \[32, 16\].*says int8 \[16, 32\]", verify=False)


def retype(directory: Path, key: str, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a tensor in the shard and in the manifest, so that the two agree."""
    edit_shard(directory, lambda tensors: tensors.update({key: convert(tensors[key])}))
    tensor = load_file(directory / "model.safetensors")[key]
    entry = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest(),
    }
    edit_manifest(directory, lambda data: data["tensors"][key].update(entry))
    assert verify_files(directory) == []


@pytest.mark.parametrize(
    ("key", "dtype"),
    [(CODES, "int32"), ("1.scale", "float16"), ("1.bias", "bfloat16"), ("0.weight", "int8")],
)
def test_a_consistent_checkpoint_with_the_wrong_dtype(single: Path, key: str, dtype: str) -> None:
    retype(single, key, lambda tensor: tensor.to(getattr(torch, dtype)))
    refuses(single, rf"tensor {re.escape(key)} is {dtype} .* but the model needs", listed=False)


@pytest.mark.parametrize("key", [CODES, "0.weight"])
def test_a_consistent_checkpoint_with_the_wrong_shape(single: Path, key: str) -> None:
    retype(single, key, lambda tensor: tensor.reshape(-1, 4))
    refuses(single, rf"tensor {re.escape(key)} is .*, 4\] .* but the model needs", listed=False)


def test_a_consistent_checkpoint_without_a_tensor(single: Path) -> None:
    edit_shard(single, lambda tensors: tensors.pop("3.scale"))
    edit_manifest(single, lambda data: data["tensors"].pop("3.scale"))
    refuses(single, r"tensor 3\.scale, which the model needs, is not in", listed=False)


def test_a_consistent_checkpoint_with_a_tensor_too_many(single: Path) -> None:
    edit_shard(single, lambda tensors: tensors.update({"3.zero_point": torch.zeros(8, 1)}))
    entry = {"dtype": "float32", "shape": [8, 1], "shard": "model.safetensors", "sha256": ""}
    edit_manifest(single, lambda data: data["tensors"].update({"3.zero_point": entry}))
    refuses(single, r"tensor 3\.zero_point of the checkpoint has no place", listed=False)


def test_a_layer_that_the_model_does_not_have(single: Path) -> None:
    edit_manifest(single, lambda data: data["layers"].update(head=data["layers"]["1"]))
    refuses(single, "quantized layer head, but Sequential has none", listed=False)


def test_a_layer_of_another_size(single: Path) -> None:
    edit_manifest(single, lambda data: data["layers"]["1"].update(out_features=17))
    refuses(single, r"layer 1 is Linear with .*\(32, 16\).*\(32, 17\)", listed=False)


def test_a_layer_where_the_model_has_something_else(single: Path) -> None:
    edit_manifest(single, lambda data: data["layers"].update({"0": data["layers"]["1"]}))
    refuses(single, "layer 0 is LayerNorm", listed=False)


def test_an_alias_of_nothing(single: Path) -> None:
    edit_manifest(single, lambda data: data["aliases"].update({"a.weight": "b.weight"}))
    refuses(single, r"tensor a\.weight is said to be b\.weight, which is not stored")


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data["layers"]["1"]["scheme"]["weights"].update(format="int4"),
        lambda data: data["tensors"][CODES].update(sha256="0" * 64),
        lambda data: data["versions"].update(torch="1.0"),
        lambda data: data.update(note="mine"),
        lambda data: data.pop("manifest_sha256"),
        lambda data: data.update(format_version=0),
    ],
)
def test_a_manifest_edited_by_hand(single: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = single / "ptq_manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    refuses(single, r"ptq_manifest\.json is edited or damaged", verify=False)


def test_a_manifest_that_was_only_reformatted(single: Path) -> None:
    path = single / "ptq_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8))
    load(single, model=plain_model())


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, '{"a": NaN}', "\udcff"])
def test_a_manifest_that_is_not_one(single: Path, text: str) -> None:
    (single / "ptq_manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    refuses(single, r"ptq_manifest\.json is .*damaged")


def test_a_manifest_with_unknown_or_missing_parts(single: Path) -> None:
    edit_manifest(single, lambda data: data["layers"]["1"]["scheme"].update(rotation=True))
    refuses(single, r"layers\.1\.scheme\.rotation: .*upgrade")
    edit_manifest(single, lambda data: data.pop("layers"))
    refuses(single, "layers: Field required")


def test_an_unknown_dtype_in_the_manifest(single: Path) -> None:
    edit_manifest(single, lambda data: data["layers"]["1"].update(bias="float4"))
    refuses(single, "unknown dtype 'float4'", listed=False)


def test_a_newer_format(single: Path) -> None:
    path = single / "ptq_manifest.json"
    path.write_text(json.dumps({"format_version": 2, "anything": "else"}))
    refuses(single, "has checkpoint format 2, this ptq reads up to 1; upgrade.*ptq-toolkit")


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\\b"]
)
def test_a_path_that_escapes_in_the_manifest(single: Path, name: str) -> None:
    shutil.copy(single / "model.safetensors", single.parent / "evil.safetensors")
    edit_manifest(single, lambda data: data["tensors"][CODES].update(shard=name))
    refuses(single, f"names the file {re.escape(repr(name))}, which is not in", verify=False)


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a//b", "a/../../b", "a/.."])
def test_a_path_that_escapes_among_the_files(single: Path, name: str) -> None:
    edit_manifest(single, lambda data: data["files"].update({name: data["files"]["README.md"]}))
    refuses(single, "which is not in its directory", verify=False)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "a/b", None, 7])
def test_a_path_that_escapes_in_the_index(sharded: Path, name: Any) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][CODES] = name
    path.write_text(json.dumps(index))
    refuses(sharded, f"names the file {re.escape(repr(name))}, which is not in", verify=False)


def test_an_index_that_disagrees_with_the_manifest(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    right = index["weight_map"].pop(CODES)
    path.write_text(json.dumps(index))
    refuses(sharded, rf"tensor 1\.codes is in None, but .* says {right}", verify=False)
    index["weight_map"] |= {CODES: right, "extra": right}
    path.write_text(json.dumps(index))
    refuses(sharded, rf"tensor extra is in {right}, but .* says None", verify=False)
    path.write_text(json.dumps({"weight_map": []}))
    refuses(sharded, "has no weight_map", verify=False)
    path.unlink()
    refuses(sharded, r"index\.json cannot be read", verify=False)


def test_an_edited_index_is_found_by_its_hash(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(path.read_text() + " ")
    refuses(sharded, r"index\.json is edited or damaged")
    load(sharded, model=plain_model(), verify=False)


@pytest.mark.parametrize("name", ["model.safetensors", "ptq_manifest.json"])
def test_a_symbolic_link_out_of_the_directory(single: Path, name: str) -> None:
    moved = single.parent / "elsewhere"
    (single / name).rename(moved)
    (single / name).symlink_to(moved)
    refuses(single, rf"{name} is a symbolic link out of", verify=False)


def test_symbolic_links_that_stay_inside(single: Path) -> None:
    (single / "model.safetensors").rename(single / "blob")
    (single / "model.safetensors").symlink_to("blob")
    link = single.parent / "link"
    link.symlink_to(single)
    load(link, model=plain_model())


def test_a_symbolic_link_to_itself(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").symlink_to("model.safetensors")
    refuses(single, r"model\.safetensors", verify=False)


def test_other_files_are_checked_by_verify_only(single: Path) -> None:
    (single / "README.md").write_text("edited")
    load(single, model=plain_model())
    assert [p for p in verify_files(single) if "README.md is edited or damaged" in p]
    (single / "README.md").unlink()
    assert [p for p in verify_files(single) if "README.md cannot be read" in p]


def test_verify_lists_every_problem(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    flip(shards[0], -1)
    shards[1].unlink()
    shards[2].write_bytes(b"")
    problems = verify_files(sharded)
    assert len(problems) == 3
    for problem, shard in zip(problems, shards, strict=False):
        assert shard.name in problem


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        (None, "is not a ptq checkpoint: it has no ptq_manifest.json$"),
        ({"model_type": "llama"}, "looks like a float model"),
        ({"quantization_config": {"quant_method": "hqq"}}, "in the 'hqq' format"),
        ({"quantization_config": {"quant_method": "ptq"}}, "copy the whole checkpoint again"),
        ([], "damaged"),
    ],
)
def test_directories_that_are_something_else(tmp_path: Path, config: Any, pattern: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    for call in (load, read_manifest):
        with pytest.raises(CheckpointError, match=pattern):
            call(tmp_path)
    assert len(verify_files(tmp_path)) == 1


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_formats_of_others_have_no_manifest(tmp_path: Path, name: str) -> None:
    section = {"quantization_config": {"quant_method": name}}
    (tmp_path / "config.json").write_text(json.dumps(section))
    pattern = f"in the '{name}' format, which ptq.load reads.*convert_checkpoint.py --format ptq"
    with pytest.raises(CheckpointError, match=pattern):
        read_manifest(tmp_path)


def test_nothing_there_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint at {tmp_path}/out"):
        load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load(tmp_path / "no" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        load(tmp_path / "file")


def test_an_edited_config(tmp_path: Path) -> None:
    from tests.helpers import tiny_llama

    save(quantize_linears(tiny_llama(), "w8a16"), tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "out" / name
        text = path.read_text()
        path.write_text(text.replace("bos_token_id", "eos_token_id"))
        assert path.read_text() != text
        with pytest.raises(CheckpointError, match=f"{name} is edited or damaged"):
            load(tmp_path / "out")
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            load(tmp_path / "out")
        path.write_text(text)
    load(tmp_path / "out")
    outside = tmp_path / "config.json"
    os.rename(tmp_path / "out/config.json", outside)
    (tmp_path / "out/config.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match="symbolic link"):
        load(tmp_path / "out", verify=False)
