"""Map the top-level folders into the `flashgrpo` namespace; everything else is in pyproject.toml."""

from setuptools import setup

FOLDERS = ("kernels", "model", "grpo", "bench", "recipes")

setup(
    packages=[f"flashgrpo.{folder}" for folder in FOLDERS],
    package_dir={f"flashgrpo.{folder}": folder for folder in FOLDERS},
    package_data={
        "": ["py.typed"],
        "flashgrpo.recipes": ["*.toml", "*.sh"],
        "flashgrpo.bench": ["results/*"],
    },
)
