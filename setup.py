"""Build of the C++ backend; everything else is declared in pyproject.toml, but for the licence.

The licence: pyproject's string form (PEP 639) needs setuptools 77, its table form is deprecated
from there on; as an argument it is accepted by every version from 64 on.

The extension uses torch's stable ABI and Python's limited API: one binary serves torch >= 2.10 and
Python >= 3.10. Without a compiler (or without torch) the package installs all the same; the reason
is left in mod_fused/_cpu_error.txt, which `mod_fused.backends()` and `mod-fused doctor` report.

Environment: MOD_FUSED_NO_EXTENSION=1 leaves it out; CXX and CXXFLAGS as usual.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU = Path("csrc/cpu")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# One file of loops per instruction set; which one runs is decided when the op is first called.
ISA_FLAGS = {
    "tiles_avx2": ["-mavx2", "-mfma", "-mprefer-vector-width=256"],
    "tiles_avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
}
# What vectorisation needs; NaN and infinity keep their meaning.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fopenmp-simd", "-fvisibility=hidden"]


def extension() -> Extension:
    sources = [str(p) for p in sorted(CPU.glob("*.cpp")) if X86 or p.stem not in ISA_FLAGS]
    macros = [("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")]
    if X86:
        macros.append(("MOD_FUSED_X86", "1"))
    return Extension(
        "mod_fused._cpu",
        sources,
        depends=[str(p) for p in sorted(Path("csrc").rglob("*")) if p.suffix in (".h", ".inl")],
        define_macros=macros,
        extra_compile_args=FLAGS,
        libraries=["torch", "torch_cpu"],
        language="c++",
        py_limited_api=True,
    )


class BuildExtension(build_ext):
    """Adds each file's instruction set, and turns a failed build into a note of why."""

    def build_extension(self, ext: Extension) -> None:
        error_file = Path(self.get_ext_fullpath(ext.name)).parent / "_cpu_error.txt"
        error_file.unlink(missing_ok=True)
        try:
            if os.environ.get("MOD_FUSED_NO_EXTENSION") == "1":
                raise RuntimeError("left out because MOD_FUSED_NO_EXTENSION=1 was set")
            self._build(ext)
        except Exception as error:  # whatever the compiler or its absence raises
            error_file.parent.mkdir(parents=True, exist_ok=True)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            error_file.write_text(reason + "\n")
            print(f"mod_fused: the C++ backend is not built: {reason}")

    def _build(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        ext.include_dirs += include_paths()
        ext.library_dirs += library_paths()
        compile_one = self.compiler._compile

        def with_isa(obj, source, suffix, cc_args, extra, pp_opts):  # type: ignore[no-untyped-def]
            compile_one(
                obj, source, suffix, cc_args, extra + ISA_FLAGS.get(Path(source).stem, []), pp_opts
            )

        self.compiler._compile = with_isa
        super().build_extension(ext)

    def copy_extensions_to_source(self) -> None:
        # In-place builds: the extension or its note goes to the source folder, the other leaves.
        built = Path(self.build_lib) / "mod_fused"
        note, source_note = built / "_cpu_error.txt", Path("mod_fused/_cpu_error.txt")
        source_note.unlink(missing_ok=True)
        if note.exists():
            for stale in Path("mod_fused").glob("_cpu.*so"):
                stale.unlink()
            source_note.write_text(note.read_text())
        else:
            super().copy_extensions_to_source()


setup(
    license="Apache-2.0",
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
