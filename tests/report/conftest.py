"""The report of a small run, with everything that a page can show."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import ptq
from ptq.config import as_config
from ptq.report import Console


@pytest.fixture(scope="session")
def small_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_texts: tuple[Path, Path]
) -> Path:
    """Directory of a run with static activations, two schemes and a timed comparison; read only."""
    directory = tmp_path_factory.mktemp("report") / "out"
    config = {
        "model": str(tiny_model),
        "scheme": "w8a8-static",
        "rules": [{"layers": "*.down_proj", "scheme": "w4a16-g32-asym"}],
        "calibration": {"data": str(tiny_texts[0]), "samples": 2, "sequence_length": 32},
        "evaluation": {"data": str(tiny_texts[1]), "windows": 3, "context": 64, "speed": True},
        "generation": {"prompt": "w3 w4 w5", "max_new_tokens": 6},
        "output": str(directory),
    }
    ptq.run(as_config(config), console=Console("quiet"))
    return directory


@pytest.fixture
def sections(small_run: Path) -> dict[str, Any]:
    """Sections of the run's report, with a diagnosis and a search, for a test to change."""
    found: dict[str, Any] = json.loads((small_run / "report.json").read_text())
    return copy.deepcopy({**found, "diagnosis": DIAGNOSIS, "search": SEARCH})


DIAGNOSIS: dict[str, Any] = {
    "layers": [
        {"layer": "model.layers.1.mlp.down_proj", "kl": 0.0213, "kl_weights": 0.0182,
         "kl_activations": 0.0031, "kl_clipping": 0.0, "sqnr_weights_db": 18.25,
         "sqnr_inputs_db": 31.5, "sqnr_outputs_db": 19.75},
        {"layer": "model.layers.0.mlp.up_proj", "kl": 0.0417, "kl_weights": 0.0125,
         "kl_activations": 0.0075, "kl_clipping": 0.0215},
    ],
    "remedies": [
        {"layer": "model.layers.0.mlp.up_proj", "remedy": "w8a16", "kl_before": 0.0417,
         "kl_after": 0.0016, "bytes": 12345},
    ],
    "whole_kl": 0.0671, "sum_of_layers": 0.0632,
}  # fmt: skip
SEARCH: dict[str, Any] = {
    "budget": "90 MB",
    "points": [
        {"bytes": 60_000_000, "bits": 4.25, "kl": 0.334},
        {"bytes": 90_000_000, "bits": 5.75, "kl": 0.0617},
        {"bytes": 120_000_000, "bits": 8.125, "kl": 0.0042},
    ],
    "chosen": {"bytes": 90_000_000, "bits": 5.75, "kl": 0.0617},
    "measured": [{"bytes": 90_000_000, "kl": 0.0654, "ratio": 1.0541, "name": "chosen"}],
    "layers": [],
}
