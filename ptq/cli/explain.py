"""Say which kernel serves which layer of a checkpoint at which number of rows, and why the faster
ones do not.

With --tune the kernels are measured on this machine first; what is found is remembered, so that
ptq.tune(model) finds it here later.
"""

import argparse
from typing import TYPE_CHECKING

from ptq.command import command_parser, run_command

if TYPE_CHECKING:
    from ptq.report import Console


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog=prog)
    parser.add_argument("checkpoint", metavar="DIR", help="directory of the checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    parser.add_argument("--tune", action="store_true", help="measure the kernels, use the fastest")
    parser.add_argument(
        "--memory",
        type=float,
        default=0.6,
        metavar="SHARE",
        help="with --tune: memory a layer may take, as a share of its bfloat16 weight "
        "(default: 0.6)",
    )
    return parser


def explain(options: argparse.Namespace, console: "Console") -> None:
    import ptq
    from ptq.model import resolve_device

    console.stage("load")
    model = ptq.load(options.checkpoint, device=resolve_device(options.device))
    if options.tune:
        console.stage("tune")
        console.say(ptq.tune(model, memory=options.memory, progress=console.bar("shape")))
    console.stage("explain")
    console.say(ptq.explain(model))


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    from ptq.report import Console

    console = Console()
    return run_command(lambda: explain(options, console), console)
