"""What users of transformers do with a model: generate, with either cache, and pipelines."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

import ptq
from ptq.modules import QuantLinear
from tests.helpers import tiny_llama
from tests.huggingface.families import auto_class, float_model, inputs
from tests.tiny import WORDS, tiny_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generation")
    model = tiny_llama()
    ptq.quantize(model, "w8a8")
    ptq.save(model, root / "out", tokenizer=tiny_tokenizer())
    return root / "out"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(directory: Path, cache: str) -> None:
    ids = torch.tensor([[5, 9, 33, 7]])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    wanted = ptq.load(directory).generate(ids, use_cache=False, **options)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(model.generate(ids, cache_implementation=cache, **options), wanted)
    assert wanted.shape == (1, 16) and len(wanted[0, 4:].unique()) > 1


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "opt", "t5", "bart"])
def test_generate_in_other_families(tmp_path: Path, family: str) -> None:
    model = float_model(family)
    ptq.quantize(model, "w8a16")
    ptq.save(model, tmp_path / "out")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = {"input_ids": inputs(model)["input_ids"]}
    again = auto_class(family).from_pretrained(tmp_path / "out")
    made = again.generate(**ids, **options)
    assert torch.equal(made, model.generate(**ids, **options))
    assert made.shape[1] == (7 if model.config.is_encoder_decoder else 13)


def test_pipeline(directory: Path) -> None:
    generate = pipeline("text-generation", model=str(directory))
    assert isinstance(generate.model.model.layers[0].mlp.up_proj, QuantLinear)
    (made,) = generate("w5 w9 w33", max_new_tokens=5, do_sample=False)
    model = ptq.load(directory)
    ids = generate.tokenizer("w5 w9 w33", return_tensors="pt").input_ids
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False)[0, 3:].tolist()
    new = made["generated_text"].removeprefix("w5 w9 w33")
    assert new.split() == [WORDS[i] for i in wanted if i > 1] and len(set(wanted)) > 1
