"""Puts the folder `conf` into the package as its data; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["flows", "flows.*"]), "flows.conf"],
    package_dir={"flows.conf": "conf"},
    package_data={"flows": ["py.typed"], "flows.conf": ["**/*.yaml"]},
)
