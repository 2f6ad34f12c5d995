"""transformers knows ptq as soon as both are imported, in any order; ``import ptq`` stays cheap."""

import subprocess
import sys
from pathlib import Path

import pytest

from ptq.checkpoint import save
from tests.helpers import quantize_linears, tiny_llama

README = Path(__file__).parents[2] / "README.md"
SHOW = """
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["ptq"].__name__ == "PtqHfQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["ptq"].__name__ == "PtqConfig"
assert not [f for f in sys.meta_path if type(f).__module__.startswith("ptq")]
assert type(auto.__spec__.loader).__name__ == type(auto.__loader__).__name__ == "SourceFileLoader"
"""
LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
"""


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", f"import sys\n{code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import ptq\nfrom transformers import AutoModelForCausalLM",
        "import transformers, ptq\nAutoModelForCausalLM = transformers.AutoModelForCausalLM",
        "import transformers.modeling_utils, ptq\nfrom transformers import AutoModelForCausalLM",
    ],
    ids=["ptq first", "transformers first", "transformers loaded"],
)
def test_any_order(tmp_path: Path, imports: str) -> None:
    save(quantize_linears(tiny_llama(), "w8a16"), tmp_path / "out")
    python(f"{imports}\n{LOAD}\n{SHOW}", str(tmp_path / "out"))


def test_ptq_imported_anew_and_a_look_at_the_module_first() -> None:
    """Looking for the module without importing it does not use up the registration."""
    python(
        "import importlib.util, ptq\n"
        "import transformers\n"
        "assert importlib.util.find_spec('transformers.quantizers.auto') is not None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"import transformers.modeling_utils\n{SHOW}"
        "for name in [n for n in sys.modules if n.partition('.')[0] == 'ptq']:\n"
        "    del sys.modules[name]\n"
        "import ptq\n"
    )


def test_importing_ptq_loads_neither_torch_nor_transformers() -> None:
    python("import ptq\nassert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()")


def test_without_ptq_transformers_says_that_it_does_not_know_it(tmp_path: Path) -> None:
    """What the README says of it: a warning that names ptq, and the tensors reported as missing."""
    save(quantize_linears(tiny_llama(), "w8a16"), tmp_path / "out")
    shown = python(
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])",
        str(tmp_path / "out"),
    )
    assert "Unknown quantization type, got ptq" in shown
    assert "up_proj.weight" in shown and "MISSING" in shown


def test_the_readme(tmp_path: Path) -> None:
    """Its three lines, in the directory where ``out`` is."""
    save(quantize_linears(tiny_llama(), "w8a16"), tmp_path / "out")
    section = README.read_text(encoding="utf-8").partition("## With transformers")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) == 3
    python(
        f"import os\nos.chdir(sys.argv[1])\n{code}"
        'assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"\n',
        str(tmp_path),
    )
