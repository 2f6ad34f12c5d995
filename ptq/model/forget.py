"""A float model that says that it is quantized."""

from typing import Any


def forget_quantization(model: Any) -> None:
    """Remove what transformers looks at to see that a model is quantized, and its model card."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model, "_upload_modified_files"),
        (getattr(model, "config", None), "quantization_config"),
    ):
        if owner is not None:
            vars(owner).pop(name, None)
