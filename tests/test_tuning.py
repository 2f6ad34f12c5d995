"""ptq.tune chooses what it measured to be fastest, within the memory that it may use."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import ptq
from ptq.errors import ConfigError, UnsupportedError
from ptq.kernels import KERNELS
from ptq.kernels.cpu_int_mm import has_vnni
from ptq.modules import QuantLinear
from ptq.tuning import _choose

ROWS = (1, 8, 64)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ptq" / "tuning.json"


def quantized(scheme: str = "w8a8") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 64))
    ptq.quantize(model, scheme)
    return model


def tuned(model: nn.Module, **options: object) -> "ptq.report.Tuning":
    return ptq.tune(model, rows=ROWS, seconds=0.01, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16-g32", "w4a8-g32"])
@pytest.mark.parametrize("memory", [0.5, 3.0])
def test_the_fastest_kernel_that_fits_is_used(scheme: str, memory: float) -> None:
    model = quantized(scheme)
    result = tuned(model, memory=memory)
    assert [g.names for g in result.layers] == [("0", "1"), ("2",)]
    explained = {g.names: g for g in ptq.explain(model).layers}
    for group in result.layers:
        layer = model.get_submodule(group.names[0])
        assert isinstance(layer, QuantLinear)
        x = {m: torch.randn(m, 128) for m in ROWS}
        for m in ROWS:
            assert layer.kernel(x[m]).name == group.kernel(m)
            layer(x[m])
            best = min(v[m] for n, v in group.times.items() if n != "float" and m in v)
            if memory > 1:  # all of them fit together
                assert group.times[group.kernel(m)][m] == best
        ranges = explained[group.names].ranges
        assert tuple((r.first, r.kernel) for r in ranges) == group.choice
        own = {b.data_ptr() for b in layer.buffers()}
        forms = [t for p in layer._prepared.values() for t in tensors(p)]
        held = sum(t.nbytes for t in forms if t.data_ptr() not in own)
        stored = layer.quantized_weight.nbytes
        assert held == 0 or stored + held <= memory * 2 * layer.in_features * layer.out_features


def tensors(value: object) -> list[torch.Tensor]:
    """The plain tensors of a prepared form; oneDNN's opaque ones have no memory to look at."""
    if isinstance(value, torch.Tensor):
        return [] if value.is_mkldnn else [value]
    parts = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    return [t for part in parts for t in tensors(part)]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16-g32"])
def test_results_stay_those_of_the_weights(scheme: str) -> None:
    model = quantized(scheme)
    x = torch.randn(8, 128)
    expected = model(x)
    tuned(model, memory=3.0)
    # Some kernels round to bfloat16, in each of three layers, and int8 activations move by a step.
    assert (model(x) - expected).norm() <= 0.03 * expected.norm()


def test_kernels_with_a_second_weight_need_leave() -> None:
    small = {n for g in tuned(quantized(), memory=0.6, cache=False).layers for n in g.times}
    large = {n for g in tuned(quantized(), memory=4.0, cache=False).layers for n in g.times}
    assert small.isdisjoint({"onednn", "resident"})
    assert large >= {"resident", "int_mm", "float"}
    assert ("onednn" in large) == has_vnni()


def test_the_largest_form_is_given_up_first() -> None:
    """int8pack is best at 1 row, resident at 64: together they take more than 1.5."""
    layer = quantized("w8a16")[0]
    assert isinstance(layer, QuantLinear)
    spec = layer.spec("cpu", torch.bfloat16, 1)
    times = {
        "float": {1: 1.0, 8: 1.0, 64: 1.0},
        "int8pack": {1: 0.1, 8: 0.6, 64: 3.0},
        "resident": {1: 1.0, 8: 1.0, 64: 1.0},
        "dequantize": {1: 2.0, 8: 2.0, 64: 2.0},
    }
    names = [
        [(m, k.name) for m, k in _choose(times, spec, ROWS, memory, layer)]
        for memory in (4.0, 1.5, 0.5)
    ]
    # From the middle of 8 and 64 by ratio: sqrt(8 * 64) = 22.6.
    assert names[0] == [(1, "int8pack"), (23, "resident")]
    assert names[1] == [(1, "int8pack"), (23, "dequantize")]
    assert names[2] == [(1, "dequantize")]


def test_measurements_are_kept_for_this_machine(cache_home: Path) -> None:
    first = tuned(quantized())
    second = tuned(quantized())
    assert not any(g.cached for g in first.layers)
    assert all(g.cached for g in second.layers)
    assert [g.times for g in second.layers] == [g.times for g in first.layers]
    assert "measured earlier" in str(second)
    content = json.loads(cache_home.read_text())
    (machine,) = content
    assert torch.__version__ in machine
    cache_home.write_text(json.dumps({"another machine": content[machine]}))
    assert not any(g.cached for g in tuned(quantized()).layers)
    assert set(json.loads(cache_home.read_text())) == {"another machine", machine}


@pytest.mark.parametrize("content", ["{", "[1]", '{"m": {"k": {"float": {"0": 1}}}}'])
def test_a_damaged_cache_is_an_error(cache_home: Path, content: str) -> None:
    cache_home.parent.mkdir(parents=True)
    cache_home.write_text(content)
    with pytest.raises(ConfigError, match=r"tuning\.json is damaged.*delete it"):
        tuned(quantized())
    assert tuned(quantized(), cache=False).layers


@pytest.mark.parametrize("lost", ["float", "dequantize", "8"])
def test_an_incomplete_measurement_is_made_again(cache_home: Path, lost: str) -> None:
    tuned(quantized())
    content = json.loads(cache_home.read_text())
    for measured in content.values():
        for times in measured.values():
            times.pop(lost, None)
            for rows in times.values():
                rows.pop(lost, None)
    cache_home.write_text(json.dumps(content))
    result = tuned(quantized())
    assert not any(group.cached for group in result.layers)
    assert "M=8" in str(result)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        tuned(quantized())


def test_it_prints_well_and_survives_a_copy() -> None:
    model = quantized()
    result = tuned(model)
    assert "128x128 w8a8, 2 layers such as 0" in str(result)
    assert "M=64" in result._repr_html_()
    json.dumps(result.to_dict())
    twin = copy.deepcopy(model)
    x = torch.randn(8, 128)
    assert twin[0].kernel(x) in KERNELS
    assert twin[0].kernel(x) == model[0].kernel(x)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rows": [0]}, "rows"),
        ({"rows": []}, "rows"),
        ({"rows": [1.5]}, "rows"),
        ({"memory": 0.0}, "memory 0.0"),
        ({"seconds": float("nan")}, "seconds nan"),
        ({"dtype": torch.int8}, "dtype"),
    ],
)
def test_options_out_of_range(options: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        ptq.tune(quantized(), **options)  # type: ignore[arg-type]


def test_a_float_model_has_nothing_to_tune() -> None:
    with pytest.raises(UnsupportedError, match=r"ptq\.quantize"):
        ptq.tune(nn.Sequential(nn.Linear(4, 4)))
