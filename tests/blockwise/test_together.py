"""Layers that read the same input are quantized as one weight: the same as one by one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import ptq.blockwise.together as part
from ptq.algorithms import ALGORITHMS, InputMoments, Outcome
from ptq.blockwise.together import quantize_together, together
from ptq.config import Scheme, WeightScheme, preset
from ptq.core import QuantizedWeight

K = 32
GPTQ = ALGORITHMS["gptq"]


def layers(**rows: int) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {name: nn.Linear(K, count, bias=False) for name, count in rows.items()}


def moments(seed: int = 0, cross: bool = False) -> InputMoments:
    x = torch.randn(200, K, generator=torch.Generator().manual_seed(seed))
    x[:, ::3] += x[:, 1::3].repeat_interleave(1, 1)[:, :11]
    second = x.T @ x / 200
    return InputMoments(second, 0.05 * second if cross else None, 200)


@pytest.mark.parametrize("name", ["gptq", "gptaq"])
@pytest.mark.parametrize("scheme", ["w4a16-g16-asym", "w3a16-g16", "w4a16", "w8a8"])
def test_the_same_codes_as_one_by_one(name: str, scheme: str) -> None:
    linears, seen = layers(q=12, k=4, v=4), moments(cross=name == "gptaq")
    algorithm = ALGORITHMS[name]
    options = algorithm.options()
    made = quantize_together(list(linears.values()), preset(scheme), seen, algorithm, options)
    for outcome, linear in zip(made, linears.values(), strict=True):
        alone = algorithm.quantize(linear.weight.detach(), preset(scheme).weights, seen, options)
        ours, theirs = outcome.weight, alone.weight
        assert ours.shape == theirs.shape
        assert ours.scale.shape == theirs.scale.shape
        # Rounding of float32 sums may turn a code over, and what follows it in its row.
        differ = (ours.dequantize() != theirs.dequantize()).any(1)
        assert float(differ.float().mean()) <= 0.25
        for tensor in (ours.packed, ours.scale):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_who_goes_together() -> None:
    """The same moments, the same scheme, in the order of the layers; each layer once."""
    linears = layers(q=4, o=4, k=4, v=4, e=4, n=4)
    shared, other = moments(), moments(1)
    seen = {"q": shared, "k": shared, "v": shared, "e": shared, "o": other}  # n: none reached it
    schemes: dict[str, Scheme] = dict.fromkeys(linears, preset("w4a16-g16"))
    schemes["v"] = preset("w8a16")
    groups = list(together(linears, schemes, seen, GPTQ))
    assert groups == [["q", "k", "e"], ["o"], ["v"], ["n"]]


def test_layers_that_no_row_reached_stay_alone() -> None:
    linears = layers(a=4, b=4)
    schemes = dict.fromkeys(linears, preset("w4a16-g16"))
    assert list(together(linears, schemes, {}, GPTQ)) == [["a"], ["b"]]


def test_not_where_rows_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    linears, shared = layers(a=4, b=4, c=8), moments()
    seen = dict.fromkeys(linears, shared)
    schemes = dict.fromkeys(linears, preset("w4a16-g16"))
    apart = [["a"], ["b"], ["c"]]
    assert list(together(linears, schemes, seen, replace(GPTQ, by_rows=False))) == apart
    whole = preset("w8a16").model_copy(
        update={"weights": WeightScheme(format="int8", granularity="tensor")}
    )
    assert list(together(linears, dict.fromkeys(linears, whole), seen, GPTQ)) == apart
    monkeypatch.setattr(part, "_AT_MOST", 8 * K)
    assert list(together(linears, schemes, seen, GPTQ)) == [["a", "b"], ["c"]]


def test_a_note_is_everybodys() -> None:
    linears = layers(a=4, b=6)
    scheme = preset("w4a16-g16")

    def noted(weight: Tensor, *_: object) -> Outcome:
        made: QuantizedWeight = GPTQ.quantize(weight, scheme.weights, None, GPTQ.options()).weight
        return Outcome(made, ("a remedy",))

    made = quantize_together(
        list(linears.values()), scheme, None, replace(GPTQ, quantize=noted), None
    )
    assert [outcome.notes for outcome in made] == [("a remedy",)] * 2
    assert [outcome.weight.shape for outcome in made] == [(4, K), (6, K)]
