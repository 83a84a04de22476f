"""The noise as noise: moments, distribution and correlations.

All samples are seeded, so a test that passes once passes always on every backend. The bounds are
those that a true sample would break with the stated probability (the rate of false alarms if the
seed were drawn anew).
"""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from zokern import noise

DIRECTIONS = [name for name, law in noise.LAWS.items() if law.is_direction]
GAUSSIANS = ["gauss16", "gauss32", "normal"]
NUMEL = 1 << 20
# |z-score| > 5 has probability 5.7e-7.
SIGMAS = 5.0


def draw(law: str, numel: int = NUMEL, **where) -> np.ndarray:
    where = {"seed": 12345, "draw": 0, "tensor_id": 7} | where
    return noise.sample(law, numel, **where).double().numpy()


def z_score_of_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of independent, centred samples of variance 1: N(0, 1) for large ones."""
    return float(a @ b / np.sqrt(len(a)))


@pytest.mark.parametrize("law", GAUSSIANS)
@pytest.mark.parametrize("power", [1, 2, 3, 4, 6])
def test_moments_are_those_of_the_normal_distribution(law, power):
    # Σ of z^p; its mean and variance are known: E z^2p = (2p-1)!!. False alarms: 5.7e-7.
    def moment(p: int) -> float:
        return 0.0 if p % 2 else float(scipy.special.factorial2(p - 1)) if p else 1.0

    z = draw(law)
    spread = np.sqrt((moment(2 * power) - moment(power) ** 2) / NUMEL)
    assert abs((z**power).mean() - moment(power)) < SIGMAS * spread


@pytest.mark.parametrize("law", GAUSSIANS)
def test_distribution_is_normal(law):
    # Kolmogorov-Smirnov: √n·D > 2.7 has probability 9e-7; D of the discrete laws themselves is at
    # most 2.0e-4 (gauss16) and 5.3e-5 (gauss32).
    own = {"gauss16": 2.0e-4, "gauss32": 5.3e-5, "normal": 0.0}[law]
    distance = scipy.stats.kstest(draw(law), "norm").statistic
    assert distance < own + 2.7 / np.sqrt(NUMEL)


@pytest.mark.parametrize("law", ["rademacher"])
def test_signs_are_balanced(law):
    assert abs(draw(law).sum()) < SIGMAS * np.sqrt(NUMEL)


@pytest.mark.parametrize("law", ["uniform32", "rounding16"])
def test_words_are_uniform(law):
    # χ² over 256 bins of the highest bits, 255 degrees of freedom; false alarms: 1e-6.
    width = 32 if law == "uniform32" else 16
    words = noise.sample(law, NUMEL, seed=12345, draw=0).numpy()
    counts = np.bincount(words >> (width - 8), minlength=256)
    chi2 = ((counts - NUMEL / 256) ** 2 / (NUMEL / 256)).sum()
    assert chi2 < scipy.stats.chi2.isf(1e-6, 255)
    assert words.min() >= 0
    assert words.max() < 1 << width


@pytest.mark.parametrize("p", [0.001, 0.3, 0.999])
def test_bernoulli_masks_keep_their_share(p):
    words = noise.sample("uniform32", NUMEL, seed=12345, draw=1)
    kept = (words < int(p * 2**32)).sum().item()
    assert abs(kept - p * NUMEL) < SIGMAS * np.sqrt(NUMEL * p * (1 - p))


@pytest.mark.parametrize("law", DIRECTIONS)
@pytest.mark.parametrize("lag", [*range(1, 17), 127, 128, 129])
def test_neighbouring_elements_are_uncorrelated(law, lag):
    # 76 tests of false-alarm rate 5.7e-7 each.
    z = draw(law, NUMEL + lag)
    assert abs(z_score_of_correlation(z[:-lag], z[lag:])) < SIGMAS


@pytest.mark.parametrize("law", GAUSSIANS)
@pytest.mark.parametrize("lag", [*range(1, 9)])
def test_squares_of_neighbouring_elements_are_uncorrelated(law, lag):
    # The variance of z² is 2.
    square = (draw(law, NUMEL + lag) ** 2 - 1) / np.sqrt(2)
    assert abs(z_score_of_correlation(square[:-lag], square[lag:])) < SIGMAS


@pytest.mark.parametrize("law", DIRECTIONS)
@pytest.mark.parametrize(
    "other",
    [
        {"draw": 1},
        {"draw": 1 << 31},
        {"tensor_id": 8},
        {"tensor_id": 7 + (1 << 24)},
        {"tensor_id": 7 + (1 << 55)},
        {"seed": 12346},
        {"seed": 12345 + (1 << 32)},
        {"seed": 12345 + (1 << 63)},
    ],
    ids=lambda other: "-".join(f"{key}={value}" for key, value in other.items()),
)
def test_draws_tensors_and_seeds_are_uncorrelated(law, other):
    # 32 tests of false-alarm rate 5.7e-7 each.
    assert abs(z_score_of_correlation(draw(law), draw(law, **other))) < SIGMAS


def test_laws_are_uncorrelated_with_each_other():
    samples = [draw(law) for law in DIRECTIONS]
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert abs(z_score_of_correlation(a, b)) < SIGMAS


@pytest.mark.parametrize("law", GAUSSIANS)
def test_squared_norms_of_draws_scatter_and_are_uncorrelated(law):
    # ‖z‖² of n elements has mean n and variance 2n. Over m draws: the mean of the normalised
    # values, their variance (χ²) and the correlation of consecutive draws and tensors, each with
    # a false-alarm rate of about 1e-6.
    n, m = 256, 4096
    norms = torch.stack(
        [noise.sample(law, n, seed=99, draw=k, tensor_id=t) for t in (1, 2) for k in range(m)]
    )
    norms = ((norms.double().square().sum(dim=1) - n) / np.sqrt(2 * n)).view(2, m).numpy()
    for row in norms:
        assert abs(row.mean()) * np.sqrt(m) < SIGMAS
        # The kurtosis of a χ² of n degrees of freedom widens the scatter of its variance.
        spread = np.sqrt((2 + 12 / n) / m)
        assert abs(row.var() - 1) < SIGMAS * spread
        assert abs(z_score_of_correlation(row[:-1], row[1:])) < SIGMAS
    assert abs(z_score_of_correlation(norms[0], norms[1])) < SIGMAS
