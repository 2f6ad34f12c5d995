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
    for name in ("kernels", "compile"):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"of bench_{name}.py")
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="of bench_model.py")
    parser.add_argument("--output", type=Path, default=Path("docs/performance.md"))
    return parser.parse_args(arguments)


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; make it with the benchmark's --json") from None
    if not {"rows", "environment", "command"} <= found.keys():
        raise ConfigError(
            f"{path} is not the JSON of a benchmark, or of an older one; make it anew"
        )
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
    """Models down; tasks, loading and weights across."""
    found = {(r["name"], r["task"]): r for r in document["rows"]}
    bases, tasks = document["bases"], unique(task for _, task in found)
    weights = {m["name"]: m["weight_bytes"] for m in document["models"]}
    body = []
    for model in document["models"]:
        name, seconds = model["name"], model["load_seconds"]
        cells = [
            " / ".join(f"{found[name, task][f'speed_over_{base}']:.2f}" for base in bases)
            + f"<br>{found[name, task]['milliseconds']:.1f} ms"
            for task in tasks
        ]
        share = weights[name] / weights[bases[0]]
        loading = "-" if seconds is None else f"{seconds:.1f}"
        body.append([f"`{name}`", *cells, loading, f"{weights[name] / 1e6:.1f} ({share:.2f})"])
    return table(["", *tasks, "load (s)", "weights (MB)"], body)


def packages(document: dict[str, Any]) -> str:
    """A sentence on the versions of the peers, if there are any."""
    ours = document["environment"]["packages"]
    versions = {
        f"{package} {version}"
        for model in document["models"]
        for package, version in model["packages"].items()
        if ours.get(package) != version
    }
    return f" Peers: {', '.join(sorted(versions))}." if versions else ""


def whole_model(document: dict[str, Any]) -> str:
    """A section: what was measured, the command, the table."""
    tune, peers = document["tune"], packages(document)
    head = f"output head {document['head'] or 'float'}"
    if document["embeddings"]:
        head = f"embeddings, and a head tied to them, {document['embeddings']}"
    bases = " / ".join(document["bases"])
    kernels = "" if tune is None else f" Kernels are those that `ptq.tune(memory={tune})` chose."
    return f"""**{document["model"]}**, {head}; decode is one step behind
{document["decode_after"]} tokens. Against {bases}.{kernels}{peers} {machine(document)}.

```bash
{document["command"]}
```

{models(document)}"""


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
    by_kernel, by_compile = read(options.kernels), read(options.compile)
    sections = "\n\n".join(whole_model(read(path)) for path in options.model)
    head = f", output head {by_compile['head']}" if by_compile["head"] else ""
    return f"""# Performance

Made by `scripts/make_performance_page.py` from the JSON of the benchmarks. A figure is the float
layer's or model's time divided by the quantized one's: above 1 is faster than float. Candidates
take turns. `a / b` is against bfloat16 / against float32.

## One layer

Whole forward pass, activation quantization included, bfloat16 activations, cold weights (every call
takes the next of enough copies to exceed the last-level cache). The first line of a scheme is the
kernel that the rule of thumb chooses; `fastest` is the best of all, for `ptq.tune`; in brackets the
memory of the codes and the kernel's own form of them, as a share of the bfloat16 layer.
`native_int8` and `native_float` are what `ptq build` compiles; without them torch's ops serve.
{machine(by_kernel)}, memory read at {by_kernel["bandwidth"]:.1f} GB/s.

```bash
{by_kernel["command"]}
```

{kernels(by_kernel)}

## Whole models, eager

Batch 1. Loading is from safetensors files that the system has in memory, to a model that can run;
peers quantize the float model as they load it. Weights are all tensors that a model holds after its
turns, the kernels' own forms included, and their share of the first float model's. Peers run in
processes of their own, which are idle between their turns; llama.cpp is a run of `llama-bench`.

{sections}

## Decoding with ptq.compile

{by_compile["model"]} through `model.generate`{head}. {machine(by_compile)}.

```bash
{by_compile["command"]}
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
