"""No damaged byte is loaded in silence: what loads is the model that was saved, bit for bit."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

import ptq
from ptq.checkpoint import assert_same, verify_bytes
from ptq.checkpoint.outputs import model_outputs
from ptq.errors import CheckpointError, PTQError
from tests.checkpoint.damages import damages
from tests.helpers import quantize_linears, tiny_llama
from tests.tiny import tiny_tokenizer

TRIES = 48
TRANSFORMERS = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""What transformers raises for files that it reads before ptq does."""
Sample = tuple[Path, nn.Module]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Sharded, with a tokenizer."""
    root = tmp_path_factory.mktemp("damage") / "out"
    model = quantize_linears(tiny_llama(dtype=torch.bfloat16), "w4a16-g32-asym")
    ptq.save(model, root, tokenizer=tiny_tokenizer(), shard_bytes=20_000)
    return root, ptq.load(root)


def came_of(read: Callable[[Path], Any], root: Path, whole: nn.Module, refusals: Any) -> str:
    try:
        found = read(root)
    except refusals:
        return "refused"
    try:
        assert_same(found, whole)
    except CheckpointError:
        return "silent"
    return "the same" if model_outputs(found) == model_outputs(whole) else "silent"


def count(pristine: Sample, root: Path, seed: int, tries: int) -> dict[str, Counter[str]]:
    """What came of loading, for the files that were damaged."""
    shutil.copytree(pristine[0], root)
    counts: dict[str, Counter[str]] = {"load": Counter(), "from_pretrained": Counter()}
    for what, path in damages(root, seed, tries):
        assert verify_bytes(root), what
        came = came_of(ptq.load, root, pristine[1], PTQError)
        assert came != "silent", what
        counts["load"][came] += 1
        came = came_of(
            AutoModelForCausalLM.from_pretrained, root, pristine[1], (PTQError, *TRANSFORMERS)
        )
        assert came != "silent" or path.suffix == ".json", f"{what}: {came}"
        counts["from_pretrained"][came] += 1
    assert verify_bytes(root) == []
    return counts


def test_random_flips_and_cuts(pristine: Sample, tmp_path: Path) -> None:
    counts = count(pristine, tmp_path / "out", seed=0, tries=TRIES)
    assert counts["load"]["refused"] > TRIES / 2
    assert counts["from_pretrained"]["refused"] > TRIES / 4


def test_a_flip_of_any_tensor_is_found_by_from_pretrained(pristine: Sample, tmp_path: Path) -> None:
    root = Path(shutil.copytree(pristine[0], tmp_path / "out"))
    for path in root.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 0x40
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"tensor \S+ in \S+{path.name} is damaged"):
            AutoModelForCausalLM.from_pretrained(root)
        data[-1] ^= 0x40
        path.write_bytes(data)
    AutoModelForCausalLM.from_pretrained(root)


def test_a_flip_in_what_save_pretrained_wrote(pristine: Sample, tmp_path: Path) -> None:
    pristine[1].save_pretrained(tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for read in (ptq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"tensor \S+ in \S+ is damaged"):
            read(tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"model.norm.weight": 7}'])
def test_hashes_in_a_header_that_are_none(pristine: Sample, tmp_path: Path, text: str) -> None:
    from safetensors.torch import load_file, save_file

    root = Path(shutil.copytree(pristine[0], tmp_path / "out"))
    for path in root.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", "ptq_sha256": text})
    with pytest.raises(CheckpointError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(root)
    assert any("has other hashes than the manifest" in p for p in verify_bytes(root))
    ptq.load(root)


def test_a_checkpoint_without_hashes_in_its_headers(pristine: Sample, tmp_path: Path) -> None:
    """As ptq wrote them at first."""
    from safetensors.torch import load_file, save_file

    root = Path(shutil.copytree(pristine[0], tmp_path / "out"))
    for path in root.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    assert_same(AutoModelForCausalLM.from_pretrained(root), pristine[1])
