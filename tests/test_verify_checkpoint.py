"""verify_checkpoint.py: every byte of every file, and what is damaged is named."""

import shutil
from pathlib import Path

import pytest
import torch
import verify_checkpoint

import ptq
from ptq.checkpoint import convert, not_covered, verify_bytes, verify_files
from tests.checkpoint.damages import damages
from tests.helpers import quantize_linears, tiny_llama
from tests.tiny import tiny_tokenizer

FLIPS, CUTS = 150, 50


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharded, with a tokenizer."""
    root = tmp_path_factory.mktemp("verify") / "out"
    model = quantize_linears(tiny_llama(dtype=torch.bfloat16), "w4a16-g32-asym")
    ptq.save(model, root, tokenizer=tiny_tokenizer(), shard_bytes=20_000)
    return root


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def verify(directory: Path) -> int:
    return verify_checkpoint.main([str(directory)])


def test_a_whole_one(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(pristine) == 0
    shown = capsys.readouterr().out
    assert "14 quantized layers" in shown and "all as written" in shown and "note" not in shown
    assert verify_bytes(pristine) == []


@pytest.mark.parametrize("seed", range(4))
def test_flips_and_cuts_of_random_bytes(copy: Path, seed: int) -> None:
    """Each file in turn; any other value at any place, any shorter length."""
    assert sum(path.is_file() for path in copy.rglob("*")) > 6
    for what, _ in damages(copy, seed, (FLIPS + CUTS) // 4):
        assert verify_bytes(copy), what
    assert verify_bytes(copy) == []


def test_every_byte_of_the_smaller_headers_and_of_the_manifest(copy: Path) -> None:
    """Those that hashes of tensors do not cover, with the changes that are hardest to see."""
    shard = min(copy.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    manifest = copy / "ptq_manifest.json"
    length = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    spaces = [i for i, byte in enumerate(manifest.read_bytes()) if byte in b" \n"][::97]
    for path, places in ((shard, range(length)), (manifest, spaces)):
        original = path.read_bytes()
        for place in places:
            damaged = bytearray(original)
            hardest = {0x20: 0x09, 0x0A: 0x0D}  # a tab, another line end
            damaged[place] = hardest.get(damaged[place], damaged[place] ^ 0x20)
            path.write_bytes(damaged)
            assert verify_bytes(copy), f"{path.name}: byte {place}"
        path.write_bytes(original)
    assert verify_bytes(copy) == []


def test_what_is_damaged_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted(copy.glob("*.safetensors"))
    data = bytearray(shards[0].read_bytes())
    data[-1] ^= 1
    shards[0].write_bytes(data)
    shards[1].unlink()
    (copy / "config.json").write_text("{}")
    assert verify(copy) == 2
    shown = capsys.readouterr().err.splitlines()
    damaged = [line for line in shown if line.startswith("damaged: ")]
    assert [p in "\n".join(damaged) for p in ("tensor ", shards[1].name, "config.json")] == [1] * 3
    assert shown[-1].startswith(f"error: {copy}: {len(damaged)} problems; copy")
    with_name = [line for line in damaged if "tensor model." in line and shards[0].name in line]
    assert len(with_name) == 1


def test_what_is_no_checkpoint(
    tmp_path: Path, pristine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(tmp_path / "nowhere") == 2
    assert "no checkpoint at" in capsys.readouterr().err
    convert(pristine, tmp_path / "awq", "awq", engine="transformers")
    assert verify(tmp_path / "awq") == 2
    assert "in the 'awq' format, which ptq.load reads" in capsys.readouterr().err


def test_files_that_no_hash_covers(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "report.json").write_text("{}")
    assert verify(copy) == 0
    assert "no hash says what these were: report.json" in capsys.readouterr().out


def test_what_transformers_wrote(tmp_path: Path) -> None:
    """The manifest is in the headers; config.json has no hash."""
    model = quantize_linears(tiny_llama(), "w8a16")
    ptq.save(model, tmp_path / "a")
    ptq.load(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size="40KB")
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 1
    assert verify(tmp_path / "b") == 0
    rest = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    assert not_covered(tmp_path / "b") == rest
    shutil.copy(tmp_path / "a/ptq_manifest.json", tmp_path / "b")  # of another checkpoint
    assert not_covered(tmp_path / "b") == [*rest, "ptq_manifest.json"]
    for shard in shards:
        original = shard.read_bytes()
        start = 8 + int.from_bytes(original[:8], "little")
        for place in (*range(9, start, 151), start - 1, len(original) - 1):
            damaged = bytearray(original)
            damaged[place] = 0x09 if damaged[place] == 0x20 else damaged[place] ^ 1
            shard.write_bytes(damaged)
            assert verify_bytes(tmp_path / "b"), f"{shard.name}: byte {place}"
        shard.write_bytes(original)


def test_a_manifest_that_says_the_same_in_other_words(copy: Path) -> None:
    """Loading takes it; a check of the bytes does not."""
    path = copy / "ptq_manifest.json"
    path.write_text(path.read_text().replace("\n ", "\n\t"))
    assert verify_files(copy) == []
    assert [problem for problem in verify_bytes(copy) if "not spelled as it was written" in problem]
    ptq.load(copy)
