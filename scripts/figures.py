"""How the benchmarks write their figures."""

import json
from pathlib import Path
from typing import Any


def write_figures(path: Path, document: dict[str, Any]) -> None:
    """As JSON."""
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def ratio_cell(row: dict[str, Any]) -> str:
    """A perplexity ratio with its confidence interval."""
    return f"{row['ratio']:.4f} [{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]"


def protocol_line(row: dict[str, Any]) -> str:
    """What perplexities were measured on, as a sentence."""
    protocol = row["protocol"]
    return (
        f"Float perplexity {row['float_perplexity']:.3f} ({protocol['float_dtype']}), "
        f"{protocol['tokens_scored']:,} tokens in {protocol['windows']} windows of "
        f"{protocol['context']}, tokens {protocol['tokens_sha256'][:12]}."
    )
