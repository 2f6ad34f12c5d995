"""Siblings quantize their input once, and never use what is out of date."""

import copy
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.kernels import quantize_activation
from ptq.modules import QuantLinear


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, 32)
        self.k = nn.Linear(64, 16)
        self.v = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tensors that were quantized."""
    seen: list[tuple[int, ...]] = []

    def counting(x: Tensor, *rest: object) -> object:
        seen.append(tuple(x.shape))
        return quantize_activation(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("ptq.modules.quant_linear.quantize_activation", counting)
    return seen


def alone(model: Heads, x: Tensor) -> Tensor:
    """Each layer by itself, on a copy of x of its own."""
    return torch.cat([layer(x.clone()) for layer in (model.q, model.k, model.v)], dim=-1)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w8a8-asym"])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_siblings_quantize_their_input_once(
    scheme: str, rows: int, calls: list[tuple[int, ...]]
) -> None:
    model = Heads()
    ptq.quantize(model, scheme)
    x = torch.randn(rows, 64)
    y = model(x)
    assert calls == [(rows, 64)]
    assert torch.equal(y, alone(model, x))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_an_input_that_was_changed_in_place_is_quantized_again(guard: type) -> None:
    model = Heads()
    ptq.quantize(model, "w8a8")
    with guard():
        x = torch.randn(40, 64)
        model(x)
        x.mul_(2).add_(1)
        assert torch.equal(model(x), alone(model, x))


def test_nothing_outlives_the_input_or_the_last_reader() -> None:
    model = Heads()
    ptq.quantize(model, "w8a8")
    shared = model.q.shared_input
    x = torch.randn(40, 64)
    model(x)
    assert shared._latest is None
    model.q(x)
    kept = weakref.ref(shared._latest.activation)
    gc.disable()
    try:
        del x
        assert kept() is None
    finally:
        gc.enable()


def test_memory_that_numpy_changes_is_quantized_again() -> None:
    model = Heads()
    ptq.quantize(model, "w8a8")
    buffer = np.random.default_rng(0).standard_normal((3, 64)).astype("float32")
    x = torch.from_numpy(buffer)
    model(x)
    buffer *= -2
    assert torch.equal(model(x), alone(model, x))
    model.q(x)
    x.data = torch.randn(5, 64)
    assert torch.equal(model(x), alone(model, x))


def test_a_layer_without_siblings_remembers_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    ptq.quantize(model, "w8a8")
    assert model[0].shared_input is None


def test_a_copy_shares_among_its_own_layers(calls: list[tuple[int, ...]]) -> None:
    model = Heads()
    ptq.quantize(model, "w8a8")
    x = torch.randn(3, 64)
    model(x)
    twin = copy.deepcopy(model)
    twin(x)
    assert calls == [(3, 64)] * 2
    assert twin.q.shared_input is twin.k.shared_input is not model.q.shared_input


def test_static_scales_are_each_layers_own(calls: list[tuple[int, ...]]) -> None:
    model = Heads()
    ptq.quantize(model, "w8a8-static", calibration=[torch.randn(8, 64)])
    calls.clear()
    x = torch.randn(3, 64) * 8
    before = model(x)
    assert len(calls) == 3
    state = model.state_dict()
    model.load_state_dict({k: v * 2 if "input_scale" in k else v for k, v in state.items()})
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), alone(model, x))


def test_a_loaded_model_shares_too(tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    model = Heads()
    ptq.quantize(model, "w8a8")
    ptq.save(model, tmp_path / "out")
    loaded = ptq.load(tmp_path / "out", model=Heads())
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))
    assert len(calls) == 2
    assert isinstance(loaded.get_submodule("q"), QuantLinear)
