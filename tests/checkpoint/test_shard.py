"""Our safetensors files against the library's reader and writer."""

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptq.checkpoint.shard import DTYPES, read_header, read_tensors, write_shard
from ptq.errors import CheckpointError


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random bits, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).itemsize
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


tensors = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.builds(
        random_tensor,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.integers(0, 1000),
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(tensors)
def test_the_library_reads_what_we_write_and_we_read_what_it_writes(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.unlink(missing_ok=True)
    hashes = write_shard(ours, tensors)
    save_file(tensors, theirs, metadata={"format": "pt"})
    for loaded in (load_file(ours), dict(read_tensors(theirs, read_header(theirs)))):
        assert loaded.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert (loaded[key].dtype, loaded[key].shape) == (tensor.dtype, tensor.shape)
            assert bits(loaded[key]) == bits(tensor)
    for key, tensor in tensors.items():
        assert hashes[key] == hashlib.sha256(bits(tensor)).hexdigest()


def test_views_are_stored_by_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"t": base.t(), "s": base[:, ::2], "e": base[:1].expand(3, 6), "c": base[1:]}
    complex_ = torch.complex(base, base + 1)
    views["conj"] = complex_.conj()
    write_shard(tmp_path / "a", views)
    loaded = load_file(tmp_path / "a")
    assert all(torch.equal(loaded[key], view) for key, view in views.items())


def test_tensors_are_aligned_in_the_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(3),
        "c": torch.zeros(1, dtype=torch.float16),
    }
    write_shard(tmp_path / "a", tensors)
    for stored in read_header(tmp_path / "a").values():
        assert stored.start % torch.empty(0, dtype=stored.dtype).itemsize == 0


def test_loaded_tensors_own_their_memory(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.arange(3, dtype=torch.uint8)}
    write_shard(tmp_path / "a", tensors)
    loaded = dict(read_tensors(tmp_path / "a", read_header(tmp_path / "a")))
    assert all(loaded[key].untyped_storage().nbytes() == len(loaded[key]) for key in tensors)
    with (tmp_path / "a").open("r+b") as file:  # a mapped file would change the tensor
        file.seek(-8, 2)
        file.write(bytes(8))
    assert torch.equal(loaded["a"], tensors["a"])


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "a", {})
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_a_cut_off_file_is_an_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, {"a": torch.zeros(9)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole"):
        read_header(path)


def test_a_file_cut_off_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, {"a": torch.zeros(9)})
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut off within tensor a"):
        dict(read_tensors(path, header))


def test_an_unknown_dtype_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    save_file({"odd": torch.zeros(2, dtype=torch.uint32)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"tensor odd .* unknown dtype U32"):
        read_header(tmp_path / "a")
