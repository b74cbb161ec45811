"""One level of K-means on a GPU: ours beside flash-kmeans and plain PyTorch, from the same first centroids.

    python -m benchmarks.kmeans_on_gpu        (needs a GPU; flash-kmeans counts where it is installed)

Ten iterations each. `lazyrec` is `model.kmeans.lloyd`, whose first centroids are part of its time and told apart; the
others get them. `torch` multiplies blocks of rows by all centroids in float32, takes the smallest, adds up in float64. All
run twice, the second run counts. Vectors: as many themes as codes, normal, and noise of half their size.

wrong   rows in a million that a system labels otherwise than the float64 truth does, for its own last centroids
loss    sum of squared distances over that of `lazyrec`
peak    MiB of the GPU beside the vectors
bits    the first letters of a hash of the centroids, of two runs over differently ordered rows
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from model.kmeans import lloyd
from model.nearest import assign, label_distances
from model.reduction import Alone
from model.seeding import seed_centroids

ITERATIONS = 10
SIZES = [(10**6, 64, 256), (10**6, 64, 8_192), (10**6, 512, 8_192), (10**7, 64, 8_192)]
BLOCK = 1 << 27  # scores of a block of plain PyTorch
Fit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # rows, ids, first centroids: centroids, their labels


def ours(x_ND: Tensor, ids_N: Tensor, first_KD: Tensor) -> tuple[Tensor, Tensor]:
    found = lloyd(x_ND, ids_N, len(first_KD), iterations=ITERATIONS, tolerance=0)
    return found.centroids_KD, found.labels_N


def by_flash_kmeans(x_ND: Tensor, ids_N: Tensor, first_KD: Tensor) -> tuple[Tensor, Tensor]:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    from flash_kmeans.kmeans_triton_impl import batch_kmeans_Euclid

    _, centroids, _ = batch_kmeans_Euclid(x_ND[None], len(first_KD), ITERATIONS, tol=-1.0, init_centroids=first_KD[None])
    return centroids[0], euclid_assign_triton(x_ND[None], centroids, (x_ND * x_ND).sum(1)[None])[0].long()


def by_torch(x_ND: Tensor, ids_N: Tensor, first_KD: Tensor) -> tuple[Tensor, Tensor]:
    centroids_KD = first_KD
    for iteration in range(ITERATIONS + 1):
        square_K = (centroids_KD * centroids_KD).sum(1)
        blocks = x_ND.split(max(1, BLOCK // len(centroids_KD)))
        labels = [torch.addmm(square_K, block, centroids_KD.T, alpha=-2).argmin(1) for block in blocks]
        if iteration < ITERATIONS:
            sums_KD = torch.zeros(first_KD.shape, dtype=torch.float64, device=x_ND.device)
            for block, label in zip(blocks, labels, strict=True):
                sums_KD.index_add_(0, label, block.double())
            counts_K = torch.bincount(torch.cat(labels), minlength=len(first_KD))
            means_KD = (sums_KD / counts_K.clamp(min=1)[:, None]).float()
            centroids_KD = torch.where(counts_K[:, None] > 0, means_KD, centroids_KD)
    return centroids_KD, torch.cat(labels)


SYSTEMS: dict[str, Fit] = {"lazyrec": ours, "flash-kmeans": by_flash_kmeans, "torch": by_torch}


def timed(work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[float, tuple[Tensor, Tensor]]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - started, result


def bits(centroids_KD: Tensor) -> str:
    return hashlib.sha256(centroids_KD.cpu().numpy().tobytes()).hexdigest()[:6]


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    print("| rows | dimensions | codes | system | seconds | of lazyrec | first centroids, s | wrong | loss | peak | bits |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for n, width, k in SIZES:
        generator = torch.Generator("cuda").manual_seed(width + k)
        themes_KD = torch.randn(k, width, device="cuda", generator=generator)
        x_ND = 0.5 * torch.randn(n, width, device="cuda", generator=generator)
        x_ND += themes_KD[torch.randint(0, k, (n,), device="cuda", generator=generator)]
        ids_N, order_N = torch.arange(n, device="cuda"), torch.randperm(n, device="cuda", generator=generator)
        seconds, (first_KD, _) = timed(lambda x=x_ND, i=ids_N, k=k: (seed_centroids(x, i, k, 0, Alone()), i))  # type: ignore[misc]
        base, base_loss = 0.0, 0.0
        for system, fit in SYSTEMS.items():
            try:
                fit(x_ND, ids_N, first_KD)
            except ImportError:
                print(f"| {n:,} | {width} | {k:,} | {system} | not installed |")
                continue
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds_of, (centroids_KD, labels_N) = timed(lambda f=fit, x=x_ND, i=ids_N, c=first_KD: f(x, i, c))  # type: ignore[misc]
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            loss = float(label_distances(x_ND, centroids_KD, labels_N).sum())
            wrong = float((labels_N != assign(x_ND, centroids_KD)).double().mean()) * 10**6
            base, base_loss = base or seconds_of, base_loss or loss
            shuffled, _ = fit(x_ND[order_N], ids_N[order_N], first_KD)
            seeds = f"{seconds:.3f}" if system == "lazyrec" else ""
            figures = (
                f"{seconds_of:.3f} | {seconds_of / base:.2f} | {seeds} | {wrong:.1f} | {loss / base_loss:.6f} | {peak:,.0f}"
            )
            same = f"{bits(centroids_KD)} {bits(shuffled)}"
            print(f"| {n:,} | {width} | {k:,} | {system} | {figures} | {same} |", flush=True)


if __name__ == "__main__":
    main()
