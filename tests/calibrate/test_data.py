"""Text from every kind of source, and tokens from text."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing

from ptq.calibrate import (
    TokenSet,
    batches,
    calibration_tokens,
    evaluation_windows,
    load_documents,
    overlap,
)
from ptq.config import CalibrationConfig, EvaluationConfig
from ptq.errors import CalibrationError
from tests.tiny import tiny_text, tiny_tokenizer

TEXTS = ["w1 w2 w3", "w4 w5", "w6"]


def as_txt(folder: Path) -> Path:
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    return folder


def as_jsonl(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": t, "id": 1}) for t in TEXTS))
    return path


def as_json(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps([{"text": t} for t in TEXTS], indent=1))
    return path


def as_parquet(folder: Path) -> Path:
    path = folder / "rows.parquet"
    Dataset.from_dict({"text": TEXTS}).to_parquet(path)
    return path


def as_saved_dataset(folder: Path) -> Path:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("make", [as_txt, as_jsonl, as_json, as_parquet, as_saved_dataset])
def test_every_source_gives_the_same_documents(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    assert [d.text for d in load_documents([str(make(tmp_path))])] == TEXTS


def test_several_sources_in_order(tmp_path: Path) -> None:
    documents = load_documents([str(as_json(tmp_path)), str(as_jsonl(tmp_path))])
    assert [d.text for d in documents] == TEXTS * 2


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "", "there is no text"),
        ("a.txt", b"abc\0def", "binary"),
        ("a.txt", b"caf\xe9", "not UTF-8 text .byte 3"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2"),
        ("a.jsonl", '{"body": "x"}', "there are body; name one with 'column:'"),
        ("a.jsonl", '"just a string"', "line 1: expected an object"),
        ("a.jsonl", '{"text": 5}', "expected a text, or a list of messages"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "a list of messages with role"),
        ("a.json", '{"text": "x"}', "expected a list"),
        ("a.parquet", b"not parquet at all", "not a whole Parquet file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(CalibrationError, match=expected) as error:
        load_documents([path])
    assert path in str(error.value)


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"no calibration or evaluation file at /.*nope\.txt"
    ):
        load_documents(["nope.txt"])
    with pytest.raises(CalibrationError, match="holds no"):
        load_documents([str(tmp_path)])
    with pytest.raises(CalibrationError, match="no file or directory here, and cannot be"):
        load_documents(["nobody/no-such-data"])
    DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "d")
    assert [d.text for d in load_documents([str(tmp_path / "d")])] == TEXTS
    with pytest.raises(CalibrationError, match="no split 'test'; there are train"):
        load_documents([str(tmp_path / "d")], split="test")


def test_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"body": "w1", "text": "w2"}')
    assert load_documents([path], column="body")[0].text == "w1"


def config(path: Path, **options: object) -> CalibrationConfig:
    return CalibrationConfig.model_validate({"data": str(path), **options})


def test_overlap_is_the_share_of_the_evaluation_text() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (512,), generator=generator)
    other = torch.randint(0, 1000, (512,), generator=generator)

    def tokens(*sequences: torch.Tensor) -> TokenSet:
        return TokenSet(sequences, "", 1, ("-",))

    assert overlap(tokens(ids), tokens(other)) == 0
    assert overlap(tokens(ids), tokens(ids[100:356], other[:256])) == 0.5
    assert overlap(tokens(ids[:20]), tokens(ids)) == 0


def test_the_shipped_texts_do_not_overlap(demo_model: str) -> None:
    from ptq.config import ModelConfig
    from ptq.model import ModelSource, load_tokenizer

    tokenizer = load_tokenizer(ModelSource.resolve(ModelConfig(id=demo_model)))
    folder = Path(__file__).parents[2] / "calibration_data"
    calibration = CalibrationConfig(data=[str(folder / "calibration.jsonl")], samples=64)
    evaluation = EvaluationConfig(data=[str(folder / "evaluation.jsonl")], windows=100)
    assert overlap(
        calibration_tokens(calibration, tokenizer), evaluation_windows(evaluation, tokenizer)
    ) == 0  # fmt: skip


def test_calibration_tokens_are_seeded_pieces_of_the_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(tiny_text(1000))
    tokenizer = tiny_tokenizer()
    options = {"samples": 10, "sequence_length": 32}
    first = calibration_tokens(config(path, **options), tokenizer)
    assert [len(s) for s in first.sequences] == [32] * 10
    assert first.tokens == 320
    whole = torch.tensor(tokenizer(path.read_text())["input_ids"]).split(32)
    for sequence in first.sequences:
        assert any(torch.equal(sequence, piece) for piece in whole)
    same = calibration_tokens(config(path, **options), tokenizer)
    assert same.sha256 == first.sha256
    other = calibration_tokens(config(path, seed=1, **options), tokenizer)
    assert other.sha256 != first.sha256


def test_too_few_pieces_says_how_many_there_are(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(tiny_text(100))
    with pytest.raises(CalibrationError, match=r"gives 3 sequences.*calibration\.samples: 3"):
        calibration_tokens(config(path, samples=4, sequence_length=32), tiny_tokenizer())


def test_chat_rows_go_through_the_template(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    }
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    tokenizer = tiny_tokenizer(chat=True)
    tokens = calibration_tokens(config(path, samples=1, sequence_length=2), tokenizer)
    assert tokens.tokens == 2
    windows = evaluation_windows(EvaluationConfig(data=[str(path)], context=5), tokenizer)
    assert tokenizer.decode(windows.sequences[0]) == "w5 w6 <eos> w7 <eos>"
    with pytest.raises(CalibrationError, match="no chat template"):
        evaluation_windows(EvaluationConfig(data=[str(path)], context=5), tiny_tokenizer())


def test_special_tokens_of_a_chat_are_those_of_the_template_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "w5 w6"}]}))
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    assert tokenizer("w5")["input_ids"] == [1, 7]
    windows = evaluation_windows(EvaluationConfig(data=[str(path)], context=3), tokenizer)
    assert tokenizer.decode(windows.sequences[0]) == "w5 w6 <eos>"


def test_windows_do_not_overlap_and_the_tail_is_dropped(tmp_path: Path) -> None:
    text = tiny_text(130)
    (tmp_path / "a.txt").write_text(text)
    tokenizer = tiny_tokenizer()
    section = EvaluationConfig(data=[str(tmp_path / "a.txt")], windows=99, context=50)
    windows = evaluation_windows(section, tokenizer)
    assert torch.equal(
        torch.cat(windows.sequences), torch.tensor(tokenizer(text)["input_ids"])[:100]
    )
    with pytest.raises(CalibrationError, match="has 130 tokens, fewer than one window of 200"):
        evaluation_windows(section.model_copy(update={"context": 200}), tokenizer)


def test_long_documents_raise_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text(tiny_text(500))
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    section = EvaluationConfig(data=[str(tmp_path / "a.txt")], context=50)
    with caplog.at_level(logging.WARNING):
        evaluation_windows(section, tokenizer)
    assert not caplog.records


def test_batches_are_padded_on_the_right_and_masked(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(tiny_text(100))
    tokens = calibration_tokens(config(path, samples=4, sequence_length=28), tiny_tokenizer())
    made = list(batches(tokens, 3, pad_token_id=9))
    assert [len(b["input_ids"]) for b in made] == [3, 1]
    row = 0
    for batch in made:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert torch.equal(ids[mask.bool()], tokens.sequences[row])
            assert (ids[~mask.bool()] == 9).all()
            row += 1
