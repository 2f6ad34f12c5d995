"""Perplexity, divergence and their interval, against independent computations in float64."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.normalizers import Strip
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import ptq
from ptq.calibrate import TokenSet
from ptq.errors import CalibrationError, ConfigError, ModelError, UnsupportedError
from ptq.evaluation import (
    Evaluation,
    Perplexity,
    ReferenceLogits,
    compare,
    encode_prompt,
    evaluate,
    sample,
    window_logits,
)
from ptq.evaluation.statistics import TokenStatistics, nll, ratio_interval, student_t
from tests.helpers import tiny_bert, tiny_llama
from tests.tiny import tiny_tokenizer


def windows(count: int = 3, length: int = 50) -> TokenSet:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 97, (count, length), generator=generator)
    return TokenSet(tuple(rows), "abc", 1, ("made",))


def logits64(model: nn.Module, window: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=window[None]).logits[0, :-1].double()


def test_perplexity_against_cross_entropy_in_float64() -> None:
    model, data = tiny_llama(), windows()
    total = sum(
        nn.functional.cross_entropy(logits64(model, w), w[1:], reduction="sum").item()
        for w in data.sequences
    )
    result = evaluate(model, data)
    assert isinstance(result, Perplexity)
    assert result.perplexity == pytest.approx(math.exp(total / (3 * 49)), rel=1e-6)
    assert result.protocol.tokens_scored == 3 * 49


def test_divergence_and_agreement_against_torch_distributions() -> None:
    model, other, data = tiny_llama(), tiny_llama(seed=1), windows()
    p = torch.cat([logits64(model, w) for w in data.sequences])
    q = torch.cat([logits64(other, w) for w in data.sequences])
    categorical = torch.distributions.Categorical
    exact = torch.distributions.kl_divergence(categorical(logits=p), categorical(logits=q))
    result = compare(other, data, model)
    assert result.kl_mean == pytest.approx(exact.mean().item(), rel=1e-5)
    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1.0}
    for name, share in shares.items():
        expected = np.quantile(exact, share, method="inverted_cdf")
        assert getattr(result, f"kl_{name}") == pytest.approx(expected, rel=1e-5), name
    five = [
        len({*a.argsort()[-5:].tolist()} & {*b.argsort()[-5:].tolist()}) / 5
        for a, b in zip(p, q, strict=True)
    ]
    assert result.top5_agreement == pytest.approx(sum(five) / len(five), rel=1e-6)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert result.top1_agreement == agreement
    assert result.ratio == pytest.approx(result.quantized_perplexity / result.float_perplexity)


def test_a_model_against_itself() -> None:
    result = compare(tiny_llama(), windows(), tiny_llama())
    assert result.ratio == 1
    assert result.ratio_low == result.ratio_high == 1
    assert result.kl_mean == 0
    assert result.top1_agreement == result.top5_agreement == 1


def test_a_vocabulary_of_less_than_five_tokens() -> None:
    p, q = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    statistics = TokenStatistics([1])
    statistics.add(p, q, torch.tensor([1]))
    assert statistics.top_agreement[0].tolist() == [1.0]
    (mine,), (other,) = statistics.likeliest(0)
    assert [token for token, _ in mine] == [2, 1, 0] and [t for t, _ in other] == [0, 1, 2]
    assert sum(share for _, share in mine) == pytest.approx(1)


def test_damage_shows() -> None:
    data, model = windows(20, 60), tiny_llama()
    # Windows that the model itself finds likely, so that damage can only hurt.
    likely = TokenSet(
        tuple(torch.cat((w[:1], logits64(model, w).argmax(-1))) for w in data.sequences),
        "x", 1, (),
    )  # fmt: skip
    damaged = tiny_llama()
    ptq.quantize(damaged, "w2a16-g16")
    result = compare(damaged, likely, model)
    assert result.ratio > 1
    assert result.ratio_low < result.ratio < result.ratio_high
    assert result.kl_mean > 0
    assert result.top1_agreement < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_logits_are_the_live_ones(dtype: torch.dtype) -> None:
    model, other, data = tiny_llama(dtype=dtype), tiny_llama(seed=1, dtype=dtype), windows()
    with ReferenceLogits() as recorded:
        recorded.record(model, data.sequences)
        assert compare(other, data, recorded) == compare(other, data, model)
        assert torch.equal(recorded[2].double(), logits64(model, data.sequences[2]))


def test_temporary_files_are_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def record_and_fail() -> None:
        with ReferenceLogits() as recorded:
            recorded.record(tiny_llama(), windows().sequences)
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_and_fail()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with ReferenceLogits() as recorded, pytest.raises(CalibrationError, match="lower evaluation"):
        recorded.record(tiny_llama(), windows().sequences)


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs a causal language model"):
        window_logits(tiny_bert(), windows().sequences[0])


def test_nan_logits_are_refused() -> None:
    model = tiny_llama()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        evaluate(model, windows())


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("w1 w2 w3 w4 " * 40)
    with pytest.raises(CalibrationError, match="tokenizer"):
        evaluate(tiny_llama(), str(path))
    result = evaluate(tiny_llama(), str(path), tokenizer=tiny_tokenizer(), windows=9, context=40)
    assert result.protocol.windows == 4


def test_row_chunks_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = torch.randn(150, 30), torch.randn(150, 30)
    targets = torch.randint(0, 30, (150,))
    found = []
    for rows in (7, 64, 1000):
        monkeypatch.setattr("ptq.evaluation.statistics._ROWS", rows)
        statistics = TokenStatistics([150])
        statistics.add(p, q, targets)
        found.append((statistics.divergence[0], statistics.quantized_nll[0], nll(q, targets)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_memory_does_not_grow_with_the_number_of_windows() -> None:
    """In a process of its own, with a vocabulary as real models have."""
    script = """
