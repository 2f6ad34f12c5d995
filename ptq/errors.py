"""The errors of ptq: each says what was asked, what was found, and what to do."""


class PTQError(Exception):
    """Base of every error that ptq raises on purpose.

    The message is for the user: it names the layer, file or key concerned and the remedy.
    """


class ConfigError(PTQError):
    """A key, value or rule of the configuration cannot be used."""


class ModelError(PTQError):
    """The model or tokenizer cannot be found, read or used."""


class CalibrationError(PTQError):
    """Calibration or evaluation data is missing, unreadable or unusable."""


class UnsupportedError(PTQError):
    """The request is well formed, but ptq has no way to carry it out."""


class CheckpointError(PTQError):
    """A checkpoint cannot be written, or what was read is not what was written."""


class GateError(PTQError):
    """Figures were measured, and violate a condition of ``fail_if``: one line for each."""
