import os

# Before transformers is imported: tests ask no hub, and its notices about optional packages are noise.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Before triton is imported: its interpreter runs the kernels.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from hypothesis import HealthCheck, settings

# One thread: the tensors are small, and results must not depend on how many cores the machine has.
torch.set_num_threads(1)

# Fresh examples at every local run, the same ones at every CI run; a failure prints the line that replays it.
_common = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("local", **_common)
settings.register_profile("ci", derandomize=True, **_common)
settings.load_profile("ci" if os.environ.get("CI") else "local")
