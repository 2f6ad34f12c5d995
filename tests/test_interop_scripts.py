"""convert_checkpoint.py as a user calls it, and the parts of check_interop.py."""

import ast
from pathlib import Path

import check_interop
import convert_checkpoint
import interop
import packed_interop
import pytest
import torch

import ptq
from ptq.checkpoint import CONVERSIONS, assert_same
from ptq.checkpoint.packed_int32 import write as packed_write
from ptq.cli.convert import FORMATS
from ptq.errors import ConfigError
from ptq.modules import quantized_layers
from tests.helpers import quantize_linears, tiny_llama


def convert(*arguments: object) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def test_convert_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = quantize_linears(tiny_llama(dtype=torch.bfloat16), "w8a8")
    ptq.save(model, tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "ct", "--format", "compressed-tensors") == 0
    shown = capsys.readouterr().out
    assert "note: scales rounded to bfloat16" in shown and "codes bit-equal" in shown
    assert convert(tmp_path / "ct", tmp_path / "b", "--format", "ptq") == 0
    back = quantized_layers(ptq.load(tmp_path / "b"))
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.codes, back[name].codes)
        assert torch.equal(layer.scale.bfloat16(), back[name].scale)


@pytest.mark.parametrize("name", ["gptq", "gptq-v2", "awq"])
def test_convert_to_packed_formats(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert FORMATS == CONVERSIONS
    model = quantize_linears(tiny_llama(), "w4a16-g32-asym")
    ptq.save(model, tmp_path / "a")
    there = (tmp_path / "a", tmp_path / "there", "--format", name)
    assert convert(*there) == (0 if name == "awq" else 2)
    assert ("choose symmetric weights" in capsys.readouterr().err) == (name != "awq")
    there = (tmp_path / "a", tmp_path / "kept", "--format", name)
    assert convert(*there, "--engine", "transformers", "--scales", "keep") == 0
    assert f"({name}), read back, codes bit-equal" in capsys.readouterr().out
    assert convert(tmp_path / "kept", tmp_path / "b", "--format", "ptq") == 0
    assert_same(model, ptq.load(tmp_path / "b"))


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ptq.save(quantize_linears(tiny_llama(), "w4a16-g16"), tmp_path / "a")
    options = (tmp_path / "a", tmp_path / "ct", "--format", "compressed-tensors")
    assert convert(*options) == 2
    assert "group size 16: not loadable by vLLM; choose 32" in capsys.readouterr().err
    assert convert(*options, "--engine", "transformers") == 0
    assert convert(*options, "--engine", "transformers") == 2
    assert "choose another directory" in capsys.readouterr().err


def test_ulps() -> None:
    wanted = torch.tensor([1.0, -3.0, 0.0, 1000.0])
    for dtype in (torch.bfloat16, torch.float16):
        found = torch.nextafter(wanted.to(dtype), torch.full_like(wanted, 2000.0).to(dtype))
        assert interop.ulps(found, wanted.to(dtype), dtype) == pytest.approx(1.0)
        assert interop.ulps(wanted, wanted, dtype) == 0.0
    assert interop.ulps(wanted + 0.5, wanted, torch.bfloat16) > 60


@pytest.fixture
def work(tmp_path: Path) -> interop.Comparison:
    rows = torch.randint(0, 97, (2, 9)).tolist()
    return interop.Comparison(tmp_path, Path("/nowhere"), torch.float32, Path("script"), rows)


def test_a_row_of_the_table(work: interop.Comparison) -> None:
    """The peer is ptq itself, dequantized; then one whose weight is an ulp off."""
    model = quantize_linears(tiny_llama(), "w4a16-g32-asym")
    ptq.save(model, work.root / "out")
    peer = {
        f"{n}.weight": m.float_weight(torch.float16) for n, m in quantized_layers(model).items()
    }
    floats = ptq.dequantize(ptq.load(work.root / "out"), torch.float32)
    logits = floats(torch.tensor(work.rows)).logits.detach()
    row = work.row("made", "w4a16-g32-asym", work.root / "out", ({**peer, "logits": logits}, "so"))
    assert (row.weights_ulp, row.reference) == (0.0, 0.0)
    assert row.kernels < 2e-2  # it rounds inputs to bfloat16
    assert check_interop.table_row(row).startswith("| made | w4a16-g32-asym | float32 | 0 | ")
    weight = peer["model.layers.1.mlp.down_proj.weight"]
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0, dtype=torch.float16))
    tensors = {**peer, "logits": logits * 1.5}
    row = work.row("made", "w4a16-g32-asym", work.root / "out", (tensors, "so"))
    assert row.weights_ulp == pytest.approx(1.0)
    assert row.reference == pytest.approx(1 / 3, rel=1e-5)
    del peer["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ConfigError, match="other quantized layers"):
        work.row("made", "x", work.root / "out", ({**peer, "logits": logits}, "so"))


@pytest.mark.parametrize("static", [True, False])
def test_the_reference_rounds_inputs(static: bool) -> None:
    """Against the codes that it stands for, one value at a time."""
    model = quantize_linears(
        torch.nn.Sequential(torch.nn.Linear(32, 8)), "w8a8-static" if static else "w8a8"
    )
    layer, x = model[0], torch.randn(3, 32)
    made = interop.Reference(layer)(x)
    for row, wanted in zip(x, made, strict=True):
        scale = 0.05 if static else float(row.abs().max()) / 127.5
        codes = [max(-128, min(127, round(float(v) / scale))) for v in row]
        expected = layer.float_weight(torch.float32) @ (torch.tensor(codes) * scale) + layer.bias
        assert torch.allclose(wanted, expected, atol=1e-5)


def test_peers_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for peer in ("hqq=/bin/sh", "llm-compressor=/nowhere", "llm-compressor"):
        assert check_interop.main(["--peer", peer]) == 2
        shown = capsys.readouterr().err
        assert "give llm-compressor=PYTHON or gptqmodel=PYTHON, an interpreter" in shown


def test_a_peer_that_fails(work: interop.Comparison, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho 'ValueError: no' >&2\nexit 1\n")
    python.chmod(0o755)
    failing = interop.Comparison(work.root, python, work.dtype, work.script, work.rows)
    with pytest.raises(ConfigError, match="the peer failed to read out: ValueError: no"):
        failing.peer("read", tmp_path / "out")


def test_every_scheme_keeps_the_limits_it_is_said_to_keep(tmp_path: Path) -> None:
    from ptq.checkpoint.compressed_tensors import write

    check_interop.float_model(tmp_path / "float", torch.bfloat16)
    for number, (scheme, engine) in enumerate(check_interop.WRITTEN.items()):
        model, _ = ptq.load_float(tmp_path / "float")
        write(quantize_linears(model, scheme), tmp_path / str(number), engine=engine)


def test_the_packed_schemes_are_held_and_given_to_a_packer(tmp_path: Path) -> None:
    """Codes come back from what the packer is given: round(w / s) + z."""
    check_interop.float_model(tmp_path / "float", torch.float16)
    for number, (scheme, layout) in enumerate(packed_interop.WRITTEN):
        model, _ = ptq.load_float(tmp_path / "float")
        target = tmp_path / str(number)
        packed_write(quantize_linears(model, scheme), target, layout, engine="transformers")
        loaded = ptq.load(target)
        given = packed_interop.unpacked(loaded)
        for name, layer in list(quantized_layers(loaded).items())[:2]:
            weight, scales, zeros = (given[f"{name}.{k}"] for k in ("weight", "scales", "zeros"))
            size = weight.shape[1] // scales.shape[1]
            steps = weight / scales.repeat_interleave(size, 1) + zeros.repeat_interleave(size, 1)
            middle = 1 << (layer.scheme.weights.int_format.bits - 1)
            codes = layer.quantized_weight.codes.float() + middle
            assert torch.allclose(steps, codes, atol=1e-2)


def test_tensors_that_are_equal_are_counted() -> None:
    a = {"x.qweight": torch.tensor([1, 2]), "x.scales": torch.ones(2), "x.qzeros": torch.ones(1)}
    b = {
        **a,
        "x.scales": torch.ones(2).half(),
        "x.qzeros": torch.zeros(1),
        "x.g_idx": a["x.scales"],
    }
    assert packed_interop.equal(a, a) == "3 of 3 tensors bit-equal"
    assert packed_interop.equal(a, b) == "1 of 4 tensors bit-equal"


def test_what_the_peer_is_to_make_is_known_to_its_script() -> None:
    """Which cannot be imported without the peer."""
    tree = ast.parse(packed_interop.SCRIPT.read_text())
    tables = [node.value for node in tree.body if isinstance(node, ast.AnnAssign)]
    assert isinstance(tables[0], ast.Dict)
    assert [key.value for key in tables[0].keys] == list(packed_interop.MADE)
