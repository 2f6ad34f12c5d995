"""What a run prints: stages, progress bars, results; or nothing; or JSON only."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
Mode = Literal["normal", "quiet", "json"]


@dataclass
class Console:
    """Where a run's words go.

    Args:
        mode: ``normal`` prints to standard output, bars to standard error; ``quiet`` prints
            nothing; ``json`` leaves standard output to the report and prints to standard error.
    """

    mode: Mode = "normal"
    stage_name: str = field(default="start", init=False)
    outcome: str = field(default="nothing half-written stays behind", init=False)

    def stage(self, name: str) -> None:
        """Begin a stage; its name is what an interruption reports."""
        self.stage_name = name
        self.say(f"\n== {name}")

    def say(self, text: object) -> None:
        """Print, unless quiet."""
        if self.mode != "quiet":
            print(text, file=sys.stderr if self.mode == "json" else sys.stdout, flush=True)

    def bar(self, unit: str, total: int | None = None) -> Callable[[Iterable[T]], Iterator[T]]:
        """A wrapper that shows elapsed and remaining time, and the item if it is a name."""

        def wrap(items: Iterable[T]) -> Iterator[T]:
            bar = tqdm(
                items,
                desc=self.stage_name,
                unit=unit,
                total=total,
                file=sys.stderr,
                disable=self.mode == "quiet",
                leave=False,
                dynamic_ncols=True,
            )
            for item in bar:
                if isinstance(item, str):
                    bar.set_postfix_str(item, refresh=False)
                yield item

        return wrap
