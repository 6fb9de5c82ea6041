"""The official sigmas: published numbers, denoise and refusals."""

from __future__ import annotations

import pytest
import torch

from bonsai_ops.host.schedule import official_sigmas, shift_mu

# width, height, tokens, mu, sigmas between 1 and 0 for four steps, from the model's published inference code
PUBLISHED = [
    (256, 256, 256, 1.9655671614, (0.9553907514, 0.8771342635, 0.7041116953)),
    (512, 512, 1024, 2.0306897079, (0.9580853581, 0.8839818835, 0.7174965739)),
    (624, 416, 1014, 2.0298417581, (0.9580512643, 0.8838948607, 0.7173246741)),
    (704, 352, 968, 2.0259411889, (0.9578942657, 0.8834940195, 0.7165330648)),
    (768, 768, 2304, 2.1392272855, (0.9622337222, 0.8946577907, 0.7389686704)),
    (1024, 1024, 4096, 2.2911798941, (0.9673840404, 0.9081439376, 0.7671999335)),
    (1248, 832, 4056, 2.2877880948, (0.9672768116, 0.9078605771, 0.7665936351)),
    (1408, 704, 3872, 2.2721858180, (0.9667793512, 0.9065471292, 0.7637903690)),
]
EIGHT_STEPS = (1, 0.985425, 0.966641, 0.941515, 0.906183, 0.852842, 0.763014, 0.579807, 0)
ORACLE_512 = (1000, 958.0854, 883.9819, 717.4966)
"""Timesteps that the official pipeline was seen to use at 512 x 512."""


@pytest.mark.parametrize(("width", "height", "tokens", "mu", "inner"), PUBLISHED)
def test_four_steps_of_every_size(width: int, height: int, tokens: int, mu: float, inner: tuple[float, ...]) -> None:
    """mu within 1e-9, sigmas within 1e-6."""
    assert (width // 16) * (height // 16) == tokens
    assert shift_mu(tokens, 4) == pytest.approx(mu, abs=1e-9)
    sigmas = official_sigmas(tokens, 4)
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx([1, *inner, 0], abs=1e-6)
    assert sigmas[0] == 1 and sigmas[-1] == 0


def test_eight_steps() -> None:
    """Within 1e-6, half of the last digit of the source doubled."""
    assert official_sigmas(4096, 8).tolist() == pytest.approx(EIGHT_STEPS, abs=1e-6)


def test_timesteps_of_the_official_pipeline() -> None:
    """Within 1e-4, the last digit of the source."""
    assert (1000 * official_sigmas(1024, 4)[:4].double()).tolist() == pytest.approx(ORACLE_512, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 28, 200])
@pytest.mark.parametrize("tokens", [4, 1024, 4300, 4301, 16384])
def test_sigmas_fall_from_one_to_zero(tokens: int, steps: int) -> None:
    sigmas = official_sigmas(tokens, steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())


def test_long_sequences_have_a_mu_without_steps() -> None:
    """Within 1e-12 of a2 L + b2 above 4300 tokens, and of the two anchors of the line up to there."""
    assert {shift_mu(4301, steps) for steps in (1, 4, 50)} == {0.00016927 * 4301 + 0.45666666}
    assert shift_mu(4300, 10) == pytest.approx(8.73809524e-05 * 4300 + 1.89833333, abs=1e-12)
    assert shift_mu(4300, 200) == pytest.approx(0.00016927 * 4300 + 0.45666666, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "denoise", "total"), [(4, 0.5, 8), (4, 0.75, 5), (4, 0.1, 40), (1, 0.3, 3), (4, 1.0, 4)]
)
def test_denoise_takes_the_last_steps_of_a_longer_schedule(steps: int, denoise: float, total: int) -> None:
    sigmas = official_sigmas(1024, steps, denoise)
    assert torch.equal(sigmas, official_sigmas(1024, total)[-(steps + 1) :])
    assert len(sigmas) == steps + 1


def test_denoise_zero_is_no_step() -> None:
    assert official_sigmas(1024, 4, 0.0).shape == (0,)


@pytest.mark.parametrize(("steps", "denoise"), [(0, 1.0), (-1, 1.0), (4, -0.1), (4, 1.01), (4, float("nan")), (0, 0.0)])
def test_impossible_steps_and_denoise_are_refused(steps: int, denoise: float) -> None:
    with pytest.raises(
        ValueError, match=rf"steps {steps} and denoise .*expected at least 1 step and denoise in 0 \.\. 1"
    ):
        official_sigmas(1024, steps, denoise)
