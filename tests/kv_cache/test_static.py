"""Static scales of a quantized cache: calibrated, used, stored, refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

import ptq
from ptq.checkpoint import convert
from ptq.config import KVCacheConfig, load_config
from ptq.errors import CalibrationError, CheckpointError, ConfigError, UnsupportedError
from ptq.kv_cache import QuantizedCache, cache_settings, held_scales, new_cache
from ptq.report import Console
from tests.helpers import quantize_linears, tiny_llama, tiny_tokens
from tests.kv_cache.reference import FakeLayer
from tests.kv_cache.test_generate import WAYS, float_model, generate
from tests.kv_cache.test_kept import config_file, job, section_of, windows

QUIET = Console("quiet")
STATIC = {"bits": 8, "mode": "static"}
CACHES = [
    STATIC,
    {**STATIC, "keys": "channel", "values": "tensor", "symmetric": False},
    {"bits": 4, "mode": "static", "window": 5, "values": "head"},
]
DIMS = {"channel": (0, 2), "head": (0, 2, 3), "tensor": (0, 1, 2, 3)}


def batch(rows: int = 3, length: int = 40) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(5))


def static_model(name: str, chosen: Any) -> Any:
    return ptq.quantize_cache(copy.deepcopy(float_model(name)), chosen, calibration=[batch()])


def states_of(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, H, T, D] of each layer, from a run with a plain float cache."""
    cache = DynamicCache()  # of no config: nothing slides out of it
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def step_and_zero(states: Tensor, axis: str, settings: KVCacheConfig) -> tuple[Tensor, Tensor]:
    """In float64, of the shape [1, H, 1, D] with ones: the distance of two codes, before it is
    rounded up to bfloat16, and the smallest code's position in steps, with the rounded one."""
    levels = 2**settings.bits - 1
    low = states.double().amin(DIMS[axis], keepdim=True)
    high = states.double().amax(DIMS[axis], keepdim=True)
    if settings.symmetric:
        return 2 * torch.maximum(high, -low) / levels, torch.tensor(-(levels + 1) / 2)
    if settings.bits == 8:
        low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / levels
    if settings.bits == 4:
        step = torch.maximum(step, torch.maximum(high, -low) / 112)
    return step, low


class FakeStatic(FakeLayer):
    """Every state beyond the window is replaced by the nearest of the values that codes have."""

    def __init__(self, settings: KVCacheConfig, sliding: int | None, found: Any) -> None:
        super().__init__(settings, sliding)
        self.step, self.found = 1, found

    def replace(self) -> None:
        if self.sliding_window is not None and self.sliding_window <= self.settings.window + 1:
            return
        end = max(self.done, self.keys.shape[2] - self.settings.window)
        for name, (step, smallest) in zip(("keys", "values"), self.found, strict=True):
            whole = getattr(self, name).clone()
            old = whole[:, :, self.done : end].double()
            first = smallest if self.settings.symmetric else (smallest / step).round()
            codes = (old / step).round().clamp(first, first + 2**self.settings.bits - 1)
            whole[:, :, self.done : end] = (codes * step).to(whole.dtype)
            setattr(self, name, whole)
        self.done = end


def reference(model: Any) -> Any:
    """A slow cache with scales of its own, but for their rounding to bfloat16."""
    settings, like = cache_settings(model), new_cache(model)
    layers = []
    for index, states in enumerate(states_of(model, batch())):
        found = []
        for axis, x, kept in zip(
            (settings.keys, settings.values), states, held_scales(model)[index].pair, strict=True
        ):
            exact, smallest = step_and_zero(x, axis, settings)
            step = kept.scale.double().reshape(exact.shape)
            assert bool((step >= exact * (1 - 1e-6)).all())
            assert bool((step <= exact * (1 + 2**-7)).all())  # the next bfloat16 at most
            found.append((step, smallest))
        layers.append(FakeStatic(settings, like.layers[index].sliding_window, found))
    return Cache(layers=layers)


@pytest.mark.parametrize("chosen", CACHES, ids=str)
@pytest.mark.parametrize(
    "name, way",
    [("llama", way) for way in WAYS] + [("mistral", "beams"), ("gemma3", "greedy")],
)
def test_the_text_is_that_of_the_slow_reference(name: str, chosen: Any, way: str) -> None:
    model = static_model(name, chosen)
    wanted = generate(model, past_key_values=reference(model), **WAYS[way])
    found = generate(model, **WAYS[way])
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert any(layer.stored is not None for layer in found.past_key_values.quantized)
    unlike = generate(float_model(name), **WAYS[way])
    assert not torch.allclose(unlike.logits[-1], found.logits[-1], rtol=1e-4, atol=1e-4)


