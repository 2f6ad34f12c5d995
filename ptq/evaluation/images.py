"""Classifiers of images: how often the quantized model sees what the float model sees."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq.core import is_finite
from ptq.errors import CalibrationError, ModelError, UnsupportedError
from ptq.evaluation.result import as_table, as_text
from ptq.model import eval_mode

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_BEST = 5

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class ImageAgreement:
    """Class probabilities of the same images by both models.

    Args:
        top1_agreement: share of the images where both models rank the same class first.
        top5_agreement: mean share of the float model's five likeliest classes that are among the
            quantized model's (of all, where there are fewer).
        kl_mean, kl_max: KL(float || quantized) in nats, over the images.
        images, classes: how many.
        float_dtype, dtype: of the models' float parameters.
    """

    top1_agreement: float
    top5_agreement: float
    kl_mean: float
    kl_max: float
    images: int
    classes: int
    float_dtype: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("top-1 agreement", f"{100 * self.top1_agreement:.2f}%"),
            ("top-5 agreement", f"{100 * self.top5_agreement:.2f}%"),
            ("KL divergence, mean", f"{self.kl_mean:.5f} nats"),
            ("KL divergence, largest", f"{self.kl_max:.4f} nats"),
            ("images", f"{self.images} in {self.classes} classes"),
            ("dtypes", f"{self.float_dtype} float, {self.dtype} quantized"),
        ]

    def __str__(self) -> str:
        return as_text(self._rows())

    def _repr_html_(self) -> str:
        return as_table(self._rows())


class ImageSet:
    """Images as a model's processor makes them, one at a time.

    Args:
        sources: files, folders (of image files, in the order of their names) and ``datasets`` ids.
        processor: a transformers image processor.
        limit: at most so many images.
        subset, split, column: of a ``datasets`` id; the column with images is found by itself.

    Raises:
        CalibrationError: a source is missing or holds no image.
        UnsupportedError: Pillow is not installed.
    """

    def __init__(
        self,
        sources: Sequence[str | os.PathLike[str]],
        processor: Any,
        limit: int,
        *,
        subset: str | None = None,
        split: str = "test",
        column: str | None = None,
    ) -> None:
        _require_pillow()
        self.source = tuple(os.fspath(source) for source in sources)
        self.processor = processor
        found = [one for s in self.source for one in _items(s, subset, split, column, limit)]
        self.items: list[Any] = found[:limit]
        if not self.items:
            raise CalibrationError(f"{', '.join(self.source)} holds no image; give more")

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Tensor]:
        """``pixel_values`` [1, C, H, W] of each image.

        Raises:
            CalibrationError: a file is no image; it is named.
        """
        for item in self.items:
            image = _opened(item) if isinstance(item, Path) else item.convert("RGB")
            made = self.processor(images=image, return_tensors="pt")
            pixels: Tensor = made["pixel_values"]
            yield pixels


def _require_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ModuleNotFoundError:
        raise UnsupportedError(
            "evaluating on images needs the package pillow; pip install 'ptq-toolkit[images]'"
        ) from None


def _items(
    source: str, subset: str | None, split: str, column: str | None, limit: int
) -> Iterable[Any]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if source.startswith((".", "/", "~")):
        raise CalibrationError(f"no image or folder of images at {path.absolute()}")
    return _rows(source, subset, split, column, limit)


def _rows(
    source: str, subset: str | None, split: str, column: str | None, limit: int
) -> Iterable[Any]:
    """Images of a ``datasets`` id."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(source, subset, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise CalibrationError(
            f"images: no file or folder {source}, and datasets cannot load it: "
            f"{' '.join(str(error).split()):.200}"
        ) from None
    kinds = {name: type(feature).__name__ for name, feature in loaded.features.items()}
    names = [name for name, kind in kinds.items() if kind == "Image" and column in (None, name)]
    if not names:
        raise CalibrationError(f"{source} has no column of images; there are {kinds}")
    return [row[names[0]] for row in loaded.select(range(min(limit, len(loaded))))]


def _opened(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise CalibrationError(f"{path} is not a whole image ({error}); remove it") from None


@torch.no_grad()
def classify(model: nn.Module, images: Iterable[Tensor], progress: Progress = iter) -> Tensor:
    """Log-probabilities of the classes: float32 [images, classes], on the CPU.

    Raises:
        UnsupportedError: the model gives no logits of classes.
        ModelError: NaN or Inf in them.
    """
    first = next(model.parameters())
    rows = []
    with eval_mode(model):
        for pixels in progress(images):
            logits = getattr(model(pixel_values=pixels.to(first)), "logits", None)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                raise UnsupportedError(f"{type(model).__name__} gives no logits of classes")
            rows.append(logits[0].float().log_softmax(-1).cpu())
    found = torch.stack(rows)
    if not is_finite(found):
        raise ModelError(f"{type(model).__name__} gives NaN or Inf for an image")
    return found


def compare_classes(
    model: nn.Module,
    images: Iterable[Tensor],
    reference: nn.Module | Tensor,
    reference_dtype: torch.dtype | None = None,
    progress: Progress = iter,
) -> ImageAgreement:
    """Compare an image classifier with the float one.

    Args:
        images: ``pixel_values`` [1, C, H, W] each; gone through twice where the reference is a
            model.
        reference: the float model, or its log-probabilities (:func:`classify`) of the same images.
        reference_dtype: of the float model's parameters, with log-probabilities.

    Raises:
        UnsupportedError, ModelError: as :func:`classify`.
        CalibrationError: the models have other classes.
    """
    if isinstance(reference, nn.Module):
        reference_dtype = next(reference.parameters()).dtype
        reference = classify(reference, images)
    found = classify(model, images, progress)
    if found.shape != reference.shape:
        raise CalibrationError(
            f"the reference gives {list(reference.shape)} probabilities, the model "
            f"{list(found.shape)}: they are not the same model"
        )
    p, q = reference.double(), found.double()
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    best = min(_BEST, p.shape[1])
    theirs, ours = p.topk(best).indices, q.topk(best).indices
    shared = (theirs[:, :, None] == ours[:, None, :]).any(-1).double().mean()
    return ImageAgreement(
        top1_agreement=(p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        top5_agreement=shared.item(),
        kl_mean=divergence.mean().item(),
        kl_max=divergence.max().item(),
        images=len(p),
        classes=p.shape[1],
        float_dtype=str(reference_dtype).removeprefix("torch."),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )
