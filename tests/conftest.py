"""Settings for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy or emulated machine may take any time for an example, so time never decides.
settings.register_profile("gwp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gwp")
