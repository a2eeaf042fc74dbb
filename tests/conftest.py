"""What every test shares: one thread a worker, no network, no progress bars of others."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402  (the environment is read at import)
from hypothesis import settings  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels then run on a CPU, slowly

from fisedit.runtime import dense  # noqa: E402

if torch.cuda.is_available():
    dense.DEVICES = ()  # Inductor would take a minute for each small model; tests of it name the device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

pytest_plugins = ["support.plugin", "pytester"]

torch.set_num_threads(1)
# Machines differ in speed; a property that is slow is no failure.
settings.register_profile("fisedit", deadline=None, derandomize=True)
settings.load_profile("fisedit")
