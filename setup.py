"""The optional native kernels: one plain shared library beside kernels/cpu/library.py, no Python API in it.

pyproject.toml holds everything else. Where no C++ compiler is, the build goes on without the library and the engine
runs on plain torch. Each instruction set is the same source compiled with other flags; the choice is made at run time.
`BULKHEAD_NATIVE_SANITIZE=1` builds with AddressSanitizer and UBSan (see `make native-asan`).
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("kernels/cpu/src")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
ISAS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1"]


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        sanitize = SANITIZE if os.environ.get("BULKHEAD_NATIVE_SANITIZE") == "1" else []
        objects = []
        macros: list[tuple[str, str | None]] = []
        for name, flags in ISAS.items():
            if not x86 and name != "portable":
                continue
            try:
                objects += self.compiler.compile(
                    [str(SOURCES / "isa.cpp")],
                    output_dir=str(Path(self.build_temp) / name),
                    macros=[("OPS", f"ops_{name}")],
                    extra_postargs=[*FLAGS, *flags, *sanitize],
                    depends=[str(path) for path in SOURCES.iterdir()],
                )
                macros.append((f"BULKHEAD_{name.upper()}", None))
            except CompileError as error:
                if name == "portable":
                    raise
                self.warn(f"this compiler does not know {name} ({error}): the library comes without it")
        objects += self.compiler.compile(
            [str(SOURCES / "library.cpp")],
            output_dir=self.build_temp,
            macros=macros,
            extra_postargs=[*FLAGS, *sanitize],
            depends=[str(path) for path in SOURCES.iterdir()],
        )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread", *sanitize],
            target_lang="c++",
        )


setup(
    ext_modules=[Extension("kernels.cpu._native", sources=[str(SOURCES / "library.cpp")], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
