"""Encoders of text: similarity of embeddings, against brute force."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ptq
from ptq.calibrate import TokenSet, evaluation_sentences, split_sentences
from ptq.config import EvaluationConfig
from ptq.errors import CalibrationError, ConfigError, UnsupportedError
from ptq.evaluation import Similarity, compare_embeddings, embed, evaluated_as
from ptq.evaluation.encoder import spearman
from tests.helpers import tiny_bert, tiny_llama
from tests.tiny import tiny_tokenizer


def texts(count: int = 12) -> TokenSet:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(0, 97, (3 + i,), generator=generator) for i in range(count)]
    return TokenSet(tuple(made), "hash", count, ("texts.txt",))


def ranks(values: list[float]) -> list[float]:
    """By counting."""
    return [
        sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2
        for value in values
    ]


def test_an_embedding_is_the_mean_of_the_last_hidden_states() -> None:
    model, data = tiny_bert(), texts(3)
    found = embed(model, data)
    batch = torch.nn.utils.rnn.pad_sequence(list(data.sequences), batch_first=True)
    mask = torch.stack([torch.arange(batch.shape[1]) < len(s) for s in data.sequences]).long()
    with torch.no_grad():
        hidden = model(input_ids=batch, attention_mask=mask).last_hidden_state
    for row, sequence in enumerate(data.sequences):
        expected = hidden[row, : len(sequence)].mean(0)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


def test_figures_against_brute_force() -> None:
    model, data = tiny_bert(), texts()
    quantized = copy.deepcopy(model)
    ptq.quantize(quantized, "w4a16")
    found = ptq.evaluate(quantized, data, reference=model)
    assert isinstance(found, Similarity)
    a, b = embed(model, data).double(), embed(quantized, data).double()

    def cosine(x: Tensor, y: Tensor) -> float:
        return float(x @ y / (x.norm() * y.norm()))

    each = sorted(cosine(x, y) for x, y in zip(a, b, strict=True))
    assert math.isclose(found.cosine_mean, sum(each) / 12, rel_tol=1e-9)
    assert math.isclose(found.cosine_min, each[0], rel_tol=1e-9)
    assert found.cosine_p05 == found.cosine_p01 == found.cosine_min  # of 12 texts
    assert 0.5 < found.cosine_min < 0.9999
    pairs = [(i, j) for i in range(12) for j in range(i)]
    x, y = (torch.tensor(ranks([cosine(e[i], e[j]) for i, j in pairs])) for e in (a, b))
    expected = float(torch.corrcoef(torch.stack((x, y)))[0, 1])
    assert math.isclose(found.spearman, expected, rel_tol=1e-5)
    assert found.spearman < 0.9999
    assert found.texts == 12
    assert found.tokens == data.tokens
    assert "Spearman" in str(found)
    assert "<table>" in found._repr_html_()


def test_a_model_is_like_itself() -> None:
    model, data = tiny_bert(), texts()
    found = compare_embeddings(model, data, embed(model, data), torch.float32)
    assert math.isclose(found.cosine_min, 1, rel_tol=1e-9)
    assert math.isclose(found.spearman, 1, rel_tol=1e-9)
    assert found.float_dtype == "float32"


def test_percentiles_are_of_the_worst_texts() -> None:
    reference = torch.nn.functional.pad(torch.ones(200, 1), (0, 1))
    angles = torch.linspace(0, 1.0, 200)
    turned = torch.stack((angles.cos(), angles.sin()), 1)
    data = TokenSet(tuple(torch.tensor([1]) for _ in range(200)), "h", 1, ("t",))

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))
            self.rows = iter(turned)

        def forward(self, **_: object) -> object:
            hidden = next(self.rows)[None, None]
            return type("Output", (), {"last_hidden_state": hidden})()

    found = compare_embeddings(Fixed(), data, reference, torch.float32)
    assert math.isclose(found.cosine_p01, math.cos(float(angles[-2])), rel_tol=1e-6)
    assert math.isclose(found.cosine_p05, math.cos(float(angles[-10])), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 21], 1.0),
        ([1, 2, 3], [3, 2, -5], -1.0),
        ([1, 1, 1], [2, 2, 2], 1.0),
        ([1, 1, 1], [1, 2, 3], 0.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486833),
    ],
)
def test_spearman(a: list[float], b: list[float], expected: float) -> None:
    found = spearman(torch.tensor(a), torch.tensor(b))
    assert math.isclose(found, expected, abs_tol=1e-6)


def test_sentences(tmp_path: Path) -> None:
    text = "The first sentence of all. Short. Is this the second sentence?\nA line without an end"
    assert split_sentences([text, text]) == [
        "The first sentence of all.",
        "Is this the second sentence?",
        "A line without an end",
    ]
    file = tmp_path / "t.txt"
    file.write_text(
        "w1 w2 w3 w4 w5 w6 w7 w8. " * 3 + "w9 w10 w11 w12 w13 w14. w20 w21 w22 w23 w24 w25."
    )
    section = EvaluationConfig(data=[str(file)], windows=2, context=9)
    found = evaluation_sentences(section, tiny_tokenizer())
    assert [len(s) for s in found.sequences] == [9, 7]  # the third does not fit into 18
    with pytest.raises(CalibrationError, match="gives 1 sentences"):
        evaluation_sentences(section.model_copy(update={"windows": 1}), tiny_tokenizer())


def test_mistakes() -> None:
    model, data = tiny_bert(), texts()
    assert evaluated_as(model) == "encoder"
    with pytest.raises(ConfigError, match="pass that as reference"):
        ptq.evaluate(model, data)
    with pytest.raises(CalibrationError, match="two texts at least"):
        compare_embeddings(model, texts(1), model)
    with pytest.raises(CalibrationError, match="not the same model"):
        compare_embeddings(model, data, torch.zeros(12, 31))
    with pytest.raises(UnsupportedError, match="no hidden states"):
        embed(_Nothing(), data)
    assert evaluated_as(tiny_llama()) == "causal"


class _Nothing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, *_: object, **__: object) -> None:
        return None
