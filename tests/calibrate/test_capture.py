"""What the observers get to see of a model."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.calibrate import collect
from ptq.config import ActivationScheme, Plugin
from ptq.errors import CalibrationError
from ptq.observers import make_observer
from tests.helpers import tiny_llama

MINMAX = Plugin(name="minmax")
STATIC = ActivationScheme(mode="static")
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
LAYERS = {UP: STATIC, Q: STATIC}


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(3))


def test_the_range_is_that_of_the_layers_input() -> None:
    model, tokens = tiny_llama(), ids(4, 9)
    seen: list[Tensor] = []
    handle = model.get_submodule(UP).register_forward_pre_hook(
        lambda _m, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    found = collect(model, LAYERS, [{"input_ids": tokens}], MINMAX)
    assert found[UP].low == seen[0].min()
    assert found[UP].high == seen[0].max()
    assert found[UP].rows == 36
    channels = collect(model, LAYERS, [{"input_ids": tokens}], MINMAX, per_channel=True)
    assert torch.equal(channels[UP].high, seen[0].flatten(0, 1).max(0).values)


def test_padding_is_not_seen() -> None:
    model = tiny_llama()
    long, short = ids(1, 9), ids(2, 5)[1:]
    apart = collect(model, LAYERS, [{"input_ids": long}, {"input_ids": short}], MINMAX)
    padded = torch.full((2, 9), 96)
    padded[0], padded[1, :5] = long[0], short[0]
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = {"input_ids": padded, "attention_mask": mask}
    together = collect(model, LAYERS, [batch], MINMAX)
    unmasked = collect(model, LAYERS, [{"input_ids": padded}], MINMAX)
    for name in LAYERS:
        assert together[name].rows == apart[name].rows == 14
        # The same sums in another order: float32 rounding only.
        assert torch.allclose(together[name].low, apart[name].low, atol=1e-5)
        assert torch.allclose(together[name].high, apart[name].high, atol=1e-5)
        assert unmasked[name].rows == 18


class Flat(nn.Module):
    """Flattens batch and time before its linear layer, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.linear(x.flatten(0, 1))


def test_flattened_inputs_are_masked_too() -> None:
    x = torch.ones(2, 3, 4)
    x[1, 2] = 100
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = collect(Flat(), {"linear": STATIC}, [{"x": x, "attention_mask": mask}], MINMAX)
    assert found["linear"].high == 1
    assert found["linear"].rows == 5


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_batches_of_every_kind(wrap: object) -> None:
    assert callable(wrap)
    assert (
        collect(Flat(), {"linear": STATIC}, [wrap(torch.ones(2, 3, 4))], MINMAX)["linear"].rows == 6
    )


def test_nan_names_the_layer_and_the_batch() -> None:
    good, bad = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    bad[0, 0, 0] = float("nan")
    model = Flat()
    with pytest.raises(CalibrationError, match=r"layer linear: .* calibration batch 1"):
        collect(model, {"linear": STATIC}, [good, bad], MINMAX)
    assert not model.linear._forward_pre_hooks


def test_a_layer_that_is_never_reached_is_named() -> None:
    with pytest.raises(CalibrationError, match="gave no rows to unused in 1 batches"):
        collect(Flat(), {"linear": STATIC, "unused": STATIC}, [torch.ones(2, 3, 4)], MINMAX)


def test_no_batches() -> None:
    with pytest.raises(CalibrationError, match="got no batches"):
        collect(Flat(), {"linear": STATIC}, [], MINMAX)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (torch.ones(2, 3, 4), "a single Tensor, expected several"),
        ({"x": torch.ones(2, 3, 4)}, "a single dict, expected several"),
        ("text.txt", "text goes into the configuration"),
        (5, "int is not iterable"),
        ([5], "batch 0 is a int; expected a tensor"),
    ],
)
def test_what_is_no_list_of_batches(data: object, expected: str) -> None:
    with pytest.raises(CalibrationError, match=expected):
        collect(Flat(), {"linear": STATIC}, data, MINMAX)  # type: ignore[arg-type]


def test_training_mode_and_hooks_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5).eval(), nn.Linear(4, 4)).train()
    model[1].eval()
    collect(model, {"0": STATIC, "2": STATIC}, [torch.ones(3, 4)], MINMAX)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_static_scales_cover_what_was_seen() -> None:
    """Within half a step of every value of the calibration input, symmetric and asymmetric."""
    for symmetric in (True, False):
        model = nn.Sequential(nn.Linear(4, 4))
        x = torch.randn(50, 4) + 2
        activations: Mapping[str, object] = {"mode": "static", "symmetric": symmetric}
        ptq.quantize(model, {"scheme": {"activations": dict(activations)}}, calibration=[x])
        layer = model[0]
        zero = 0 if layer.input_zero_point is None else layer.input_zero_point
        codes = ((x / layer.input_scale).round() + zero).clamp(-128, 127)
        error = ((codes - zero) * layer.input_scale - x).abs().max()
        assert error <= layer.input_scale * 0.5001
        assert (layer.input_zero_point is None) == symmetric


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
@pytest.mark.parametrize("observer", ["mse", "entropy"])
def test_the_observer_knows_the_scheme(observer: str, recipe: str) -> None:
    """Two layers read the same skewed input, one with a zero point and one without."""
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 4))
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).abs().pow(2.5) - 0.2
    scales = []
    for symmetric in (True, False):
        activations = {"mode": "static", "symmetric": symmetric}
        made = copy.deepcopy(model)
        ptq.quantize(
            made,
            {
                "scheme": {"activations": activations},
                "recipe": recipe,
                "calibration": {"data": "none", "observer": observer},
            },
            calibration=[x],
        )
        expected = make_observer(Plugin(name=observer), ActivationScheme(**activations))
        expected.update(x)
        low, high = (float(end) for end in expected.range())
        scale = max(high, -low) / 127.5 if symmetric else (high - low) / 255
        assert float(made[0].input_scale) == pytest.approx(scale, rel=1e-5)
        scales.append((low, high))
    assert scales[0] != scales[1]
