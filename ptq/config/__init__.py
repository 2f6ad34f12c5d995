"""The configuration: what the user asked, checked and with every default resolved.

:class:`QuantizationConfig` is the whole YAML file. Each section is a pydantic model that rejects
unknown keys; :func:`load_config` turns what pydantic finds into one line per mistake, with the
file, the line and the nearest known key.
"""

from ptq.config.kv_cache import KVCacheConfig, cache_config
from ptq.config.mistakes import make_section
from ptq.config.scheme import ActivationScheme, Rule, Scheme, WeightScheme, preset
from ptq.config.section import Plugin, Section, torch_dtype
from ptq.config.sections import (
    CalibrationConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OutputConfig,
)
from ptq.config.whole import QuantizationConfig, as_config, with_conditions
from ptq.config.yaml_file import load_config

__all__ = [
    "ActivationScheme",
    "CalibrationConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "KVCacheConfig",
    "ModelConfig",
    "OutputConfig",
    "Plugin",
    "QuantizationConfig",
    "Rule",
    "Scheme",
    "Section",
    "WeightScheme",
    "as_config",
    "cache_config",
    "load_config",
    "make_section",
    "preset",
    "torch_dtype",
    "with_conditions",
]
