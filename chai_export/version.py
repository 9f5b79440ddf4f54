"""The version of this package; pyproject.toml and CMakeLists.txt state the same."""

from __future__ import annotations

__version__ = "0.1.0"

CREATED_WITH = f"chai_export {__version__}"
"""What files say that were written by this version."""
