"""Models without weights: built from their transformers config on the meta device."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ptq.errors import ModelError


def named_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that ``config.architectures`` begins with; None if it has none."""
    names = config.architectures
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def model_class(config: PretrainedConfig) -> Any:
    """The class that ``config.architectures`` names, else ``AutoModelForCausalLM``."""
    return named_class(config) or AutoModelForCausalLM


def skeleton(
    config: PretrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of this config with every tensor on the meta device; costs no memory.

    Args:
        dtype: of the floating-point parameters (default: the config's, else float32).

    Raises:
        ModelError: transformers has no model for the config.
    """
    cls = model_class(config)
    wanted = dtype or config.dtype or torch.float32
    with torch.device("meta"):
        if cls is not AutoModelForCausalLM:
            model = cls._from_config(config, dtype=wanted)
        else:
            try:
                model = cls.from_config(  # type: ignore[no-untyped-call]
                    config, dtype=wanted, trust_remote_code=trust_remote_code
                )
            except ValueError as error:
                raise ModelError(
                    f"no model class for model_type {config.model_type!r}: "
                    f"{str(error).splitlines()[0]}"
                ) from None
    assert isinstance(model, PreTrainedModel)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def fill_computed_buffers(model: nn.Module, device: str | torch.device = "cpu") -> None:
    """Give buffers that no checkpoint holds (rotary frequencies, position ids) their values.

    transformers computes them in ``initialize_weights``, which skips what is marked as loaded.
    On the meta device they stay without.

    Raises:
        ModelError: a buffer is still without value; it is named.
    """
    waiting = {
        name: buffer
        for name, buffer in model.named_buffers()
        if buffer.is_meta and not _is_persistent(model, name)
    }
    if not waiting or torch.device(device).type == "meta":
        return
    for name, buffer in waiting.items():
        _set_buffer(model, name, _unset_like(buffer, device))
    if isinstance(model, PreTrainedModel):
        for tensor in (*model.parameters(), *_persistent_buffers(model)):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        model.initialize_weights()  # type: ignore[no-untyped-call]
    unset = [n for n in waiting if _is_unset(model.get_buffer(n))]
    if unset:
        raise ModelError(
            f"{type(model).__name__} computes {', '.join(unset)} in its constructor only; "
            "pass a model that you built yourself: ptq.load(dir, model=...)"
        )


def _is_persistent(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(owner)._non_persistent_buffers_set


def _persistent_buffers(model: nn.Module) -> list[Tensor]:
    return [b for name, b in model.named_buffers() if _is_persistent(model, name)]


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._buffers[leaf] = value


def _unset_like(buffer: Tensor, device: str | torch.device) -> Tensor:
    """A buffer full of a value that no computation gives: NaN, or the smallest integer."""
    if buffer.is_floating_point() or buffer.is_complex():
        return torch.full_like(buffer, torch.nan, device=device)
    smallest = 0 if buffer.dtype == torch.bool else torch.iinfo(buffer.dtype).min
    return torch.full_like(buffer, smallest, device=device)


def _is_unset(buffer: Tensor) -> bool:
    if buffer.dtype == torch.bool or buffer.numel() == 0:
        return False
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().any())
    return bool((buffer == torch.iinfo(buffer.dtype).min).any())
