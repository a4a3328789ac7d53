"""Lets tests import the top level's modules; one thread for torch, fastest for tiny tensors."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


def pytest_configure(config):
    """torchvision says at each JPEG that it will drop its decoder, which datasets is ready for."""
    config.addinivalue_line("filterwarnings", "ignore:The image decoding:DeprecationWarning")
