"""Names of schemes, which a command line shows without loading torch."""

PRESETS = (
    "w8a16",
    "w8a8",
    "w8a8-static",
    "w8a16-g64",
    "w4a16-g32",
    "w4a16-g64",
    "w4a16-g128",
    "w4a16-g64-asym",
    "w4a16-g128-asym",
    "w4a16",
    "w4a8-g64",
    "w4a8-g64-asym",
    "w4a8-g128",
    "w3a16-g64-asym",
    "w2a16-g32-asym",
    "fp8",
    "fp8-a16",
)
"""Named schemes that are shown in help and errors; any name of the same grammar is accepted."""

_WEIGHTS = r"(-g0*([89]|[1-9][0-9]+)|-tensor)?(-asym)?"
WEIGHT_ONLY_PATTERN = rf"^(w[2-8]a16{_WEIGHTS}|fp8-a16)$"
SCHEME_PATTERN = rf"^(w[2-8]a16{_WEIGHTS}|w[2-8]a8{_WEIGHTS}(-static)?|fp8|fp8-a16)$"
"""The grammar of names, for the JSON schema; ``ptq.config.preset`` is what reads them."""