def test_masked_tokens_do_not_count() -> None:
    ids = batch()
    padded = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)}
    padded["input_ids"][1, 12:], padded["attention_mask"][1, 12:] = 96, 0
    model = ptq.quantize_cache(copy.deepcopy(float_model("llama")), STATIC, calibration=[padded])
    alone = [ids[:1], ids[1:2, :12], ids[2:]]
    other = ptq.quantize_cache(copy.deepcopy(float_model("llama")), STATIC, calibration=alone)
    whole = static_model("llama", STATIC)
    for index, layer in held_scales(model).items():
        for name, scale in layer.named_buffers():
            wanted = held_scales(other)[index].get_buffer(name)
            torch.testing.assert_close(scale, wanted, rtol=2**-7, atol=0)
    assert not all(torch.equal(a, b) for a, b in zip(whole.buffers(), model.buffers(), strict=True))


def test_the_observer_is_the_one_asked_for() -> None:
    model = float_model("llama")
    wide, narrow = (
        ptq.quantize_cache(copy.deepcopy(model), {"bits": 4, "mode": "static"},
                           calibration=[batch()], observer=observer)
        for observer in ("minmax", "mse")
    )  # fmt: skip
    first, second = held_scales(wide)[0].key_scale, held_scales(narrow)[0].key_scale
    assert bool((second <= first).all())
    assert bool((second < first).any())


def test_beyond_the_calibrated_range_codes_saturate() -> None:
    model = static_model("llama", STATIC)
    cache = new_cache(model)
    scale = held_scales(model)[0].key_scale.float()
    states = torch.full((1, 2, 3, 8), 1e4)
    keys, _ = cache.update(states, -states, 0)
    torch.testing.assert_close(keys, (127 * scale)[None, :, None].expand_as(keys))
    assert cache.size().nbytes == 2 * states.numel()  # codes only


def test_a_checkpoint_has_the_scales(tmp_path: Path) -> None:
    model = ptq.quantize_cache(
        quantize_linears(tiny_llama(), "w8a8"), STATIC, calibration=[batch()]
    )
    ptq.save(model, tmp_path / "ptq")
    loaded = ptq.load(tmp_path / "ptq")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "ptq")
    by_transformers.save_pretrained(tmp_path / "again")
    again = ptq.load(tmp_path / "again")
    ids = tiny_tokens(1, 20)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for other in (loaded, by_transformers, again, copy.deepcopy(loaded)):
        assert cache_settings(other) == KVCacheConfig(**STATIC)
        for name, scale in model.kv_cache_scales.state_dict().items():
            found = other.kv_cache_scales.state_dict()[name]
            assert found.dtype == scale.dtype == torch.bfloat16
            assert torch.equal(found, scale)
        made = other.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(made, wanted)
    assert section_of(tmp_path / "ptq")["kv_cache"]["mode"] == "static"
    assert AutoModel.from_pretrained(tmp_path / "ptq")(input_ids=ids).last_hidden_state is not None
    loaded.to(torch.float16).float()
    assert loaded.kv_cache_scales["0"].key_scale.dtype == torch.bfloat16
    ptq.quantize_cache(loaded, "int8")
    assert held_scales(loaded) is None
    assert not any("kv_cache" in name for name in loaded.state_dict())


def without_a_layer(scales: Any) -> None:
    del scales["1"]


def with_one_more(scales: Any) -> None:
    scales["2"] = copy.deepcopy(scales["0"])


def in_another_dtype(scales: Any) -> None:
    scales["0"].key_scale = scales["0"].key_scale.double().float()


@pytest.mark.parametrize("change, message", [
    (without_a_layer, "tensor kv_cache_scales.1.key_scale is missing; copy the checkpoint again"),
    (with_one_more, "the 2 layers of the model .* no place for tensor kv_cache_scales.2.key_scale"),
    (in_another_dtype, "kv_cache_scales.0.key_scale is torch.float32 .* torch.bfloat16, one per"),
])  # fmt: skip
def test_what_is_missing_or_of_another_model_is_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    model = ptq.quantize_cache(
        quantize_linears(tiny_llama(), "w8a8"), STATIC, calibration=[batch()]
    )
    ptq.save(model, tmp_path / "ptq")
    broken = ptq.load(tmp_path / "ptq")
    change(broken.kv_cache_scales)
    broken.save_pretrained(tmp_path / "broken")
    for load in (ptq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "broken")


def test_scales_of_zero_are_refused(tmp_path: Path) -> None:
    model = ptq.quantize_cache(
        quantize_linears(tiny_llama(), "w8a8"), STATIC, calibration=[batch()]
    )
    model.kv_cache_scales["1"].value_scale[0] = 0
    ptq.save(model, tmp_path / "ptq")
    for load in (ptq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"kv_cache_scales.1.value_scale .* not positive"):
            load(tmp_path / "ptq")


