"""What the page reads of ``report.json`` and its neighbours; the rest is passed over.

Every section may be missing: older reports do not have them all.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Part(BaseModel):
    """Keys that the page does not know are ignored; those that it knows have the right type."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class LayerPlan(Part):
    name: str
    kind: str
    shape: list[int]
    parameters: int
    scheme: str | None
    reason: str
    bytes_before: int
    bytes_after: int


class PlanPart(Part):
    dtype_of_float_tensors: str
    parameters: int
    quantized_share_of_parameters: float
    bytes_before: int
    bytes_after: int
    compression: float
    layers: list[LayerPlan]


class SizeRow(Part):
    outcome: str
    modules: int
    parameters: int
    bytes_before: int
    bytes_after: int


class WeightError(Part):
    name: str
    relative_squared_error: float | None
    sqnr_db: float | None


class WeightHistogram(Part):
    name: str
    format: str
    low: float
    high: float
    clipped: int
    before: list[int] = Field(min_length=1)
    after: list[int] = Field(min_length=1)


class Weights(Part):
    layers: list[WeightError]
    histograms: list[WeightHistogram]


class Magnitudes(Part):
    lowest: float
    per_octave: int
    counts: list[int]
    zeros: int


class Channel(Part):
    channel: int
    absmax: float


class Inputs(Part):
    name: str
    absmax: float | None = None
    median_channel_absmax: float | None = None
    median_token_absmax: float | None = None
    largest_channels: list[Channel] = Field(default_factory=list)
    largest_token: int | None = None
    largest_token_text: str | None = None
    magnitudes: Magnitudes | None = None
    after: Magnitudes | None = None
    step: float | None = None
    zero: float | None = None
    clipped: float | None = None


class ProtocolPart(Part):
    windows: int
    context: int
    tokens_scored: int
    float_dtype: str | None
    dtype: str
    interval: str


class EvaluationPart(Part):
    float_perplexity: float
    quantized_perplexity: float
    ratio: float
    ratio_low: float
    ratio_high: float | None
    kl_mean: float
    kl_p50: float | None = None
    kl_p90: float | None = None
    kl_p95: float | None = None
    kl_p99: float
    kl_p999: float | None = None
    kl_max: float | None = None
    top1_agreement: float
    top5_agreement: float | None = None
    protocol: ProtocolPart


class OtherEvaluation(Part):
    """Of a model that predicts no next token: an encoder of text, a classifier of images."""

    kind: Literal["encoder", "images"]
    cosine_mean: float | None = None
    cosine_p05: float | None = None
    cosine_p01: float | None = None
    cosine_min: float | None = None
    spearman: float | None = None
    texts: int | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    images: int | None = None


class Window(Part):
    index: int
    why: str = ""
    mean_kl: float
    pieces: list[str]
    kl: list[float | None]


class Choice(Part):
    token: str
    probability: float


class WorstToken(Part):
    window: int
    position: int
    times: int = 1
    kl: float
    before: str
    token: str
    float_probability: float
    quantized_probability: float
    float_choices: list[Choice] = Field(alias="float")
    quantized_choices: list[Choice] = Field(alias="quantized")


class Tokens(Part):
    windows: list[Window]
    worst: list[WorstToken]


class Race(Part):
    tokens: int
    float_seconds: float
    quantized_seconds: float
    speed: float
    speed_low: float
    speed_high: float


class Speed(Part):
    turns: int
    prompt: Race
    decode: Race


class Sample(Part):
    prompt: str
    float_text: str = Field(alias="float")
    quantized_text: str = Field(alias="quantized")


class Generation(Part):
    samples: list[Sample]

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_report(cls, value: Any) -> Any:
        """Which had one sample, whose keys lay here."""
        old = isinstance(value, dict) and "samples" not in value
        return {"samples": [value]} if old else value


class KernelRange(Part):
    first_row: int
    last_row: int | None
    kernel: str
    refused: dict[str, str] = Field(default_factory=dict, alias="not")


class KernelGroup(Part):
    names: list[str] = Field(min_length=1)
    shape: list[int]
    scheme: str
    extra_bytes: int
    kernels: list[KernelRange]


class Kernels(Part):
    device: str
    dtype: str
    layers: list[KernelGroup]


class RecipePart(Part):
    steps: list[str]
    seconds: float
    notes: list[str]
    remedies: list[str]


class CheckpointPart(Part):
    directory: str
    tensor_bytes: int
    weight_file_bytes: int
    bit_equal: str | None = None


class DataPart(Part):
    source: list[str]
    sha256: str


class Resources(Part):
    seconds: float
    peak_memory_bytes: int


class DiagnosisLayer(Part):
    layer: str
    kl: float
    kl_weights: float | None = None
    kl_activations: float | None = None
    kl_clipping: float | None = None
    sqnr_weights_db: float | None = None
    sqnr_inputs_db: float | None = None
    sqnr_outputs_db: float | None = None


class Remedy(Part):
    layer: str
    remedy: str
    kl_before: float
    kl_after: float
    bytes: int


class Diagnosis(Part):
    layers: list[DiagnosisLayer]
    remedies: list[Remedy] = Field(default_factory=list)
    whole_kl: float | None = None
    sum_of_layers: float | None = None


class SearchPoint(Part):
    bytes: float
    kl: float
    bits: float | None = None


class MeasuredPoint(Part):
    bytes: float
    kl: float
    ratio: float | None = None
    name: str


class Search(Part):
    budget: Any = None
    points: list[SearchPoint] = Field(min_length=1)
    chosen: SearchPoint
    measured: list[MeasuredPoint] = Field(default_factory=list)


class PageData(Part):
    """All that a page is drawn from."""

    config: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, DataPart] = Field(default_factory=dict)
    plan: PlanPart | None = None
    size: list[SizeRow] = Field(default_factory=list)
    weights: Weights | None = None
    inputs: list[Inputs] = Field(default_factory=list)
    evaluation: EvaluationPart | None = None
    other: OtherEvaluation | None = None
    """What the section ``evaluation`` holds of a model that predicts no next token."""
    kv_cache: EvaluationPart | None = None
    tokens: Tokens | None = None
    speed: Speed | None = None
    generation: Generation | None = None
    kernels: Kernels | None = None
    recipe: RecipePart | None = None
    checkpoint: CheckpointPart | None = None
    resources: Resources | None = None
    notes: list[str] = Field(default_factory=list)
    diagnosis: Diagnosis | None = None
    search: Search | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_kind(cls, sections: Any) -> Any:
        found = sections.get("evaluation")
        if isinstance(found, dict) and "kind" in found:
            return {**sections, "evaluation": None, "other": found}
        return sections
