"""ptq's own kernels: compiled once, equal to the reference, at any number of rows."""

import functools
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ptq
from ptq.algorithms import round_to_nearest
from ptq.cli import main
from ptq.config import ActivationScheme, Scheme, preset
from ptq.core import QuantizedWeight, Rotation, hadamard
from ptq.errors import UnsupportedError
from ptq.kernels import (
    Activation,
    Kernel,
    LinearSpec,
    quantize_activation,
    rotated,
    row_ranges,
)
from ptq.kernels.cpu_native import NativeFloat, NativeInt4, NativeInt8
from ptq.modules import QuantLinear, join
from ptq.native import library
from tests.helpers import SIZES
from tests.kernels.test_conformance import (
    ACTIVATIONS,
    WEIGHTS,
    check,
    inputs,
    make_scheme,
    make_weight,
    misaligned,
)

pytestmark = pytest.mark.usefixtures("kernels")
LOADED = library.library_loaded  # before tests replace it
# One row, few (some of them padded), one panel and two, an odd number of panels.
ROWS = (1, 2, 3, 4, 6, 8, 9, 12, 16, 17, 33, 70)
SHAPES = ((48, 128), (33, 256), (5, 64))
GROUPED = (
    {"group_size": 32},
    {"group_size": 64, "symmetric": False},
    {"format": "int4", "group_size": 32, "scale_dtype": "float32"},
)


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiled kernels, in the way that a user gets them; processes of one run share them."""
    if library.processor_reason() is not None:
        pytest.skip(f"ptq's own kernels are {library.processor_reason()}")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared))
    monkeypatch.delenv("PTQ_NATIVE")
    loaded = functools.cache(lambda: True)  # as the function itself, once it has found the file
    monkeypatch.setattr("ptq.native.build.library_loaded", loaded)
    monkeypatch.setattr("ptq.native.library.library_loaded", loaded)
    return ptq.build_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(
    "kernel", [NativeInt8(), NativeInt4(), NativeFloat()], ids=lambda k: k.name
)
def test_equals_the_reference_where_it_claims_to(
    kernel: Kernel,
    activations: dict | None,
    dtype: torch.dtype,
) -> None:
    for weights in (*WEIGHTS, *GROUPED):
        scheme = make_scheme(weights, activations)
        for n, k in SHAPES if scheme is not None else ():
            weight = make_weight(n, k, scheme)
            for m in ROWS if weight is not None else ():
                spec = LinearSpec.of(weight, scheme.activations, "cpu", dtype, m)
                if kernel.supports(spec) is None:
                    for x in inputs(m, k, dtype):
                        check(kernel, spec, weight, x)


@pytest.mark.parametrize(("n", "k", "rows"), [(37, 8192, (1, 3, 5, 9, 16)), (130, 128, (40,))])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16-g64-asym", "w4a8-g64"])
def test_threads_and_blocks_of_columns(scheme: str, n: int, k: int, rows: tuple[int, ...]) -> None:
    """A thread's part begins anywhere; W is taken a cache's worth at a time, or a batch."""
    made = preset(scheme)
    weight = make_weight(n, k, made)
    assert weight is not None
    served = 0
    for kernel in (NativeInt8(), NativeInt4(), NativeFloat()):
        for m in rows:
            spec = LinearSpec.of(weight, made.activations, "cpu", torch.bfloat16, m)
            if kernel.supports(spec) is None:
                check(kernel, spec, weight, inputs(m, k, torch.bfloat16)[0])
                served += 1
    assert served >= len(rows)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_int8_serves_every_number_of_rows(scheme: str) -> None:
    assert [r.kernel for r in row_ranges(spec_of(scheme))] == ["native_int8"]


@pytest.mark.parametrize("scheme", ["w4a8-g64", "w4a8-g32-asym"])
def test_int4_codes_are_multiplied_as_they_are_from_nine_rows_on(scheme: str) -> None:
    ranges = [(r.first, r.kernel) for r in row_ranges(spec_of(scheme))]
    assert ranges == [(1, "native_float"), (9, "native_int4")]


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g64", "w4a16-g32-asym"])
def test_float_serves_every_number_of_rows(scheme: str) -> None:
    assert [r.kernel for r in row_ranges(spec_of(scheme))] == ["native_float"]


def spec_of(scheme: str, k: int = 128, dtype: torch.dtype = torch.bfloat16) -> LinearSpec:
    made = preset(scheme)
    weight = round_to_nearest(torch.randn(48, k), made.weights)
    return LinearSpec.of(weight, made.activations, "cpu", dtype, 1)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16", "w4a16-g32", "w4a8-g64"])
@pytest.mark.parametrize("columns", [32, 64, 192, 256])
@pytest.mark.parametrize("rows", [1, 9, 18])
def test_rows_of_another_length_are_refused(scheme: str, columns: int, rows: int) -> None:
    made = preset(scheme)
    layer = QuantLinear(round_to_nearest(torch.randn(48, 128), made.weights), made)
    with pytest.raises(RuntimeError, match="invalid for input"):
        layer(torch.randn(rows, columns))


def test_what_they_do_not_serve() -> None:
    assert "multiple of 64" in str(NativeInt8().supports(spec_of("w8a8", k=96)))
    assert "bfloat16" in str(NativeFloat().supports(spec_of("w8a16", dtype=torch.float16)))
    scheme = Scheme.model_validate({"weights": {"format": "int4", "group_size": 16}})
    weight = round_to_nearest(torch.randn(48, 128), scheme.weights)
    grouped = LinearSpec.of(weight, None, "cpu", torch.bfloat16, 1)
    assert "multiple of 32" in str(NativeFloat().supports(grouped))


def test_without_having_been_compiled_they_say_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq.native.library.library_loaded", lambda: False)
    assert "ptq build" in str(NativeInt8().supports(spec_of("w8a8")))


def test_a_variable_switches_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQ_NATIVE", "0")
    monkeypatch.setattr("ptq.native.library.library_loaded", LOADED)
    assert not library.ready()
    assert "PTQ_NATIVE" in str(NativeInt8().supports(spec_of("w8a8")))


@pytest.mark.fresh_process
@pytest.mark.parametrize("has_them", [True, False])
def test_the_process_that_verifies_has_the_kernels_of_this_one(
    has_them: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is compiled while a long run goes on."""
    monkeypatch.setattr("ptq.native.library.library_loaded", lambda: has_them)
    config = LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 128})
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    ptq.quantize(model, "w4a16-g32-asym")
    assert ("native_float" in str(ptq.explain(model)).split("not ")[0]) == has_them
    ptq.save(model, tmp_path / "out", verify="process")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 15, 16, 100])
