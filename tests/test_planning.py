"""The plan: who is quantized, why not, by which rule, and how many bytes."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from ptq.errors import ConfigError, UnsupportedError
from ptq.model import cast_parameters, skeleton
from ptq.pipeline import quantize
from ptq.planning import matches, plan


def llama(tied: bool = True, **options: object) -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(**{**sizes, "tie_word_embeddings": tied, **options})
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def outcomes(model: nn.Module, config: object) -> dict[str, str]:
    return {layer.name: layer.outcome for layer in plan(model, config).layers}  # type: ignore[arg-type]


def test_every_linear_layer_but_the_head() -> None:
    model = llama(tied=False)
    quantized = {layer.name for layer in plan(model, "w8a8").quantized}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert quantized == linears - {"lm_head"}


def test_a_tied_head_stays_float_unless_untied() -> None:
    model = llama()
    assert outcomes(model, "w8a8")["lm_head"].startswith("float: its weight is tied to")
    rules = [{"layers": "lm_head", "scheme": "w8a16"}]
    config = {"scheme": "w8a8", "rules": rules, "tied_embeddings": "untie"}
    assert outcomes(model, config)["lm_head"] == "w8a16"
    with pytest.raises(ConfigError, match="tied_embeddings: untie"):
        plan(model, {"scheme": "w8a8", "rules": rules})


def test_later_rules_win() -> None:
    config = {
        "scheme": "w8a8",
        "rules": [
            {"layers": "*.mlp.*", "scheme": "w4a16-g32"},
            {"layers": r"re:model\.layers\.0\..*", "scheme": "float"},
            {"layers": "*.0.mlp.down_proj", "scheme": "w8a16"},
        ],
    }
    made = outcomes(llama(), config)
    assert made["model.layers.0.mlp.gate_proj"].startswith("float")
    assert made["model.layers.0.mlp.down_proj"] == "w8a16"
    assert made["model.layers.1.mlp.gate_proj"] == "w4a16-g32"
    assert made["model.layers.1.self_attn.q_proj"] == "w8a8"


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    config = {"scheme": "w8a8", "rules": [{"layers": "*.qkv_proj", "scheme": "float"}]}
    with pytest.raises(ConfigError, match=r"rules\.0.*qkv_proj.*matches no linear layer.*q_proj"):
        plan(llama(), config)


def test_everything_float_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"every linear layer stays in float: .*rules\.0: \*"):
        plan(llama(), {"scheme": "w8a8", "rules": [{"layers": "*", "scheme": "float"}]})


def test_a_model_whose_layers_are_of_another_kind_is_told_so() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(16, 16, 3), "head": nn.Linear(16, 8)})
    config = {"scheme": "w8a8", "rules": [{"layers": "head", "scheme": "float"}]}
    with pytest.raises(ConfigError, match=r"head \(rules\.0.*94% of the parameters are in Conv2d"):
        plan(model, config)


def test_group_size_that_does_not_divide_names_the_layer_and_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"q_proj.*group_size 24.*32.*choose one of 8, 16, 32"):
        plan(llama(), {"scheme": {"weights": {"format": "int4", "group_size": 24}}})


def test_no_linear_layers() -> None:
    with pytest.raises(UnsupportedError, match=r"no nn\.Linear layer"):
        plan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "w8a8")


def test_already_quantized_models_are_refused() -> None:
    model = llama()
    quantize(model, "w8a16")
    with pytest.raises(UnsupportedError, match="already quantized by ptq"):
        quantize(model, "w8a16")
    other = llama()
    other.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedError, match="gptq"):
        plan(other, "w8a8")


def test_integer_parameters_are_refused() -> None:
    """As bitsandbytes and others leave them."""
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="already quantized"):
        plan(nn.Sequential(layer), "w8a8")


def test_subclasses_of_linear_stay_float_and_work() -> None:
    model = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    made = outcomes(model, "w8a16")
    assert "subclass of nn.Linear" in made["self_attn.out_proj"]
    x = torch.randn(2, 5, 32)
    expected = model(x)
    quantize(model, "w8a16")
    with torch.no_grad():
        assert (model(x) - expected).abs().max() < 0.1


def test_works_on_meta_and_agrees_with_the_real_model() -> None:
    model = llama()
    empty = skeleton(model.config)
    assert all(p.is_meta for p in empty.parameters())
    config = {"scheme": "w4a16-g32-asym"}
    assert plan(empty, config).to_dict() == plan(model, config).to_dict()


@pytest.mark.parametrize(
    "scheme",
    ["w8a16", "w8a8", "w4a16-g32", "w4a16-g32-asym", "w3a16-g16-asym", "w5a16", "w8a8-tensor"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_are_the_bytes(scheme: str, dtype: torch.dtype) -> None:
    """An independent count: the tensors of the state dict, shared storage once."""
    for model in (llama(), llama(attention_bias=True, tied=False), BertModel(_bert())):
        predicted = plan(model, scheme, dtype=dtype)
        assert predicted.bytes_before == _bytes(model, dtype)
        quantize(model, scheme)
        cast_parameters(model, dtype)
        assert predicted.bytes_after == _bytes(model, dtype)


def _bert() -> BertConfig:
    return BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        vocab_size=97,
        num_attention_heads=4,
        max_position_embeddings=64,
    )


def _bytes(model: nn.Module, dtype: torch.dtype) -> int:
    parameters = {id(p) for p in model.parameters()}
    seen = {t.data_ptr(): t for t in model.state_dict(keep_vars=True).values()}
    return sum(
        t.numel() * (dtype.itemsize if id(t) in parameters else t.element_size())
        for t in seen.values()
    )


def test_parameters_are_counted_once() -> None:
    model = llama()
    assert plan(model, "w8a8").parameters == sum(p.numel() for p in model.parameters())


def test_the_table_folds_repeated_layers_and_full_does_not() -> None:
    made = plan(llama(), "w8a8")
    assert "model.layers.*.self_attn.q_proj" in str(made)
    assert "model.layers.1.self_attn.q_proj" in made.table(full=True)
    assert "of" in made.summary()
    assert "<table>" in made._repr_html_()


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "x.lm_head", False),
        ("*.q_proj", "model.layers.0.q_proj", True),
        ("*.[qk]_proj", "a.k_proj", True),
        ("re:.*proj", "a.k_proj", True),
        ("re:k_proj", "a.k_proj", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected
