"""Runs that stream the float model: the checkpoint is the same, and memory holds one block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
)

import ptq
from ptq.blockwise import Blockwise
from ptq.calibrate import BlockCall, NotAChain, capture
from ptq.config import as_config, preset
from ptq.errors import ConfigError, ModelError, UnsupportedError
from ptq.model import StreamedModel, block_lists
from ptq.modules import quantized_layers
from ptq.pipeline import run
from ptq.recipe import make_recipe
from ptq.report import Console
from tests.helpers import tiny_llama
from tests.tiny import WORDS, tiny_tokenizer

LEARNED = {"name": "learned_rounding", "options": {"iterations": 10, "sequences": 2}}
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": len(WORDS), "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip


def sharded(
    path: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32, blocks: int = 3
) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=blocks, tie_word_embeddings=tied)
    LlamaForCausalLM._from_config(config, dtype=dtype).save_pretrained(path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) > blocks
    return path


def asked(
    model: Path, texts: tuple[Path, Path], output: Path, *, stream: bool = True, **more: Any
) -> dict[str, Any]:
    section = {"data": str(texts[0]), "samples": 6, "sequence_length": 24}
    base = {
        "model": {"id": str(model), "stream": stream},
        "scheme": "w4a16-g16",
        "calibration": section,
        "output": str(output),
    }
    return base | more


def checkpoints(model: Path, texts: tuple[Path, Path], tmp_path: Path, **more: Any) -> list[Path]:
    """The checkpoint without and with streaming."""
    made = [tmp_path / "loaded", tmp_path / "streamed"]
    for path in made:
        config = asked(model, texts, path, stream=path.name == "streamed", **more)
        run(as_config(config), console=Console("quiet"))
    return made


def assert_same_files(a: Path, b: Path) -> None:
    names = {p.name for p in a.iterdir()}
    assert names == {p.name for p in b.iterdir()}
    # These two repeat the configuration, which differs in model.stream and output.dir.
    for name in names - {"ptq_manifest.json", "report.json", "report.html"}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", [["rtn"], ["gptq"], ["awq", "gptq", LEARNED]], ids=str)
def test_the_checkpoint_is_the_same_bit_for_bit(
    recipe: Any, tied: bool, dtype: torch.dtype, tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    model = sharded(tmp_path / "model", tied=tied, dtype=dtype)
    more: dict[str, Any] = {} if tied else {"rules": [{"layers": "lm_head", "scheme": "w8a16"}]}
    assert_same_files(*checkpoints(model, tiny_texts, tmp_path, recipe=recipe, **more))


@pytest.mark.parametrize(
    "more",
    [
        {"recipe": ["gptaq"], "scheme": "w4a8-g16"},
        {"recipe": ["gptq"], "scheme": "w8a8-static"},
        {"recipe": ["gptq"], "rules": [{"layers": "model.layers.1.*", "scheme": "float"}]},
        {"recipe": ["rtn"], "rules": [{"layers": "model.layers.[12].*", "scheme": "float"}]},
        {"recipe": ["rtn"], "tied_embeddings": "untie",
         "rules": [{"layers": "lm_head", "scheme": "w8a16"}]},
        {"recipe": ["gptq"], "embeddings": "w8a16"},
        {"recipe": ["residual_rotation", "gptq"], "tied_embeddings": "untie"},
        {"recipe": ["residual_rotation", "rotation", "gptaq", LEARNED], "scheme": "w8a8-static",
         "tied_embeddings": "untie", "embeddings": "w8a16",
         "rules": [{"layers": "lm_head", "scheme": "w8a16"},
                   {"layers": "model.layers.1.*", "scheme": "float"}]},
        {"recipe": [{"name": "gptq", "options": {"act_order": "permuted"}}]},
    ],
    ids=str,
)  # fmt: skip
def test_other_requests_are_the_same_too(
    more: dict[str, Any], tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    assert_same_files(*checkpoints(sharded(tmp_path / "m"), tiny_texts, tmp_path, **more))


EXPERTS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_hidden_layers=2, num_local_experts=3),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES, num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=2, head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", [["rtn"], ["gptq"]], ids=str)
@pytest.mark.parametrize("family", EXPERTS)
def test_fused_experts_are_the_same_too(
    family: str, recipe: list[str], tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(EXPERTS[family]())
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rules = [{"layers": "*.1.mlp.experts.[01].down_proj", "scheme": "float"}]
    more = {"recipe": recipe, "rules": rules}
    assert_same_files(*checkpoints(tmp_path / "model", tiny_texts, tmp_path, **more))


@pytest.mark.parametrize("recipe", [["rtn"], ["gptq"]], ids=str)
def test_transposed_weights_are_the_same_too(
    recipe: list[str], tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of Conv1D; those that a rule keeps float are written as they were."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=97,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel._from_config(config)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    more = {"recipe": recipe, "rules": [{"layers": "*.0.attn.*", "scheme": "float"}]}
    assert_same_files(*checkpoints(tmp_path / "model", tiny_texts, tmp_path, **more))
    stored = load_file(tmp_path / "loaded" / "model.safetensors")
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(stored[name], model.state_dict()[name])


def float_blocks(model: nn.Module) -> list[str]:
    """The blocks with a linear layer that has float values in memory."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("model.layers.")
    }
    found = {name[: name.index(".", 13)] for name, m in layers.items() if not m.weight.is_meta}
    return sorted(found)


