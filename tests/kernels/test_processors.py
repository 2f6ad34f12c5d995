"""What a processor lacks decides which kernels are chosen."""

import platform

import pytest
import torch

from ptq.config import preset
from ptq.core import Granularity
from ptq.formats import INTEGERS
from ptq.kernels import IntMM, LinearSpec, OneDnn, TwoDigit, select


def spec(scheme: str, m: int) -> LinearSpec:
    made = preset(scheme)
    return LinearSpec(
        "cpu", torch.float32, INTEGERS["int8"], Granularity("channel"), True,
        made.activations, 2048, 2048, m,
    )  # fmt: skip


@pytest.mark.skipif(platform.machine() != "x86_64", reason="VNNI is of x86")
@pytest.mark.parametrize("m", [1, 16, 128, 512])
def test_without_vnni_no_integer_product_is_chosen(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    for scheme in ("w8a8", "w8a16"):
        assert select(spec(scheme, m)).name not in {"int_mm", "two_digit", "onednn"}
    assert "no VNNI" in str(IntMM().declines(spec("w8a8", m)))
    assert "no VNNI" in str(TwoDigit().declines(spec("w8a16", m)))
    assert "saturates" in str(OneDnn().supports(spec("w8a8", m)))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="VNNI is of x86")
def test_with_vnni_int_mm_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr("ptq.kernels.cpu_int_mm.int_mm_is_exact", lambda: True)
    assert select(spec("w8a8", 128)).name == "int_mm"
