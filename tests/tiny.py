"""A tiny model directory with a tokenizer and text, for tests of the whole job."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", *[f"w{i}" for i in range(95)]]


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Splits at spaces; knows the words w0 to w94."""
    model = WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w0"
    )
    if chat:
        made.chat_template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    return made


def tiny_text(words: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, len(WORDS), (words,), generator=generator)
    return " ".join(WORDS[i] for i in ids.tolist())


def tiny_model_directory(path: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """A float Llama of two blocks with its tokenizer, as ``save_pretrained`` writes them."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(WORDS),
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
