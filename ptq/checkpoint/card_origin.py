"""What a new card takes over from the one that a model came with.

Figures are of certain tensors, run in a certain way. A card of ptq has the model's identity in a
comment, so that they are taken over for the very same model and for no other.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn

from ptq.checkpoint.account import layer_entries
from ptq.checkpoint.card_sections import FIGURES, RECIPE
from ptq.checkpoint.hashing import tensor_sha256
from ptq.checkpoint.manifest import identity
from ptq.checkpoint.tensors import distinct_tensors

_MARK = re.compile(r"<!-- model: ([0-9a-f]{64}) -->")
_MAX_BYTES = 1_000_000  # of a card


@dataclass(frozen=True)
class Origin:
    """A card of ptq, taken apart; texts are empty where it says nothing."""

    text: str
    layout: str
    base: str | None
    licence: str | None
    recipe: str
    figures: str


def model_identity(model: nn.Module) -> str:
    """The identity of a model in memory, as a manifest of it has it."""
    tensors, _ = distinct_tensors(model)
    hashes = {key: tensor_sha256(tensor) for key, tensor in tensors.items()}
    return identity(layer_entries(model), hashes)


def identity_mark(whose: str) -> str:
    """How a card says whose it is."""
    return f"<!-- model: {whose} -->"


def marked(text: str) -> str | None:
    """The identity of the model that a card is about; None if it does not say."""
    found = _MARK.findall(text)
    return found[-1] if found else None


def origin_of(path: Path, whose: str) -> Origin | None:
    """The card at a path, if there is one of ptq that is about this model."""
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if marked(text) != whose:
        return None
    data = ModelCard(text, ignore_metadata_errors=True).data
    base = re.search(r"^Made from `([^`]+)`", text, re.MULTILINE)
    layout = re.search(r"^The files are in the (\S+) format", text, re.MULTILINE)
    return Origin(
        text=text,
        layout="ptq" if layout is None else layout[1],
        base=data.get("base_model") or (None if base is None else base[1]),
        licence=data.get("license"),
        recipe=_section(text, RECIPE),
        figures=_section(text, FIGURES),
    )


def _section(text: str, heading: str) -> str:
    """From its heading to the next one, or to the last line of a card."""
    found = re.search(rf"^{heading}$.*?(?=\n\n(?:## |Made with ))", text, re.MULTILINE | re.DOTALL)
    return found[0] if found else ""