@pytest.mark.parametrize("recipe", [["rtn"], ["gptq"], ["awq", "gptaq", LEARNED]], ids=str)
def test_one_block_at_a_time_is_in_memory(
    recipe: Any, tiny_texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = []
    fill = StreamedModel.fill

    def counted(self: StreamedModel, block: str) -> None:
        waiting = block in self.waiting
        if waiting:
            assert float_blocks(self.model) == [], f"when {block} is filled"
        fill(self, block)
        if waiting:
            filled.append(block)
            assert float_blocks(self.model) == [block]

    monkeypatch.setattr(StreamedModel, "fill", counted)
    model = sharded(tmp_path / "model", blocks=6)
    run(
        as_config(asked(model, tiny_texts, tmp_path / "out", recipe=recipe)),
        console=Console("quiet"),
    )
    assert filled == [f"model.layers.{i}" for i in range(6)]
    assert len(quantized_layers(ptq.load(tmp_path / "out"))) == 6 * 7


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"evaluation": "x.txt"}, "evaluation needs the whole float model; remove that, or"),
        ({"evaluation": "x.txt", "generation": {}}, "evaluation and generation need the whole"),
        ({"recipe": ["gptq", "distill"]}, "distill tunes all blocks together"),
        ({"scheme": "w8a8-static"}, "static activations with recipe"),
    ],
)
def test_what_needs_the_whole_model_is_refused_with_the_plan(
    more: dict[str, Any], message: str, tiny_texts: tuple[Path, Path], tmp_path: Path,
    tiny_model: Path,
) -> None:  # fmt: skip
    config = as_config(asked(tiny_model, tiny_texts, tmp_path / "out", **more))
    with pytest.raises(ConfigError, match=rf"model\.stream: {message}.*set model\.stream: false"):
        run(config, dry_run=True, console=Console("quiet"))


def test_gguf_is_refused_with_the_plan(demo_model: str) -> None:
    config = as_config({"model": {"id": demo_model, "stream": True}, "scheme": "w8a16"})
    with pytest.raises(ConfigError, match="GGUF cannot be streamed; set"):
        run(config, dry_run=True, console=Console("quiet"))


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_a_damaged_late_block_stops_the_run(
    recipe: str, tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    model = sharded(tmp_path / "model")
    name = "model.layers.2.mlp.up_proj.weight"
    shard = next(p for p in sorted(model.glob("*.safetensors")) if name in load_file(p))
    stored = load_file(shard)
    stored[name][3, 5] = torch.nan
    save_file(stored, shard, metadata={"format": "pt"})
    config = as_config(asked(model, tiny_texts, tmp_path / "out", recipe=recipe))
    with pytest.raises(ModelError, match=f"tensor {name} has 1 NaN or Inf"):
        run(config, console=Console("quiet"))
    assert not (tmp_path / "out").exists()


class Pair(nn.Module):
    """A block that returns more than hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x), x


class Wider(Pair):
    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.linear(x), x], -1)


class Chain(nn.Module):
    """Passes hidden states on as they come."""

    def __init__(self, block: type[nn.Module], parallel: bool = False) -> None:
        super().__init__()
        self.parallel = parallel
        self.blocks = nn.ModuleList([block() for _ in range(2)])

    def forward(self, x: Tensor) -> Any:
        if self.parallel:
            return self.blocks[1](self.blocks[0](x) + x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Chain(Pair), "block blocks.0 is no chain: it returns a tuple"),
        (Chain(Wider), r"block blocks.0 is no chain: it returns a tensor of shape \[4, 32\]"),
        (Chain(Pair, parallel=True), "blocks.1 does not read what blocks.0 returns"),
    ],
)
def test_blocks_that_are_no_chain_cannot_be_streamed(model: nn.Module, message: str) -> None:
    schemes = {f"blocks.{i}.linear": preset("w4a16-g16") for i in range(2)}
    config = as_config({"scheme": "w4a16-g16", "recipe": ["gptq"]})
    recipe = make_recipe(config.recipe, config.scheme)
    observer = as_config({"scheme": "w8a8", "calibration": "-"}).calibration.observer
    filled: list[str] = []
    work = Blockwise(model, schemes, recipe, observer, fill=filled.append)
    with pytest.raises(UnsupportedError, match=f"{message}.*set model.stream: false"):
        work.run([torch.randn(4, 16)])
    assert filled in ([], ["blocks.0"])


def test_capture_without_running_any_block() -> None:
    model = tiny_llama()
    (names,) = block_lists(model)
    data = [{"input_ids": torch.arange(8)[None]}]
    for name in names:
        model.get_submodule(name).to("meta")
    stream = capture(model, names, data, run_first=False)
    assert torch.equal(stream.hidden[0], model.model.embed_tokens(data[0]["input_ids"]))
    with pytest.raises(NotAChain, match="comes from blocks without weights"):
        capture(Chain(Pair).to("meta"), ["blocks.0"], [torch.ones(4, 16)], run_first=False)


def test_what_a_block_returns_is_checked() -> None:
    with pytest.raises(NotAChain, match="it returns a tuple, not hidden states"):
        BlockCall((), None, {}).run(Pair(), torch.ones(2, 16))
