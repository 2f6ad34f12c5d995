"""Checkpoints that were made to do harm: an error of one line, soon, in little memory, and nothing
is run or fetched. Hashes do not help here: whoever makes such a checkpoint writes them as well."""

import json
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mutations
import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

import ptq
from ptq.checkpoint import convert, save
from ptq.checkpoint.json_file import json_object
from ptq.checkpoint.patterns import matches
from ptq.errors import CheckpointError, PTQError
from tests.helpers import quantize_linears, tiny_llama

UP = "model.layers.0.mlp.up_proj"
SECONDS, MEMORY = 5, 1_000_000_000
Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """Processor time and addresses: far above what a refusal takes, far below what it avoids."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def stop(*_: object) -> None:
        raise RuntimeError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)


@pytest.fixture
def native(tmp_path: Path) -> Path:
    save(quantize_linears(tiny_llama(), "w4a16-g32-asym"), tmp_path / "out", shard_bytes=30_000)
    return tmp_path / "out"


def edit_json(root: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((root / name).read_text())
    edit(data)
    (root / name).write_text(json.dumps(data))
    mutations.reseal(root)


def edit_text(root: Path, name: str, edit: Callable[[str], str]) -> None:
    (root / name).write_text(edit((root / name).read_text()))
    mutations.reseal(root)


def edit_header(root: Path, edit: Callable[[bytes], bytes]) -> None:
    """Of the first weight file; the length is put right."""
    path = min(root.glob("*.safetensors"))
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = edit(raw[8:start])
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[start:])


def with_length(length: int) -> Damage:
    def damage(root: Path) -> None:
        path = min(root.glob("*.safetensors"))
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    return damage


def set_config(**values: Any) -> Damage:
    return lambda root: edit_json(root, "config.json", lambda data: data.update(values))


def in_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the entry of the first tensor."""

    def edit(text: bytes) -> bytes:
        header = json.loads(text)
        change(header[next(key for key in header if key != "__metadata__")])
        return json.dumps(header).encode()

    return lambda root: edit_header(root, edit)


class Evil:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def pickled(root: Path) -> None:
    for path in root.glob("*.safetensors"):
        path.write_bytes(pickle.dumps(Evil(root / "trace")))


def twice(name: str) -> Damage:
    return lambda root: edit_text(root, name, lambda text: '{"x": 1, "x": 2,' + text.lstrip()[1:])


FILES: dict[str, tuple[Damage, str]] = {
    "header longer than the file": (with_length(2**40), "header is said to have"),
    "header of 2^63": (with_length(2**63), "header is said to have"),
    "no header": (with_length(0), "not a whole safetensors file"),
    "pickle": (pickled, "not a whole safetensors file|is not"),
    "huge shape": (in_header(lambda e: e.update(shape=[2**40, 2**40])), "do not hold|differ"),
    "huge offsets": (in_header(lambda e: e.update(data_offsets=[0, 2**62])), "do not hold|starts"),
    "negative offset": (in_header(lambda e: e.update(data_offsets=[-8, 8])), "starts at -8"),
    "overlap": (in_header(lambda e: e.update(data_offsets=[1, 2])), "starts at"),
    "offsets that are none": (in_header(lambda e: e.update(data_offsets=[])), "safetensors file"),
    "shape of text": (in_header(lambda e: e.update(shape="ab")), "safetensors file"),
    "unknown dtype": (in_header(lambda e: e.update(dtype="F4")), "unknown dtype"),
    "deep header": (lambda r: edit_header(r, lambda t: b'{"a":' + b"[" * 99_999), "safetensors"),
    "a key twice": (
        lambda root: edit_header(root, lambda text: b'{"a": 1, "a": 1,' + text[1:]),
        "the key 'a' is there 2 times",
    ),
    "a header that is no text": (lambda r: edit_header(r, lambda t: b"\xff" + t), "safetensors"),
    "a huge number": (
        lambda root: edit_header(root, lambda text: b'{"a":' + b"9" * 99_999 + b"}"),
        "safetensors file",
    ),
    "config twice": (twice("config.json"), "the key 'x' is there 2 times"),
    "index twice": (twice("model.safetensors.index.json"), "the key 'x' is there 2 times"),
    "index of a list": (
        lambda root: edit_json(
            root, "model.safetensors.index.json", lambda d: d["weight_map"].update(a=["b"])
        ),
        "names the file|unhashable|expected str",
    ),
}
"""What is wrong in a file, and a word of the error; transformers may find it first."""
FROM_TRANSFORMERS = (SafetensorError, OSError, TypeError, ValueError)


