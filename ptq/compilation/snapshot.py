"""Whether a model still consists of the modules and the memory that it was compiled with."""

from torch import Tensor, nn


class Snapshot:
    """What a model consists of: which object has which name in which module, which modules train
    and have which hooks, and where in memory each tensor is. Values may change in place; what else
    changes is noticed.

    In place of torch's guards on modules and the checks of sizes in its compiled code.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._places = [
            (members, name, value)
            for module in modules
            for members in (module._modules, module._parameters, module._buffers)
            for name, value in members.items()
        ]
        self._training = [(module, module.training) for module in modules]
        self._hooks = [
            (hooks, tuple(hooks.values()))
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._tensors = [value for *_, value in self._places if isinstance(value, Tensor)]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    @property
    def hooked(self) -> bool:
        """Whether a module has hooks."""
        return any(found for _, found in self._hooks)

    def holds(self) -> bool:
        """Nothing was exchanged, added in its place, hooked, moved or converted since."""
        if any(members.get(name) is not value for members, name, value in self._places):
            return False
        if any(module.training != training for module, training in self._training):
            return False
        if any(tuple(hooks.values()) != seen for hooks, seen in self._hooks):
            return False
        return [tensor.data_ptr() for tensor in self._tensors] == self._addresses
