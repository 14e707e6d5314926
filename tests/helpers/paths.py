"""Where the files of the project are that tests read."""

from __future__ import annotations

from pathlib import Path

import gam
import gam_kernels

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [str(Path(package.__file__).parents[1]) for package in (gam, gam_kernels)]
"""What must be on the path of another process for it to import what is tested here."""