@pytest.mark.parametrize("what", FILES)
def test_files(native: Path, what: str) -> None:
    damage, pattern = FILES[what]
    damage(native)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        ptq.load(native, verify=False)
    assert "\n" not in str(caught.value)
    with pytest.raises((CheckpointError, *FROM_TRANSFORMERS)):
        AutoModelForCausalLM.from_pretrained(native)
    assert not (native / "trace").exists()


CONFIGS: dict[str, tuple[Damage, str]] = {
    "a billion blocks": (set_config(num_hidden_layers=10**9), "describes a model of more than"),
    "a huge width": (set_config(hidden_size=2**62), "no model can be built|cannot be used"),
    "a width of 10^30": (set_config(hidden_size=10**30), "no model can be built|cannot be used"),
    "a vocabulary of 2^40": (set_config(vocab_size=2**40), "but the model needs"),
    "no heads": (set_config(num_attention_heads=0), "cannot be used|no model can be built"),
    "text for a number": (set_config(hidden_size="x"), "cannot be used"),
    "no such class": (set_config(architectures=["Evil"]), "does not have"),
    "a class that is no model": (set_config(architectures=["AutoTokenizer"]), "does not have"),
    "no name of a class": (set_config(architectures=[7]), "does not have"),
    "nested": (
        lambda root: edit_text(
            root, "config.json", lambda t: '{"a":' + "[" * 200 + "]" * 200 + "}"
        ),
        "nested more than 100 deep",
    ),
    "half a character": (set_config(a="\ud800"), "surrogates not allowed"),
}


@pytest.mark.parametrize("what", CONFIGS)
@pytest.mark.parametrize("kind", ["ptq", "compressed-tensors", "gptq-v2", "awq"])
def test_configs(native: Path, what: str, kind: str) -> None:
    root = native
    if kind != "ptq":
        root = native.with_name(kind)
        convert(native, root, kind, engine="transformers")
    damage, pattern = CONFIGS[what]
    damage(root)
    with pytest.raises(PTQError, match=pattern) as caught:
        ptq.load(root)
    assert "\n" not in str(caught.value)


EVIL = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["ptq", "awq"])
def test_code_that_comes_along_is_not_run(native: Path, kind: str, known: bool) -> None:
    """Nor is anybody asked at the terminal whether it may; a known type is transformers' own."""
    root = native
    if kind == "awq":
        root = native.with_name(kind)
        convert(native, root, kind, engine="transformers")
    (root / "evil.py").write_text(f"import os; os.mkdir({str(root / 'trace')!r})\n")
    set_config(auto_map=EVIL, **({} if known else {"model_type": "evil"}))(root)
    if known:
        assert type(ptq.load(root)).__module__.startswith("transformers.")
    else:
        with pytest.raises(CheckpointError, match="cannot be used: The .* custom code"):
            ptq.load(root)
    assert not (root / "trace").exists() and "evil" not in sys.modules


def test_a_pickle_beside_a_config(native: Path) -> None:
    """from_pretrained would take it where there are no safetensors files."""
    for path in (*native.glob("*.safetensors"), native / "model.safetensors.index.json"):
        path.unlink()
    torch.save({"a": Evil(native / "trace")}, native / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        ptq.load(native)
    with pytest.raises(Exception) as caught:
        AutoModelForCausalLM.from_pretrained(native)
    assert not isinstance(caught.value, RuntimeError) or "took more" not in str(caught.value)
    assert not (native / "trace").exists()


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "sub/evil.safetensors", "{}/evil.safetensors"]
)
def test_an_index_that_leads_elsewhere(native: Path, name: str) -> None:
    """transformers joins what it says to the directory."""
    first = min(native.glob("*.safetensors"))
    name = name.format(native.parent)
    target = native / name
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(first.read_bytes())

    def lead(index: dict[str, Any]) -> None:
        for key, file in index["weight_map"].items():
            if file == first.name:
                index["weight_map"][key] = name

    edit_json(native, "model.safetensors.index.json", lead)
    with pytest.raises(CheckpointError, match="names weight files in several directories"):
        AutoModelForCausalLM.from_pretrained(native)
    with pytest.raises(CheckpointError, match="names the file"):
        ptq.load(native)


def test_an_index_of_which_all_leads_elsewhere(native: Path) -> None:
    away = native.parent / "away"
    away.mkdir()
    for path in native.glob("*.safetensors"):
        path.rename(away / path.name)
    edit_json(
        native,
        "model.safetensors.index.json",
        lambda d: d.update(weight_map={k: f"../away/{v}" for k, v in d["weight_map"].items()}),
    )
    with pytest.raises(CheckpointError, match="leads out of its directory"):
        AutoModelForCausalLM.from_pretrained(native)


def values(key: str, fill: Callable[[torch.Tensor], object]) -> Callable[[nn.Module], None]:
    return lambda model: fill(model.get_submodule(UP)._buffers[key].view(-1)[:1])


