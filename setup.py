"""Build the compiled kernels; everything else about the package is in pyproject.toml.

``fastnorm/_core/kernels.h``, with what it includes, is the one source of the kernels, and
``kernels.pxi`` Python's way to them. Each tiny ``_kernels_*.pyx`` includes both and is compiled for
one instruction set; the package picks the best of them at import.

The environment variable ``FASTNORM_BUILD_KERNELS`` says what to do about the compiler:

=========  ================================================================================
not set    build the kernels if there is a C compiler; without one, install without them
``1``      build the kernels; it is an error if that is not possible
``0``      do not build them
=========  ================================================================================

A compiler that works but fails on the kernels is always an error.

With ``FASTNORM_CHECK=1`` the kernels check the extent of every array and tile they touch, and end
the process where one is left (``_core/check.h``). ``FASTNORM_SANITIZE=address,undefined`` builds
them with those sanitizers of the compiler, and ``FASTNORM_BUILD_CPU=x86-64-v3`` for some
instruction sets alone. These are for `make sanitize`: such kernels are slow.
"""

import ast
import os
import sys
import tempfile
import threading
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError, LinkError

CORE = "fastnorm/_core"

# The kernels centre with (x - hi) - lo, where hi + lo is the mean. A compiler that may reassociate
# turns this into x - (hi + lo) and every digit the pair was kept for is gone (docs/accuracy.rst).
# So: never -ffast-math, -fassociative-math or -Ofast, and -fno-fast-math against the ones in a
# user's CFLAGS. Contraction to fused multiply-adds is off so that every instruction set gives the
# same bits. The last two flags change no result: they say that nobody reads errno or
# floating-point traps.
GNU_FLAGS = [
    "-O3",
    "-fno-fast-math",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    # Else a function that the headers do not declare is found missing only at import.
    "-Werror=implicit-function-declaration",
]
# Elsewhere the kernels have threads of their own.
MSVC_FLAGS = ["/O2", "/fp:precise", "/openmp"]

# With FASTNORM_SANITIZE: what it finds ends the process, with the place in the source.
SANITIZER_FLAGS = ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]

# What each build adds for gcc and clang on x86-64. Without -mprefer-vector-width=512 the compilers
# use half of an AVX-512 register.
X86_64_FLAGS = {
    "_kernels_v2": ["-march=x86-64-v2"],
    "_kernels_v3": ["-march=x86-64-v3"],
    "_kernels_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
PLAIN = "_kernels_plain"  # every other machine and compiler: that compiler's default instructions
# What runs on every processor: what says which of them it can run, and the way of tensors.
FOR_ALL = ("_cpu", "_exchange")

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
}

PYTHON_PROBE = "#include <Python.h>\nint fastnorm_probe(void) { return PY_MAJOR_VERSION; }\n"

NO_COMPILER = """
fastnorm: no C compiler that can build Python extensions was found, so the compiled kernels are
left out. Numba compiles others when they are first called. To get these, install a C compiler
(and, where they are a package of their own, the Python headers) and install fastnorm again.
"""


SIZES = """\
/* Written by setup.py from fastnorm/schedule.py, where each is explained. */
#ifndef FASTNORM_SIZES_H
#define FASTNORM_SIZES_H

enum {{
{lines}
}};
static const char SIZES[] = "{text}";

#endif
"""


def sizes_header():
    """The header with the sizes and thresholds of fastnorm/schedule.py, which is not imported."""
    sizes = {}
    for node in ast.parse(
        (Path(__file__).parent / "fastnorm/schedule.py").read_text(encoding="utf-8")
    ).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name.isupper() and not name.startswith("_") and is_number(node.value):
                sizes[name] = eval(ast.unparse(node.value), {"__builtins__": {}})
    lines = "\n".join(f"    {name} = {size}," for name, size in sizes.items())
    return SIZES.format(lines=lines, text=" ".join(f"{n}={size}" for n, size in sizes.items()))


def is_number(node):
    """Whether an expression is made of whole numbers alone, such as 1 << 17."""
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


