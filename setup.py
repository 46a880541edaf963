"""The long description: README.md without links and pictures that lead nowhere outside a checkout."""

import re
from pathlib import Path

from setuptools import setup

LINK = r"\[([^]]*)\]\((?!https?:)[^)]*\)"

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(LINK, r"\1", re.sub(rf"!{LINK}\n*", "", readme))
setup(long_description=readme, long_description_content_type="text/markdown")
