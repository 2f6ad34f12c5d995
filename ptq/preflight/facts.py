"""What the predictions are made of: sizes of the model and of the data, without any value."""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from ptq.config import ActivationScheme, QuantizationConfig, Scheme
from ptq.model import block_lists, output_head
from ptq.planning import Plan
from ptq.recipe import Recipe


@dataclass(frozen=True)
class LinearFacts:
    """Linear layers of one shape and scheme.

    Args:
        shape: (out_features N, in_features K).
        scheme: None where they stay float.
        count: how many there are.
        inside: they are part of the repeated blocks.
        share: of the tokens that each sees: less than one for experts.
    """

    shape: tuple[int, int]
    scheme: Scheme | None
    count: int
    inside: bool
    share: float

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1] * self.count


@dataclass(frozen=True)
class Source:
    """How the float model is stored.

    Args:
        gguf: it is dequantized while it is loaded.
        parse_seconds: that reading a GGUF file's header took; it is read again and again.
    """

    gguf: bool
    parse_seconds: float = 0.0


@dataclass(frozen=True)
class Facts:
    """Sizes in elements, tokens and bytes.

    Args:
        plan, recipe, config: as decided.
        source: of the weights.
        float_dtype: that the float model is loaded in.
        output_dtype: of what stays float afterwards.
        linears: all linear layers, by shape, scheme and place.
        blocks: repeated blocks.
        hidden: width of the hidden states.
        heads, kv_heads, head_dim: of the attention.
        inner: out_features of the widest layer in a block.
        vocabulary: of the output head; 0 where there is none.
        largest: elements of the largest tensor.
        lengths: tokens of each calibration sequence, once the text is read; until then each is
            taken to be as long as the configuration allows.
    """

    plan: Plan
    recipe: Recipe
    config: QuantizationConfig
    source: Source
    float_dtype: torch.dtype
    output_dtype: torch.dtype
    linears: tuple[LinearFacts, ...]
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    largest: int
    lengths: tuple[int, ...] | None = None

    @property
    def streamed(self) -> bool:
        return self.config.model is not None and self.config.model.stream

    @property
    def float_bytes(self) -> int:
        """Of the float model in memory."""
        return self.plan.parameters * self.float_dtype.itemsize

    @property
    def untied_bytes(self) -> int:
        """Of the weight that an output head tied to the embedding gets while the model is float."""
        tied = (x for x in self.plan.layers if not x.parameters and len(x.shape) == 2)
        elements = sum(x.shape[0] * x.shape[1] for x in tied) if self.recipe.unties else 0
        return elements * self.float_dtype.itemsize

    @property
    def quantized_bytes(self) -> int:
        """Of the quantized model in memory: its tensors are the checkpoint's."""
        return self.plan.bytes_after

    @property
    def block_elements(self) -> int:
        """Elements of the linear weights of one block."""
        inside = sum(linear.elements for linear in self.linears if linear.inside)
        return inside // max(1, self.blocks)

    @property
    def outside_bytes(self) -> int:
        """Of the float model, what is in no block."""
        inside = self.block_elements * self.blocks
        return max(0, self.plan.parameters - inside) * self.float_dtype.itemsize

    @property
    def quantized_linears(self) -> tuple[LinearFacts, ...]:
        return tuple(linear for linear in self.linears if linear.scheme is not None)

    @property
    def static(self) -> ActivationScheme | None:
        """How inputs are quantized whose range comes from calibration; None where none is."""
        return next(iter(self.plan.static_layers.values()), None)

    @property
    def calibrates(self) -> bool:
        return self.static is not None or not self.recipe.plain or self.static_cache

    @property
    def static_cache(self) -> bool:
        """Whether the key-value cache has scales from calibration, of the quantized model."""
        return self.config.kv_cache is not None and self.config.kv_cache.static

    @property
    def calibration_lengths(self) -> tuple[int, ...]:
        """Tokens of each calibration sequence."""
        section = self.config.calibration
        if section is None or not self.calibrates:
            return ()
        return self.lengths or (section.sequence_length,) * section.samples

    @property
    def calibration_tokens(self) -> int:
        return sum(self.calibration_lengths)

    @property
    def padded_batches(self) -> tuple[tuple[int, int], ...]:
        """Sequences and tokens of each batch that runs through the whole model."""
        section, lengths = self.config.calibration, self.calibration_lengths
        size = 1 if section is None or not self.recipe.plain else section.batch_size
        groups = [lengths[start : start + size] for start in range(0, len(lengths), size)]
        return tuple((len(group), max(group)) for group in groups)


def facts_of(
    empty: nn.Module,
    model_config: PretrainedConfig,
    plan: Plan,
    recipe: Recipe,
    config: QuantizationConfig,
    source: Source,
    float_dtype: torch.dtype,
) -> Facts:
    """Read the sizes of a model, which may be on the meta device.

    Args:
        plan: made for this model.
    """
    text = model_config.get_text_config()
    names = [name for names in block_lists(empty) for name in names]
    linears = _linears(plan, names, _share(text))
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = getattr(text, "head_dim", None) or hidden // max(1, heads)
    head = _head(empty)
    return Facts(
        plan=plan,
        recipe=recipe,
        config=config,
        source=source,
        float_dtype=float_dtype,
        output_dtype=plan.dtype,
        linears=linears,
        blocks=len(names),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(head_dim),
        inner=max((linear.shape[0] for linear in linears if linear.inside), default=0),
        vocabulary=0 if head is None else int(head.shape[0]),
        largest=max((p.numel() for p in empty.parameters()), default=0),
    )


def _head(model: nn.Module) -> torch.Tensor | None:
    """Weight [V, H] of the output head of a model that says which that is."""
    weight = getattr(output_head(model), "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def _share(text: PretrainedConfig) -> float:
    """Of the tokens, what an expert sees where they are spread evenly."""
    chosen = getattr(text, "num_experts_per_tok", None)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    return chosen / experts if chosen and experts else 1.0


def _linears(plan: Plan, blocks: list[str], share: float) -> tuple[LinearFacts, ...]:
    prefixes = tuple(f"{name}." for name in blocks)
    counts: Counter[tuple[tuple[int, int], Scheme | None, bool, float]] = Counter()
    schemes: dict[str, Scheme | None] = {}
    for layer in plan.layers:
        multiplies = layer.scheme is not None or _is_linear(layer.kind, layer.reason)
        if len(layer.shape) != 2 or layer.looked_up or not multiplies:
            continue
        seen = share if re.search(r"\.experts\.", layer.name) else 1.0
        key = str(layer.scheme)
        schemes[key] = layer.scheme
        shape = (layer.shape[0], layer.shape[1])
        counts[shape, key, layer.name.startswith(prefixes), seen] += 1  # type: ignore[index]
    return tuple(
        LinearFacts(shape, schemes[str(key)], count, inside, seen)
        for (shape, key, inside, seen), count in counts.items()
    )


def _is_linear(kind: str, reason: str) -> bool:
    return kind in ("Linear", "Conv1D") or "tied" in reason or reason == "output head"
