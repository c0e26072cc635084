"""Everything is declared in pyproject.toml, except what that file cannot say for all setuptools.

The licence: pyproject's string form (PEP 639) needs setuptools 77, its table form is deprecated
from there on; as an argument it is accepted by every version from 64 on.
"""

from setuptools import setup

setup(license="Apache-2.0")
