"""Settings shared by all tests: repeatable property tests, quiet numeric libraries."""

from __future__ import annotations

import os

# Set before any numeric library is imported: tests run beside each other on small machines, and a
# pool of threads per process makes timings of peers in separate processes meaningless.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# A user's own settings must not reach the tests.
for _name in [name for name in os.environ if name.startswith("SWARMTRAIN_")]:
    del os.environ[_name]

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "default",
    deadline=None,  # a shared machine stalls; the per-test timeout is the bound
    derandomize=True,  # the same examples on every run: a failure is never a matter of luck
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
