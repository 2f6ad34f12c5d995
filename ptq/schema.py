"""The JSON schema of the YAML config, with which editors complete, explain and check it.

pydantic makes it from the config's models; what they leave to the plugins (which steps and
observers there are, and the options of each) comes from the registries, and what their validators
check across keys is said again as JSON schema's conditions. Not said, because it cannot be or
depends on the model: the order of a recipe's steps, whether a regular expression compiles, and
everything that the plan checks.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ptq.algorithms import ALGORITHMS, NoOptions
from ptq.config import QuantizationConfig
from ptq.formats import FLOAT8
from ptq.observers import OBSERVERS
from ptq.presets import PRESETS, WEIGHT_ONLY_PATTERN
from ptq.refine import FINISHES, REFINEMENTS
from ptq.transforms import PREPARATIONS, TRANSFORMS

Schema = dict[str, Any]

STEPS = {
    "residual_rotation": "preparation: the residual stream rotated, merged into the weights",
    "smoothquant": "transform: moves outliers of the activations into the weights",
    "awq": "transform: protects the weights of large inputs",
    "equalize": "transform: one range for what a layer gives and what its reader takes",
    "rotation": "transform, the last one: mixes channels by a Hadamard matrix where that helps",
    "rtn": "algorithm: nearest code; needs no data",
    "hqq": "algorithm: half-quadratic, few weights far off; needs no data",
    "gptq": "algorithm: each column's error is made up for by the next ones",
    "gptaq": "algorithm: as gptq, and the error of the layers before is made up for too",
    "learned_rounding": "refinement: gradient descent on the rounding and scales of a block",
    "bias_correction": "refinement: the mean error of each layer's output goes into its bias",
    "distill": "finish: scales and norms tuned towards the float model's predictions",
    "auto": "what measured best for the scheme",
}
"""What each step of a recipe does."""
OBSERVED = {
    "minmax": "the extremes: nothing saturates",
    "moving_average": "the extremes of the batches, averaged",
    "percentile": "the outermost values are cut off",
    "mse": "the range of the least error",
    "entropy": "the range of the least Kullback-Leibler divergence",
}
"""What range each observer takes."""


def config_schema() -> Schema:
    """The schema of a whole config file, in JSON Schema 2020-12.

    Every key has a title and a description; a test holds docs/ptq.schema.json equal to it.
    """
    schema = QuantizationConfig.model_json_schema()
    parts = schema["$defs"]
    del parts["Plugin"]
    steps = {name: made.options for name, made in _steps().items()}
    step = _plugin(steps, STEPS, parts)
    observer = _plugin({name: made.Options for name, made in OBSERVERS.items()}, OBSERVED, parts)
    _replace(schema, "recipe", {"anyOf": [step, {"type": "array", "items": step}]})
    _replace(parts["CalibrationConfig"], "observer", observer)
    parts["WeightScheme"]["allOf"] = _weight_rules()
    parts["ActivationScheme"]["allOf"] = [
        _if({"format": {"const": FLOAT8.name}}, {"mode": _no("static"), "symmetric": _no(False)})
    ]
    parts["Scheme"]["allOf"] = _scheme_rules()
    parts["KVCacheConfig"]["allOf"] = [_cache_rule()]
    _replace(parts["Scheme"], "input_rotation", {"type": "null"})
    weight_only = {
        "allOf": [{"$ref": "#/$defs/Scheme"}, {"properties": {"activations": {"const": None}}}]
    }
    names = {"type": "string", "pattern": WEIGHT_ONLY_PATTERN, "examples": _weight_only()}
    kinds = [weight_only, names, {"const": "float"}, {"type": "null"}]
    _replace(schema, "embeddings", {"anyOf": kinds})
    for section in (schema, *parts.values()):
        for key, value in section.get("properties", {}).items():
            value.setdefault("title", key.replace("_", " ").title())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "ptq"}


def _steps() -> Mapping[str, Any]:
    auto = type("Auto", (), {"options": NoOptions})
    return {**PREPARATIONS, **TRANSFORMS, **ALGORITHMS, **REFINEMENTS, **FINISHES, "auto": auto}


def _weight_only() -> list[str]:
    return [name for name in PRESETS if "a16" in name]


def _replace(section: Schema, key: str, kinds: Schema) -> None:
    """Say what a key may be; its title, description and default stay."""
    old = section["properties"][key]
    kept = {
        word: old[word] for word in ("title", "description", "default", "examples") if word in old
    }
    section["properties"][key] = {**kept, **kinds}


def _plugin(
    options: Mapping[str, type[BaseModel]], says: Mapping[str, str], parts: Schema
) -> Schema:
    """A name, or a name and its own options; the models of the options become ``parts``."""
    kinds: list[Schema] = [{"enum": list(options), "enumDescriptions": [says[n] for n in options]}]
    for name, model in options.items():
        parts[model.__name__] = model.model_json_schema()
        kinds.append(
            {
                "type": "object",
                "title": name,
                "description": says[name],
                "properties": {
                    "name": {"const": name, "title": "Name", "description": says[name]},
                    "options": {
                        "title": "Options",
                        "description": f"of {name}",
                        "$ref": f"#/$defs/{model.__name__}",
                    },
                },
                "required": ["name"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": kinds}


def _if(given: Schema, then: Schema, otherwise: Schema | None = None) -> Schema:
    """Where these keys are given and have these values, those have these."""
    rule = {"if": {"properties": given, "required": list(given)}, "then": {"properties": then}}
    return rule if otherwise is None else {**rule, "else": {"properties": otherwise}}


def _no(value: Any) -> Schema:
    return {"not": {"const": value}}


def _weight_rules() -> list[Schema]:
    grouped = _if({"granularity": {"const": "group"}}, {"group_size": {"type": "integer"}})
    grouped["then"]["required"] = ["group_size"]
    return [
        grouped,
        _if({"group_size": {"type": "integer"}}, {"granularity": {"const": "group"}}),
        _if({"symmetric": {"const": False}}, {"signed_scale": _no(True)}),
        _if(
            {"format": {"const": FLOAT8.name}}, {"symmetric": _no(False), "signed_scale": _no(True)}
        ),
    ]


def _cache_rule() -> Schema:
    """Static scales have no groups, dynamic ones are of tokens."""
    axes, sizes = ("keys", "values"), ("key_group_size", "value_group_size")
    static = {**{key: _no("token") for key in axes}, **{key: {"type": "null"} for key in sizes}}
    dynamic = {key: {"enum": ["token", "channel"]} for key in axes}
    return _if({"mode": {"const": "static"}}, static, dynamic)


def _scheme_rules() -> list[Schema]:
    """Weights and activations are both integers or both float8."""
    float8 = {"properties": {"format": {"const": FLOAT8.name}}, "required": ["format"]}
    whole = {"type": "object", "not": float8}
    return [
        _if(
            {"weights": float8},
            {"activations": {"anyOf": [{"type": "null"}, float8]}},
            {"activations": {"anyOf": [{"type": "null"}, whole]}},
        )
    ]
