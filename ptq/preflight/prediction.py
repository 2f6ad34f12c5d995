"""The prediction as a value, and how far it was from what was measured."""

from dataclasses import dataclass
from typing import Any

from ptq.planning import megabytes
from ptq.preflight.facts import Facts
from ptq.preflight.memory import Stage, memory_stages
from ptq.preflight.rates import Rates
from ptq.preflight.time import time_terms


@dataclass(frozen=True)
class Prediction:
    """What a run will need.

    Args:
        checkpoint_bytes: of the weight files, headers included.
        stages: what each holds in memory.
        times: seconds by what they are spent on; None where time is not predicted.
        elapsed: seconds of the run that are over.
        measuring: seconds that measuring this machine took.
        threads: with one, seconds are of its processor time; with several, of the clock.
        counted: the text is read, or none is needed; else every sequence is taken to be as long as
            the configuration allows, so memory and time are upper ends.
    """

    checkpoint_bytes: int
    stages: tuple[Stage, ...]
    times: dict[str, float] | None
    elapsed: float
    measuring: float
    threads: int = 1
    counted: bool = True

    @property
    def peak(self) -> Stage:
        """The stage that holds most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def seconds(self) -> float | None:
        """Of the whole run, from its start."""
        if self.times is None:
            return None
        return self.elapsed + self.measuring + sum(self.times.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "checkpoint_bytes": self.checkpoint_bytes,
            "peak_memory_bytes": self.peak.total,
            "peak_stage": self.peak.name,
            "memory_bytes": {stage.name: stage.terms for stage in self.stages},
            "seconds": self.seconds,
            "seconds_of": self.times,
            "seconds_before": self.elapsed,
            "seconds_measuring": self.measuring,
            "threads": self.threads,
            "text_counted": self.counted,
        }

    def __str__(self) -> str:
        most = "" if self.counted else "at most "
        lines = [
            f"checkpoint  {megabytes(self.checkpoint_bytes)} of weight files, headers included",
            f"peak memory {most}~{self.peak.total / 1e9:.2f} GB, in '{self.peak.name}': "
            + ", ".join(_largest(self.peak.terms, megabytes)),
        ]
        if self.times is None:
            return "\n".join([*lines, "time        is predicted for a CPU only"])
        assert self.seconds is not None
        terms = _largest(self.times, lambda value: f"{value:.1f} s")
        lines.append(f"time        {most}~{duration(self.seconds)}: {', '.join(terms)}")
        return "\n".join(lines)


def predict(
    facts: Facts,
    checkpoint_bytes: int,
    process: int,
    elapsed: float,
    *,
    rates: Rates | None,
    measuring: float = 0.0,
    threads: int = 1,
) -> Prediction:
    """Predict a run.

    Args:
        process: resident bytes of the process.
        elapsed: seconds that the run has taken, by :func:`ptq.preflight.clock`.
        rates: of this machine; None where the model does not run on its processor.
        measuring: seconds that measuring them took.
        threads: that will run.
    """
    times = None if rates is None else time_terms(facts, rates)
    stages = tuple(memory_stages(facts, process))
    counted = facts.lengths is not None or not facts.calibrates
    return Prediction(checkpoint_bytes, stages, times, elapsed, measuring, threads, counted)


def compared(predicted: dict[str, Any], measured: dict[str, float | int]) -> dict[str, Any]:
    """A prediction beside what was measured, with its error in percent of the measured value.

    Args:
        predicted: of :meth:`Prediction.to_dict`.
        measured: ``checkpoint_bytes``, ``peak_memory_bytes``, ``seconds`` (by the clock) and
            ``cpu_seconds`` (of all threads, and of processes that ended), which a prediction of
            the clock is not compared with.
    """
    pairs = {name: name for name in ("checkpoint_bytes", "peak_memory_bytes", "seconds")}
    if predicted["threads"] == 1:
        pairs["cpu_seconds"] = "seconds"
    errors = {
        name: 100 * (predicted[source] / measured[name] - 1)
        for name, source in pairs.items()
        if predicted[source] is not None and measured.get(name)
    }
    return {**predicted, "measured": measured, "error_percent": errors}


def duration(value: float) -> str:
    """Seconds as text: 48 s, 12 min, 3.5 h."""
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _largest(terms: dict[str, Any], show: Any) -> list[str]:
    """Terms that matter, in their order; what is below 1% of all is one term."""
    total = sum(terms.values())
    shown = {name: value for name, value in terms.items() if value >= 0.01 * total}
    rest = total - sum(shown.values())
    named = [f"{name} {show(value)}" for name, value in shown.items()]
    return [*named, f"rest {show(rest)}"] if rest > 0 else named
