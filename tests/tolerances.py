"""The one tolerance table. Errors are relative to the largest value of the tensor compared.

EXACT, FLOOR and TORCH_FACTOR are those of `fastrnn verify`.
ENGINE: the C++ engine's error against the fp64 truth on the same numbers, gradients by sums that cancel
included. Storage of 16 bits rounds y, from which the gradients of the weights are made.
KERNELS: the same of the CUDA kernels, by number type; those of 16 bits round the input's part of the gates and, for the
backward, the tape and the gradients at the gates.
AUTOCAST: results and gradients, as a whole, against fp32 where autocast has not rounded inputs and weights.
"""

import torch

from fastrnn.bench.tolerances import EXACT, FLOOR, TORCH_FACTOR

__all__ = ["AUTOCAST", "ENGINE", "EXACT", "FLOOR", "KERNELS", "TORCH_FACTOR"]

ENGINE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
AUTOCAST = {torch.float16: 8e-3, torch.bfloat16: 6e-2}
KERNELS = {"bf16": 4e-2, "fp16": 5e-3, "tf32": 5e-3, "fp32": 2e-5}
