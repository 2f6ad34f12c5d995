"""Finding, loading and reading models; nothing here quantizes."""

from ptq.model.blocks import block_lists
from ptq.model.experts import Experts, is_fused_experts
from ptq.model.file_names import FileNames
from ptq.model.forget import forget_quantization
from ptq.model.layers import (
    LayerInfo,
    cast_parameters,
    check_finite,
    eval_mode,
    output_head,
    read_layers,
    token_embedding,
)
from ptq.model.limits import check_tokens, max_positions, require_causal, require_token_ids
from ptq.model.load import load_float
from ptq.model.renaming import names_in_model
from ptq.model.replace import (
    replace_module,
    replace_modules,
    shared_modules,
    stands_for,
    take_place,
)
from ptq.model.skeleton import fill_computed_buffers, named_class, skeleton
from ptq.model.source import ModelSource, load_model, load_model_config, resolve_device
from ptq.model.streaming import StreamedModel, stream_model
from ptq.model.tokenizer import load_image_processor, load_tokenizer
from ptq.model.unfold import fold, folded, unfold, unfolded
from ptq.model.untie import forget_ties, untie_head

__all__ = [
    "Experts",
    "FileNames",
    "LayerInfo",
    "ModelSource",
    "StreamedModel",
    "block_lists",
    "cast_parameters",
    "check_finite",
    "check_tokens",
    "eval_mode",
    "fill_computed_buffers",
    "fold",
    "folded",
    "forget_quantization",
    "forget_ties",
    "is_fused_experts",
    "load_float",
    "load_image_processor",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "max_positions",
    "named_class",
    "names_in_model",
    "output_head",
    "read_layers",
    "replace_module",
    "replace_modules",
    "require_causal",
    "require_token_ids",
    "resolve_device",
    "shared_modules",
    "skeleton",
    "stands_for",
    "stream_model",
    "take_place",
    "token_embedding",
    "unfold",
    "unfolded",
    "untie_head",
]