@pytest.mark.parametrize("codes", [torch.int8, torch.bfloat16], ids=str)
def test_activations_are_quantized_to_the_bits_of_torchs_ops(
    dtype: torch.dtype, columns: int, codes: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(9, columns) * torch.logspace(-20, 20, 9).unsqueeze(1)
    x[1], x[2, -1], x[3, 0], x[4] = 0, float("nan"), float("inf"), 1e-42
    scheme = ActivationScheme(mode="dynamic", symmetric=True, format="int8")
    wide = torch.stack((x, x), dim=2).to(dtype)[:, :, 0]  # strided
    own = quantize_activation(wide, scheme, dtype=codes)
    monkeypatch.setattr("ptq.native.library.library_loaded", lambda: False)
    torchs = quantize_activation(wide, scheme, dtype=codes)
    assert own.scale is not None and torchs.scale is not None
    assert torch.equal(own.scale.nan_to_num(7), torchs.scale.nan_to_num(7))
    finite = torch.tensor([0, 1, 4, 5, 6, 7, 8])  # of others the codes mean nothing
    assert torch.equal(own.values[finite], torchs.values[finite])


@pytest.mark.parametrize("m", [1, 5, 20])
def test_int8_is_exact_in_the_extreme(m: int) -> None:
    """x is shifted to 0 and 255 on the way: the sums of the shifted codes may wrap around."""
    k = 1 << 16
    for x, w in ((-128, -128), (127, -128), (127, 127)):
        weight = QuantizedWeight.from_codes(
            torch.full((3, k), w, dtype=torch.int8), torch.ones(3, 1), None,
            preset("w8a8").weights.number_format, preset("w8a8").weights.granularity_value,
        )  # fmt: skip
        kernel = NativeInt8()
        activation = Activation(torch.full((m, k), x, dtype=torch.int8), torch.ones(m, 1))
        y = kernel.linear(activation, kernel.prepare(weight, torch.float32), torch.float32)
        assert (y == x * w * k).all()


@pytest.mark.parametrize("m", [9, 20])
def test_int4_is_exact_in_the_extreme(m: int) -> None:
    """One group of 2^16 columns, codes 15 from their zero point, x shifted to 0 and 255."""
    k = 1 << 16
    weights = Scheme.model_validate(
        {"weights": {"format": "int4", "group_size": k, "symmetric": False}}
    ).weights
    for x, w, zero in ((-128, -8, 7), (127, -8, 7), (127, 7, -8), (-128, 7, -8)):
        weight = QuantizedWeight.from_codes(
            torch.full((3, k), w, dtype=torch.int8), torch.ones(3, 1),
            torch.full((3, 1), zero, dtype=torch.int8), weights.number_format,
            weights.granularity_value,
        )  # fmt: skip
        kernel = NativeInt4()
        activation = Activation(torch.full((m, k), x, dtype=torch.int8), torch.ones(m, 1))
        y = kernel.linear(activation, kernel.prepare(weight, torch.float32), torch.float32)
        assert (y == x * (w - zero) * k).all()


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [("w8a8", NativeInt8()), ("w4a16-g64", NativeFloat()), ("w4a8-g64", NativeInt4())],
)
def test_memory_may_begin_anywhere(scheme: str, kernel: Kernel) -> None:
    made = preset(scheme)
    weight = round_to_nearest(torch.randn(48, 128), made.weights)
    weight = replace(weight, packed=misaligned(weight.packed))
    for m in (1, 4, 6, 17):
        spec = LinearSpec.of(weight, made.activations, "cpu", torch.bfloat16, m)
        check(kernel, spec, weight, misaligned(torch.randn(m, 128).bfloat16()))


