"""The choice of a scheme and a recipe among those that were measured."""

from dataclasses import dataclass
from typing import Literal

from ptq.advice.facts import Facts
from ptq.advice.measured import MEASURED, Measured
from ptq.errors import ConfigError

Goal = Literal["smallest", "fastest", "accurate"]
Loss = Literal["none", "small", "any"]
Use = Literal["generate", "read"]
Device = Literal["cpu", "cuda"]

GOALS: dict[Goal, str] = {
    "smallest": "the fewest bytes",
    "fastest": "the least time",
    "accurate": "the nearest to the float model",
}
LOSSES: dict[Loss, str] = {
    "none": "half a percent of perplexity at most",
    "small": "five percent at most",
    "any": "whatever the goal costs",
}
USES: dict[Use, str] = {
    "generate": "it mostly writes text, a token at a time",
    "read": "it mostly reads: long prompts, classification, embeddings",
}
DEVICES: dict[Device, str] = {"cpu": "a processor", "cuda": "an NVIDIA GPU"}
_MOST = {
    "decoder": {"none": 0.005, "small": 0.05, "any": float("inf")},
    "encoder": {"none": 0.001, "small": 0.015, "any": float("inf")},
}
"""Loss at most: of perplexity, and of the cosine similarity of embeddings."""
WORTH_QUANTIZING = 0.05
"""Share of the parameters from which an embedding is quantized for the smallest model."""


@dataclass(frozen=True)
class Wishes:
    """What the user wants of a model.

    Args:
        calibration, evaluation: files, directories or datasets ids; None: there is no text.
    """

    model: str
    goal: Goal = "smallest"
    loss: Loss = "small"
    device: Device = "cpu"
    use: Use = "generate"
    calibration: str | None = None
    evaluation: str | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        measured: what was chosen of the table.
        scheme, steps: the same, fitted to the model.
        why: lines, in order.
        embeddings: scheme of the embedding, or None.
        stream: the model is read one block at a time.
    """

    measured: Measured
    scheme: str
    steps: tuple[str, ...]
    why: tuple[str, ...]
    embeddings: str | None
    stream: bool


def choose(wishes: Wishes, facts: Facts) -> Choice:
    """The best of what was measured on a model of this kind.

    Raises:
        ConfigError: nothing that was measured loses as little as asked, without data.
    """
    kind = "encoder" if facts.reads_text and not facts.predicts else "decoder"
    data = facts.reads_text and wishes.calibration is not None
    stream = facts.larger_than_memory and not facts.single_file
    fitting = [
        m
        for m in MEASURED
        if m.kind == kind and m.loss <= _MOST[kind][wishes.loss] and (data or not m.samples)
    ]
    if not fitting:
        raise ConfigError(
            f"nothing that needs no calibration data loses as little as '{wishes.loss}' on an "
            "encoder; give --calibration FILE, or --loss small"
        )
    best = min(fitting, key=lambda m: _rank(m, wishes))
    scheme, notes = _fitted(best.scheme, facts)
    steps = tuple(s for s in best.steps if not (stream and s == "distill"))
    why = [f"{_REASONS[wishes.goal]} {_measured(best)}.", *notes]
    if kind == "decoder" and not facts.predicts:
        why.append("No model of this kind was measured: the figures are of a language model.")
    if not data and any(m.samples and m.kind == kind for m in MEASURED):
        why.append(_without_data(facts))
    if stream:
        why.append(
            "The float model does not fit into this machine's memory: it is read one block at a "
            "time, which leaves no evaluation, generation and distill."
        )
    embeddings = None
    if wishes.goal == "smallest" and facts.embedding_share >= WORTH_QUANTIZING:
        embeddings = "w8a16"
    return Choice(best, scheme, steps, tuple(why), embeddings, stream)


_REASONS = {
    "smallest": "The fewest bits that lose no more than asked:",
    "fastest": "The fastest that loses no more than asked:",
    "accurate": "The nearest to the float model:",
}


def _rank(m: Measured, wishes: Wishes) -> tuple[float, float]:
    """Smaller is better; what loses less decides between equals."""
    if wishes.goal == "accurate":
        return (abs(m.loss), 0)
    if wishes.goal == "smallest":
        return (m.bits, m.loss)
    speed = m.decode if wishes.use == "generate" else m.prompt
    # Encoders were not timed. What they do is what prompts do, for which int8 is the fastest.
    assumed = {"w8a8": 1.0}.get(m.scheme, 0.0)
    return (-(assumed if speed is None else speed), m.loss)


def _measured(m: Measured) -> str:
    steps = ", ".join(step.partition(",")[0].removeprefix("{name: ") for step in m.steps)
    if m.kind == "encoder":
        return f"{m.scheme} [{steps}] keeps embeddings at a cosine similarity of {m.figure}"
    speed = ""
    if m.decode is not None:
        speed = (
            f"; it writes {m.decode:.2f} and reads (128 tokens) {m.prompt:.2f} times as fast as "
            "bfloat16 on a CPU"
        )
    return f"{m.scheme} [{steps}] multiplies perplexity by {m.figure:.4f}{speed}"


def _fitted(scheme: str, facts: Facts) -> tuple[str, list[str]]:
    """The scheme with groups that divide the model's layers."""
    if "-g64" not in scheme or facts.group == 64:
        return scheme, []
    if facts.group is None:
        return scheme.replace("-g64", ""), [
            "No size of groups divides every layer's input: one scale for each output channel, "
            "which loses more."
        ]
    return scheme.replace("-g64", f"-g{facts.group}"), [
        f"Groups of {facts.group}, not 64: a layer's input is no multiple of 64."
    ]


def _without_data(facts: Facts) -> str:
    if not facts.reads_text:
        return (
            "A config's calibration text cannot run this model, so only what needs no data was "
            "looked at; in Python, ptq.quantize(..., calibration=batches) can."
        )
    return "There is no calibration data: with some, better recipes can be chosen (gptq, gptaq)."
