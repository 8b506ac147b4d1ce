"""Puts `parity_tools` on the path of the tests in this folder, and keeps torch to one thread."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
