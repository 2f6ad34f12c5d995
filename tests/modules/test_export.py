"""torch.export: one graph for any number of tokens, with the outputs of the eager model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export, load, save

import ptq
from ptq.algorithms import round_to_nearest
from ptq.config import preset
from ptq.core import Rotation
from ptq.kernels import KERNELS, Reference
from ptq.modules import QuantLinear, quantized_layers
from tests.helpers import tiny_llama

ROWS = Dim("rows", min=1, max=4096)


def run_by_reference(model: nn.Module, x: Tensor) -> Any:
    """The model's output with every layer dequantized, eagerly."""
    for layer in quantized_layers(model).values():
        for dtype in (torch.float32, torch.bfloat16):
            layer.tune("cpu", dtype, ((1, Reference()),))
    made = model(x)
    for layer in quantized_layers(model).values():
        for dtype in (torch.float32, torch.bfloat16):
            layer.tune("cpu", dtype, ())
    return made


def exported(model: nn.Module, x: Tensor, strict: bool) -> ExportedProgram:
    with torch.no_grad():
        return export(model, (x,), dynamic_shapes=({0: ROWS},), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "scheme", ["w8a8", "w8a16", "w4a16-g64", "w4a8-g64-asym", "w3a16-g64", "fp8"]
)
def test_one_graph_serves_every_number_of_rows(
    scheme: str, dtype: torch.dtype, strict: bool
) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).to(dtype).eval()
    ptq.quantize(model, scheme)
    program = exported(model, torch.randn(12, 64, dtype=dtype), strict).module()
    with torch.no_grad():
        for rows in (1, 2, 7, 12, 33, 300):
            x = torch.randn(rows, 64, dtype=dtype)
            assert torch.equal(program(x), run_by_reference(model, x))
            # Kernels round what they read and give to bfloat16, in either layer.
            eager = model(x)
            assert (program(x) - eager).norm() <= 3 * torch.finfo(torch.bfloat16).eps * eager.norm()


@pytest.mark.parametrize("strict", [False, True])
def test_the_model_is_left_as_it_was(strict: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    ptq.quantize(model, "w8a8")
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = model(x)
        exported(model, x, strict)
        assert torch.equal(model(x), expected)
        assert torch.equal(run_by_reference(model, x), exported(model, x, strict).module()(x))


def test_a_saved_program_holds_the_codes_and_no_second_weight(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512)).eval()
    ptq.quantize(model, "w4a16-g64")
    x = torch.randn(12, 512)
    with torch.no_grad():
        expected = run_by_reference(model, x)
        model(x)  # leaves a kernel's own form with the layer
        program = exported(model, x, False)
        save(program, tmp_path / "program.pt2")
        assert torch.equal(load(tmp_path / "program.pt2").module()(x), expected)
    canonical = sum(tensor.nbytes for tensor in model.state_dict().values())
    held = [*program.state_dict.values(), *program.constants.values()]
    assert sum(t.nbytes for t in held if isinstance(t, Tensor)) == canonical
    assert (tmp_path / "program.pt2").stat().st_size < canonical + 100_000


def test_no_op_of_one_machine_is_in_the_program() -> None:
    """Only what torch decomposes everywhere; no packing that depends on the processor."""
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    ptq.quantize(model, "w4a16-g64")
    graph = str(exported(model, torch.randn(4, 64), True).graph)
    assert "linear" in graph
    for name in ("_int_mm", "int4pack", "int8pack", "onednn", "mkldnn", "scaled_mm"):
        assert name not in graph
    assert any(kernel.name == "int4pack" for kernel in KERNELS)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
@pytest.mark.parametrize("strict", [False, True])
def test_rotated_layers_that_have_not_run(scheme: str, strict: bool) -> None:
    made = preset(scheme).model_copy(update={"input_rotation": "hadamard"})
    weight = Rotation.of(96).weight(torch.randn(64, 96))
    layer = QuantLinear(round_to_nearest(weight, made.weights), made)
    model = nn.Sequential(layer)
    program = exported(model, torch.randn(5, 96), strict).module()
    with torch.no_grad():
        for rows in (1, 5, 40):
            x = torch.randn(rows, 96)
            expected = run_by_reference(model, x)
            assert (program(x) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16-g32"])
def test_a_language_model_of_any_length(scheme: str) -> None:
    model = tiny_llama(tied=True)
    ptq.quantize(model, {"scheme": scheme, "embeddings": "w8a16"})
    ids = torch.randint(0, 97, (2, 9))
    length = Dim("length", min=2, max=64)
    with torch.no_grad():
        program = export(
            model, (), {"input_ids": ids, "use_cache": False},
            dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
        ).module()  # fmt: skip
        for tokens in (2, 9, 30):
            ids = torch.randint(0, 97, (2, tokens))
            found = program(input_ids=ids, use_cache=False).logits
            expected = run_by_reference(model, ids).logits
            # A sum rounded otherwise may move an activation by one step.
            assert (found - expected).norm() <= expected.norm() / 127
