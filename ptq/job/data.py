"""The text, or the images, of a run: read before the weights."""

from ptq.calibrate import TokenSet, evaluation_windows, overlap
from ptq.config import EvaluationConfig, GenerationConfig
from ptq.errors import ConfigError, ModelError
from ptq.evaluation import HeldReference, encode_prompt, evaluation_data
from ptq.job.planning import predict_again
from ptq.job.state import Job
from ptq.model import check_tokens, load_image_processor, load_tokenizer, max_positions
from ptq.quantization import calibration_tokens_of


def read_data(job: Job) -> None:
    """Tokenizer and text, so that bad data is found before the weights are loaded."""
    job.console.stage("read data")
    job.tokenizer = load_tokenizer(job.source)
    if job.tokenizer is None:
        if job.kind != "images":
            job.note("the model comes without a tokenizer: none is saved")
        if job.calibrates or (job.config.evaluation and job.kind != "images"):
            raise ModelError(f"model {job.source} has no tokenizer, which its text needs")
    if job.calibrates:
        job.calibration = calibration_tokens_of(job.config, job.recipe, job.tokenizer)
        check_tokens(job.model_config, job.calibration.sequences, "calibration text")
        predict_again(job, job.calibration)
    if job.config.evaluation is not None and job.kind != "causal":
        _read_other(job, job.config.evaluation)
    elif job.config.evaluation is not None:
        job.evaluation = evaluation_windows(job.config.evaluation, job.tokenizer)
        check_tokens(job.model_config, job.evaluation.sequences, "evaluation text")
        if job.calibration is not None:
            _note_overlap(job, job.calibration, job.evaluation)
    if job.config.generation is not None:
        _read_prompts(job, job.config.generation)
    named = {"calibration": job.calibration, "evaluation": job.evaluation}
    job.report.sections["data"] = {
        name: {
            "source": list(tokens.source),
            "sha256": tokens.sha256,
            "sequences": len(tokens.sequences),
            "tokens": tokens.tokens,
        }
        for name, tokens in named.items()
        if tokens is not None
    }


def _read_other(job: Job, section: EvaluationConfig) -> None:
    """Sentences or images, for a model that predicts no next token."""
    images = job.kind == "images"
    processor = load_image_processor(job.source) if images else job.tokenizer
    job.tokenizer = processor  # travels with the checkpoint
    data = evaluation_data(job.kind, section, processor)
    job.held = HeldReference(data)
    if isinstance(data, TokenSet):
        job.evaluation = data
        check_tokens(job.model_config, data.sequences, "evaluation text")


def _note_overlap(job: Job, calibration: TokenSet, evaluation: TokenSet) -> None:
    shared = overlap(calibration, evaluation)
    if shared > 0:
        job.note(
            f"{shared:.0%} of the evaluation text is in the calibration text as well, so the "
            "figures flatter; evaluate on other text"
        )


def _read_prompts(job: Job, section: GenerationConfig) -> None:
    limit = max_positions(job.model_config)
    for text in section.prompt:
        prompt = encode_prompt(text, job.tokenizer, chat=section.chat)
        check_tokens(job.model_config, list(prompt), "generation.prompt")
        if limit is not None and prompt.shape[1] + section.max_new_tokens > limit:
            raise ConfigError(
                f"generation: {prompt.shape[1]} tokens of prompt and "
                f"{section.max_new_tokens} new ones are more than the model's {limit} "
                "positions; lower max_new_tokens"
            )
        job.prompts.append((text, prompt))
