"""Hadamard matrices: orthogonal, all entries equally large, so that they spread a channel evenly over all.

Orders come from two sources and their products with powers of two. Sylvester: powers of two. Paley: for ``q`` a power
of an odd prime, ``q + 1`` if ``q = 3 mod 4``, else ``2 (q + 1)``.

Source: Paley, On Orthogonal Matrices, 1933, lemmas 2 and 3.
"""

from __future__ import annotations

import itertools

import numpy as np

__all__ = ["factors_of", "hadamard"]

_BITS = 6
"""Binary logarithm of the largest power of two that is one factor: 64 multiplications per element are still cheap."""

_LARGEST = 1024
"""Largest factor that is not made of smaller ones."""

_LARGEST_DEGREE = 3
"""Of the extensions of prime fields that are tried: a polynomial up to this degree is irreducible if it has no root."""

_TWO = np.array([[1, 1], [1, -1]], np.int8)


def hadamard(order: int) -> np.ndarray | None:
    """A matrix of -1 and 1, int8 ``[order, order]``, with ``H @ H.T = order``; None if the sources have none."""
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order == 2:
        return _TWO
    if order % 4:
        return None
    if order & (order - 1):
        one, two = order - 1, order // 2 - 1
        if one % 4 == 3 and (character := _quadratic_character(one)) is not None:
            return np.eye(order, dtype=np.int8) + _bordered(character, -1)
        if two % 4 == 1 and (character := _quadratic_character(two)) is not None:
            flipped = np.array([[1, -1], [-1, -1]], np.int8)
            return np.kron(_bordered(character, 1), _TWO) + np.kron(np.eye(two + 1, dtype=np.int8), flipped)
    half = hadamard(order // 2)
    return None if half is None else np.kron(_TWO, half)


def factors_of(width: int, rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], int]:
    """Orthogonal matrices whose Kronecker product is ``[width, width]``: Hadamard matrices, scaled to unit rows.

    With ``width = 2^k m`` and odd ``m``, one factor takes ``m`` and as few powers of two as it needs to be one. Where
    none exists, it is a random orthogonal matrix ``[m, m]``.

    Args:
        width: Number of channels.
        rng: Draws that matrix.

    Returns:
        The factors in float64, and the order of the random one: 1 if there is none.
    """
    powers = (width & -width).bit_length() - 1
    odd, factors, drawn = width >> powers, [], 1
    if odd > 1:
        tried = (t for t in range(2, powers + 1) if odd << t <= _LARGEST)
        found = next(((t, h) for t in tried if (h := hadamard(odd << t)) is not None), None)
        if found is None:
            drawn = odd
            factors.append(np.linalg.qr(rng.standard_normal((odd, odd)))[0])
        else:
            powers -= found[0]
            factors.append(_unit(found[1]))
    count = -(-powers // _BITS)
    factors += [_unit(hadamard(1 << (powers + i) // count)) for i in range(count)]
    return tuple(factors), drawn


def _unit(matrix: np.ndarray | None) -> np.ndarray:
    assert matrix is not None, "powers of two, and what was found, exist"
    return matrix / np.sqrt(len(matrix))


def _bordered(character: np.ndarray, corner: int) -> np.ndarray:
    """``[[0, 1], [corner, character]]``."""
    q = len(character)
    held = np.zeros((q + 1, q + 1), np.int8)
    held[0, 1:], held[1:, 0], held[1:, 1:] = 1, corner, character
    return held


def _quadratic_character(q: int) -> np.ndarray | None:
    """``chi(a - b)`` for all elements of the field of q elements: 1 for squares, -1 for others, 0 for zero.

    None if q is no power of an odd prime of degree `_LARGEST_DEGREE` at most.
    """
    prime = next((p for p in range(3, q + 1, 2) if q % p == 0), 0)
    degree = next((d for d in range(1, _LARGEST_DEGREE + 1) if prime and prime**d == q), 0)
    if not degree:
        return None
    elements = np.array(list(itertools.product(range(prime), repeat=degree)))
    places = prime ** np.arange(degree)[::-1]
    chi = np.full(q, -1, np.int8)
    chi[_squares(elements, prime) @ places] = 1
    chi[0] = 0
    return chi[((elements[:, None] - elements[None]) % prime) @ places]


def _squares(elements: np.ndarray, prime: int) -> np.ndarray:
    """The squares of polynomials (rows of coefficients, highest first) modulo an irreducible one."""
    degree = elements.shape[1]
    product = np.zeros((len(elements), 2 * degree - 1), int)
    for i, j in itertools.product(range(degree), repeat=2):
        product[:, i + j] += elements[:, i] * elements[:, j]
    tail = _irreducible(prime, degree)
    for lead in range(degree - 1):
        product[:, lead + 1 : lead + 1 + degree] -= product[:, lead : lead + 1] * tail
        product[:, lead] = 0
    return product[:, degree - 1 :] % prime


def _irreducible(prime: int, degree: int) -> np.ndarray:
    """The lower coefficients, highest first, of a monic polynomial without a root."""
    points = np.arange(prime)
    for tail in itertools.product(range(prime), repeat=degree):
        if np.all(np.polyval((1, *tail), points) % prime):
            return np.array(tail)
    return np.zeros(degree, int)  # degree 1: no reduction takes place
