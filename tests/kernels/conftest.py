"""Which native library the tests load: NATIVE_LIBRARY names another build, such as the sanitizers'."""

import os
from pathlib import Path

from kernels.cpu import library

if path := os.environ.get("NATIVE_LIBRARY"):
    library.PATH = Path(path).absolute()
