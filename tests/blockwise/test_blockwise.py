"""Recipes that look at data: what comes out, compared with round to nearest and the float model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import ptq
from ptq.config import QuantizationConfig, as_config
from ptq.errors import CalibrationError, ConfigError
from ptq.modules import quantized_layers
from ptq.recipe import make_recipe
from tests.helpers import tiny_bert, tiny_llama, tiny_tokens

LEARNED = {"name": "learned_rounding", "options": {"iterations": 30, "sequences": 2}}
PERMUTED = {"name": "gptq", "options": {"act_order": "permuted"}}
DISTILL = {"name": "distill", "options": {"epochs": 3}}


def data(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(0, 97, (1, 24), generator=generator)} for _ in range(count)]


def config(recipe: Any, scheme: str = "w3a16-g16") -> QuantizationConfig:
    return as_config({"scheme": scheme, "recipe": recipe})


def quantized(recipe: Any, scheme: str = "w3a16-g16", model: nn.Module | None = None) -> nn.Module:
    model = copy.deepcopy(tiny_llama() if model is None else model)
    ptq.quantize(model, config(recipe, scheme), calibration=data())
    return model


@torch.no_grad()
def divergence(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Mean KL divergence from the float model, in float64, without any code of ptq."""
    total = 0.0
    for batch in batches:
        p = tiny_llama()(**batch).logits.double().log_softmax(-1)
        q = model(**batch).logits.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(batches)


@pytest.mark.parametrize("scheme", ["w3a16-g16", "w3a16-g16-asym", "w4a8-g16", "w4a8-g16-static"])
@pytest.mark.parametrize(
    "recipe",
    [
        ["gptq"], ["gptaq"], ["rtn", LEARNED], ["gptq", LEARNED], ["gptq", DISTILL],
        [PERMUTED, LEARNED, DISTILL],
    ],
    ids=str,
)  # fmt: skip
def test_calibrated_recipes_are_nearer_to_the_float_model(recipe: Any, scheme: str) -> None:
    plain = divergence(
        quantized(["smoothquant"] if "static" in scheme else ["rtn"], scheme), data()
    )
    made = quantized(recipe, scheme)
    assert len(quantized_layers(made)) == 14
    assert divergence(made, data()) < 0.9 * plain


def test_distillation_lowers_the_divergence() -> None:
    longer = {"name": "distill", "options": {"epochs": 10, "learning_rate": 5e-3}}
    before, after = quantized(["rtn", LEARNED]), quantized(["rtn", LEARNED, longer])
    assert divergence(after, data()) < 0.8 * divergence(before, data())


def test_distillation_keeps_the_codes_and_the_scales_dtype() -> None:
    before, after = quantized(["rtn"]), quantized(["rtn", DISTILL])
    moved = False
    for a, b in zip(
        quantized_layers(before).values(), quantized_layers(after).values(), strict=True
    ):
        assert torch.equal(a.codes, b.codes)
        assert b.scale.dtype == torch.float16
        moved |= not torch.equal(a.scale, b.scale)
    assert moved
    assert not any(
        parameter.requires_grad for parameter in quantized_layers(after).popitem()[1].parameters()
    )


def test_same_seed_same_bits_whatever_the_batch_size(tiny_model: Any, tiny_texts: Any) -> None:
    states = []
    for size in (1, 3, 8):
        model, tokenizer = ptq.load_float(tiny_model)
        section = {
            "data": str(tiny_texts[0]), "samples": 8, "sequence_length": 24, "batch_size": size,
        }  # fmt: skip
        recipe = ["awq", "gptq", LEARNED, DISTILL]
        asked = {"scheme": "w4a16-g16", "recipe": recipe, "calibration": section}
        ptq.quantize(model, asked, tokenizer=tokenizer)
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


