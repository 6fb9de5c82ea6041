"""The official sampling schedule of FLUX.2 Klein: sigmas of a given image size and number of steps.

    L = tokens = (width / 16) (height / 16)
    m10 = 8.73809524e-05 L + 1.89833333,  m200 = 0.00016927 L + 0.45666666
    mu = m200 if L > 4300, else the line through (10 steps, m10) and (200 steps, m200), read at the number of steps
    sigma(t) = e^mu / (e^mu + 1 / t - 1)  for t = 1, (n-1)/n, .., 1/n, and 0 at the end

Source: the model's published inference code (FlowMatchEulerDiscreteScheduler with dynamic shifting by this mu).
"""

from __future__ import annotations

import math

import torch

LONG_SEQUENCE = 4300


def shift_mu(tokens: int, steps: int) -> float:
    """mu for an image of `tokens` latent positions."""
    m200 = 0.00016927 * tokens + 0.45666666
    if tokens > LONG_SEQUENCE:
        return m200
    m10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (m200 - m10) / 190.0
    return slope * steps + m200 - 200.0 * slope


def official_sigmas(tokens: int, steps: int, denoise: float = 1.0) -> torch.Tensor:
    """float32 sigmas [steps + 1], 1 at the start for denoise 1 and 0 at the end.

    denoise < 1 takes the last `steps` of int(steps / denoise) steps, as ComfyUI's samplers do; denoise 0 gives [].
    Raises ValueError for steps < 1 or denoise outside 0 .. 1.
    """
    if steps < 1 or not 0.0 <= denoise <= 1.0:
        raise ValueError(f"steps {steps} and denoise {denoise}: expected at least 1 step and denoise in 0 .. 1")
    if denoise == 0.0:
        return torch.empty(0)
    total = max(steps, int(steps / denoise))
    growth = math.exp(shift_mu(tokens, total))
    times = [(total - i) / total for i in range(total)]
    sigmas = [growth / (growth + 1.0 / t - 1.0) for t in times] + [0.0]
    return torch.tensor(sigmas[-(steps + 1) :], dtype=torch.float32)
