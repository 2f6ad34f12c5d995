"""The model card of what ``model.push_to_hub`` uploads.

transformers makes a card of its own after ``save_pretrained``, which has asked the quantizer for
the tensors, and then calls the model's ``_upload_modified_files``. There ptq's card goes in.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils.hub import PushToHubMixin

from ptq.checkpoint.card import CARD, is_own_text
from ptq.checkpoint.card_origin import marked
from ptq.checkpoint.card_sections import FIGURES

_AUTOMATIC = "This model card has been automatically generated."


class CardOnUpload(PushToHubMixin):
    """What takes the place of ``_upload_modified_files`` of a model that is saved.

    Holds texts only, so that the model can be copied, pickled and freed as before.

    Args:
        card: ptq's card of the model.
        name: of the model's class.
    """

    def __init__(self, card: str, name: str):
        self.card = card
        self.name = name

    def __call__(
        self,
        working_dir: str,
        repo_id: str,
        files_timestamps: dict[str, float],
        commit_message: str | None = None,
        **options: Any,
    ) -> Any:
        """Put the card into the directory, and upload what is new there."""
        path = Path(working_dir) / CARD
        path.write_text(chosen(path.read_text(encoding="utf-8"), self.card), encoding="utf-8")
        message = commit_message or f"Upload {self.name}"
        return self._upload_modified_files(
            working_dir, repo_id, files_timestamps, commit_message=message, **options
        )


def chosen(found: str, card: str) -> str:
    """The card to upload.

    Args:
        found: that of the repository, with tags added, or the one that transformers makes for a
            repository without.
        card: ptq's.

    Returns:
        ptq's, with the added tags; but ``found`` where a user wrote or changed it, or where it is
        about the same model and ptq's has no figures.
    """
    theirs, ours = (ModelCard(text, ignore_metadata_errors=True) for text in (found, card))
    added = _tags(theirs) if _AUTOMATIC in found else _added_tags(theirs)
    if added is None or (marked(found) == marked(card) and FIGURES not in card):
        return found
    ours.data["tags"] = list(dict.fromkeys([*_tags(ours), *added]))
    return str(ours)


def _added_tags(card: ModelCard) -> list[str] | None:
    """The tags at the end without which it is a card as ptq wrote it; None if it is none."""
    added: list[str] = []
    tags = _tags(card)
    while True:
        card.data["tags"] = list(tags)
        if is_own_text(str(card)):
            return added
        if not tags:
            return None
        added.insert(0, tags.pop())


def _tags(card: ModelCard) -> list[str]:
    return list(card.data.get("tags") or [])
