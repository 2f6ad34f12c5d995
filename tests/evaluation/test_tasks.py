"""Multiple-choice tasks: the statistics by brute force, and lm-eval where it is installed."""

import itertools
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ptq
from ptq.errors import CalibrationError, UnsupportedError
from ptq.evaluation import accuracies, answers, compare_answers, require_lm_eval
from ptq.evaluation.tasks import mcnemar, paired_interval
from tests.tiny import tiny_tokenizer

TASKS = Path(__file__).parent / "tasks"


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 1), (5, 5), (2, 9)])
def test_mcnemar_counts_coins(lost: int, won: int) -> None:
    pytest.importorskip("scipy")
    coins = list(itertools.product((0, 1), repeat=lost + won))
    extreme = sum(abs(2 * sum(c) - len(c)) >= abs(lost - won) for c in coins)
    assert math.isclose(mcnemar(lost, won), extreme / len(coins))


def test_paired_interval() -> None:
    # By hand, n' = 100 + 2: b = 10.5, c = 4.5.
    low, high = paired_interval(10, 4, 100)
    middle = -6 / 102
    reach = 1.959964 * math.sqrt(15 - 36 / 102) / 102
    assert math.isclose(low, middle - reach, rel_tol=1e-6)
    assert math.isclose(high, middle + reach, rel_tol=1e-6)
    low, high = paired_interval(0, 0, 16)
    assert low < 0 < high
    assert paired_interval(3, 0, 3)[0] == pytest.approx(-1, abs=0.15)


def test_the_interval_holds_the_true_difference_often_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        draws = torch.rand(60, generator=generator)
        lost, won = int((draws < 0.12).sum()), int(((draws >= 0.12) & (draws < 0.2)).sum())
        low, high = paired_interval(lost, won, 60)
        held += low <= -0.04 <= high
    assert 0.92 <= held / 400 <= 0.99


def test_answers_are_compared_item_by_item() -> None:
    pytest.importorskip("scipy")
    theirs = {"a": {0: True, 1: True, 2: False, 3: False, 5: True}}
    ours = {"a": {5: False, 0: True, 1: False, 2: True, 3: False}}
    found = compare_answers(theirs, ours).to_dict()["a"]
    assert (found["items"], found["only_float"], found["only_quantized"]) == (5, 2, 1)
    assert (found["float_accuracy"], found["accuracy"], found["difference"]) == (0.6, 0.4, -0.2)
    assert accuracies(ours).to_dict() == {"a": 0.4}
    with pytest.raises(CalibrationError, match="the same questions"):
        compare_answers(theirs, {"a": {0: True}})


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnsupportedError, match="not installed; pip install 'ptq-toolkit"):
        require_lm_eval()


def test_lm_eval_runs_local_tasks(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what lm-eval's own packages warn of
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=97,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.5,
        )
        model, tokenizer = LlamaForCausalLM(config).eval(), tiny_tokenizer()
        (tmp_path / "words.yaml").write_text(
            (TASKS / "ptq_words.yaml").read_text().replace("ptq_words", "words")
        )
        (tmp_path / "words.jsonl").write_text(
            '{"question": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 1}\n'
            '{"question": "w7", "choices": ["w8", "w9"], "answer": 0}\n'
            '{"question": "w9 w4", "choices": ["w2", "w6"], "answer": 0}\n'
        )
        found = answers(model, tokenizer, [tmp_path], items=2)
        shipped = answers(model, tokenizer, [TASKS], items=1)
        with pytest.raises(CalibrationError, match="neither a directory"):
            answers(model, tokenizer, ["no-such-task-anywhere"])
        with pytest.raises(CalibrationError, match="holds no task file"):
            (tmp_path / "empty").mkdir()
            answers(model, tokenizer, [tmp_path / "empty"])
    assert list(shipped) == ["ptq_words"]
    expected = {}
    rows = [("w1 w2", ["w3", "w4 w5"], 1), ("w7", ["w8", "w9"], 0)]
    for item, (question, choices, answer) in enumerate(rows):
        scores = []
        for choice in choices:
            start = len(tokenizer(question)["input_ids"])
            ids = torch.tensor(tokenizer(f"{question} {choice}")["input_ids"])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids))))
        expected[item] = max(range(2), key=scores.__getitem__) == answer
    assert found == {"words": expected}
    assert ptq.__version__
