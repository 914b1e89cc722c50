"""What every party agrees on. Imports neither server, client nor simulations."""

import os

# Flower, Ray and MLflow report usage unless told not to, and a privacy product does not phone home.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# gRPC offers no setting for the version of TLS. With no cipher for 1.2 that fits an elliptic-curve key, as ours are,
# 1.3 is what is left. Read when grpc is imported, so it must stand here, before everything.
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES256-GCM-SHA384")
