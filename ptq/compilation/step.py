"""One decoding step of a language model as one compiled graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ptq.compilation.common_subexpressions import CommonSubexpressions
from ptq.compilation.regions import Region, as_regions, find_regions
from ptq.compilation.snapshot import Snapshot
from ptq.kernels import row_ranges, select
from ptq.model import eval_mode
from ptq.modules import QuantLinear, join, readers_of_one_tensor


class CompiledStep:
    """The model's forward pass, compiled when it is first called.

    torch's guards on the model's modules are left out, and so are the checks of sizes in the
    compiled code: a :class:`Snapshot` notices what they would. A module that is exchanged, or a
    weight that is moved, converted or resized, compiles the model again; values may change in
    place. A setting of a module (an attribute that is no tensor and no module) is not noticed.

    Args:
        rows: sequences that are decoded together, for which the kernels' forms are made before.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self.model = model
        self.rows = rows
        self._compiled: Any = None
        self._regions: dict[nn.Module, Region] = {}
        self._layers: list[QuantLinear] = []
        self._releases = 0  # of the layers, when the forms that the graph reads were made
        self._snapshot: Snapshot | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._stale():
            self._compile(options)
        if not _attends_by_sdpa_on_cpu(self.model):
            with as_regions(self._regions):
                output = self._compiled(*arguments, **options)
            return _own_memory(output) if self.model.device.type == "cuda" else output
        mask = additive(options.get("attention_mask"), _dtype(self.model))
        with _plain_attention(self.model.config), as_regions(self._regions):
            return self._compiled(*arguments, **{**options, "attention_mask": mask})

    def _stale(self) -> bool:
        """It is not compiled, or for weights, or forms of them, that the model has no more."""
        return (
            self._snapshot is None
            or self._releases != sum(layer.releases for layer in self._layers)
            or not self._snapshot.holds()
        )

    def _compile(self, options: dict[str, Any]) -> None:
        join_readers(self.model, self.rows)
        bind(self.model, self.rows)
        self._layers = [m for m in self.model.modules() if isinstance(m, QuantLinear)]
        self._releases = sum(layer.releases for layer in self._layers)
        self._snapshot = Snapshot(self.model)
        settings: dict[str, Any] = {
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
            "post_grad_custom_pre_pass": CommonSubexpressions(),
            "size_asserts": False,
        }
        if self.model.device.type == "cuda":  # else launching takes longer than computing
            settings["triton.cudagraphs"] = True
        # Static: a step has one length, that of the cache. Once another compiled model has made
        # torch see a mask's length as dynamic, a region is not reused (KeyError in torch 2.13).
        self._compiled = torch.compile(_own(self.model), dynamic=False, options=settings)
        self._regions = find_regions(self.model, options)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the compiled code holds the original's weights."""
        return {**self.__dict__, "_compiled": None, "_regions": {}, "_snapshot": None}


@torch.no_grad()
def bind(model: nn.Module, rows: int | None) -> None:
    """Let the kernels of the rule of thumb make their forms of the weights, which must not happen
    in the graph: those for a number of rows, or for any (None)."""
    dtype = _dtype(model)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            spec = layer.spec(layer.codes.device.type, dtype, 1)
            counts = [r.first for r in row_ranges(spec)] if rows is None else [rows]
            for m in counts:
                layer.prepared(select(spec.with_rows(m)), dtype)


@torch.no_grad()
def join_readers(model: Any, rows: int) -> None:
    """Let layers that read the same tensor in a step be one product."""
    dtype = _dtype(model)
    ids = torch.zeros((rows, 1), dtype=torch.int64, device=model.device)
    with eval_mode(model):
        groups = readers_of_one_tensor(model, lambda: model(input_ids=ids, use_cache=False))
    for layers in groups:
        join(layers, rows, dtype)


def _own(model: Any) -> Callable[..., Any]:
    """The model's call with a code object of its own: torch compiles one at most 8 times, whatever
    model it is called with, and then runs it uncompiled."""

    def call(*arguments: Any, **options: Any) -> Any:
        return model(*arguments, **options)

    return FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)


def _own_memory(output: Any) -> Any:
    """What a step returned in memory of its own: the next replay of a CUDA graph writes to the same
    memory again. The cache stays: it was the caller's before."""
    for name, value in output.items():
        if name != "past_key_values":
            output[name] = tree_map_only(Tensor, Tensor.clone, value)
    return output


def _dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in."""
    return next((p.dtype for p in model.parameters()), torch.float32)


def additive(mask: Any, dtype: torch.dtype) -> Any:
    """A mask [batch, heads, tokens, keys] of booleans as one of values to add: 0, or the least
    finite number where there is nothing to see. Mappings of masks likewise; others stay."""
    if isinstance(mask, dict):
        return {name: additive(value, dtype) for name, value in mask.items()}
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.bool:
        least = torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, least)
    return mask


def _attends_by_sdpa_on_cpu(model: Any) -> bool:
    """Composite models (with a configuration for each part) stay as they are."""
    config = model.config
    return (
        model.device.type == "cpu"
        and not config.sub_configs
        and config._attn_implementation == "sdpa"
    )


@contextmanager
def _plain_attention(config: Any) -> Iterator[None]:
    """Attention in plain operations, which the compiler fuses.

    For one new token torch's fused attention takes 195 us a layer of 9 heads and 256 keys on two
    cores of a Zen 4, as much as the layer's matrix products together; for prompts it is faster.
    """
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
