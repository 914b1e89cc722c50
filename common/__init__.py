"""What every party agrees on. Imports neither server, client nor simulations."""

import os

# Flower and Ray report usage unless told not to, and a privacy product does not phone home.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
