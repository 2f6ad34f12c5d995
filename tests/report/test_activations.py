"""What layers read, against hooks of the test's own."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import ptq
from ptq.report import inputs_section, record_inputs
from tests.helpers import quantize_linears, tiny_llama, tiny_tokens

NAMES = [f"model.layers.{i}.{k}" for i in range(2) for k in ("self_attn.q_proj", "mlp.down_proj")]


def reads(model: nn.Module, names: list[str], window: Tensor) -> dict[str, Tensor]:
    """Inputs [T, K] of the layers."""
    found: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0][0].double()})
        )
    with torch.no_grad():
        model(input_ids=window[None])
    return found


def counts(values: np.ndarray, magnitudes: dict[str, Any]) -> list[int]:
    """Of numpy, in the bins that are said."""
    size = np.abs(values[values != 0]).clip(2.0**-16)  # what is below is in the first bin
    bins = len(magnitudes["counts"])
    edges = magnitudes["lowest"] + np.arange(bins + 1) / magnitudes["per_octave"]
    return np.histogram(np.log2(size), edges)[0].tolist()


def test_sizes_and_outliers_of_a_float_model() -> None:
    window = tiny_tokens(1, 40)[0]
    found = record_inputs(tiny_llama(), NAMES, window)
    assert list(found) == NAMES
    for name, x in reads(tiny_llama(), NAMES, window).items():
        seen, size = found[name], x.abs()
        assert seen["absmax"] == pytest.approx(size.max().item(), rel=1e-3)
        channels = size.amax(0)
        assert seen["median_channel_absmax"] == pytest.approx(channels.median().item(), rel=1e-3)
        assert seen["median_token_absmax"] == pytest.approx(size.amax(1).median().item(), rel=1e-3)
        order = channels.argsort(descending=True)[:3].tolist()
        assert [row["channel"] for row in seen["largest_channels"]] == order
        assert seen["largest_token"] == int(size.amax(1).argmax())
        assert seen["magnitudes"]["counts"] == counts(x.numpy(), seen["magnitudes"])
        assert sum(seen["magnitudes"]["counts"]) + seen["magnitudes"]["zeros"] == x.numel()
        assert "after" not in seen


def fake(x: Tensor, layer: ptq.QuantLinear) -> tuple[Tensor, Tensor]:
    """What int8 codes of x stand for, and their step, written out."""
    if layer.input_scale is not None:
        step = layer.input_scale.double().expand(len(x), 1)
        offset = 0 if layer.input_zero_point is None else layer.input_zero_point.double()
    else:
        step, offset = x.abs().amax(1, keepdim=True) / 127, 0
    codes = (torch.round(x / step) + offset).clamp(-128, 127)
    return (codes - offset) * step, step


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_the_grid_of_a_quantized_model(scheme: str) -> None:
    window = tiny_tokens(1, 40)[0]
    model = quantize_linears(tiny_llama(), scheme)
    model.get_submodule("model.layers.0.input_layernorm").weight.data[0] = 0  # zeros stay zeros
    if scheme == "w8a8-static":
        for name in NAMES:
            model.get_submodule(name).input_scale.fill_(0.005)  # narrow: some is clipped
    seen = record_inputs(model, NAMES, window)
    for name, x in reads(model, NAMES, window).items():
        after, step = fake(x, model.get_submodule(name))  # type: ignore[arg-type]
        found = seen[name]
        assert found["step"] == pytest.approx(step.median().item(), rel=2e-3)
        zero = ((after == 0) & (x != 0)).double().mean().item()
        assert found["zero"] == pytest.approx(zero, abs=2e-3)
        clipped = ((after - x).abs() > 0.501 * step).double().mean().item()
        assert found["clipped"] == pytest.approx(clipped, abs=2e-3)
        assert (clipped > 0.01) == (scheme == "w8a8-static")
        total = sum(found["after"]["counts"]) + found["after"]["zeros"]
        assert total == x.numel()
        assert found["after"]["zeros"] == pytest.approx((after == 0).sum().item(), abs=3)


def test_a_rotated_input_is_looked_at_as_it_is_quantized() -> None:
    model = quantize_linears(tiny_llama(), "w8a8")
    layer = model.get_submodule(NAMES[0])
    seen = record_inputs(model, NAMES, tiny_tokens(1, 40)[0])
    layer.rotation = ptq.core.Rotation.of(32)  # type: ignore[union-attr]
    turned = record_inputs(model, NAMES[:1], tiny_tokens(1, 40)[0])
    assert turned[NAMES[0]]["magnitudes"] == seen[NAMES[0]]["magnitudes"]
    assert turned[NAMES[0]]["after"] != seen[NAMES[0]]["after"]


def test_weight_only_layers_have_no_grid() -> None:
    model = quantize_linears(tiny_llama(), "w4a16-g32")
    assert all("after" not in s for s in record_inputs(model, NAMES, tiny_tokens(1, 9)[0]).values())


def test_layers_that_are_not_there_are_left_out_and_the_model_stays_as_it_was() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=97, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    kinds = {name: type(module) for name, module in model.named_modules()}
    names = ["transformer.h.0.attn.c_attn", "transformer.wte", "nowhere"]
    assert list(record_inputs(model, names, tiny_tokens(1, 9)[0])) == names[:1]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_section_keeps_the_farthest_outliers() -> None:
    def seen(ratio: float, channel: int) -> dict[str, Any]:
        largest = [{"channel": channel, "absmax": ratio}]
        return {"absmax": ratio, "median_channel_absmax": 1.0, "largest_channels": largest,
                "largest_token": 1, "magnitudes": {"counts": [1]}}  # fmt: skip

    before = {"a": seen(2.0, 1), "b": seen(9.0, 2), "b2": seen(9.0, 2), "c": seen(5.0, 3), "d": {}}
    after = {"b": {"step": 0.5, "zero": 0.25, "clipped": 0.0, "after": {"counts": [2]},
                   "absmax": 7.0}}  # fmt: skip
    rows = {row["name"]: row for row in inputs_section(before, after, ["x", "y"], histograms=2)}
    assert {name for name, row in rows.items() if "magnitudes" in row} == {"b", "c"}
    assert rows["b"]["absmax"] == 9.0 and rows["b"]["step"] == 0.5 and "after" in rows["b"]
    assert rows["a"]["largest_token_text"] == "y"
    assert "largest_token_text" not in rows["d"]
