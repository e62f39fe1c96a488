"""The libraries that publish checkpoints, and the engine beside them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # before the libraries read them
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
