"""The wheel: the package, with the scripts of launch/ and the recipes inside it; the rest is said in pyproject.toml."""

from setuptools import find_packages, setup

INSIDE = {"qwen2audio_train.launch": "launch", "qwen2audio_train.recipes": "recipes"}
"""Folders of the checkout that are installed as parts of the package."""

setup(packages=[*find_packages(include=["qwen2audio_train*"]), *INSIDE], package_dir=INSIDE)
