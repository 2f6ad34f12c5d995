"""One turn of a whole model, and the bytes of its weights; shared with the processes of peers.

Needs torch only: peer_model.py runs it in environments that do not have ptq.
"""

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from racing import timed
from torch import Tensor, nn

KINDS = ("prefill", "decode")


class Turns:
    """Single timed turns of a causal language model, at batch 1.

    Args:
        longest: tokens that a turn may take.
    """

    def __init__(self, model: Any, longest: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (1, longest)
        ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
        self.ids = ids.to(model.device)
        self.model = model
        self.caches: dict[int, Any] = {}

    @torch.no_grad()
    def __call__(self, kind: str, tokens: int) -> float:
        """Seconds of a forward pass over ``tokens`` tokens (prefill), or of one step behind as many
        (decode)."""
        return self._prefill(tokens) if kind == "prefill" else self._decode(tokens)

    def _prefill(self, tokens: int) -> float:
        ids = self.ids[:, :tokens]
        return timed(lambda: self.model(input_ids=ids, use_cache=False, logits_to_keep=1))

    def _decode(self, tokens: int) -> float:
        """The cache is cut back afterwards, so that every step is the same."""
        if tokens not in self.caches:
            made = self.model(input_ids=self.ids[:, :tokens], use_cache=True, logits_to_keep=1)
            self.caches[tokens] = made.past_key_values
        cache, one = self.caches[tokens], self.ids[:, :1]
        seconds = timed(lambda: self.model(input_ids=one, past_key_values=cache, use_cache=True))
        cache.crop(tokens - cache.get_seq_length())
        return seconds


@torch.no_grad()
def own_memory(model: nn.Module) -> nn.Module:
    """Copy parameters out of the checkpoint's mapped file: its small pages are slower to read."""
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            parameter.data = parameter.data.clone()
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a model holds, in whatever attribute, shared memory counted once:
    parameters, buffers, and the forms that kernels have made so far."""
    sizes: dict[object, int] = {}
    for tensor in _tensors(model, {}):
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
        else:  # opaque, such as oneDNN's packed weights: padding is not seen
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def _tensors(value: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    """The plain tensors that can be reached from a value.

    Args:
        seen: by id; it keeps them alive, or another object might get the id.
    """
    if id(value) in seen or isinstance(value, type | ModuleType):
        return
    seen[id(value)] = value
    parts: Any = list(vars(value).values()) if hasattr(value, "__dict__") else ()
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a subclass that wraps tensors
            parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        else:
            yield value
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = value
    for part in parts:
        yield from _tensors(part, seen)
