"""What a search was asked: candidates, limits on size, and texts."""

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from ptq.calibrate import TokenSet, calibration_tokens, evaluation_windows, overlap
from ptq.config import CalibrationConfig, QuantizationConfig, Scheme, make_section, preset
from ptq.errors import CalibrationError, ConfigError
from ptq.mixed_precision.budget import Budget
from ptq.mixed_precision.choices import FITS_ALL, Space
from ptq.mixed_precision.problem import MEGABYTES, bytes_table
from ptq.mixed_precision.proof import float_dtype
from ptq.mixed_precision.solve import Limit
from ptq.planning import plan


def read_schemes(given: Sequence[str | Scheme]) -> list[Scheme | None]:
    """Candidates, of which ``float`` is None.

    Raises:
        ConfigError: a name is not a preset's.
    """
    found: list[Scheme | None] = []
    for item in given:
        try:
            found.append(item if isinstance(item, Scheme) else _named(item))
        except ValueError as error:
            raise ConfigError(f"candidates: {error}") from None
    return found


def read_uniform(given: Sequence[str]) -> list[Scheme]:
    """Schemes to compare with.

    Raises:
        ConfigError: a name is not a preset's, or it is float, with which all is compared.
    """
    found = [scheme for scheme in read_schemes(given) if scheme is not None]
    if len(found) < len(given):
        raise ConfigError("against: everything is compared with float; leave that out")
    return found


def read_ends(given: Sequence[str | Scheme]) -> list[Scheme | None]:
    """Candidates for the embedding, whose rows are looked up, and the output head.

    Raises:
        ConfigError: one has quantized activations.
    """
    found = read_schemes(given)
    for scheme in found:
        if scheme is not None and scheme.activations is not None:
            raise ConfigError(f"ends: {scheme} has quantized activations; give one such as w8a16")
    return found


def _named(name: str) -> Scheme | None:
    return None if name == "float" else preset(name)


def size_limit(budget: Budget, space: Space, model: nn.Module, config: QuantizationConfig) -> Limit:
    """The limit on bytes that a budget of bytes or bits sets."""
    dtype = float_dtype(config)
    if budget.kind == "bits":
        unit = (8 / space.weights, "bits")
        bound = (budget.value or 0) * space.weights / 8
        return Limit(budget.text, bytes_table(space), bound, unit)
    if budget.value is not None:
        bound = budget.value - space.fixed_bytes
    else:
        uniform = config.model_copy(update={"scheme": budget.like or FITS_ALL})
        made = plan(model, uniform, dtype=dtype)
        whole = made.bytes_before if budget.like is None else made.bytes_after
        bound = whole - space.fixed_bytes
    return Limit(budget.text, bytes_table(space), bound, MEGABYTES, space.fixed_bytes)


def read_text(config: QuantizationConfig, data: Any, tokenizer: Any) -> TokenSet:
    """The tokens that sensitivities are predicted on."""
    if isinstance(data, TokenSet):
        return data
    section = config.calibration
    if data is not None:
        section = make_section(CalibrationConfig, "search", data=[os.fspath(data)])
    if section is None:
        raise CalibrationError(
            "the search needs text to predict sensitivities on: add a section 'calibration:' with "
            "'data: FILE', or pass data=..."
        )
    if tokenizer is None:
        raise CalibrationError("text needs a tokenizer: pass tokenizer=...")
    return calibration_tokens(section, tokenizer)


def read_windows(
    config: QuantizationConfig, given: TokenSet | None, tokenizer: Any, seen: TokenSet
) -> TokenSet:
    """The windows to measure on; never the text that was searched on."""
    if given is None:
        if config.evaluation is None:
            raise CalibrationError(
                "measuring needs text: add a section 'evaluation:' with 'data: FILE', or pass "
                "evaluation=..., or verify=False"
            )
        if tokenizer is None:
            raise CalibrationError("evaluation text needs a tokenizer: pass tokenizer=...")
        given = evaluation_windows(config.evaluation, tokenizer)
    shared = overlap(seen, given)
    if shared > 0:
        raise CalibrationError(
            f"{shared:.0%} of the evaluation text is in the text that is searched on; give other "
            "text to measure on"
        )
    return given
