"""Search a scheme for each layer under a budget; write the recipe that `ptq quantize` runs.

The recipe's rules pin layers, its recipe finds the codes, its calibration section is the text that
sensitivities are predicted on, and its evaluation section the text that the result is measured on.
"""

import argparse
import json
from typing import TYPE_CHECKING

from ptq.command import command_parser, output_file, positive, run_command

if TYPE_CHECKING:
    from ptq.report import Console


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog=prog)
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a key of the recipe; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--budget", action="append", required=True,
        help='"90 MB", "as small as w4a16-g64", "4.5 bits", "1%% perplexity", "2.5 ms", "as fast '
        'as w8a8"; several hold together',
    )  # fmt: skip
    parser.add_argument(
        "--output", required=True, type=output_file, metavar="FILE", help="the YAML to write"
    )
    parser.add_argument(
        "--schemes", nargs="+", default=[], help="candidates (default: by the recipe's scheme)"
    )
    parser.add_argument(
        "--ends", nargs="+", metavar="SCHEME",
        help="candidates for the embedding and the output head (default: float and w8a16 where "
        "budgets are of the whole checkpoint; --ends float keeps them)",
    )  # fmt: skip
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="SCHEME", help="uniform schemes to measure too"
    )
    parser.add_argument(
        "--no-fuse", action="store_true", help="q, k, v (gate, up) may get different schemes"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not measure the result")
    parser.add_argument(
        "--rows", type=positive, default=1, help="tokens in a call, for time (default: 1)"
    )
    parser.add_argument(
        "--draws", type=positive, default=4, help="backward passes for each sequence (default: 4)"
    )
    parser.add_argument(
        "--trials",
        type=positive,
        default=5,
        help="configurations measured, at most, besides uniform ones (default: 5)",
    )  # fmt: skip
    parser.add_argument(
        "--sensitivity", type=output_file, metavar="FILE",
        help="keeps the predictions for the next budget: read if it is there, else written",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=output_file, metavar="FILE",
        help="write the curve and all figures here; as search.json beside report.json, the page "
        "of the report draws it",
    )  # fmt: skip
    return parser


def search(options: argparse.Namespace, console: "Console") -> None:
    import ptq
    from ptq.config import load_config
    from ptq.errors import ConfigError
    from ptq.model import ModelSource, load_model, load_tokenizer

    config = load_config(options.config, options.overrides)
    if config.model is None:
        raise ConfigError("key 'model' is required: a hub id, a directory or a .gguf file")
    console.stage("load")
    source = ModelSource.resolve(config.model)
    model, tokenizer = load_model(source), load_tokenizer(source)
    found = ptq.search(
        model,
        options.budget,
        config=config,
        tokenizer=tokenizer,
        schemes=options.schemes,
        ends=options.ends,
        fuse=not options.no_fuse,
        rows=options.rows,
        draws=options.draws,
        trials=options.trials,
        verify=not options.no_verify,
        against=options.against,
        sensitivity=options.sensitivity,
        console=console,
    )
    found.save(options.output)
    if options.json:
        options.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    console.stage("done")
    console.say(found)
    console.say(f"written    {options.output}: ptq quantize --config {options.output}")


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    from ptq.report import Console

    console = Console()
    return run_command(lambda: search(options, console), console)
