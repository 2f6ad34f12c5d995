"""The config as commented YAML."""

import json
import re
import textwrap

from ptq.advice.choose import Choice, Wishes
from ptq.advice.facts import Facts

SEQUENCE = 512
_PLAIN = re.compile(r"[A-Za-z0-9./][A-Za-z0-9_./\-]*(:[A-Za-z0-9_./\-]+)*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off"}


def config_text(wishes: Wishes, facts: Facts, choice: Choice, checkpoint: str) -> str:
    """A whole config, which says why it is as it is.

    Args:
        checkpoint: the directory that it will create.
    """
    parts = [
        _head(wishes, facts),
        _model(wishes, choice),
        _comment(*choice.why, _time(facts, choice), _search(wishes, facts, choice))
        + f"scheme: {choice.scheme}\n",
        _recipe(choice),
    ]
    if choice.embeddings is not None:
        share = f"{100 * facts.embedding_share:.0f}%"
        parts.append(
            _comment(
                f"The embedding has {share} of the parameters. What this costs was not measured "
                "apart: see the evaluation. Other engines need it float: then leave this line out."
            )
            + f"embeddings: {choice.embeddings}\n"
        )  # fmt: skip
    if choice.measured.samples:
        parts.append(_calibration(wishes, facts, choice))
    parts += [_cache(facts, choice), _evaluation(wishes, facts, choice)]
    parts.append(_output(facts, checkpoint))
    return "\n".join(part for part in parts if part)


def _head(wishes: Wishes, facts: Facts) -> str:
    size = facts.float_bytes / 1e6
    asked = f"goal {wishes.goal}, loss {wishes.loss}, device {wishes.device}"
    many = f"{facts.parameters / 1e6:,.0f} million parameters"
    return _comment(
        f"Written by `ptq init`: {asked}, use {wishes.use}.",
        f"{facts.name}, {many}, {size:,.0f} MB as loaded.",
        "Figures: SmolLM2-135M-Instruct (encoders: all-MiniLM-L6-v2), two cores of a CPU, from "
        "README.md and docs/accuracy.md. Yours will differ: the evaluation below says by how much.",
        "What it does to every layer: ptq plan --config THIS_FILE",
        "All keys, with completion in an editor: ptq schema > ptq.schema.json, and the first line",
        "  # yaml-language-server: $schema=ptq.schema.json",
    )


def _model(wishes: Wishes, choice: Choice) -> str:
    more = ""
    if wishes.device != "cpu":
        more += f"  device: {wishes.device}\n"
    if choice.stream:
        more += "  stream: true\n"
    if not more:
        return f"model: {_scalar(wishes.model)}\n"
    note = ""
    if wishes.device == "cuda" and wishes.goal == "fastest":
        note = _comment(
            "Which scheme is the fastest was measured on a CPU. A GPU waits for Python in eager "
            "mode, and no scheme is faster than float there: decode with ptq.compile(model)."
        )
    return f"{note}model:\n  id: {_scalar(wishes.model)}\n{more}"


def _time(facts: Facts, choice: Choice) -> str:
    m = choice.measured
    if not m.seconds:
        return ""
    guess = m.seconds * facts.parameters / 135e6
    shown = f"{guess / 60:,.0f} minutes" if guess < 7200 else f"{guess / 3600:,.0f} hours"
    return (
        f"Quantizing took {m.seconds} s there, so about {shown} for this model. Less accurate, "
        "and quicker: `recipe: [gptq]`; at once: `recipe: rtn`."
    )


def _search(wishes: Wishes, facts: Facts, choice: Choice) -> str:
    """Where `ptq search` can read what it needs: calibration text, and the whole float model."""
    if wishes.goal != "smallest" or not facts.predicts or not choice.measured.samples:
        return ""
    return "" if choice.stream else "Other sizes, with a scheme for each layer: ptq search --help"


def _recipe(choice: Choice) -> str:
    if len(choice.steps) == 1:
        return f"recipe: {choice.steps[0]}\n"
    return "recipe:\n" + "".join(f"  - {step}\n" for step in choice.steps)


def _calibration(wishes: Wishes, facts: Facts, choice: Choice) -> str:
    assert wishes.calibration is not None
    length = SEQUENCE if facts.predicts else 128
    return (
        _comment("Text like what the model will see is best: .txt, .jsonl, .parquet, a directory, "
                 "or a datasets id.")
        + "calibration:\n"
        + f"  data: {_scalar(wishes.calibration)}\n"
        + f"  samples: {choice.measured.samples}\n"
        + f"  sequence_length: {min(length, facts.positions or length)}\n"
    )  # fmt: skip


def _cache(facts: Facts, choice: Choice) -> str:
    """A key that is left for the user to take."""
    if not (facts.predicts and facts.reads_text):
        return ""
    static = ""
    if choice.measured.samples and not choice.stream:
        static = " With {bits: 8, mode: static} the scales come from the calibration text."
    return _comment(
        "Keys and values of model.generate as integers, in half the bytes of bfloat16 (int4: 0.3):"
        + static,
        "kv_cache: int8",
    )


def _evaluation(wishes: Wishes, facts: Facts, choice: Choice) -> str:
    if not (facts.predicts and facts.reads_text) or choice.stream:
        return ""
    if wishes.evaluation is None:
        return _comment(
            "Float against quantized on held-out text (never the calibration text):",
            "evaluation: {data: FILE}",
        )
    return (
        _comment("Float against quantized on held-out text; the report has the ratio.")
        + "evaluation:\n"
        + f"  data: {_scalar(wishes.evaluation)}\n"
        + f"  context: {min(SEQUENCE, facts.positions or SEQUENCE)}\n"
        + _comment("The same prompt before and after.")
        + "generation:\n"
        + "  max_new_tokens: 32\n"
    )


def _output(facts: Facts, checkpoint: str) -> str:
    dtype = "  dtype: bfloat16                 # of what stays float\n" if facts.predicts else ""
    return f"output:\n  dir: {_scalar(checkpoint)}\n{dtype}"


def _comment(*lines: str) -> str:
    wrapped = [part for line in lines if line for part in textwrap.wrap(line, 96)]
    return "".join(f"# {line}\n" for line in wrapped)


def _scalar(text: str) -> str:
    """A string as YAML, in quotes where it could be read as something else."""
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS and not _is_number(text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9.:_\-]+(e[0-9]+)?|0x[0-9a-f]+|0o[0-7]+", text.lower()) is not None
