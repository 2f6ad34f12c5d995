"""Carrying out what was searched, on a copy of the model, and measuring it."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptq.calibrate import TokenSet
from ptq.config import QuantizationConfig, torch_dtype
from ptq.errors import UnsupportedError
from ptq.evaluation import ReferenceLogits, compare
from ptq.mixed_precision.result import Measured
from ptq.model import cast_parameters
from ptq.pipeline import quantize
from ptq.planning import megabytes, plan
from ptq.report import Console

_CLOSE = 0.1  # of the allowed rise in perplexity: near enough to stop
_NOISE = 1e-4  # a smaller rise is taken for this one


def float_dtype(config: QuantizationConfig) -> torch.dtype | None:
    """dtype of what stays float in the checkpoint; None: each tensor's own."""
    if config.output is None or config.output.dtype == "auto":
        return None
    return torch_dtype(config.output.dtype)


@dataclass(frozen=True)
class Prover:
    """Quantizes a copy of the float model by the configuration's own recipe, and compares it with
    the float model as the main job does.

    Args:
        reference: the float model's logits of the windows.
    """

    model: nn.Module
    tokenizer: Any
    windows: TokenSet
    reference: ReferenceLogits
    console: Console

    def measure(
        self, name: str, config: QuantizationConfig, predicted_kl: float | None = None
    ) -> Measured:
        """Carry out a configuration and compare."""
        self.console.stage(f"measure {name}")
        dtype = float_dtype(config)
        size = plan(self.model, config, dtype=dtype).bytes_after
        candidate = copy.deepcopy(self.model)
        quantize(candidate, config, tokenizer=self.tokenizer, console=self.console)
        if dtype is not None:
            cast_parameters(candidate, dtype)
        bar = self.console.bar("window")
        found = compare(candidate, self.windows, self.reference, progress=bar)
        measured = Measured(
            name, size, found.kl_mean, found.ratio, found.ratio_low, found.ratio_high,
            predicted_kl, found.protocol.windows,
        )  # fmt: skip
        self.console.say(measured)
        return measured


def within_bound(
    percent: float,
    trials: int,
    attempt: Callable[[float], tuple[list[int], Measured]],
) -> tuple[list[int], list[Measured]]:
    """The smallest measured allocation whose perplexity rises by at most ``percent``.

    The logarithm of the ratio is about proportional to the predicted divergence: from each
    measurement the next divergence to ask for, within the bracket that is known.

    Args:
        attempt: the smallest allocation with this predicted divergence, measured.

    Returns:
        The allocation, and all that was measured.

    Raises:
        UnsupportedError: none of the trials was within the bound.
    """
    wanted = math.log1p(percent / 100)
    low, high, kl = 0.0, math.inf, wanted
    best: tuple[list[int], Measured] | None = None
    seen: list[list[int]] = []
    measured: list[Measured] = []
    for _ in range(trials):
        chosen, found = attempt(kl)
        if chosen in seen:
            break
        seen.append(chosen)
        measured.append(found)
        rise = math.log(found.ratio)
        if rise <= wanted:
            low = max(low, kl)
            if best is None or found.bytes < best[1].bytes:
                best = chosen, found
            if rise >= (1 - _CLOSE) * wanted:
                break
        else:
            high = min(high, kl)
        kl = _next(kl, low, high, wanted / max(rise, _NOISE))
    if best is None:
        nearest = min(measured, key=lambda m: m.ratio)
        raise UnsupportedError(
            f"none of {len(measured)} configurations was within {percent:g}% of the float model's "
            f"perplexity; nearest: {nearest.ratio:.4f} at {megabytes(nearest.bytes)}; allow larger "
            "schemes (float is one), a better recipe, or more trials"
        )
    return best[0], measured


def _next(kl: float, low: float, high: float, factor: float) -> float:
    """The divergence to ask for next: by proportion (four times as much at most), inside the
    bracket; in its middle, by ratio, where proportion leads out of it."""
    asked = kl * min(4.0, max(0.25, 0.97 * factor))
    if low < asked < high:
        return asked
    return math.sqrt(low * high) if low > 0 else high / 2
