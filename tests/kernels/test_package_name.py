"""`kernels` is also the name of a published package for which transformers probes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_transformers_does_not_take_our_kernels_for_the_published_package() -> None:
    code = "from transformers.utils.import_utils import is_kernels_available as probe; raise SystemExit(probe())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120).returncode == 0


def test_the_package_stays_empty() -> None:
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_serving_on_a_cpu_imports_no_triton() -> None:
    """Triton is an extra: half a gigabyte that a machine without a GPU does not need."""
    code = (
        "import sys, engine.worker, engine.build, gateway.worker, gateway.audit_observer\n"
        "from kernels.choice import choose\n"
        "choose('auto', 1, lambda line: None)\n"
        "raise SystemExit('triton' in sys.modules or any(name.startswith('kernels.gpu') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120).returncode == 0
