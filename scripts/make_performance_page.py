#!/usr/bin/env python
"""Write docs/performance.md from the JSON of bench_kernels.py, bench_model.py and bench_compile.py.

Every table names the command and the machine that made it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from arguments import script_parser

from ptq.command import run_command
from ptq.errors import ConfigError
from ptq.report import Console


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    for name in ("kernels", "model", "compile"):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"of bench_{name}.py")
    parser.add_argument("--output", type=Path, default=Path("docs/performance.md"))
    return parser.parse_args(arguments)


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; make it with the benchmark's --json") from None
    if "rows" not in found or "environment" not in found:
        raise ConfigError(f"{path} is not the JSON of a benchmark")
    return found


def machine(document: dict[str, Any]) -> str:
    found = document["environment"]
    return f"{found['processor']}, {found['threads']} threads, torch {found['packages']['torch']}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def kernels(document: dict[str, Any]) -> str:
    """A table for each shape: schemes down, numbers of rows across; for each scheme a line of the
    rule of thumb and one of the fastest kernel, whatever memory it takes."""
    parts = []
    rows = document["rows"]
    for n, k in unique((r["n"], r["k"]) for r in rows):
        here = [r for r in rows if (r["n"], r["k"]) == (n, k)]
        counts = unique(r["m"] for r in here)
        body = []
        for scheme in unique(r["scheme"] for r in here):
            cells = [[r for r in here if (r["scheme"], r["m"]) == (scheme, m)] for m in counts]
            chosen = [next(r for r in cell if r["chosen"]) for cell in cells]
            fastest = [max(cell, key=lambda r: float(r["speed_over_bfloat16"])) for cell in cells]
            body.append([f"`{scheme}`", *map(kernel_cell, chosen)])
            body.append(["fastest", *map(kernel_cell, fastest)])
        parts.append(f"**{n} x {k}**\n\n" + table(["", *(f"M={m}" for m in counts)], body))
    return "\n\n".join(parts)


def kernel_cell(row: dict[str, Any]) -> str:
    return (
        f"{row['speed_over_bfloat16']:.2f} / {row['speed_over_float32']:.2f}<br>"
        f"{row['kernel']} ({row['memory']:.2f})"
    )


def models(document: dict[str, Any]) -> str:
    """Tasks down, schemes across."""
    found = {(r["task"], r["scheme"]): r for r in document["rows"]}
    schemes = unique(s for _, s in found)
    body = [
        [task]
        + [
            " / ".join(
                f"{found[task, s][f'speed_over_{base}']:.2f}" for base in ("bfloat16", "float32")
            )
            for s in schemes
        ]
        for task in unique(t for t, _ in found)
    ]
    return table(["", *(f"`{s}`" for s in schemes)], body)


def compiled(document: dict[str, Any]) -> str:
    body = []
    for row in document["rows"]:
        low, high = row["spread_over_bfloat16"]
        body.append([
            row["model"],
            f"{1e3 / row['milliseconds']:.1f}",
            f"{row['speed_over_bfloat16']:.2f} [{low:.2f}, {high:.2f}]",
            f"{row['speed_over_bfloat16 compiled']:.2f}",
        ])  # fmt: skip
    return table(["", "tokens/s", "over bfloat16 eager", "over bfloat16 compiled"], body)


def page(options: argparse.Namespace) -> str:
    by_kernel, by_model, by_compile = map(read, (options.kernels, options.model, options.compile))
    head = f" --head {by_compile['head']}" if by_compile["head"] else ""
    return f"""# Performance

Made by `scripts/make_performance_page.py` from the JSON of the benchmarks. A figure is the float
layer's or model's time divided by the quantized one's: above 1 is faster than float. Candidates
take turns in one process. `a / b` is against bfloat16 / against float32.

## One layer

Whole forward pass, activation quantization included, bfloat16 activations, cold weights (every call
takes the next of enough copies to exceed the last-level cache). The first line of a scheme is the
kernel that the rule of thumb chooses; `fastest` is the best of all, for `ptq.tune`; in brackets the
memory of the codes and the kernel's own form of them, as a share of the bfloat16 layer.
{machine(by_kernel)}, memory read at {by_kernel["bandwidth"]:.1f} GB/s.

```bash
python scripts/bench_kernels.py --json kernels.json
```

{kernels(by_kernel)}

## A whole model, eager

{by_model["model"]}, batch 1, output head float; decode is one step behind 128 tokens.
{machine(by_model)}.

```bash
python scripts/bench_model.py --seconds 12 --json model.json
```

{models(by_model)}

## Decoding with ptq.compile

The same model through `model.generate`{", output head " + by_compile["head"] if head else ""}.
{machine(by_compile)}.

```bash
python scripts/bench_compile.py{head} --json compile.json
```

{compiled(by_compile)}
"""


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    def write() -> None:
        content = page(options)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(content, encoding="utf-8")

    return run_command(write, Console())


if __name__ == "__main__":
    sys.exit(main())
