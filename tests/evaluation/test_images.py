"""Classifiers of images: agreement with the float model on generated images."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

import ptq
from ptq.config import as_config
from ptq.errors import CalibrationError, ModelError, UnsupportedError
from ptq.evaluation import ImageAgreement, ImageSet, classify, compare_classes, evaluated_as
from ptq.pipeline import run
from ptq.report import Console

SIZE = {"height": 16, "width": 16}


def tiny_vit(classes: int = 7) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=classes,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nine images of noise, one of them grey, one in a folder below."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "below").mkdir()
    generator = np.random.default_rng(0)
    for i in range(8):
        pixels = generator.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    grey = generator.integers(0, 256, (20, 20), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "below" / "grey.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_figures_against_brute_force(images: Path) -> None:
    model = tiny_vit()
    quantized = copy.deepcopy(model)
    ptq.quantize(quantized, "w2a16-g32-asym")
    processor = ViTImageProcessor(size=SIZE)
    found = ptq.evaluate(quantized, images, tokenizer=processor, reference=model, windows=9)
    assert isinstance(found, ImageAgreement)
    assert (found.images, found.classes) == (9, 7)
    top1 = top5 = 0.0
    divergences = []
    for path in sorted(p for p in images.rglob("*.png")):
        pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            p, q = (m(pixels).logits[0].double().softmax(-1) for m in (model, quantized))
        top1 += int(p.argmax()) == int(q.argmax())
        best = [set(sorted(range(7), key=lambda c, x=x: -float(x[c]))[:5]) for x in (p, q)]
        top5 += len(best[0] & best[1]) / 5
        pairs = [(float(a), float(b)) for a, b in zip(p, q, strict=True)]
        divergences.append(sum(a * math.log(a / b) for a, b in pairs))
    assert math.isclose(found.top1_agreement, top1 / 9)
    assert math.isclose(found.top5_agreement, top5 / 9)
    assert math.isclose(found.kl_mean, sum(divergences) / 9, rel_tol=1e-4)
    assert math.isclose(found.kl_max, max(divergences), rel_tol=1e-4)
    assert 0 < found.kl_mean < found.kl_max
    assert found.top5_agreement < 1
    assert "top-5 agreement" in str(found)


def test_a_model_agrees_with_itself(images: Path) -> None:
    model = tiny_vit(classes=3)
    data = ImageSet([images], ViTImageProcessor(size=SIZE), 4)
    assert len(data) == 4
    found = compare_classes(model, data, classify(model, data), torch.float32)
    assert (found.top1_agreement, found.top5_agreement, found.kl_max) == (1, 1, 0)


def test_the_whole_job(images: Path, tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size=SIZE).save_pretrained(tmp_path / "vit")
    config = {
        "model": str(tmp_path / "vit"),
        "scheme": "w8a8",
        "evaluation": {"data": str(images), "windows": 5, "fail_if": "top1_agreement < 0.5"},
        "output": str(tmp_path / "out"),
    }
    report = run(as_config(config), console=Console("quiet"))
    assert report.sections["evaluation"]["kind"] == "images"
    assert report.sections["evaluation"]["images"] == 5
    assert report.sections["gate"]["violations"] == []
    assert "top-1 agreement" in str(report)
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


class _Wrong(torch.nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, pixel_values: Tensor) -> object:
        return type("Output", (), {"logits": self.logits})()


def test_mistakes(images: Path, tmp_path: Path) -> None:
    processor = ViTImageProcessor(size=SIZE)
    with pytest.raises(CalibrationError, match="no image or folder of images at"):
        ImageSet([tmp_path / "nowhere"], processor, 3)
    with pytest.raises(CalibrationError, match="holds no image"):
        ImageSet([tmp_path], processor, 3)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(CalibrationError, match=r"broken.png is not a whole image"):
        list(ImageSet([tmp_path], processor, 3))
    data = ImageSet([images], processor, 2)
    with pytest.raises(ModelError, match="NaN or Inf"):
        classify(_Wrong(torch.tensor([[1.0, torch.nan]])), data)
    with pytest.raises(UnsupportedError, match="no logits of classes"):
        classify(_Wrong(torch.zeros(1, 4, 2)), data)
    with pytest.raises(CalibrationError, match="not the same model"):
        compare_classes(tiny_vit(), data, torch.zeros(2, 3))
    with pytest.raises(UnsupportedError, match="is no decoder of text"):
        evaluated_as(ViTModel(tiny_vit().config))
