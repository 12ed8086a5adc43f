"""Tests of what FFCV does are skipped, with the reason, where it is not installed."""

from __future__ import annotations

import pytest

from lape_ray.data.installed import missing_for_ffcv

MISSING = " and ".join(missing_for_ffcv())
needs_ffcv = pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}: the extra lape_ray[ffcv]")
