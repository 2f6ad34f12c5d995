"""The compiled step of decoding: masks and the kind of attention."""

from types import SimpleNamespace

import pytest
import torch

from ptq.compilation.step import CompiledStep, additive
from tests.helpers import tiny_llama, tiny_tokens


def test_a_mask_of_booleans_becomes_one_to_add() -> None:
    mask = torch.tensor([[[[True, False, True]]]])
    least = torch.finfo(torch.bfloat16).min
    found = additive({"full_attention": mask, "none": None}, torch.bfloat16)
    assert found["full_attention"].tolist() == [[[[0.0, least, 0.0]]]]
    assert found["full_attention"].dtype == torch.bfloat16
    assert found["none"] is None
    flat = torch.ones(1, 3, dtype=torch.int64)  # of tokens: the model makes its own of it
    assert additive(flat, torch.float32) is flat


def test_the_kind_of_attention_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    seen = []

    def step(**_: object) -> object:
        seen.append(model.config._attn_implementation)
        raise ValueError("stop")

    compiled = CompiledStep(model, 1)
    monkeypatch.setattr(compiled, "_compiled", step)
    monkeypatch.setattr(compiled, "_stale", lambda: False)
    with pytest.raises(ValueError, match="stop"):
        compiled(input_ids=tiny_tokens(1, 1))
    assert seen == ["eager"]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_composite_and_plain_models_keep_their_attention(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"text_config": object} if kind == "sdpa" else {}
    config = SimpleNamespace(sub_configs=parts, _attn_implementation=kind)
    compiled = CompiledStep(SimpleNamespace(device=torch.device("cpu"), config=config), 1)
    monkeypatch.setattr(compiled, "_compiled", lambda **_: config._attn_implementation)
    monkeypatch.setattr(compiled, "_stale", lambda: False)
    assert compiled(input_ids=None) == kind
