"""How far float32 tables and steps of diffusers may be from ours: as far as torch itself is from exact roots."""

import numpy as np
import torch

_LEVELS = torch.linspace(0.05, 0.95, 1000)
#: Whether torch's square roots are correctly rounded here. On some processors (AMD's with AVX-512) they are off by the
#: last bit, and with them the sigmas of diffusers, which a logarithm's interpolation, a short stochastic step or a
#: first level of 4096 magnifies.
EXACT_ROOTS = bool(np.array_equal((_LEVELS**0.5).numpy(), np.sqrt(_LEVELS.numpy())))
TIMESTEP_ROUNDING = 3e-7 if EXACT_ROOTS else 1e-6
