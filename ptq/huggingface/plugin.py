"""The two classes that transformers asks for: a configuration and a quantizer.

They are imported in the middle of transformers' own import, so what needs a model class is imported
inside the methods.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptq.errors import UnsupportedError

if TYPE_CHECKING:
    from ptq.huggingface.loading import Prepared


class PtqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint's config.json, as it is there.

    What is in it is checked when a model is loaded, when the file's path is known.
    """

    def __init__(self, /, **described: Any) -> None:
        self.quant_method = "ptq"  # type: ignore[assignment]
        self.described = described

    def to_dict(self) -> dict[str, Any]:
        return {**self.described, "quant_method": self.quant_method}


class PtqHfQuantizer(HfQuantizer):
    """Builds the quantized layers of a checkpoint, and writes them.

    Loading checks that the files hold every tensor that the model needs, of its shape and, in
    quantized layers, its dtype, and that they have the hashes that the files' headers give.

    Raises:
        UnsupportedError: ``from_pretrained`` of a float model with a :class:`PtqConfig`.
        CheckpointError: config.json or a weight file is damaged or of another model; file, key
            and remedy are named.
    """

    _prepared: "Prepared | None" = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise UnsupportedError(
                "from_pretrained does not quantize with ptq: load the float model, "
                "then ptq.quantize(model, scheme)"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from ptq.huggingface.loading import prepare

        described = self.quantization_config.to_dict()
        self._prepared = prepare(model, described, checkpoint_files or [])

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """The dtype to cast a tensor of the files to; None for those of a QuantizedWeight."""
        held = self._prepared is not None and self._prepared.exact
        if held and held.intersection(converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from ptq.huggingface.loading import finish

        assert self._prepared is not None
        finish(model, self._prepared)
        self._prepared = None

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], Any]:
        """What ``save_pretrained`` writes into the weight files; ``push_to_hub`` uploads them."""
        from ptq.checkpoint import card_of, declare_quantized, embed, metadata_of
        from ptq.huggingface.pushing import CardOnUpload

        declare_quantized(model)  # config.json is written next: with the layers as they are now
        model._weight_conversions = []  # the files have the names of state_dict()
        tensors, manifest = embed(model)
        card = card_of(model, identity=manifest.identity)
        model._upload_modified_files = CardOnUpload(card, type(model).__name__)
        return tensors, metadata_of(manifest)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        from ptq.swap import dequantize

        return dequantize(model, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        """``generate`` may decode through one compiled graph (:func:`ptq.compile`)."""
        return True