def test_no_form_of_the_weight_is_kept() -> None:
    for scheme, kernel in (("w8a8", NativeInt8()), ("w4a16-g64", NativeFloat())):
        spec = spec_of(scheme)
        weight = round_to_nearest(torch.randn(48, 128), preset(scheme).weights)
        form = kernel.prepare(weight, torch.bfloat16)
        own = [t for t in vars(form).values() if t is not None and not shares(t, weight)]
        assert sum(t.nbytes for t in own) <= kernel.extra_bytes(spec) <= 8 * 48


def shares(tensor: torch.Tensor, weight: QuantizedWeight) -> bool:
    return tensor.data_ptr() in (weight.packed.data_ptr(), weight.scale.data_ptr())


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g64", "w8a16", "w4a8-g64"])
def test_compiled_for_any_number_of_rows(scheme: str) -> None:
    made = preset(scheme)
    layer = QuantLinear(round_to_nearest(torch.randn(48, 128), made.weights), made)
    layer(torch.randn(1, 128))  # makes the form
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 20):
        x = torch.randn(m, 128)
        assert (compiled(x) - layer(x)).norm() <= 1e-3 * layer(x).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 12, 24, 40, 120, 344, 576, 1536, 2048])
def test_rotated_rows_are_products_with_the_whole_matrix(size: int, dtype: torch.dtype) -> None:
    """Orders 1 and 2, multiples of 4 and 8, several pieces in a row; in float64 for comparison."""
    rotation = Rotation.of(size)
    left, right = hadamard(rotation.left).double(), hadamard(rotation.right).double()
    pieces = size // rotation.order
    whole = torch.block_diag(*[torch.kron(left, right)] * pieces)
    whole *= 2.0 ** -round(math.log2(rotation.order) / 2)
    for rows in (1, 3, 17):
        x = torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(rows)).to(dtype)
        x = x[:, ::2]  # strided
        y = rotated(x, rotation)
        exact = x.double() @ whole
        # Each step adds products that are exact, as the entries are powers of two.
        terms = x.double().abs() @ whole.abs()
        rounding = (rotation.left + rotation.right) * torch.finfo(torch.float32).eps
        stored = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
        assert y.dtype == dtype
        assert bool(((y.double() - exact).abs() <= terms * rounding + exact.abs() * stored).all())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8-g16"])
