"""Logits of a causal language model, and a float model's logits kept on disk.

The float model is run first; its logits wait on disk, exactly as they are, while the model is
quantized in place, so that float and quantized weights never share the memory.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq.core import is_finite
from ptq.errors import CalibrationError, ModelError, UnsupportedError
from ptq.model import eval_mode

Progress = Callable[[Iterable[int]], Iterable[int]]


@torch.no_grad()
def window_logits(model: nn.Module, window: Tensor) -> Tensor:
    """Logits [T - 1, V] that predict the tokens 1 .. T - 1 of a window [T] of token ids.

    The model runs in eval mode.

    Raises:
        UnsupportedError: the model has no logits.
        ModelError: NaN or Inf in the logits.
    """
    parameter = next(model.parameters())
    options: dict[str, Any] = {}
    if hasattr(getattr(model, "config", None), "use_cache"):
        options["use_cache"] = False
    with eval_mode(model):
        output = model(input_ids=window[None].to(parameter.device), **options)
    return checked_logits(model, output, window)[0, :-1]


def checked_logits(model: nn.Module, output: Any, window: Tensor) -> Tensor:
    """Logits [B, T, V] of a model's output.

    Args:
        window: the token ids, for the error.

    Raises:
        UnsupportedError: there are none.
        ModelError: NaN or Inf in them.
    """
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3:
        raise UnsupportedError(
            f"{type(model).__name__} gives no next-token logits: perplexity needs a causal "
            "language model; remove the evaluation section for this one"
        )
    if not is_finite(logits):
        raise ModelError(
            f"{type(model).__name__} gives NaN or Inf logits for {window.tolist()[:8]}..."
        )
    assert isinstance(logits, Tensor)
    return logits


class ReferenceLogits:
    """A float model's logits of some windows, in a temporary directory.

    Use as a context manager; the directory is gone afterwards, whatever happens.
    """

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        self._logits_dtype = torch.float32
        self._vocabulary = 0
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "ReferenceLogits":
        self._directory = tempfile.TemporaryDirectory(prefix="ptq-logits-")
        return self

    def __exit__(self, *_: object) -> None:
        if self._directory is not None:
            self._directory.cleanup()

    def record(
        self, model: nn.Module, windows: Sequence[Tensor], progress: Progress = iter
    ) -> None:
        """Run the model over the windows and keep its logits.

        Raises:
            CalibrationError: they do not fit on the disk.
        """
        for index in progress(range(len(windows))):
            logits = window_logits(model, windows[index])
            if index == 0:
                self.dtype = next(model.parameters()).dtype
                self._logits_dtype, self._vocabulary = logits.dtype, logits.shape[1]
                self._check_space(logits.nbytes * len(windows))
            try:
                _write(logits, self._path(index))
            except OSError as error:
                raise CalibrationError(
                    f"the float model's logits do not fit in {tempfile.gettempdir()}: {error}; "
                    "lower evaluation.windows or set TMPDIR"
                ) from None

    def __getitem__(self, index: int) -> Tensor:
        """Logits of one window, read (not mapped), on the CPU."""
        stored = torch.from_numpy(np.fromfile(self._path(index), dtype=np.uint8))
        return stored.view(self._logits_dtype).view(-1, self._vocabulary)

    def _path(self, index: int) -> Path:
        assert self._directory is not None, "use ReferenceLogits as a context manager"
        return Path(self._directory.name) / f"{index}.bin"

    def _check_space(self, needed: int) -> None:
        assert self._directory is not None
        free = shutil.disk_usage(self._directory.name).free
        if needed > free:
            raise CalibrationError(
                f"the float model's logits need {needed / 1e9:.1f} GB in {tempfile.gettempdir()}, "
                f"where {free / 1e9:.1f} GB are free; lower evaluation.windows or set TMPDIR"
            )


def _write(logits: Tensor, path: Path) -> None:
    """As bytes: numpy knows no bfloat16, and a serializer would make a copy in memory."""
    logits.cpu().contiguous().view(torch.uint8).numpy().tofile(path)
