"""What is written comes back bit for bit."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ptq.checkpoint import (
    CHECKPOINT_FORMATS,
    assert_same,
    load,
    read_manifest,
    save,
    verify_files,
)
from ptq.config import Scheme, as_config
from ptq.errors import CheckpointError, UnsupportedError
from ptq.modules import QuantLinear
from tests.helpers import quant_linear, quantize_linears, tiny_bert, tiny_llama, tiny_tokens

PRESETS = ("w8a16", "w8a8-static", "w4a16-g32", "w4a16-g32-asym", "w3a16-g32-asym")
REFUSED = {
    "gptq": ("w8a16", "w8a8-static", "w3a16-g32-asym"),
    "gptq-v2": ("w8a16", "w8a8-static", "w3a16-g32-asym"),
    "awq": ("w8a16", "w8a8-static", "w3a16-g32-asym"),
}
"""Float32 scales, int8 inputs, and rows that fill no words have no place in these formats."""
STATIC_ASYMMETRIC = Scheme.model_validate(
    {"weights": {"format": "int8"}, "activations": {"mode": "static", "symmetric": False}}
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    """Independent of assert_same: keys, dtypes, shapes, values."""
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype and torch.equal(tensor, right[key]), key


@pytest.mark.parametrize("name", CHECKPOINT_FORMATS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scheme", PRESETS)
def test_llama(tmp_path: Path, name: str, scheme: str, tied: bool) -> None:
    dtype = torch.bfloat16 if tied else torch.float32
    model = quantize_linears(tiny_llama(tied=tied, dtype=dtype), scheme)
    fmt = CHECKPOINT_FORMATS[name]
    if scheme in REFUSED.get(name, ()):
        with pytest.raises(UnsupportedError, match=r"layer model\.layers\.0\."):
            fmt.write(model, tmp_path / "out")
        return
    fmt.write(model, tmp_path / "out")
    loaded = fmt.read(tmp_path / "out")
    assert_equal_states(model, loaded)
    assert_same(model, loaded)
    ids = tiny_tokens()
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert isinstance(loaded, LlamaForCausalLM) and not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("scheme", ["w8a8", STATIC_ASYMMETRIC], ids=str)
def test_bert_with_biases(tmp_path: Path, scheme: str | Scheme) -> None:
    model = quantize_linears(tiny_bert(), scheme)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert_equal_states(model, loaded)
    assert_same(model, loaded)
    ids = tiny_tokens()
    assert torch.equal(model(ids).last_hidden_state, loaded(ids).last_hidden_state)


@pytest.mark.parametrize("config_says_tied", [True, False])
def test_a_quantized_head(tmp_path: Path, config_says_tied: bool) -> None:
    """Once untied, the head is a layer as any other, whatever config.json says."""
    model = quantize_linears(tiny_llama(tied=config_says_tied), "w8a16", head=True)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert isinstance(loaded.lm_head, QuantLinear)
    assert_same(model, loaded)
    assert torch.equal(model(tiny_tokens()).logits, loaded(tiny_tokens()).logits)


def test_dtypes_that_differ_from_the_configs(tmp_path: Path) -> None:
    """A model in bfloat16 with norms in float32, and scales of another dtype."""
    model = quantize_linears(tiny_llama(dtype=torch.bfloat16), "w4a16-g32")
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.weight = nn.Parameter(module.weight.float() + 2**-12)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    dtypes = {str(t.dtype) for t in loaded.state_dict().values()}
    assert dtypes == {"torch.bfloat16", "torch.float32", "torch.float16", "torch.uint8"}
    assert_same(model, loaded)


@pytest.mark.parametrize("shard_bytes", [1, 3000, 20_000])
def test_sharded(tmp_path: Path, shard_bytes: int) -> None:
    model = quantize_linears(tiny_llama(tied=True), "w4a16-g32-asym")
    save(model, tmp_path / "out", shard_bytes=shard_bytes)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (
        len(shards) > 1
        and shards[-1].name == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    )
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    stored = {}
    for shard in shards:
        tensors = load_file(shard)
        assert all(index["weight_map"][key] == shard.name for key in tensors)
        assert tensors
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= shard_bytes
        stored |= tensors
    assert stored.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    assert_same(model, load(tmp_path / "out"))


def test_tied_tensors_are_stored_once_and_bytes_are_as_counted(tmp_path: Path) -> None:
    manifest = save(quantize_linears(tiny_llama(tied=True), "w8a16"), tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert manifest.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in stored and stored.keys() == manifest.tensors.keys()
    assert manifest.total_tensor_bytes == sum(t.nbytes for t in stored.values())


def test_save_load_save_gives_the_same_bytes(tmp_path: Path) -> None:
    config = as_config({"scheme": "w4a16-g32", "rules": [{"layers": "*.mlp.*", "scheme": "float"}]})
    model = quantize_linears(tiny_llama(tied=True, dtype=torch.bfloat16), "w4a16-g32")
    options: dict[str, Any] = {
        "config": config,
        "shard_bytes": 9000,
        "extra_files": {"A.md": "é\n"},
    }
    save(model, tmp_path / "a", **options)
    save(load(tmp_path / "a"), tmp_path / "b", **options)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert (tmp_path / "a/A.md").read_text(encoding="utf-8") == "é\n"


def test_the_model_is_not_changed_by_saving(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a16")
    before = model.config.to_dict()
    save(model, tmp_path / "out")
    assert model.config.to_dict() == before


def test_generation(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a16")
    model.generation_config = GenerationConfig(
        max_new_tokens=3, temperature=0.5, do_sample=False, pad_token_id=0, eos_token_id=[5, 2]
    )
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert loaded.config.quantization_config.to_dict()["quant_method"] == "ptq"
    ids = tiny_tokens()
    arguments = {"attention_mask": torch.ones_like(ids), "temperature": None}
    assert torch.equal(loaded.generate(ids, **arguments), model.generate(ids, **arguments))


def test_config_json(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(dtype=torch.bfloat16), "w8a16")
    model.config.dtype = torch.float32  # out of date: the tensors say otherwise
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (group,) = config["quantization_config"].pop("groups")
    assert Scheme.model_validate(group["scheme"]) == as_config("w8a16").scheme
    assert len(group["layers"]) == 14 and "model.layers.1.mlp.down_proj" in group["layers"]
    assert config["quantization_config"] == {
        "quant_method": "ptq",
        "format_version": 1,
        "aliases": {},
    }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"


def test_a_tokenizer_travels_along(tmp_path: Path) -> None:
    words = {word: i for i, word in enumerate(["<unk>", "one", "two", "three"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool": "{{ tools }}"}
    manifest = save(quantize_linears(tiny_llama(), "w8a16"), tmp_path / "out", tokenizer=tokenizer)
    assert {"tokenizer.json", "additional_chat_templates/tool.jinja"} <= manifest.files.keys()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("one three four").input_ids == [1, 3, 0]
    assert verify_files(tmp_path / "out") == []
    load(tmp_path / "out")


def test_the_manifest_says_what_there_is(tmp_path: Path) -> None:
    config = as_config("w3a16-g32-asym")
    model = quantize_linears(tiny_llama(), "w3a16-g32-asym")
    manifest = save(model, tmp_path / "out", config=config)
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.config == config.model_dump(mode="json")
    layer = manifest.layers["model.layers.1.mlp.down_proj"]
    assert (layer.in_features, layer.out_features, layer.bias) == (64, 32, None)
    assert layer.scheme == config.scheme
    assert manifest.tensors["model.layers.1.mlp.down_proj.codes"].shape == (32, 24)
    assert manifest.versions["torch"] == torch.__version__
    on_disk = set(os.listdir(tmp_path / "out")) - {"model.safetensors", "ptq_manifest.json"}
    assert manifest.files.keys() == on_disk


class Shared(nn.Module):
    """One linear under two names, a weight tied to an embedding, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.again = self.first
        self.embed = nn.Embedding(11, 32)
        self.out = nn.Linear(32, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.again(self.first(self.embed(ids))))


