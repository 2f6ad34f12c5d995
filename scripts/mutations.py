"""Ways to damage a checkpoint: bytes, JSON values, tensors; the hashes may be put right."""

import copy
import hashlib
import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from ptq.checkpoint.manifest import MANIFEST, canonical_sha256

DEEP = json.loads("[" * 400 + "]" * 400)
NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 8, 64, 2**31, 2**63, -(2**63), 10**30, 1e308,
    float("nan"), float("inf"), "", ".", "..", "../config.json", "/etc/passwd", "a/b", "\x00",
    "\ud800", "x" * 5000, "re:(a+)+$", "re:(", "re:(.*.*.*)*x", "ptq", "gptq", "awq",
    "compressed-tensors", "int8", "int4", "int9", "uint4", "float8_e4m3fn", "F64", "I8", "BF16",
    "float32", "LlamaForCausalLM", "BertModel", "PreTrainedModel", "llama", "gpt2", [], {}, [1],
    [0, 0], [2**40, 2**40], [-1], {"a": 1}, ["re:.*"],
    {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, DEEP,
)  # fmt: skip
FILLS = ("zeros", "ones", "random", "nan")


def damage(root: Path, chance: Random) -> str:
    """Change something below ``root``; returns what, in words."""
    kinds = [damage_bytes, damage_json, damage_json, damage_header, damage_tensor]
    return chance.choice(kinds)(root, chance)


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def damage_bytes(root: Path, chance: Random) -> str:
    """A flip, a cut, a longer file, a copy of another file, or none."""
    path = chance.choice(files_of(root))
    data = bytearray(path.read_bytes())
    kind = chance.choice(("flip", "flip", "cut", "insert", "append", "swap", "remove"))
    place = chance.randrange(len(data)) if data else 0
    if kind == "flip" and data:
        data[place] ^= chance.randrange(1, 256)
    elif kind == "cut":
        del data[place:]
    elif kind == "insert":
        data[place:place] = chance.randbytes(chance.randrange(1, 9))
    elif kind == "append":
        data += chance.randbytes(chance.randrange(1, 99))
    elif kind == "swap":
        data = bytearray(chance.choice(files_of(root)).read_bytes())
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{kind} {path.name} at {place}"


def damage_json(root: Path, chance: Random) -> str:
    """Other values in a JSON file; the hashes are those of the new content, so that they pass."""
    paths = [path for path in files_of(root) if path.suffix == ".json"]
    path = chance.choice(paths)
    data = json.loads(path.read_text())
    said = [change(data, chance) for _ in range(chance.choice((1, 1, 1, 2, 4)))]
    text = json.dumps(data)
    if chance.random() < 0.1:
        text = doubled(text, chance)
    path.write_text(text)
    reseal(root)
    return f"{path.name}: {'; '.join(said)}"


def doubled(text: str, chance: Random) -> str:
    """The JSON object with a key twice."""
    data = json.loads(text)
    key = chance.choice(list(data) or ["a"])
    return f"{{{json.dumps(key)}: {json.dumps(chance.choice(NASTY))}, {text[1:]}"


def change(data: Any, chance: Random) -> str:
    """Change one value somewhere in a JSON value."""
    places = list(walk(data))
    if not places:
        return "nothing"
    holder, key = chance.choice(places)
    kind = chance.choice(("nasty", "nasty", "nasty", "drop", "sibling", "nudge", "rename"))
    if kind == "drop":
        del holder[key]
    elif kind == "sibling":
        other, name = chance.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind == "nudge" and type(holder[key]) is int:
        holder[key] += chance.choice((-1, 1, 2**20))
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}{chance.choice(('', 'x', '.weight'))}"] = holder.pop(key)
    else:
        holder[key] = copy.deepcopy(chance.choice(NASTY))
    return f"{kind} {key}"


def walk(data: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) of a JSON value."""
    found, waiting = [], [data]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        for key in keys:
            found.append((one, key))
            if isinstance(one[key], dict | list) and len(found) < 5000:
                waiting.append(one[key])
    return found


def damage_header(root: Path, chance: Random) -> str:
    """Other values in the header of a weight file, or another length of it."""
    path = chance.choice(sorted(root.glob("*.safetensors")))
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    if chance.random() < 0.2:
        length = chance.choice((0, 1, start, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + raw[8:])
        return f"{path.name}: header of {length} bytes"
    header = json.loads(raw[8:start])
    said = change(header, chance)
    text = json.dumps(header)
    if chance.random() < 0.1:
        text = doubled(text, chance)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[start:])
    return f"header of {path.name}: {said}"


def damage_tensor(root: Path, chance: Random) -> str:
    """Other bytes in one tensor, and the hash of those where there is a manifest."""
    path = chance.choice(sorted(root.glob("*.safetensors")))
    raw = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    key = chance.choice([key for key in header if key != "__metadata__"])
    first, end = (start + offset for offset in header[key]["data_offsets"])
    kind = chance.choice(FILLS)
    size = end - first
    fill = {"zeros": b"\x00" * size, "ones": b"\xff" * size, "random": chance.randbytes(size)}
    nan = {"F32": b"\x00\x00\xc0\x7f", "F16": b"\x00\x7e", "BF16": b"\xc0\x7f"}
    unit = nan.get(header[key]["dtype"], b"\x7f")
    before = hashlib.sha256(raw[first:end]).hexdigest().encode()
    raw[first:end] = fill.get(kind, (unit * size)[:size])
    after = hashlib.sha256(raw[first:end]).hexdigest().encode()
    path.write_bytes(raw[:start].replace(before, after) + raw[start:])
    manifest = root / MANIFEST
    if manifest.is_file():
        data = json.loads(manifest.read_text())
        if key in data["tensors"]:
            data["tensors"][key]["sha256"] = hashlib.sha256(raw[first:end]).hexdigest()
            manifest.write_text(json.dumps(data))
        reseal(root)
    return f"{path.name}: {key} of {kind}"


def reseal(root: Path) -> None:
    """Make the hashes of the manifest those of the files as they are, as an attacker would."""
    path = root / MANIFEST
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_text())
        for name, entry in data["files"].items():
            if (root / name).is_file():
                content = (root / name).read_bytes()
                entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        data["manifest_sha256"] = canonical_sha256(data)
        path.write_text(json.dumps(data))
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return  # too damaged for that
