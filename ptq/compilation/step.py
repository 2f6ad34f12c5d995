"""One decoding step of a language model as one compiled graph."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ptq.compilation.common_subexpressions import CommonSubexpressions
from ptq.compilation.regions import Region, as_regions, find_regions
from ptq.compilation.situation import brief, is_known, is_plain, situation
from ptq.compilation.snapshot import Snapshot
from ptq.kernels import row_ranges, select
from ptq.model import eval_mode
from ptq.modules import QuantLinear, join, readers_of_one_tensor


class CompiledStep:
    """The model's forward pass, compiled when it is first called.

    Over a cache of tensors alone the compiled code has none of torch's guards, and no checks of
    sizes, which take 2 ms a token for 30 blocks. Instead the first step of a generation looks at
    all that they would: the model (:class:`Snapshot`) and what the step is given
    (:func:`situation`). A module that is exchanged, or a weight that is moved, converted or
    resized, or a hook that is added, makes all code anew; an input or a cache of another size or
    dtype, or another state of torch, has code of its own. The steps after it look at what they are
    given alone: what a generation's own callbacks change of the model is noticed when the next one
    begins. A setting of a module (an attribute that is no tensor and no module) is not noticed but
    for ``training``.
    Where modules have hooks, torch's guards on what these read remain.

    Args:
        rows: sequences that are decoded together, for which the kernels' forms are made before.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self.model = model
        self.rows = rows
        self._codes: dict[Hashable, Callable[..., Any]] = {}
        self._regions: dict[nn.Module, Region] = {}
        self._layers: list[QuantLinear] = []
        self._releases = 0  # of the layers, when the forms that the graph reads were made
        self._snapshot: Snapshot | None = None
        self._latest: tuple[Hashable, Callable[..., Any]] | None = None

    def begin(self) -> None:
        """A generation begins: the next step looks at everything."""
        self._latest = None

    def __call__(self, **options: Any) -> Any:
        given = brief(options)
        if self._latest is not None and self._latest[0] == given:
            return self._own_output(self._latest[1](**options))
        self._latest = None
        if self._stale():
            self._prepare(options)
        code = self._code(options)
        plain = (
            _plain_attention(self.model.config) if _fuses_attention(self.model) else nullcontext()
        )
        with plain, as_regions(self._regions_of(options)):
            output = code(**options)
        if self._unguarded(options):
            self._latest = given, code
        return self._own_output(output)

    def _unguarded(self, options: dict[str, Any]) -> bool:
        """Whether a situation is all that the code depends on. A hook may read anything."""
        plain = is_plain(options.get("past_key_values")) and is_known(options)
        return plain and not self._hooked

    @property
    def _hooked(self) -> bool:
        return self._snapshot is not None and self._snapshot.hooked

    def _own_output(self, output: Any) -> Any:
        return _own_memory(output) if self.model.device.type == "cuda" else output

    def _regions_of(self, options: dict[str, Any]) -> dict[nn.Module, Region]:
        """None for other numbers of rows: their layers read parts of one tensor that were joined,
        which torch does not allow in a region."""
        counts = [value.shape[0] for value in options.values() if isinstance(value, Tensor)]
        cache = options.get("past_key_values")
        begun = cache is not None and all(layer.is_initialized for layer in cache.layers)
        return self._regions if begun and counts and counts[0] == self.rows else {}

    def _stale(self) -> bool:
        """Nothing is compiled, or for weights, or forms of them, that the model has no more."""
        return (
            self._snapshot is None
            or self._releases != sum(layer.releases for layer in self._layers)
            or not self._snapshot.holds()
        )

    def _prepare(self, options: dict[str, Any]) -> None:
        join_readers(self.model, self.rows)
        bind(self.model, self.rows)
        self._codes = {}
        self._layers = [m for m in self.model.modules() if isinstance(m, QuantLinear)]
        self._releases = sum(layer.releases for layer in self._layers)
        self._snapshot = Snapshot(self.model)
        self._regions = find_regions(self.model, options)

    def _code(self, options: dict[str, Any]) -> Callable[..., Any]:
        """What is compiled, or will be when it is called, for such a step."""
        key = situation(options)
        if key not in self._codes:
            settings: dict[str, Any] = {
                "post_grad_custom_pre_pass": CommonSubexpressions(),
                "size_asserts": False,
            }
            if self._unguarded(options):
                settings["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
            elif not self._hooked:
                settings["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
            if self.model.device.type == "cuda":  # else launching takes longer than computing
                settings["triton.cudagraphs"] = True
            # Static: a step has one length, that of the cache. Once another compiled model has made
            # torch see a mask's length as dynamic, a region is not reused (KeyError in torch 2.13).
            # One graph: what follows a break would run what was compiled for another layer.
            self._codes[key] = torch.compile(
                _own(self.model), dynamic=False, fullgraph=True, options=settings
            )
        return self._codes[key]

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the compiled code holds the original's weights."""
        return {**self.__dict__, "_codes": {}, "_regions": {}, "_snapshot": None, "_latest": None}


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
    dtype, adds = _dtype(model), _fuses_attention(model)

    def call(**options: Any) -> Any:
        if adds:
            options["attention_mask"] = additive(options.get("attention_mask"), dtype)
        return model(**options)

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


def _fuses_attention(model: Any) -> bool:
    """Whether a step's attention is left to the compiler. Composite models (with a configuration
    for each part) stay as they are."""
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
