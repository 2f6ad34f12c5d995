"""Telling transformers about ptq, without importing transformers.

transformers finds a quantizer in two dictionaries of ``transformers.quantizers.auto``, and has no
other place to announce one (no entry points). Importing that module for them would make ``import
ptq`` take 6 s of processor time instead of 0.02 s; leaving it to the user's first call of ptq would
miss ``import ptq`` followed by transformers alone, whose linear layers would then be random. So,
where the module is not loaded yet, a finder waits for its import and for no other, registers once
the module has been executed, and is gone. Of transformers it uses ``register_quantization_config``
and ``register_quantizer``, and the name of their module.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importlib.abc takes longer to import than the rest of ptq
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_AUTO = "transformers.quantizers.auto"
METHOD = "ptq"
"""The ``quant_method`` of a checkpoint's config.json."""


def register_when_loaded() -> None:
    """Register now if transformers has loaded its quantizers, else as soon as it has."""
    if _AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    from transformers.quantizers import auto

    from ptq.huggingface.plugin import PtqConfig, PtqHfQuantizer

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:  # ptq may have been imported anew
        auto.register_quantization_config(METHOD)(PtqConfig)
        auto.register_quantizer(METHOD)(PtqHfQuantizer)


class _Waiting:
    """Finds one module, as the other finders do, and has it loaded by :class:`_Registering`."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != _AUTO:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)  # type: ignore[assignment]
        return spec


class _Registering:
    """Executes a module by its own loader, and registers after that."""

    def __init__(self, loader: Any, waiting: _Waiting) -> None:
        self.loader = loader
        self.waiting = waiting

    def create_module(self, spec: "ModuleSpec") -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.waiting in sys.meta_path:
            sys.meta_path.remove(self.waiting)
        _register()
