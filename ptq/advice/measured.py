"""Schemes and recipes that were measured, and what they gave.

The figures are those of FIGURES.md and docs/accuracy.md (a test looks them up there), which name
the commands: SmolLM2-135M-Instruct for language models, all-MiniLM-L6-v2 for sentence encoders, two
cores of a CPU. Other models lose more or less; larger ones mostly less.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["decoder", "encoder"]

LEARNED = (
    "{name: gptaq, options: {refine: 0, tune_scales: false}}",
    "{name: learned_rounding, options: {iterations: 40, sequences: 1}}",
    "distill",
)
QUICK = ("rtn", "{name: learned_rounding, options: {iterations: 30, sequences: 1}}")


@dataclass(frozen=True)
class Measured:
    """One scheme with one recipe.

    Args:
        kind: of the model that it was measured on.
        scheme: its name; groups are of 64.
        steps: of the recipe, as YAML.
        figure: perplexity over the float model's; of encoders, cosine similarity of embeddings.
        seconds: that quantizing took, 0 where it is next to nothing.
        samples: calibration sequences, 0 where none are needed.
        decode, prompt: speed over the bfloat16 model, one token and 128 tokens at a time; those of
            the scheme, rounded to nearest.
    """

    kind: Kind
    scheme: str
    steps: tuple[str, ...]
    figure: float
    seconds: int = 0
    samples: int = 0
    decode: float | None = None
    prompt: float | None = None

    @property
    def loss(self) -> float:
        """Share of the quality that is lost: 0.02 for two percent of perplexity."""
        return self.figure - 1 if self.kind == "decoder" else 1 - self.figure

    @property
    def bits(self) -> int:
        return int(self.scheme[1])


MEASURED = (
    Measured("decoder", "w8a16", ("rtn",), 0.9997, decode=1.30, prompt=0.87),
    Measured("decoder", "w8a8", ("rotation", "gptq"), 1.0004, 712, 64, 1.14, 1.22),
    Measured("decoder", "w8a8", ("rtn",), 1.0251, decode=1.14, prompt=1.22),
    Measured("decoder", "w4a16-g64-asym", LEARNED, 1.0208, 2739, 64, 1.72, 0.68),
    Measured("decoder", "w4a16-g64", LEARNED, 1.0340, 1001, 64, 1.74, 0.71),
    Measured("decoder", "w4a8-g64", LEARNED, 1.0471, 1756, 64, 1.30, 0.65),
    Measured("decoder", "w4a16-g64", QUICK, 1.0712, 269, 16, 1.74, 0.71),
    Measured("decoder", "w3a16-g64-asym", LEARNED, 1.1839, 5000, 64),
    Measured("decoder", "w4a16-g64", ("rtn",), 1.2461, decode=1.74, prompt=0.71),
    Measured("encoder", "w8a8", ("rotation", "gptq"), 0.9998, samples=64),
    Measured("encoder", "w8a8", ("rtn",), 0.9972),
    Measured("encoder", "w4a16-g64-asym", ("gptq",), 0.988, samples=64),
    Measured("encoder", "w4a16-g64", ("gptq",), 0.986, samples=64),
    Measured("encoder", "w4a16-g64", ("rtn",), 0.957),
)
