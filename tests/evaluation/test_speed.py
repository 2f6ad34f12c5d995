"""The timed comparison: turns, sides and ratios, with a clock that the test sets."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ptq.evaluation import race, speed
from tests.helpers import tiny_llama, tiny_tokens


def test_ratios_are_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float model takes 6, 1, 2, 3, ... seconds, the quantized one half of it."""
    calls: list[tuple[str, str]] = []
    float_model, model = nn.Linear(1, 1), nn.Linear(1, 1)

    def timer(kind: str, factor: float) -> Callable[[Any, Any], float]:
        def measured(which: nn.Module, _: object) -> float:
            side = "float" if which is float_model else "quantized"
            calls.append((side, kind))
            turn = sum(call == (side, kind) for call in calls) - 1
            busy = 6 if turn == 0 else turn
            return factor * busy * (1.0 if side == "float" else 0.5)

        return measured

    monkeypatch.setattr(speed, "_prompt", timer("prompt", 1.0))
    monkeypatch.setattr(speed, "_decode", timer("decode", 0.1))
    found = race(float_model, model, torch.arange(30), turns=5)
    assert found["turns"] == 5
    assert found["prompt"] == {
        "tokens": 30, "float_seconds": 3.0, "quantized_seconds": 1.5,
        "speed": 2.0, "speed_low": 2.0, "speed_high": 2.0,
    }  # fmt: skip
    assert found["decode"]["float_seconds"] == pytest.approx(0.3)
    firsts = [side for side, kind in calls if kind == "prompt"][::2]
    assert len(calls) == 2 * 2 * 6 and set(firsts) == {"float", "quantized"}


def test_real_models_are_timed_and_left_as_they_were() -> None:
    reference, model = tiny_llama().train(), tiny_llama(seed=1)
    found = race(reference, model, tiny_tokens(1, 30)[0], turns=2)
    for kind, tokens in (("prompt", 30), ("decode", 16)):
        assert found[kind]["tokens"] == tokens
        assert found[kind]["float_seconds"] > 0 and found[kind]["quantized_seconds"] > 0
        assert found[kind]["speed_low"] <= found[kind]["speed"] <= found[kind]["speed_high"]
    assert reference.training and not model.training
