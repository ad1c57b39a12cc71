"""What all rooms' tests share: real servers and the real model, one of each per session, and Hypothesis profiles.

Profiles: `quick` by default, the same examples each time, so that a change is judged by what it changed; `deep` under
make test-all (BULKHEAD_TEST_PROFILE=deep), others each time.
"""

import os

from hypothesis import HealthCheck, settings

# Before anything imports Triton: without a GPU its kernels are interpreted. `make gpu` sets it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.model import model_dir
from tests.servers import postgres_server, valkey_socket

__all__ = ["model_dir", "postgres_server", "valkey_socket"]

settings.register_profile(
    "quick", max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("deep", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("BULKHEAD_TEST_PROFILE", "quick"))