class BuildKernels(build_ext):
    """Choose the kernels that this compiler and machine can have, and build them in parallel."""

    def finalize_options(self):
        """Compile one extension per processor unless told otherwise."""
        super().finalize_options()
        if self.parallel is None:
            affinity = getattr(os, "sched_getaffinity", None)  # honours a container's limit
            self.parallel = len(affinity(0)) if affinity else os.cpu_count()

    def build_extensions(self):
        """Build them all, or none where there is no compiler or no wish to."""
        wish = os.environ.get("FASTNORM_BUILD_KERNELS", "")
        if wish not in ("", "0", "1"):
            raise BaseError(f"FASTNORM_BUILD_KERNELS is {wish!r}: use 0 or 1, or leave it unset")
        if wish == "0":
            self.extensions = []
        elif not self.compiles(PYTHON_PROBE):
            if wish == "1":
                raise BaseError("FASTNORM_BUILD_KERNELS is 1, but no working C compiler was found")
            print(NO_COMPILER, file=sys.stderr)
            self.extensions = []
        else:
            self.choose_extensions()
        self.translating = threading.Lock()
        super().build_extensions()

    def choose_extensions(self):
        """Keep the extensions that this compiler can build, with their flags filled in."""
        import numpy as np

        msvc = self.compiler.compiler_type == "msvc"
        flags = list(MSVC_FLAGS if msvc else GNU_FLAGS)
        if os.environ.get("FASTNORM_CHECK", "") not in ("", "0"):
            flags.append("/DFN_CHECKED=1" if msvc else "-DFN_CHECKED=1")
        if sanitizers := os.environ.get("FASTNORM_SANITIZE", ""):
            flags += [f"-fsanitize={sanitizers}", *SANITIZER_FLAGS]

        variants = {}
        if not msvc and self.plat_name.endswith(("x86_64", "amd64")):
            variants = {
                name: extra
                for name, extra in X86_64_FLAGS.items()
                if self.compiles(PYTHON_PROBE, extra)
            }
        if wanted := os.environ.get("FASTNORM_BUILD_CPU", ""):
            names = {"_kernels_" + level.rpartition("-")[2] for level in wanted.split(",")}
            variants = {name: extra for name, extra in variants.items() if name in names}
        variants = (variants or {PLAIN: []}) | {name: [] for name in FOR_ALL}

        sizes = Path(self.build_temp, "sizes.h")
        sizes.parent.mkdir(parents=True, exist_ok=True)
        header = sizes_header()
        if not sizes.exists() or sizes.read_text(encoding="utf-8") != header:
            sizes.write_text(header, encoding="utf-8")
        self.extensions = [
            ext for ext in self.extensions if ext.name.rpartition(".")[2] in variants
        ]
        for ext in self.extensions:
            ext.extra_compile_args = flags + variants[ext.name.rpartition(".")[2]]
            if not self.debug and not msvc:
                ext.extra_compile_args.append("-g0")  # Python's own flags ask for debug symbols
            # gcc links start-up code that flushes subnormals for all of Python if a user's CFLAGS
            # hold -ffast-math. The flags against it are needed here, too.
            ext.extra_link_args = [] if msvc else flags
            ext.include_dirs = [np.get_include(), CORE, str(sizes.parent)]
            ext.depends.append(str(sizes))

    def compiles(self, source, flags=(), link_flags=()):
        """Whether the compiler turns ``source`` into a shared library under these flags."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.c")
            path.write_text(source, encoding="utf-8")
            try:
                objects = self.compiler.compile(
                    [str(path)], output_dir=folder, extra_postargs=list(flags)
                )
                self.compiler.link_shared_object(
                    objects, str(Path(folder, "probe.lib")), extra_postargs=list(link_flags)
                )
            except (BaseError, CCompilerError, CompileError, LinkError, OSError):
                return False
        return True

    def build_extension(self, ext):
        """Translate one extension to C in the build folder, then compile it.

        The lock lets one thread at a time through Cython while the others are in the C compiler.
        """
        from Cython.Build import cythonize

        with self.translating:
            ext.sources = cythonize(
                [ext],
                build_dir=self.build_temp,
                compiler_directives=DIRECTIVES,
                # Cython compares file times only: it would miss a new Cython or new directives.
                force=True,
            )[0].sources
        super().build_extension(ext)


def extension(name):
    """Describe one extension; its flags wait until the compiler is known."""
    shared = [path for path in Path(CORE).iterdir() if path.suffix in (".pxi", ".pxd", ".h")]
    return Extension(
        f"fastnorm._core.{name}",
        [f"{CORE}/{name}.pyx"],
        depends=sorted(path.as_posix() for path in shared),
        # The oldest NumPy that pyproject.toml allows: by itself NumPy would declare only what NumPy
        # 1.19 had, or, from newer headers, allow what NumPy 2.0 lacks.
        define_macros=[
            ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
        ],
    )


if __name__ == "__main__":
    setup(
        ext_modules=[extension(name) for name in (*X86_64_FLAGS, PLAIN, *FOR_ALL)],
        cmdclass={"build_ext": BuildKernels},
    )
