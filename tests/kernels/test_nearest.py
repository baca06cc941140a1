"""The kernel that finds the nearest centroid of each point, run on the CPU."""

from __future__ import annotations

import host_cuda
import pytest
import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import nearest
from compress.methods.solvers import operators
from compress.methods.solvers.operators import assign


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    return host_cuda.Host(*(nearest.instance(d, weighted) for d in nearest.DIMENSIONS for weighted in (False, True)))


@pytest.fixture
def host(compiled: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> host_cuda.Host:
    compiled.seed = 0
    return compiled.install(monkeypatch)


def clouds(count: int, centroids: int, dimensions: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Points far from the origin, and weights over three orders of magnitude, some of them 0."""
    generator = torch.Generator().manual_seed(count + centroids + dimensions)
    points = torch.randn(count, dimensions, generator=generator) + 30
    weights = torch.rand(count, dimensions, generator=generator).pow(6) * 100 if weighted else None
    if weights is not None:
        weights[:, 0] *= torch.rand(count, generator=generator) > 0.3
    return points, torch.randn(centroids, dimensions, generator=generator) + 30, weights


def nearest_is(found: Tensor, points: Tensor, centroids: Tensor, weights: Tensor | None) -> None:
    """No centroid is nearer, but by what float32 rounds."""
    share = torch.ones_like(points) if weights is None else weights
    away = (points.double().unsqueeze(1) - centroids.double()).square()
    distance = (share.double().unsqueeze(1) * away).sum(2)
    assert found.dtype == torch.int64
    assert found.shape == (len(points),)
    chosen = distance.gather(1, found.unsqueeze(1)).squeeze(1)
    assert bool((chosen - distance.amin(1) <= 1e-5 * distance.amax(1)).all())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize(("count", "centroids"), [(1, 1), (300, 127), (5, 129), (1025, 300)])
def test_nearest_centroids(count: int, centroids: int, dimensions: int, weighted: bool, host: host_cuda.Host) -> None:
    points, centers, weights = clouds(count, centroids, dimensions, weighted)
    host.seed = count
    found = nearest.assign_kernel(points, centers, weights)
    nearest_is(found, points, centers, weights)
    nearest_is(assign(points, centers, weights), points, centers, weights)  # plain torch on a CPU
    assert float((found == assign(points, centers, weights)).float().mean()) > 0.99


def test_centroids_find_themselves(host: host_cuda.Host) -> None:
    """And of two that are the same, the first is taken."""
    _, centers, _ = clouds(1, 300, 8, False)
    assert torch.equal(nearest.assign_kernel(centers.flip(0), centers), torch.arange(300).flip(0))
    assert torch.equal(nearest.assign_kernel(centers, torch.cat([centers, centers])), torch.arange(300))


def test_points_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centers, weights = clouds(50, 20, 4, True)
    whole = operators.assigned_by_torch(points, centers, weights)
    monkeypatch.setattr(operators, "_SCORES", 70)
    assert torch.equal(operators.assigned_by_torch(points, centers, weights), whole)


def test_a_step_of_k_means_lowers_the_error(host: host_cuda.Host) -> None:
    points, centers, weights = clouds(600, 16, 2, True)
    assert weights is not None
    errors = []
    for _ in range(4):
        found = nearest.assign_kernel(points, centers, weights)
        errors.append(float((weights * (points - centers[found]).square()).sum()))
        total = torch.zeros_like(centers).index_add_(0, found, weights * points)
        share = torch.zeros_like(centers).index_add_(0, found, weights)
        centers = torch.where(share > 0, total / share, centers)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_points_and_centroids_that_do_not_fit(host: host_cuda.Host) -> None:
    points, centers, _ = clouds(4, 3, 2, False)
    assert nearest.assign_kernel(points[:0], centers).shape == (0,)
    for wrong in ((points, centers[:0]), (points, centers[:, :1]), (points, centers, points[:2])):
        with pytest.raises(KernelError, match="expected"):
            nearest.assign_kernel(*wrong)
        with pytest.raises(ValueError, match="expected"):
            operators.assigned_by_torch(*wrong)
    with pytest.raises(KernelError, match="up to 16"):
        nearest.assign_kernel(torch.zeros(2, 17), torch.zeros(2, 17))
    with pytest.raises(KernelError, match="float32"):
        nearest.assign_kernel(points.double(), centers.double())


def test_the_operator_of_assignment() -> None:
    torch.library.opcheck(torch.ops.compress.assign.default, clouds(5, 3, 2, True))
    torch.library.opcheck(torch.ops.compress.assign.default, clouds(5, 3, 2, False))
