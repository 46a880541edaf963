"""What pyproject.toml cannot say: the packages, and the long description."""

import re
from pathlib import Path

from setuptools import find_packages, setup

LINK = r"\[([^]]*)\]\((?!https?:)[^)]*\)"

# README.md without links and pictures that lead nowhere outside a checkout
readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(LINK, r"\1", re.sub(rf"!{LINK}\n*", "", readme))
setup(
    # kernels/ has no __init__.py, and a checkout has a link to it where the sdist has nothing
    packages=[*find_packages(include=["rtmdet_fast", "rtmdet_fast.*"]), "rtmdet_fast.kernels"],
    long_description=readme,
    long_description_content_type="text/markdown",
)
