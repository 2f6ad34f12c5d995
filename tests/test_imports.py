"""The structure: imports point down only, and importing ptq costs next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ptq

PACKAGE = Path(ptq.__file__).parent
RANKS = {
    "errors": 0, "formats": 0, "presets": 0, "core": 1,
    "native": 1,
    "config": 2,
    "plugins": 3, "kernels": 4, "observers": 4, "model": 4,
    "modules": 5,
    "calibrate": 6, "algorithms": 6,
    "kv_cache": 7, "transforms": 7, "refine": 7, "swap": 7,
    "recipe": 8, "sensitivity": 8,
    "blockwise": 9, "planning": 9,
    "checkpoint": 10, "evaluation": 10, "compilation": 10,
    "report": 11, "resume": 11, "huggingface": 11,
    "tuning_cache": 12, "preflight": 12,
    "quantization": 12, "schema": 12,
    "job": 13, "tuning": 13,
    "pipeline": 14,
    "command": 15, "diagnosis": 15, "mixed_precision": 15, "advice": 15,
    "cli": 16,
    "__main__": 17,
}  # fmt: skip
HEAVY = ("datasets", "matplotlib", "transformers", "pandas")


def imported(path: Path) -> set[str]:
    """The parts of ptq that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {n.split(".")[1] for n in names if n.startswith("ptq.")} & set(RANKS)


def files() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_has_a_rank() -> None:
    assert {part(path) for path in files()} <= set(RANKS)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    upward = {n for n in imported(path) if n != own and RANKS[n] >= RANKS[own]}
    # Formats and core, blockwise and planning, share a rank without knowing each other.
    assert not upward, f"{path} imports {upward}, which are not below {own}"


def test_only_the_pipeline_sees_every_stage() -> None:
    assert [part(p) for p in files() if "job" in imported(p) - {part(p)}] == ["pipeline"]


def test_importing_ptq_loads_nothing_heavy_and_no_cuda() -> None:
    code = (
        "import sys, ptq; "
        f"print([m for m in {HEAVY!r} if m in sys.modules], "
        "'torch' in sys.modules and sys.modules['torch'].cuda.is_initialized())"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "[] False"


def test_the_main_job_does_not_import_matplotlib_or_datasets() -> None:
    code = f"import sys, ptq.pipeline; print([m for m in {HEAVY[:2]!r} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "[]"


def test_the_public_names_exist() -> None:
    for name in ptq.__all__:
        assert getattr(ptq, name) is not None
    assert callable(ptq.plan)
    assert callable(ptq.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = ptq.quantise
