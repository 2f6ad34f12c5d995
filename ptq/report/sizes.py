"""Bytes before and after, by what happened to the layers."""

from typing import Any

from ptq.planning import Plan

_SUMS = ("modules", "parameters", "bytes_before", "bytes_after")


def sizes(plan: Plan) -> list[dict[str, Any]]:
    """For JSON: a row for each scheme, and one for what stays float, the largest first."""
    rows: dict[str, dict[str, Any]] = {}
    for layer in plan.layers:
        outcome = "float" if layer.scheme is None else str(layer.scheme)
        row = rows.setdefault(
            outcome,
            {
                "outcome": outcome,
                "modules": 0,
                "parameters": 0,
                "bytes_before": 0,
                "bytes_after": 0,
            },
        )
        row["modules"] += 1
        row["parameters"] += layer.parameters
        row["bytes_before"] += layer.bytes_before
        row["bytes_after"] += layer.bytes_after
    return sorted(rows.values(), key=lambda row: -row["bytes_before"])