STATIC = {"weights": {"format": "int8"}, "activations": {"mode": "static", "symmetric": False}}
NUMBERS: dict[str, tuple[Any, Callable[[nn.Module], None], str]] = {
    "NaN scale": ("w8a8", values("scale", lambda t: t.fill_(torch.nan)), "scale .*NaN or inf"),
    "infinite scale": ("w8a8", values("scale", lambda t: t.fill_(torch.inf)), "scale .*NaN or inf"),
    "zero scale": ("w8a8", values("scale", lambda t: t.zero_()), "scale .*zero"),
    "negative scale": ("w8a8", values("scale", lambda t: t.neg_()), "scale .*negative"),
    "zero point": ("w4a16-g32-asym", values("zero_point", lambda t: t.fill_(9)), "zero_point .*-8"),
    "NaN code": ("fp8", values("codes", lambda t: t.fill_(127)), "codes .*NaN"),
    "input scale": ("w8a8-static", values("input_scale", lambda t: t.fill_(torch.nan)), "input_sc"),
    "input zero point": (
        STATIC,
        values("input_zero_point", lambda t: t.fill_(128)),
        "input_zero_point .*-128 to 127",
    ),
}
"""Numbers that mean nothing, in a checkpoint whose hashes are right."""


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers(tmp_path: Path, what: str) -> None:
    scheme, spoil, pattern = NUMBERS[what]
    if scheme == "w8a8-static-asym":
        scheme = {
            "weights": {"format": "int8"},
            "activations": {"mode": "static", "symmetric": False},
        }
    model = tiny_llama()
    data = [torch.arange(16).reshape(1, 16)]
    ptq.quantize(model, {"scheme": scheme}, calibration=data)
    spoil(model)
    save(model, tmp_path / "out")
    for read in (ptq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=rf"tensor {UP}\.{pattern}"):
            read(tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"does not load in a fresh process: .*{UP}"):
        save(model, tmp_path / "new", verify="process")


def test_a_signed_scale_is_no_damage(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w4a16-g32")
    assert bool((model.get_submodule(UP).scale < 0).any())
    save(model, tmp_path / "out")
    ptq.load(tmp_path / "out")


SLOW = r"(a|aa)*[^ab]"
"""Takes years for 64 letters a and a b, in Python's re and in the package regex."""
EXPRESSIONS = [r"(.|..|...)*[^j]$", "(a+)+$", "((a{1,99}){1,99}){1,99}$", "(" * 5000, "[", "(?P<a"]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda text: text[:24])
@pytest.mark.parametrize("kind", ["compressed-tensors", "gptq-v2"])
def test_expressions_in_a_config(native: Path, kind: str, expression: str) -> None:
    """They end, one way or the other; what is none is an error."""
    root = native.with_name(kind)
    convert(native, root, kind, engine="transformers")

    def edit(config: dict[str, Any]) -> None:
        section = config["quantization_config"]
        if kind == "gptq-v2":
            section["dynamic"] = {expression: {"bits": 4}}
        else:
            section["config_groups"]["group_0"]["targets"] = [f"re:{expression}"]

    edit_json(root, "config.json", edit)
    if kind == "gptq-v2" and expression in ("(a+)+$", "((a{1,99}){1,99}){1,99}$"):
        ptq.load(root)  # a rule for no layer
        return
    with pytest.raises(CheckpointError):
        ptq.load(root)


def test_an_expression_that_takes_for_ever() -> None:
    assert matches(r"model\.layers\.\d+\..*up_proj$", UP, "x") and not matches("down", UP, "x")
    with pytest.raises(CheckpointError, match="x: the regular expression .* takes too long"):
        matches(SLOW, "a" * 64 + "b", "x")


@pytest.mark.parametrize(
    "text", ['{"a":' + "[" * 101 + "]" * 101 + "}", '{"a": "\\ud800"}', '{"a": 1, "a": 1}', "7"]
)
def test_json_that_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        json_object(text, tmp_path)


def test_json_of_too_many_values(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="more than 10,000,000 values"):
        json_object('{"a": [' + "[]," * 10_000_000 + "[]]}", tmp_path)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "config.json").symlink_to(tmp_path / "large")
    with pytest.raises(CheckpointError, match="no JSON file of a model is that large"):
        ptq.load(tmp_path)


def test_a_file_with_holes(native: Path) -> None:
    """A terabyte costs whoever writes it nothing; it is not believed, and not read."""
    path = min(native.glob("*.safetensors"))
    header = json.dumps({"a": {"dtype": "I8", "shape": [2**40], "data_offsets": [0, 2**40]}})
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + 2**40)
    for read in (ptq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises((CheckpointError, *FROM_TRANSFORMERS)):
            read(native)