def quantized_shared() -> Shared:
    model = Shared().eval()
    model.first = model.again = quant_linear(model.first, as_config("w4a16-g32").scheme)
    model.steps += 1
    return model


def test_a_plain_module_with_shared_layers(tmp_path: Path) -> None:
    model = quantized_shared()
    save(model, tmp_path / "out")
    skeleton = Shared().train()
    loaded = load(tmp_path / "out", model=skeleton)
    assert loaded is skeleton and not loaded.training
    assert isinstance(loaded.first, QuantLinear) and loaded.first is loaded.again
    assert loaded.out.weight is loaded.embed.weight and loaded.out.weight.requires_grad
    assert loaded.steps == 8 and loaded.empty is not loaded.nothing
    assert_equal_states(model, loaded)
    assert_same(model, loaded)
    assert torch.equal(model(tiny_tokens() % 11), loaded(tiny_tokens() % 11))


class Overlapping(nn.Module):
    """Buffers that begin at the same byte and are not the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 8)
        base = torch.arange(16.0)
        self.register_buffer("whole", base)
        self.register_buffer("part", base[:4])
        self.register_buffer("matrix", base.view(4, 4))
        self.register_buffer("transposed", base.view(4, 4).t())
        self.register_buffer("bits", base.view(torch.int32))


def test_tensors_that_merely_overlap_are_stored_each_by_itself(tmp_path: Path) -> None:
    model = quantize_linears(Overlapping(), "w8a16")
    assert save(model, tmp_path / "out").aliases == {}
    assert_equal_states(model, load(tmp_path / "out", model=Overlapping()))


def test_a_skeleton_on_the_meta_device(tmp_path: Path) -> None:
    model = quantize_linears(nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3)), "w8a8")
    save(model.eval(), tmp_path / "out")
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))
    loaded = load(tmp_path / "out", model=skeleton)
    assert_same(model, loaded)
    x = torch.randn(2, 32)
    assert torch.equal(model(x), loaded(x))


def test_a_plain_module_needs_its_model(tmp_path: Path) -> None:
    save(quantize_linears(nn.Sequential(nn.Linear(32, 8)), "w8a16"), tmp_path / "out")
    assert "config.json" not in os.listdir(tmp_path / "out")
    with pytest.raises(UnsupportedError, match=r"holds a torch.*Sequential.*model="):
        load(tmp_path / "out")


def test_a_failed_load_does_not_touch_the_given_model(tmp_path: Path) -> None:
    save(quantized_shared(), tmp_path / "out")
    shard = tmp_path / "out/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    skeleton = Shared()
    before = {key: value.clone() for key, value in skeleton.state_dict().items()}
    with pytest.raises(CheckpointError):
        load(tmp_path / "out", model=skeleton)
    after = skeleton.state_dict()
    assert type(skeleton.first) is nn.Linear and before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


class OtherLlama(LlamaForCausalLM):
    """A class that transformers does not have."""


def test_a_class_from_elsewhere_is_not_replaced_by_another(tmp_path: Path) -> None:
    llama = tiny_llama()
    model = quantize_linears(OtherLlama._from_config(llama.config).eval(), "w8a16")
    save(model, tmp_path / "out")
    with pytest.raises(UnsupportedError, match=r"OtherLlama.*trust_remote_code.*model="):
        load(tmp_path / "out")
    with torch.device("meta"):
        skeleton = OtherLlama._from_config(llama.config)
    assert_same(model, load(tmp_path / "out", model=skeleton))


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing in this LlamaForCausalLM is quantized"):
        save(tiny_llama(), tmp_path / "out")
    linear = quant_linear(nn.Linear(32, 8), as_config("w8a16").scheme)
    with pytest.raises(CheckpointError, match="single QuantLinear"):
        save(linear, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"tensor 1\.weight has no values"):
        save(nn.Sequential(linear, nn.Linear(8, 8, device="meta")), tmp_path / "out")
    odd = nn.Sequential(linear)
    odd.register_buffer("odd", torch.zeros(2, dtype=torch.uint32))
    with pytest.raises(CheckpointError, match=r"tensor odd is torch\.uint32"):
        save(odd, tmp_path / "out")
    with pytest.raises(CheckpointError, match="shard_bytes is 0"):
        save(nn.Sequential(linear), tmp_path / "out", shard_bytes=0)
    for name in ("../x", "a/b", "ptq_manifest.json", "model.safetensors", ""):
        with pytest.raises(CheckpointError, match="extra file"):
            save(nn.Sequential(linear), tmp_path / "out", extra_files={name: ""})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        save(
            quantize_linears(tiny_llama(), "w8a16"),
            tmp_path / "out",
            extra_files={"config.json": ""},
        )
    assert os.listdir(tmp_path) == []


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    save(quantize_linears(nn.Sequential(nn.Linear(32, 8)), "w8a16"), tmp_path / "out")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(CheckpointError, match=f"device '{device}' cannot be used"):
            load(tmp_path / "out", device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_on_cuda(tmp_path: Path, tied: bool) -> None:
    model = quantize_linears(tiny_llama(tied=tied), "w4a16-g32-asym")
    save(model.to("cuda"), tmp_path / "a")
    loaded = load(tmp_path / "a", device="cuda")
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    assert_same(model, loaded)
    assert_same(model, load(tmp_path / "a"))
    save(model.to("cpu"), tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save(quantize_linears(tiny_llama(), "w8a16"), tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {
        ".json",
        ".safetensors",
        ".md",
    }


def test_without_ptq_transformers_does_not_take_codes_for_weights(tmp_path: Path) -> None:
    """No stored name of a quantized layer is one that nn.Linear would load."""
    manifest = save(quantize_linears(tiny_llama(), "w8a16"), tmp_path / "out")
    names = {f"{layer}.weight" for layer in manifest.layers}
    assert not names & manifest.tensors.keys()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").quantization_config
