"""Tokens in their text: pieces, the worst ones, what was likely instead."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import PreTrainedTokenizerFast

from ptq.calibrate import TokenSet
from ptq.evaluation import Evaluation, compare, pieces, tokens_in_text
from tests.helpers import tiny_llama
from tests.tiny import tiny_tokenizer


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: a character outside ASCII is several tokens."""
    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=270, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(["the cat sat on the mat, the cat"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def word_pieces() -> PreTrainedTokenizerFast:
    words = {"[UNK]": 0, "un": 1, "##known": 2, "word": 3, "##s": 4, ".": 5}
    made = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@pytest.mark.parametrize("text", ["the cat: é, 猫, 🐈‍⬛.", "  two  spaces\n\tand lines\n", "é"])
def test_pieces_of_bytes_are_the_text(text: str) -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text)["input_ids"]
    made = pieces(tokenizer, ids)
    assert len(made) == len(ids)
    assert "".join(made) == text
    assert not any("\ufffd" in piece for piece in made)


def test_a_text_that_ends_within_a_character() -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer("a猫")["input_ids"][:-1]
    assert pieces(tokenizer, ids)[0] == "a"
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_pieces_of_words_keep_their_joints() -> None:
    assert pieces(word_pieces(), [1, 2, 3, 4]) == ["un", "known", " word", "s"]
    assert pieces(tiny_tokenizer(), [5, 6, 7]) == ["w3", " w4", " w5"]
    assert pieces(tiny_tokenizer(), []) == []


def windows(count: int = 3, length: int = 40) -> TokenSet:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 97, (count, length), generator=generator)
    return TokenSet(tuple(rows), "abc", 1, ("made",))


def section(worst: int = 20) -> tuple[dict[str, Any], nn.Module, nn.Module, TokenSet]:
    model, reference, data = tiny_llama(seed=1), tiny_llama(), windows()
    result = compare(model, data, reference)
    assert isinstance(result, Evaluation) and result.tokens is not None
    return (
        tokens_in_text(result.tokens, data, tiny_tokenizer(), worst=worst),
        reference,
        model,
        data,
    )


def probabilities(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=window[None]).logits[0, :-1].double().softmax(-1)


def test_worst_tokens_against_probabilities_in_float64() -> None:
    found, reference, model, data = section(worst=5)
    tokenizer = tiny_tokenizer()
    p = [probabilities(reference, w) for w in data.sequences]
    q = [probabilities(model, w) for w in data.sequences]
    kl = torch.stack([(a * (a / b).log()).sum(-1) for a, b in zip(p, q, strict=True)])
    order = kl.flatten().argsort(descending=True)[:5].tolist()
    assert [row["kl"] for row in found["worst"]] == [
        pytest.approx(kl.flatten()[i].item(), rel=1e-3) for i in order
    ]
    for row, index in zip(found["worst"], order, strict=True):
        window, scored = divmod(index, kl.shape[1])
        assert (row["window"], row["position"], row["times"]) == (window, scored + 1, 1)
        ids = data.sequences[window]
        target = ids[scored + 1]
        whole = tokenizer.decode(ids[max(0, scored - 23) : scored + 2].tolist())
        assert row["before"] + row["token"] == whole
        assert row["float_probability"] == pytest.approx(p[window][scored, target].item(), rel=1e-3)
        assert row["quantized_probability"] == pytest.approx(
            q[window][scored, target].item(), rel=1e-3
        )
        for key, side in (("float", p), ("quantized", q)):
            top = side[window][scored].topk(5)
            assert [c["token"].strip() for c in row[key]] == [
                tokenizer.decode([i]) for i in top.indices.tolist()
            ]
            shares = [c["probability"] for c in row[key]]
            assert shares == pytest.approx(top.values.tolist(), rel=1e-3)


def test_windows_are_a_typical_one_and_the_worst() -> None:
    found, reference, model, data = section()
    result = compare(model, data, reference)
    assert isinstance(result, Evaluation) and result.tokens is not None
    means = [values.mean().item() for values in result.tokens.divergence]
    order = sorted(range(3), key=lambda i: -means[i])
    assert [(w["index"], w["why"]) for w in found["windows"]] == [
        (order[1], "median"),
        (order[0], "largest"),
    ]
    for window in found["windows"]:
        assert window["mean_kl"] == pytest.approx(means[window["index"]], rel=1e-3)
        assert window["kl"][0] is None
        expected = result.tokens.divergence[window["index"]].tolist()
        assert window["kl"][1:] == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert len(window["pieces"]) == len(window["kl"]) == 40


def test_one_window_is_shown_once() -> None:
    model, reference = tiny_llama(seed=1), tiny_llama()
    data = windows(1)
    result = compare(model, data, reference)
    assert isinstance(result, Evaluation) and result.tokens is not None
    found = tokens_in_text(result.tokens, data, tiny_tokenizer())
    assert [window["why"] for window in found["windows"]] == ["largest"]


def test_like_places_are_listed_once_and_counted() -> None:
    model, reference = tiny_llama(seed=1), tiny_llama()
    one = windows(1).sequences[0]
    data = TokenSet((one, one, one), "abc", 1, ("made",))
    result = compare(model, data, reference)
    assert isinstance(result, Evaluation) and result.tokens is not None
    found = tokens_in_text(result.tokens, data, tiny_tokenizer(), worst=4)["worst"]
    assert [row["times"] for row in found] == [3, 3, 3, 3]
    assert len({row["position"] for row in found}) == 4


def test_parts_of_characters_have_some_text() -> None:
    """A worst token that ends within a character is shown by what its decoder gives."""
    tokenizer = bytes_tokenizer()
    ids = torch.tensor(tokenizer("猫 é 猫 é")["input_ids"])
    data = TokenSet((ids,), "abc", 1, ("made",))
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, len(ids) - 1, len(tokenizer), generator=generator)
    from ptq.evaluation.statistics import TokenStatistics

    statistics = TokenStatistics([len(ids) - 1])
    statistics.add(p, q, ids[1:])
    found = tokens_in_text(statistics, data, tokenizer)
    assert all(row["token"] for row in found["worst"])
    assert all(choice["token"] for row in found["worst"] for choice in row["float"])