def test_layers_rotate_by_the_compiled_op(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give what they give with torch's products."""
    rule = preset(scheme).model_copy(update={"input_rotation": "hadamard"})
    weight = round_to_nearest(torch.randn(16, 192), rule.weights)
    layer, x = QuantLinear(weight, rule), torch.randn(5, 192)
    calls = []
    real = torch.ops.ptq.rotate_rows

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(arguments)
        made: Tensor = real(*arguments)
        return made

    monkeypatch.setattr(torch.ops.ptq, "rotate_rows", counted)
    ours = layer(x)
    assert len(calls) == 1
    monkeypatch.setattr("ptq.kernels.rotate.ready", lambda: False)
    torch.testing.assert_close(layer(x), ours, rtol=1e-5, atol=1e-4)
    assert len(calls) == 1


def test_the_ops_do_what_their_schema_says() -> None:
    made = preset("w8a8")
    form = NativeInt8().prepare(round_to_nearest(torch.randn(48, 128), made.weights), torch.float32)
    x = torch.randn(5, 128)
    codes, scale = torch.ops.ptq.quantize_rows(x, torch.int8)
    grouped = NativeFloat().prepare(
        round_to_nearest(torch.randn(48, 128), preset("w4a16-g64").weights), torch.float32
    )
    for op, arguments in (
        (torch.ops.ptq.quantize_rows.default, (x, torch.bfloat16)),
        (torch.ops.ptq.rotate_rows.default, (x, *Rotation.of(128).factors(x))),
        (torch.ops.ptq.linear_int8.default,
         (codes, scale, form.codes, form.scale, form.sums, torch.bfloat16)),
        (torch.ops.ptq.linear_float.default,
         (x.bfloat16(), None, grouped.packed, grouped.scale, None, torch.float32)),
        (torch.ops.ptq.linear_groups.default,
         (codes, scale, grouped.packed, grouped.scale, None, torch.bfloat16)),
    ):  # fmt: skip
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_library_that_is_there_is_not_made_again(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert ptq.build_kernels() == kernels


def test_no_compiler_or_one_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(UnsupportedError, match="no such thing.*GCC 12"):
        ptq.build_kernels()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    with pytest.raises(UnsupportedError, match=r"install g\+\+"):
        ptq.build_kernels()
    assert list((tmp_path / "ptq").iterdir()) == []


def test_another_processor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(UnsupportedError, match="x86-64"):
        ptq.build_kernels()


def test_the_command_says_where_they_are(kernels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build"]) == 0
    assert str(kernels) in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w8a16", "w8a8"])
def test_joined_layers_share_one_tensor_of_codes(scheme: str) -> None:
    made = preset(scheme)
    layers = tuple(
        QuantLinear(round_to_nearest(torch.randn(n, 128), made.weights), made) for n in (48, 16)
    )
    x = torch.randn(1, 128)
    before = [layer(x) for layer in layers]
    assert join(layers, 1, torch.float32)
    assert len({layer.codes.untyped_storage().data_ptr() for layer in layers}) == 1
    for layer, y in zip(layers, before, strict=True):
        assert torch.equal(layer(x), y)
        assert layer.joint is not None
        activation = layer._activation(x, x, layer.kernel(x))
        assert torch.equal(layer.joint.linear(activation), y)
