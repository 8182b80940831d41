"""Names the packages: this folder is the package `services`, which `packages.find` cannot say."""

from setuptools import find_namespace_packages, setup

found = find_namespace_packages(".", exclude=["build*", "*.egg-info*"])
setup(packages=["services", *(f"services.{name}" for name in found)])
