"""What counts as right, for `fastrnn verify` and the tests. Errors are relative to the largest value of a tensor.

EXACT: two computations of the same type that should agree up to the order of their sums.
FLOOR: the error against fp64 that is granted whatever torch.nn's own is; above it, ours may be at most TORCH_FACTOR
times that of torch.nn.
"""

import torch

EXACT = {torch.float64: 1e-10, torch.float32: 2e-5}
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
TORCH_FACTOR = 2.0