def test_conversion_leaves_them_out(tmp_path: Path) -> None:
    model = ptq.quantize_cache(
        quantize_linears(tiny_llama(), "w8a8"), STATIC, calibration=[batch()]
    )
    ptq.save(model, tmp_path / "ptq")
    notes = convert(tmp_path / "ptq", tmp_path / "ct", "compressed-tensors", engine="transformers")
    assert "left out: the quantized key-value cache, which only ptq has" in notes
    assert not any("kv_cache" in name for name in ptq.load(tmp_path / "ct").state_dict())


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_a_run_calibrates_keeps_and_measures_it(
    tiny_model: Path, tiny_texts: tuple[Path, Path], tmp_path: Path, recipe: str
) -> None:
    values = {
        **job(tiny_model, tiny_texts, tmp_path / "out", STATIC),
        "recipe": recipe,
        "calibration": {"data": [str(tiny_texts[0])], "samples": 4, "sequence_length": 32},
    }
    report = ptq.run(load_config(config_file(tmp_path, values)), console=QUIET)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    # 2 layers x 2 heads of 8 channels: a byte for each number, and nothing else.
    assert written["kv_cache"]["cache"]["bytes_per_token"] == 2 * 2 * (8 + 8)
    found = written["checkpoint"]
    assert found["predicted_tensor_bytes"] == found["tensor_bytes"]
    predicted = written["preflight"]["checkpoint_bytes"]
    assert predicted == found["weight_file_bytes"]
    assert "static scales" in str(report)
    model = ptq.load(tmp_path / "out")
    assert "int8 static symmetric, keys per head, values per channel" in str(ptq.explain(model))
    by_run = ptq.evaluate(model, windows(), through_cache=True)
    assert by_run.perplexity != ptq.evaluate(model, windows()).perplexity


def test_a_run_says_what_is_missing_before_it_loads_weights(
    tiny_model: Path, tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    values = job(tiny_model, tiny_texts, tmp_path / "out", STATIC)
    text = {"data": [str(tiny_texts[0])], "samples": 4, "sequence_length": 32}
    entropy = {**text, "observer": "entropy"}
    streamed = {"model": {"id": str(tiny_model), "stream": True}, "calibration": text}
    alone = {key: values[key] for key in ("scheme", "kv_cache", "output")}
    for config, error, message in (
        (values, CalibrationError, "kv_cache has static scales, which need calibration data"),
        ({**values, "calibration": entropy}, ConfigError, "observer entropy: .* per channel"),
        ({**alone, **streamed}, ConfigError, "calibrated on the whole quantized model; choose kv"),
    ):
        with pytest.raises(error, match=message):
            ptq.run(load_config(config_file(tmp_path, config)), dry_run=True, console=QUIET)


@pytest.mark.parametrize("settings, message", [
    ({"keys": "token"}, "keys: token has scales of single tokens, which are dynamic; with mode"),
    ({"value_group_size": 8}, "value_group_size: static scales have no groups of tokens"),
    ({"mode": "dynamic", "values": "head"}, "values: head needs mode: static; choose token or"),
    ({"mode": "fixed"}, "kv_cache: mode: input should be 'dynamic' or 'static'"),
])  # fmt: skip
def test_settings_that_contradict(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ptq.quantize_cache(float_model("llama"), {**STATIC, **settings}, calibration=[batch()])


def test_what_cannot_be_calibrated() -> None:
    model = float_model("llama")
    with pytest.raises(CalibrationError, match="need calibration data: pass calibration=batches"):
        ptq.quantize_cache(model, STATIC)
    with pytest.raises(CalibrationError, match="need calibration data"):
        ptq.quantize(tiny_llama(), {"scheme": "w8a16", "kv_cache": STATIC}, console=QUIET)
    with pytest.raises(CalibrationError, match="no tokens to the keys of layer 0"):
        ptq.quantize_cache(model, STATIC, calibration=[])
    with pytest.raises(UnsupportedError, match="T5ForConditionalGeneration is an encoder-decoder"):
        ptq.quantize_cache(float_model("t5"), STATIC, calibration=[batch()])
    with pytest.raises(ConfigError, match="mode: static needs calibrated scales"):
        QuantizedCache(model.config, mode="static")
    scales = held_scales(static_model("llama", STATIC))
    del scales[2]
    with pytest.raises(ConfigError, match="scales .* are of 2 layers, and 3 layers of this llama"):
        QuantizedCache(model.config, mode="static", scales=scales)
    assert held_scales(model) is None
    assert cache_settings(model) is None


def test_scales_of_other_heads_are_refused() -> None:
    cache = QuantizedCache(
        float_model("llama").config,
        scales=held_scales(static_model("llama", STATIC)),
        mode="static",
    )
    states = torch.zeros(1, 4, 3, 8)
    with pytest.raises(UnsupportedError, match=r"key scales \[2, 1\], .* 4 heads of 8 channels"):
        cache.update(states, states, 0)
