"""RQ-VAE, the tokenizer that RQ-Kmeans is compared with, in the form of TIGER (Rajput et al., 2023, section 3.1).

An encoder to a narrow latent z, residual quantisation of z by L codebooks, a decoder of the sum of the chosen codes:

    r_1 = z,  s_l = argmin_k |r_l - e_{l,k}|^2,  r_{l+1} = r_l - e_{l,s_l},  z_q = sum_l e_{l,s_l}
    loss = |x - decoder(z_q)|^2 + sum_l |sg(r_l) - e_{l,s_l}|^2 + beta |r_l - sg(e_{l,s_l})|^2

with the gradient of z_q passed straight through to z. Codebooks start as K-means of the residuals of a first batch, which
keeps them from collapsing (TIGER); a code that wins no row for `restart_every` steps may start anew from a residual of the
batch. Rows are centred and scaled by one number, so that settings do not depend on the scale of the vectors.
Trained on one machine: a peer for measurements, no stage of the pipeline.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kmeans import lloyd
from model.nearest import blocks
from model.rq_kmeans import Codebook, encode
from schemas.errors import ContractViolation

FIRST_ROWS_A_CODE = 16  # of the batch that starts the codebooks
CHUNK = 8192  # rows encoded at a time


@dataclass(frozen=True)
class RqVaeSize:
    """The defaults are TIGER's (its appendix gives 512, 256, 128 and a latent of 32; beta 0.25), the optimiser is Adam."""

    levels: int = 3
    codes: int = 256  # a level
    hidden: tuple[int, ...] = (512, 256, 128)  # of the encoder; the decoder mirrors it
    latent: int = 32
    commitment: float = 0.25  # beta
    batch: int = 1024
    learning_rate: float = 1e-3
    restart_every: int = 0  # steps after which a code that won no row starts anew; 0: never, as in the paper


def mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class RqVae(nn.Module):
    """Made by `train_rq_vae`. Shapes: N rows, D their width, d the latent's, L levels, K codes."""

    def __init__(self, width: int, size: RqVaeSize) -> None:
        super().__init__()
        self.size = size
        widths = [width, *size.hidden, size.latent]
        self.encoder, self.decoder = mlp(widths), mlp(widths[::-1])
        self.codebooks = nn.Parameter(torch.zeros(size.levels, size.codes, size.latent))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(()))
        self.curve: list[float] = []  # the loss at every step, in units of the scaled rows, summed over dimensions
        self.seconds = 0.0  # of training

    mean: Tensor
    spread: Tensor

    def scaled(self, x_ND: Tensor) -> Tensor:
        return (x_ND - self.mean) / self.spread

    def latents(self, x_ND: Tensor) -> Tensor:
        """float32 [N, d]. Computed in float64 and rounded: the bits of float32 products vary with the rows beside a row."""
        encoder = copy.deepcopy(self.encoder).double()
        with torch.no_grad():
            parts = [encoder(self.scaled(x_ND[s].double())).float() for s in blocks(len(x_ND), 1, CHUNK)]
        return torch.cat([x_ND.new_zeros(0, self.size.latent), *parts])

    def encode(self, x_ND: Tensor) -> Tensor:
        """int32 [N, L]: the codes of float32 rows."""
        return encode(Codebook(list(self.codebooks.detach())), self.latents(x_ND))

    def reconstruct(self, x_ND: Tensor) -> Tensor:
        """float32 [N, D]: what the decoder makes of the codes of each row."""
        codes_NL, decoder = self.encode(x_ND).long(), copy.deepcopy(self.decoder).double()
        with torch.no_grad():
            latent_Nd = sum((book[codes] for book, codes in zip(self.codebooks.double(), codes_NL.T, strict=True)))
            parts = [decoder(latent_Nd[s]) * self.spread + self.mean for s in blocks(len(x_ND), 1, CHUNK)]
        return torch.cat([x_ND.new_zeros(0, x_ND.shape[1]), *(part.float() for part in parts)])

    def quantised(self, latent_Bd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the chosen codes with its gradient straight through, codes int64 [B, L], codebook loss (scalar)."""
        residual_Bd, total_Bd, loss, codes = latent_Bd, torch.zeros_like(latent_Bd), latent_Bd.new_zeros(()), []
        for book_Kd in self.codebooks:
            codes.append(nearest(residual_Bd.detach(), book_Kd.detach()))
            chosen_Bd = book_Kd[codes[-1]]
            loss = loss + F.mse_loss(chosen_Bd, residual_Bd.detach()) * self.size.latent
            loss = loss + F.mse_loss(residual_Bd, chosen_Bd.detach()) * self.size.latent * self.size.commitment
            residual_Bd, total_Bd = residual_Bd - chosen_Bd.detach(), total_Bd + chosen_Bd.detach()
        return latent_Bd + (total_Bd - latent_Bd).detach(), torch.stack(codes, 1), loss

    def loss(self, scaled_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, a mean over rows, and the codes int64 [B, L]."""
        latent_Bd, codes_BL, codebook_loss = self.quantised(self.encoder(scaled_BD))
        return F.mse_loss(self.decoder(latent_Bd), scaled_BD) * scaled_BD.shape[1] + codebook_loss, codes_BL

    @torch.no_grad()
    def start_codebooks(self, scaled_BD: Tensor, seed: int) -> None:
        """K-means of the residuals, level by level."""
        residual_Bd = self.encoder(scaled_BD)
        for level in range(self.size.levels):
            ids = torch.arange(len(residual_Bd), device=residual_Bd.device)
            found = lloyd(residual_Bd, ids, self.size.codes, salt=seed * 1_000_003 + level, iterations=10)
            self.codebooks[level] = found.centroids_KD
            residual_Bd = residual_Bd - found.centroids_KD[found.labels_N]

    @torch.no_grad()
    def restart(self, scaled_BD: Tensor, unused_LK: Tensor, generator: torch.Generator) -> None:
        """Puts every unused code on a random residual of the batch."""
        residual_Bd = self.encoder(scaled_BD)
        for book_Kd, unused_K in zip(self.codebooks, unused_LK, strict=True):
            rows = torch.randint(len(residual_Bd), (int(unused_K.sum()),), generator=generator)
            book_Kd[unused_K] = residual_Bd[rows.to(residual_Bd.device)]
            residual_Bd = residual_Bd - book_Kd[nearest(residual_Bd, book_Kd)]


def nearest(residual_Bd: Tensor, book_Kd: Tensor) -> Tensor:
    """int64 [B]: in float32, as training needs it; `model.nearest` is exact and slower."""
    return torch.addmm((book_Kd * book_Kd).sum(1), residual_Bd, book_Kd.T, alpha=-2).argmin(1)


def train_rq_vae(x_ND: Tensor, size: RqVaeSize, *, steps: int, seconds: float = float("inf"), seed: int = 0) -> RqVae:
    """Trains on float32 rows for `steps` batches or `seconds` of wall time, the start of the codebooks included, whichever
    ends first; at least one step. The same `seed` and `steps` give the same model on one CPU; `seconds` that cut it short
    do not. Raises ContractViolation without rows or with values that are not finite.
    """
    if len(x_ND) == 0 or not bool(x_ND.isfinite().all()):
        raise ContractViolation("RQ-VAE was given no rows, or a value that is not finite; rerun stage embed.")
    started = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RqVae(x_ND.shape[1], size).to(x_ND.device)
    model.mean.copy_(x_ND.mean(0))
    model.spread.copy_((x_ND - model.mean).square().mean().sqrt().clamp(min=1e-12))
    first = torch.randperm(len(x_ND), generator=generator)[: max(size.batch, FIRST_ROWS_A_CODE * size.codes)]
    model.start_codebooks(model.scaled(x_ND[first.to(x_ND.device)]), seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=size.learning_rate)
    used_LK = torch.zeros(model.codebooks.shape[:2], dtype=torch.bool, device=x_ND.device)
    for step, rows in enumerate(_batches(len(x_ND), size.batch, generator), start=1):
        scaled_BD = model.scaled(x_ND[rows.to(x_ND.device)])
        loss, codes_BL = model.loss(scaled_BD)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        model.curve.append(float(loss.detach()))
        used_LK.scatter_(1, codes_BL.T, True)
        if step >= steps or time.monotonic() - started >= seconds:
            break
        if size.restart_every and step % size.restart_every == 0:
            model.restart(scaled_BD, ~used_LK, generator)
            used_LK.zero_()
    model.seconds = time.monotonic() - started
    return model


def _batches(rows: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """int64 [B]: places, every row once in a pass, pass after pass."""
    while True:
        yield from torch.randperm(rows, generator=generator).split(batch)