def test_padding_does_not_count() -> None:
    """Rows behind the mask may hold anything."""
    made = []
    for filler in (0, 50):
        ids = tiny_tokens(4, 12).clone()
        mask = torch.ones_like(ids)
        ids[1::2, 7:] = filler
        mask[1::2, 7:] = 0
        model = tiny_llama()
        ptq.quantize(
            model, config(["smoothquant", "gptq", LEARNED, DISTILL]),
            calibration=[{"input_ids": ids, "attention_mask": mask}],
        )  # fmt: skip
        made.append(model.state_dict())
    for key, value in made[0].items():
        assert torch.equal(value, made[1][key]), key


def test_an_encoder() -> None:
    model = tiny_bert()
    batches = data()
    exact = [model(**batch)[0].detach() for batch in batches]
    errors = []
    for recipe in (["rtn"], ["gptq", LEARNED, DISTILL]):
        made = copy.deepcopy(model)
        ptq.quantize(made, config(recipe), calibration=batches)
        with torch.no_grad():
            found = [made(**batch)[0] for batch in batches]
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("scheme", ["w3a16-g16", "w4a8-g16"])
@pytest.mark.parametrize("recipe", [["gptaq", LEARNED], ["smoothquant", "gptq", DISTILL]], ids=str)
def test_an_encoder_decoder(recipe: Any, scheme: str) -> None:
    """T5: both stacks go block by block; the lengths of their sequences differ, one has padding."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=97)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q.weight", "k.weight", "v.weight", "o.weight")):
                parameter.normal_(std=0.2)  # else attention gives next to nothing
    batches = [
        {**batch, "attention_mask": torch.ones(1, 24), "decoder_input_ids": tiny_tokens(1, 12)}
        for batch in data()
    ]
    batches[1]["attention_mask"][:, 20:] = 0
    exact = [model(**batch).logits.detach() for batch in batches]
    errors = []
    for steps in (["rtn"], recipe):
        made = copy.deepcopy(model)
        result = ptq.quantize(made, config(steps, scheme), calibration=batches)
        assert not any("chain" in note for note in result.remedies)
        with torch.no_grad():
            found = [made(**batch).logits for batch in batches]
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)))
    assert len(quantized_layers(made)) == 2 * 6 + 2 * 10
    assert errors[1] < 0.8 * errors[0]


def test_layers_outside_the_blocks_are_quantized_and_noted() -> None:
    model = tiny_llama()
    asked = as_config(
        {
            "scheme": "w4a16-g16",
            "recipe": ["gptq"],
            "rules": [{"layers": "lm_head", "scheme": "w8a16"}],
        }
    )
    result = ptq.quantize(model, asked, calibration=data())
    assert "lm_head" in quantized_layers(model)
    assert any("outside the blocks" in note and "lm_head" in note for note in result.remedies)


def test_blocks_that_are_no_chain_are_quantized_all_the_same() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x) + self.blocks[1](x)

    model = Parallel()
    result = ptq.quantize(model, config(["gptq"]), calibration=[torch.randn(64, 16)])
    assert len(quantized_layers(model)) == 2
    assert any("no chain" in note for note in result.remedies)


def test_a_recipe_without_data_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"recipe \[gptq\] needs calibration data"):
        ptq.quantize(tiny_llama(), config(["gptq"]))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["gtpq"], r"recipe\.0: unknown step 'gtpq'; did you mean 'gptq'\?"),
        (["gptq", "hqq"], "gptq and hqq are both algorithms"),
        (["gptq", "awq"], r"recipe\.1: awq is a step of the kind 'transform'"),
        ([{"name": "gptq", "options": {"damping ": 1}}], "did you mean 'damping'"),
        ([{"name": "learned_rounding", "options": {"iterations": 0}}], "option 'iterations'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe(steps: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(config(steps).recipe, config(steps).scheme)


def test_mistakes_are_found_before_anything_changes() -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="unknown step"):
        ptq.quantize(model, config(["nope"]), calibration=data())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("scheme", "first"), [("w8a16", "rtn"), ("w8a8", "rotation"), ("w4a16-g64", "gptaq")]
)
def test_auto_is_a_recipe_of_known_steps(scheme: str, first: str) -> None:
    asked = as_config({"scheme": scheme, "recipe": "auto"})
    assert make_recipe(asked.recipe, asked.scheme).names[0] == first
