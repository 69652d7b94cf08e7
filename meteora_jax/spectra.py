"""What routers that need no training read off an adapter's matrices, once, when the first of them is asked.

With dW = s B A, and QR of both factors, B = Q_B R_B and A^T = Q_A R_A, the r x r matrix R_B R_A^T = U S V^T has the
singular values of B A, whose right singular vectors are Q_A V. Neither Q is needed: the first of them is
A^T (R_B^T u) / sigma, so that its product with an input x is one with the shrink A x, which the adapter takes anyway;
and ||dW x|| is ||s R_B (A x)||.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

SPECTRA = ("lora_arrow", "lora_spectr")  # the arrays of a model that hold them, zeros until then


def spectra(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of adapters a [L, A, R, I], b [L, A, R, O] and scale [L, A], in float32.

    Returns:
        arrow [L, A, R]: the first right singular vector of dW is A^T arrow, its sign free; zeros where dW is zero.
        spectr [L, A, R, R]: ||dW x|| is ||spectr (A x)||.
    """
    with ThreadPoolExecutor() as pool:  # LAPACK lets go of Python's lock
        layers = list(pool.map(_layer, a, b))
    arrow, r = (np.stack(parts) for parts in zip(*layers, strict=True))
    return arrow, np.asarray(scale, np.float32)[..., None, None] * r


def _layer(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """arrow [A, R] and R_B [A, R, R] of a [A, R, I] and b [A, R, O]."""
    r_a, r_b = (_triangle(np.asarray(z, np.float32).swapaxes(1, 2)) for z in (a, b))
    u, sigma, _ = np.linalg.svd(r_b @ r_a.swapaxes(1, 2))
    first = np.where(sigma[:, :1] > 0, sigma[:, :1], np.inf)
    return np.einsum("aqr,aq->ar", r_b, u[..., 0]) / first, r_b


def _triangle(z: np.ndarray) -> np.ndarray:
    """R of QR of z [A, N, R], [A, R, R] also where there are fewer rows than columns."""
    missing = max(z.shape[2] - z.shape[1], 0)
    return np.asarray(np.linalg.qr(np.pad(z, ((0, 0), (0, missing), (0, 0))), mode="r"))
