"""The plan: what will happen to every layer, decided from the config and the shapes alone."""

from ptq.planning.decide import plan
from ptq.planning.rules import matches
from ptq.planning.sizes import megabytes, quantized_bytes
from ptq.planning.whole import LayerPlan, Plan

__all__ = ["LayerPlan", "Plan", "matches", "megabytes", "plan", "quantized_bytes"]
