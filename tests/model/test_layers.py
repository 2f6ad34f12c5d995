"""What counts as a layer that can be replaced, and what replacing and casting leave alone."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import T5Config, T5ForConditionalGeneration

import ptq
from ptq.errors import ConfigError, ModelError, UnsupportedError
from ptq.model import cast_parameters, eval_mode
from ptq.modules import QuantLinear
from ptq.planning import plan


def two(change: Callable[[nn.Linear], object]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    change(model[0])
    return model


def replaced_forward(linear: nn.Linear) -> None:
    original = linear.forward
    linear.forward = lambda x: original(x)  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (weight_norm, "computed"),
        (spectral_norm, "computed"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "computed"),
        (parametrizations.weight_norm, "parametrized"),
        (replaced_forward, "forward was replaced"),
    ],
)
def test_layers_that_cannot_be_replaced_stay_and_say_why(
    change: Callable[[nn.Linear], object], reason: str
) -> None:
    model = two(change).eval()  # spectral_norm changes its weight in every training step
    x = torch.randn(3, 32)
    before = model[0](x)
    made = ptq.plan(model, "w8a16")
    assert reason in next(layer for layer in made.layers if layer.name == "0").reason
    ptq.quantize(model, "w8a16")
    assert isinstance(model[1], QuantLinear)
    assert torch.equal(model[0](x), before)


def test_a_model_that_is_one_layer_cannot_be_changed_in_place() -> None:
    with pytest.raises(UnsupportedError, match=r"single Linear.*nn\.Sequential"):
        ptq.quantize(nn.Linear(32, 16), "w8a16")
    model = nn.Sequential(nn.Linear(32, 16))
    ptq.quantize(model, "w8a16")
    with pytest.raises(UnsupportedError, match=r"single QuantLinear.*nn\.Sequential"):
        ptq.dequantize(model[0])


def test_what_is_no_model() -> None:
    with pytest.raises(ConfigError, match=r"found a tuple; ptq\.load_float gives one: model, tok"):
        ptq.quantize((nn.Linear(4, 4), None), "w8a16")  # type: ignore[arg-type]


def test_weights_without_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 16))
    with pytest.raises(ModelError, match=r"tensor 0\.weight has no values"):
        ptq.quantize(model, "w8a16")


def test_forward_hooks_stay() -> None:
    seen: list[str] = []
    model = two(
        lambda m: (
            m.register_forward_pre_hook(lambda *_: seen.append("before")),
            m.register_forward_hook(lambda *_, **__: seen.append("after"), with_kwargs=True),
        )
    )
    ptq.quantize(model, "w8a16")
    model(torch.randn(2, 32))
    assert seen == ["before", "after"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_encoder_layer_of_torch_is_left(masked: bool) -> None:
    """In eval mode it reads weights instead of calling layers; ours must be called."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    with torch.no_grad():
        before = model(x, src_key_padding_mask=mask)
    ptq.quantize(model, "w8a8")
    called: list[nn.Module] = []
    original = QuantLinear.forward

    def counting(self: QuantLinear, rows: torch.Tensor) -> torch.Tensor:
        called.append(self)
        return original(self, rows)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(QuantLinear, "forward", counting)
        after = model(x, src_key_padding_mask=mask)
    assert len(called) == 4
    real = slice(None) if mask is None else ~mask
    assert not torch.equal(after[real], before[real])
    assert torch.allclose(after[real], before[real], atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_transformers_keeps_in_float32_stays_so(dtype: torch.dtype, tmp_path: object) -> None:
    """As from_pretrained does: T5's wo is float32 in a float16 model, which would overflow."""
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=97)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    expected = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    rules = [{"layers": "*.wo", "scheme": "float"}]
    cast_parameters(model, dtype)
    for name, parameter in expected.named_parameters():
        assert model.get_parameter(name).dtype == parameter.dtype, name
    made = plan(model, {"scheme": "w8a16", "rules": rules}, dtype=dtype)
    wo = next(layer for layer in made.layers if layer.name.endswith(".wo"))
    assert wo.bytes_after == expected.get_parameter(f"{wo.name}.weight").nbytes


def test_eval_mode_gives_every_module_its_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32", "w4a8-g32", "w3a16-g32-asym"])
@pytest.mark.parametrize("rows", [1, 40])
def test_float64(scheme: str, rows: int) -> None:
    model = nn.Sequential(nn.Linear(64, 32)).double()
    x = torch.randn(rows, 64, dtype=torch.float64)
    expected = model(x)
    ptq.quantize(model, scheme)
    y = model(x)
    assert y.dtype == torch.float64
    # Of the outputs' norm: steps of the weights are a fifteenth (int4) or a seventh (int3).
    assert (y - expected).norm() < 0.25 * expected.norm()
