from __future__ import annotations

import torch

# More threads than free cores make matrix products of this size slower by an order of magnitude.
torch.set_num_threads(1)
