"""What mmengine asks of `pkg_resources`, which setuptools has no more from version 82 on, by `importlib.metadata`."""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution


class DistributionNotFound(Exception):
    """No such package is installed."""


class _Installed:
    def __init__(self, found: Distribution):
        self._found = found
        self.version = found.version
        self.location = str(found.locate_file(""))

    def has_metadata(self, name: str) -> bool:
        return self._found.read_text(name) is not None

    def get_metadata(self, name: str) -> str:
        return self._found.read_text(name) or ""


def fixup_namespace_packages(path: str, parent: object = None) -> None:
    """What pytest asks for when it changes `sys.path`: nothing, as Python itself knows such packages."""


def get_distribution(name: str) -> _Installed:
    """The package that is installed under `name`; DistributionNotFound if none is."""
    try:
        return _Installed(distribution(name))
    except PackageNotFoundError:
        raise DistributionNotFound(name) from None
