"""One thread: on a shared machine two threads that wait for each other cost more than they bring."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))  # for helpers