import resource, torch
from ptq.evaluation.statistics import TokenStatistics
def add(count):
    statistics = TokenStatistics([127] * count)
    for _ in range(count):
        p, q = torch.randn(127, 49152), torch.randn(127, 49152)
        statistics.add(p, q, torch.zeros(127, dtype=torch.int64))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few = add(3)
print(add(30) / few)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # One window's temporaries are about a fifth of such a process.
    assert float(run.stdout) < 1.25


@pytest.mark.parametrize(
    ("degrees", "table"),
    # Two-sided 95% values of any table of Student's t.
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)],
)
def test_student_t_against_the_table(degrees: int, table: float) -> None:
    assert student_t(0.975, degrees) == pytest.approx(table, rel=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Correlated neighbours, as in text: 95% of the intervals hold the true mean, within 4 sigma
    of the binomial spread over 400 repetitions (and a little for what correlation is left)."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        steps = torch.randn(12, 512, generator=generator)
        smooth = nn.functional.avg_pool1d(steps[:, None], 5, stride=1)[:, 0]
        low, high = ratio_interval(list(smooth + 0.1))
        covered += low <= math.exp(0.1) <= high
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400) - 0.01 <= covered / 400


def test_one_block_says_nothing_about_spread() -> None:
    assert ratio_interval([torch.randn(40)]) == (0.0, math.inf)


def test_results_print_and_serialise() -> None:
    result = compare(tiny_llama(seed=1), windows(), tiny_llama())
    assert isinstance(result, Evaluation)
    assert "ratio [95%]" in str(result)
    assert "<table>" in result._repr_html_()
    found = result.to_dict()
    assert found["protocol"]["tokens_sha256"] == "abc"
    assert "tokens" not in found and "cache" not in found
    json.dumps(found)


def test_sample_gives_new_tokens_only() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    prompt = encode_prompt("w3 w4", tokenizer)
    made = sample(model, tokenizer, prompt, 5)
    assert made.new_tokens == 5
    assert not made.text.startswith("w3 w4 ")


def test_sample_of_an_encoder_decoder_is_what_the_decoder_wrote() -> None:
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=97,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    prompt = encode_prompt("w3 " * 20, tiny_tokenizer())
    made = sample(T5ForConditionalGeneration(config).eval(), tiny_tokenizer(), prompt, 6)
    assert made.new_tokens == 6


def test_the_prompt_of_a_chat_has_its_special_tokens_once() -> None:
    """The template writes them; a tokenizer that adds its own would double them."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    tokenizer.chat_template = "<eos> {{ messages[0]['content'] }}"
    chat = encode_prompt("w3", tokenizer, chat=True)
    plain = encode_prompt("w3", tokenizer)
    assert tokenizer.decode(chat[0]) == tokenizer.decode(plain[0]) == "<eos> w3"


def test_prompts_that_cannot_be_used() -> None:
    with pytest.raises(ModelError, match="chat template"):
        encode_prompt("w3", tiny_tokenizer(), chat=True)
    with pytest.raises(ModelError, match="without one"):
        encode_prompt("w3", None)
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.normalizer = Strip()
    with pytest.raises(CalibrationError, match="has no tokens"):
        encode_prompt("  ", tokenizer)


def test_sample_refuses_what_cannot_generate() -> None:
    with pytest.raises(UnsupportedError, match="does not generate"):
        sample(tiny_bert(), tiny_tokenizer(), torch.tensor([[3]]), 5)


def test_dropout_is_off_while_measuring_and_the_mode_stays() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    expected = evaluate(model.eval(), windows())
    assert evaluate(model.train(), windows()) == expected
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=32,
                                    num_attention_heads=4)), "ViTModel is no decoder"),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1,
                                                     num_heads=4, vocab_size=97)), "no decoder"),
    ],
)  # fmt: skip
def test_models_that_predict_something_else(make: Callable[[], nn.Module], expected: str) -> None:
    with pytest.raises(UnsupportedError, match=expected):
        evaluate(make(), windows())


def test_text_that_the_model_cannot_take(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(CalibrationError, match="65 tokens in one piece, the model has 64"):
        evaluate(model, windows(2, 65))
    foreign = TokenSet((torch.tensor([1, 97]),), "x", 1, ("t.txt",))
    with pytest.raises(CalibrationError, match="token id 97, the model's vocabulary has 97"):
        evaluate(model, foreign)
    config = tiny_llama().config.to_dict() | {"vocab_size": 98}
    other = LlamaForCausalLM(LlamaConfig(**config))
    with pytest.raises(CalibrationError, match="vocabulary of 98, the model one of 97"):
        compare(model, windows(), other)
    with pytest.raises(ConfigError, match="evaluate: windows: .*greater than or equal to 1"):
        evaluate(model, "x.txt", tokenizer=tiny_tokenizer(), windows=0)
    path = tmp_path / "text.txt"
    path.write_text("w1 w2 w3 w4 " * 40)
    assert evaluate(model, path, tokenizer=tiny_tokenizer(), context=40)


def test_one_block_has_no_upper_end_in_json() -> None:
    result = compare(tiny_llama(seed=1), windows(1, 40), tiny_llama())
    assert isinstance(result, Evaluation)
    assert result.ratio_high == math.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["ratio_high"] is None


def test_a_disk_that_fills_up_while_logits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("24444 requested and 10240 written")

    with ReferenceLogits() as recorded, monkeypatch.context() as patch:
        patch.setattr("ptq.evaluation.logits._write", full)
        with pytest.raises(CalibrationError, match="do not fit in .*set TMPDIR"):
            recorded.record(tiny_llama(), windows().sequences)
