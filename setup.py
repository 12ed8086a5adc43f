"""The compiled crop decoder; everything else about the package is in pyproject.toml.

It is a top-level module, not a part of the package `lape_ray`: a job that is submitted with a working directory
imports `lape_ray` from there, where no build products are, and still finds the installed extension.

It is compiled against the limited API, so that one wheel (abi3) serves Python 3.11 and all later ones.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("lape_ray/data/native")

setup(
    ext_modules=[
        Extension(
            "_lape_ray_native",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            libraries=["jpeg"],
            language="c++",
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            # Contraction to fused multiply-add would change the last bit of filter weights on some processors.
            extra_compile_args=["-std=c++17", "-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
