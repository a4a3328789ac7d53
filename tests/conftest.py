"""Lets the tests import the modules of the top level, and keeps torch to one thread, the fastest for tiny tensors."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
