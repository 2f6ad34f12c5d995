"""Whole checkpoints: ptq's own, and files by the definition of the layouts."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ptq
from ptq.checkpoint import CHECKPOINT_FORMATS, assert_same, convert, verify_files
from ptq.checkpoint.packed_int32 import layout_name, read, write
from ptq.checkpoint.packed_int32.settings import parse_settings
from ptq.config import Scheme, preset
from ptq.errors import CheckpointError, PTQError, UnsupportedError
from ptq.kernels import select
from ptq.modules import QuantLinear, quantized_layers
from tests.checkpoint.packed_int32 import by_hand
from tests.helpers import quant_linear, quantize_linears, tiny_bert, tiny_llama, tiny_tokens
from tests.tiny import tiny_tokenizer

DOWN = "model.layers.1.mlp.down_proj"
HELD = [
    ("gptq", "w4a16-g32"), ("gptq", "w4a16-g16-asym"), ("gptq", "w8a16-g32"),
    ("gptq", "w2a16-g16"), ("gptq-v2", "w4a16-g32"), ("gptq-v2", "w4a16-g16-asym"),
    ("gptq-v2", "w8a16-g32-asym"), ("gptq-v2", "w2a16-g32-asym"), ("awq", "w4a16-g32"),
    ("awq", "w4a16-g16-asym"),
]  # fmt: skip
"""Layouts, and schemes in groups that they hold."""
PER_CHANNEL = [("gptq", "w4a16"), ("gptq", "w8a16"), ("gptq-v2", "w4a16-asym"),
               ("awq", "w4a16-asym")]  # fmt: skip


def half_scales(scheme: str) -> Scheme:
    """A scheme whose scales are float16."""
    data = preset(scheme).model_dump()
    data["weights"]["scale_dtype"] = "float16"
    return Scheme.model_validate(data)


@pytest.mark.parametrize(("layout", "scheme"), HELD + PER_CHANNEL)
def test_there_and_back(tmp_path: Path, layout: str, scheme: str) -> None:
    """ptq to the format to ptq: the same bits, and the same logits."""
    model = quantize_linears(tiny_llama(tied=True, dtype=torch.bfloat16), half_scales(scheme))
    ptq.save(model, tmp_path / "a", tokenizer=tiny_tokenizer())
    options: dict[str, Any] = {"engine": "transformers", "scales": "keep"}
    convert(tmp_path / "a", tmp_path / "there", layout, **options)
    convert(tmp_path / "there", tmp_path / "b", "ptq")
    back = ptq.load(tmp_path / "b")
    assert_same(model, back)
    assert torch.equal(model(tiny_tokens()).logits, back(tiny_tokens()).logits)
    assert verify_files(tmp_path / "b") == []
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        original = (tmp_path / "a" / name).read_bytes()
        assert (tmp_path / "there" / name).read_bytes() == original
        assert (tmp_path / "b" / name).read_bytes() == original


@pytest.mark.parametrize(("layout", "scheme"), HELD + PER_CHANNEL)
def test_files_of_another_writer(tmp_path: Path, layout: str, scheme: str) -> None:
    """What the definition says is what is read, and what is written, bit for bit."""
    model = quantize_linears(tiny_llama(tied=True), half_scales(scheme))
    theirs = by_hand.write(model, tmp_path / "theirs", layout)
    loaded = ptq.load(tmp_path / "theirs")
    assert_same(model, loaded)
    assert torch.equal(model(tiny_tokens()).logits, loaded(tiny_tokens()).logits)
    CHECKPOINT_FORMATS[layout].write(loaded, tmp_path / "ours")
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key]), key
    configs = [
        json.loads((tmp_path / d / "config.json").read_text())["quantization_config"]
        for d in ("ours", "theirs")
    ]
    shared = configs[0].keys() & configs[1].keys()
    assert len(shared) >= 5
    assert {k: configs[0][k] for k in shared} == {k: configs[1][k] for k in shared}


def test_integer_kernels_serve_what_was_read(tmp_path: Path) -> None:
    for layout, scheme, dtype in (("awq", "w4a16-g32", torch.uint8), ("gptq", "w8a16", torch.int8)):
        model = quantize_linears(tiny_llama(tied=True), half_scales(scheme))
        by_hand.write(model, tmp_path / layout, layout)
        layers = quantized_layers(ptq.load(tmp_path / layout))
        assert len(layers) == 14
        assert {layer.codes.dtype for layer in layers.values()} == {dtype}
        assert {layer.zero_point for layer in layers.values()} == {None}
        for layer in layers.values():
            assert select(layer.spec("cpu", torch.float32, 1)).name != "reference"


def test_mid_zero_points_of_an_asymmetric_scheme_are_read_as_symmetric(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w4a16-g32-asym")
    layer = model.get_submodule(DOWN)
    layer.zero_point.zero_()
    write(model, tmp_path / "out", "awq", engine="transformers")
    found = quantized_layers(ptq.load(tmp_path / "out"))
    assert found[DOWN].zero_point is None and found[DOWN].scheme.weights.symmetric
    assert torch.equal(found[DOWN].codes, layer.codes)
    assert torch.equal(found[DOWN].float_weight(torch.float32), layer.float_weight(torch.float32))
    assert sum(other.zero_point is None for other in found.values()) == 1


def test_scales_are_rounded_to_float16(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w4a16")
    notes = write(model, tmp_path / "out", "gptq", engine="transformers")
    assert notes[0].startswith("scales rounded to float16, the format's dtype, in 14 tensors")
    assert "negative scales" in notes[1]
    for name, layer in quantized_layers(ptq.load(tmp_path / "out")).items():
        original = model.get_submodule(name)
        assert torch.equal(layer.codes, original.codes)
        assert torch.equal(layer.scale, original.scale.half())
    with pytest.raises(UnsupportedError, match="q_proj has float32 scales, gptq has 16-bit ones"):
        write(model, tmp_path / "new", "gptq", engine="transformers", scales="keep")
    model.get_submodule(DOWN).scale.fill_(1e-12)
    with pytest.raises(UnsupportedError, match="down_proj has scales that float16.*cannot hold"):
        write(model, tmp_path / "new", "gptq", engine="transformers")
    assert not (tmp_path / "new").exists()


def test_bfloat16_scales(tmp_path: Path) -> None:
    """GPTQModel writes them; they are kept where asked, and become float16 exactly otherwise."""
    data = preset("w4a16-g32-asym").model_dump()
    data["weights"]["scale_dtype"] = "bfloat16"
    model = quantize_linears(tiny_llama(tied=True), Scheme.model_validate(data))
    by_hand.write(model, tmp_path / "theirs", "awq")
    assert_same(model, ptq.load(tmp_path / "theirs"))
    for layout in ("awq", "gptq-v2"):
        CHECKPOINT_FORMATS[layout].write(model, tmp_path / layout)
        assert_same(model, ptq.load(tmp_path / layout))
    assert write(model, tmp_path / "half", "awq", engine="transformers") == []
    found = quantized_layers(ptq.load(tmp_path / "half"))
    assert {layer.scale.dtype for layer in found.values()} == {torch.float16}
    assert torch.equal(found[DOWN].scale, model.get_submodule(DOWN).scale.half())


def test_layers_that_stay_float(tmp_path: Path) -> None:
    """Named to each reader in the way that it looks for."""
    model = tiny_llama(tied=True)
    kept = model.model.layers[0].mlp.up_proj
    quantize_linears(model, "w4a16-g32")
    model.model.layers[0].mlp.up_proj = kept
    for layout in ("gptq", "awq"):
        write(model, tmp_path / layout, layout, engine="transformers")
        assert_same(model, ptq.load(tmp_path / layout))
        assert_same(model, read(tmp_path / layout, model=tiny_llama(tied=True, seed=1)))
    gptq, awq = (
        json.loads((tmp_path / d / "config.json").read_text())["quantization_config"]
        for d in ("gptq", "awq")
    )
    name = "model.layers.0.mlp.up_proj"
    assert awq["modules_to_not_convert"] == [name, "lm_head"]
    assert list(gptq["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.up_proj$"]
    assert gptq["block_name_to_quantize"] == "model.layers"
    listed = [entry for part in gptq["modules_in_block_to_quantize"] for entry in part]
    assert len(listed) == 13 and name not in listed


def test_an_encoder_with_biases_and_shards(tmp_path: Path) -> None:
    model = quantize_linears(tiny_bert(), "w4a16-g32")
    write(model, tmp_path / "awq", "awq", engine="transformers", shard_bytes=9000)
    assert len(list((tmp_path / "awq").glob("model-*.safetensors"))) > 2
    assert_same(model, ptq.load(tmp_path / "awq"))
    with pytest.raises(UnsupportedError, match=r"pooler\.dense is not in encoder\.layer.*gptq"):
        write(model, tmp_path / "gptq", "gptq", engine="transformers")


def test_biases_that_the_model_does_not_have(tmp_path: Path) -> None:
    """AutoGPTQ wrote zeros for each layer; others are a part of the layer."""
    model = quantize_linears(tiny_llama(tied=True), "w4a16-g32")
    tensors = by_hand.write(model, tmp_path / "out", "gptq")
    for name in quantized_layers(model):
        rows = model.get_submodule(name).out_features
        tensors[f"{name}.bias"] = torch.zeros(rows, dtype=torch.float16)
    tensors[f"{DOWN}.bias"][3] = 2
    save_file(tensors, tmp_path / "out/model.safetensors")
    loaded = quantized_layers(ptq.load(tmp_path / "out"))
    assert [name for name, layer in loaded.items() if layer.bias is not None] == [DOWN]
    x = torch.randn(2, 64)
    difference = loaded[DOWN](x) - model.get_submodule(DOWN)(x)
    assert torch.allclose(difference, torch.eye(32)[3] * 2, atol=1e-5)
    convert(tmp_path / "out", tmp_path / "b", "ptq")
    assert_same(ptq.load(tmp_path / "out"), ptq.load(tmp_path / "b"))


def test_frequencies_that_older_versions_stored(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(tied=True), "w4a16-g32")
    tensors = by_hand.write(model, tmp_path / "out", "gptq")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "out/model.safetensors")
    assert_same(model, ptq.load(tmp_path / "out"))


def test_rules_of_gptqmodel(tmp_path: Path) -> None:
    """``dynamic``: the first match changes bits and group size of a layer."""
    model = tiny_llama(tied=True)
    quantize_linears(model.model.layers[0], "w8a16-g16")
    quantize_linears(model, "w4a16-g32")
    rules = {
        r"+:.*layers\.1\.": {"bits": 4, "group_size": 32},
        r".*layers\.1": {"bits": 3},
        r"-:.*lm_head": {},
    }
    section: dict[str, Any] = {"bits": 8, "group_size": 16, "sym": True}
    by_hand.write(model, tmp_path / "out", "gptq", dynamic=rules, **section)
    assert_same(model, ptq.load(tmp_path / "out"))
    for wrong, pattern in (
        ({"-:.*layers": {}}, "down_proj is float by the rule '-:.*layers'"),
        ({"(": {}}, r"dynamic: '\(' is not a regular expression"),
        ({"model": {"bits": "4"}}, "down_proj: quantization_config.dynamic has the rule"),
        ({"model": {"bits": 5}}, "down_proj has 5 bits"),
    ):
        edit_config(tmp_path / "out", lambda s, w=wrong: s.update(dynamic=w))
        with pytest.raises(PTQError, match=pattern):
            ptq.load(tmp_path / "out")


def test_nothing_is_overwritten_and_nothing_is_left(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w4a16-g32")
    ptq.save(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "v2", "gptq-v2", engine="transformers")
    before = sorted(tmp_path.rglob("*"))
    for source, target, to, pattern in (
        ("a", "v2", "gptq", "it stays as it is; choose another directory"),
        ("v2", "a", "ptq", "holds a ptq checkpoint already"),
        ("a", "new", "ptq", "is in the ptq format already"),
        ("v2", "new", "gptq-v2", "is in the gptq-v2 format already"),
        ("nowhere", "new", "awq", "no checkpoint at"),
    ):
        with pytest.raises(CheckpointError, match=pattern):
            convert(tmp_path / source, tmp_path / target, to)
    assert sorted(tmp_path.rglob("*")) == before


def test_between_the_formats_of_others(tmp_path: Path) -> None:
    """Codes carry over without ptq's own format in between; the other's description does not."""
    model = quantize_linears(tiny_llama(tied=True), "w4a16-g32-asym")
    by_hand.write(model, tmp_path / "awq", "awq")
    for name in ("quant_config.json", "LICENSE", "model.py"):
        (tmp_path / "awq" / name).write_text(name)
    chain = ("gptq-v2", "compressed-tensors", "gptq", "awq")
    options: dict[str, Any] = {"engine": "transformers", "scales": "keep"}
    source = tmp_path / "awq"
    for number, to in enumerate(chain):
        notes = convert(source, tmp_path / str(number), to, **options)
        assert ("left behind: model.py, quant_config.json" in notes) == (number == 0)
        source = tmp_path / str(number)
    assert (source / "LICENSE").read_text() == "LICENSE"
    assert not (source / "quant_config.json").exists()
    ours, theirs = (load_file(d / "model.safetensors") for d in (source, tmp_path / "awq"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())


def test_a_checkpoint_that_does_not_read_back_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize_linears(tiny_llama(), "w4a16-g32-asym")

    def damaged(directory: Path) -> nn.Module:
        loaded = read(directory)
        loaded.get_submodule(DOWN).zero_point[3, 1] += 1
        return loaded

    writer = importlib.import_module("ptq.checkpoint.packed_int32.write")
    monkeypatch.setattr(writer, "read", damaged)
    with pytest.raises(CheckpointError, match=rf"tensor {DOWN}\.zero_point does not read back"):
        write(model, tmp_path / "out", "awq", engine="transformers")
    assert list(tmp_path.iterdir()) == []


Edit = Callable[[dict[str, Tensor]], object]


def replaced(key: str, change: Callable[[Tensor], Tensor]) -> Edit:
    name = f"{DOWN}.{key}"
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("layout", "edit", "pattern"),
    [
        ("gptq", lambda t: t.pop(f"{DOWN}.qzeros"), r"tensor \S+down_proj\.qzeros.*not in"),
        ("awq", lambda t: t.pop(f"{DOWN}.qweight"), r"tensor \S+down_proj\.qweight.*not in"),
        ("awq", lambda t: t.pop(f"{DOWN}.scales"), r"tensor \S+down_proj\.scales.*not in"),
        ("gptq", lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight.*not in"),
        ("awq", lambda t: t.update({f"{DOWN}.g_idx": torch.zeros(64)}), "g_idx.*no place"),
        ("gptq", replaced("qweight", lambda t: t[1:]), r"qweight is int32 \[7, 32\].*\[8, 32\]"),
        ("gptq", replaced("qweight", lambda t: t.t()), r"qweight is int32 \[32, 8\].*\[8, 32\]"),
        ("awq", replaced("qweight", lambda t: t.float()), r"qweight is float32.*int32 \[64, 4\]"),
        ("awq", replaced("qzeros", lambda t: t.char()), r"qzeros is int8 \[2, 4\].*int32 \[2, 4\]"),
        ("gptq", replaced("scales", lambda t: t[:1]), r"scales is float16 \[1, 32\].*\[2, 32\]"),
        ("gptq", replaced("scales", lambda t: t.int()), r"scales is int32.*float16 or bfloat16"),
        ("gptq", replaced("scales", lambda t: t * torch.nan), f"{DOWN}: scales has values.*finite"),
        ("gptq", replaced("g_idx", lambda t: t[:-1]), r"g_idx is int32 \[63\].*\[64\]"),
        ("gptq", replaced("g_idx", lambda t: t.clamp(max=0)), f"{DOWN}: g_idx does not give each"),
        ("gptq", replaced("g_idx", lambda t: t - 9), f"{DOWN}: g_idx does not give each"),
        (
            "gptq",
            replaced("qzeros", lambda t: t + 1),
            f"{DOWN}: quantization_config says sym, but qzeros",
        ),
        (
            "gptq",
            lambda t: t.update({"model.layers.9.qweight": torch.zeros(4, dtype=torch.int32)}),
            r"codes of a layer model\.layers\.9, which LlamaForCausalLM does not have",
        ),
        (
            "gptq",
            lambda t: t.update({"model.norm.qzeros": torch.zeros(4, dtype=torch.int32)}),
            r"layer model\.norm is a quantized LlamaRMSNorm",
        ),
    ],
)
def test_damage(tmp_path: Path, layout: str, edit: Edit, pattern: str) -> None:
    tensors = by_hand.write(
        quantize_linears(tiny_llama(tied=True), "w4a16-g32"), tmp_path / "out", layout
    )
    ptq.load(tmp_path / "out")
    edit(tensors)
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(PTQError, match=pattern) as caught:
        ptq.load(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_without_g_idx_groups_are_neighbours(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(tied=True), "w4a16-g32")
    tensors = by_hand.write(model, tmp_path / "out", "gptq", desc_act=True)
    kept = {key: t for key, t in tensors.items() if not key.endswith("g_idx")}
    save_file(kept, tmp_path / "out/model.safetensors")
    assert_same(model, ptq.load(tmp_path / "out"))


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    data = json.loads(path.read_text())
    edit(data["quantization_config"])
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("layout", "changed", "pattern"),
    [
        ("gptq", {"bits": 5}, r"layer model\.layers\.0\S+ has 5 bits, gptq with 2, 3, 4, 8"),
        ("awq", {"bits": 8}, r"layer \S+ has 8 bits, awq with 4 is what ptq reads"),
        ("gptq", {"bits": 8}, r"qweight is int32 \[8, 32\].*\[16, 32\]"),
        ("gptq", {"bits": "4"}, r"config\.json: quantization_config\.bits: "),
        ("gptq", {"bits": None}, r"quantization_config\.bits: "),
        ("gptq", {"group_size": 0}, r"layer \S+ has group size 0"),
        ("gptq", {"group_size": -2}, r"layer \S+ has group size -2"),
        ("gptq", {"group_size": 24}, r"layer \S+: its group size 24 does not divide"),
        ("gptq", {"group_size": 16}, r"qzeros is int32 \[2, 4\].*\[4, 4\]"),
        ("gptq", {"dynamic": [1]}, r"quantization_config\.dynamic: "),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin'.*is no layout that ptq reads"),
        ("awq", {"version": "gemv"}, "'gemv'.*is no layout that ptq reads"),
        ("awq", {"version": 7}, "is no layout that ptq reads"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, "says sym, but qzeros"),
    ],
)
def test_configs_that_do_not_fit(
    tmp_path: Path, layout: str, changed: dict[str, Any], pattern: str
) -> None:
    by_hand.write(quantize_linears(tiny_llama(tied=True), "w4a16-g32"), tmp_path / "out", layout)
    edit_config(tmp_path / "out", lambda section: section.update(changed))
    with pytest.raises(PTQError, match=pattern):
        ptq.load(tmp_path / "out")


def test_names_of_older_writers(tmp_path: Path) -> None:
    """AutoAWQ's own w_bit and q_group_size, upper case, no checkpoint_format, a model's class."""
    model = quantize_linears(tiny_llama(tied=True), "w4a16-g32-asym")
    by_hand.write(model, tmp_path / "awq", "awq")
    by_hand.write(model, tmp_path / "gptq", "gptq")
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    edit_config(tmp_path / "awq", lambda section: (section.clear(), section.update(old)))
    edit_config(tmp_path / "gptq", lambda section: section.pop("checkpoint_format"))
    for layout in ("awq", "gptq"):
        assert_same(model, ptq.load(tmp_path / layout))


def test_a_group_longer_than_the_rows(tmp_path: Path) -> None:
    """One group, as -1 says it."""
    model = quantize_linears(tiny_llama(tied=True), half_scales("w4a16"))
    by_hand.write(model, tmp_path / "out", "gptq", group_size=128)
    assert_same(model, ptq.load(tmp_path / "out"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
KEYS = ("quant_method", "bits", "group_size", "sym", "dynamic", "checkpoint_format", "version")


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from(["gptq", "awq"]),
    changed=st.dictionaries(st.sampled_from(KEYS), JSON),
    rule=st.dictionaries(st.sampled_from(["+:.*", "a", "("]), st.dictionaries(st.text(), JSON)),
)
def test_any_section_is_settings_or_an_error(
    method: str, changed: dict[str, Any], rule: dict[str, Any]
) -> None:
    base = {"quant_method": method, "bits": 4, "group_size": 32, "sym": True, "dynamic": rule}
    try:
        found = parse_settings(base | changed, Path("config.json")).of(["a.b"])
    except PTQError as error:
        assert "\n" not in str(error)
    else:
        assert found.bits in (2, 3, 4, 8)
    assert layout_name(base | changed) in (None, "gptq", "gptq-v2", "awq")


def test_nothing_quantized(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "out")
    path = tmp_path / "out/config.json"
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": section}))
    with pytest.raises(CheckpointError, match="holds no tensor qweight"):
        ptq.load(tmp_path / "out")


def test_a_layer_without_a_place(tmp_path: Path) -> None:
    """The model's own shapes decide, not those that the file declares."""
    model = nn.Sequential(nn.Linear(32, 32))
    other = quantize_linears(tiny_llama(tied=True), "w4a16-g32")
    by_hand.write(other, tmp_path / "out", "gptq")
    with pytest.raises(CheckpointError, match="which Sequential does not have"):
        ptq.load(tmp_path / "out", model=model)
    assert isinstance(quant_linear(model[0], preset("w4a16-g32")), QuantLinear)
