"""Every test is deterministic: hypothesis draws the same examples on every run. Fixtures of tiny runs are shared."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU tensors; triton reads it when it is imported

from hypothesis import settings
from tiny import data, pruned, source, whole  # noqa: F401 (fixtures)

settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("deterministic")
