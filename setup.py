"""Map the top-level folders into the `flashgrpo` namespace; everything else is in pyproject.toml."""

from setuptools import setup

ROOMS = ("recipe", "learn", "run", "data", "rollout", "rollout/vllm", "rewards", "stages")
FOLDERS = ("kernels", "model", "grpo", *(f"grpo/{room}" for room in ROOMS), "bench", "recipes")
PACKAGES = {f"flashgrpo.{folder.replace('/', '.')}": folder for folder in FOLDERS}

setup(
    packages=[*PACKAGES],
    package_dir=PACKAGES,
    package_data={
        "": ["py.typed"],
        "flashgrpo.recipes": ["*.toml", "*.sh"],
        "flashgrpo.bench": ["results/*"],
    },
)
