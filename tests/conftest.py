"""What every test shares: one thread a worker, no network, no progress bars of others."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402  (the environment is read at import)
from hypothesis import settings  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels then run on a CPU, slowly

pytest_plugins = ["support.plugin", "pytester"]

torch.set_num_threads(1)
# Machines differ in speed; a property that is slow is no failure.
settings.register_profile("fisedit", deadline=None, derandomize=True)
settings.load_profile("fisedit")
