from __future__ import annotations

import math

import numpy as np
import pytest

from qc.backends.decoding import generate
from qc.backends.ort.backend import OrtCpu
from qc.backends.reference import ModelRunner
from qc.backends.sampling import GREEDY, Sampling
from qc.ir.errors import InputError

LOGITS = np.log(np.array([1, 8, 2, 4, 1], np.float32))


def likely(sampling, logits=LOGITS):
    tokens, probabilities = sampling.distribution(logits)
    return dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, {0: 1, 1: 8, 2: 2, 3: 4, 4: 1}),
        ({"temperature": 0.5}, {0: 1, 1: 64, 2: 4, 3: 16, 4: 1}),
        ({"temperature": 2}, {0: 1, 1: 8**0.5, 2: 2**0.5, 3: 2, 4: 1}),
        ({"top_k": 3}, {1: 8, 2: 2, 3: 4}),
        ({"top_k": 99}, {0: 1, 1: 8, 2: 2, 3: 4, 4: 1}),
        ({"top_p": 0.5}, {1: 8}),
        ({"top_p": 0.51}, {1: 8, 3: 4}),
        ({"top_p": 1e-9}, {1: 8}),
        ({"top_k": 3, "top_p": 0.6}, {1: 8, 3: 4}),
        ({"top_k": 2, "top_p": 0.6}, {1: 8}),  # 8 of 12 are more than 0.6
        ({"temperature": 1e-300}, {0: 0, 1: 1, 2: 0, 3: 0, 4: 0}),
    ],
)
def test_temperature_comes_first_then_the_k_likeliest_then_the_share_of_their_probability(options, weights):
    total = sum(weights.values())
    assert likely(Sampling(**options)) == pytest.approx({t: w / total for t, w in weights.items()}, abs=1e-6)


def test_tokens_come_as_often_as_they_are_likely():
    choose = Sampling(top_k=3, seed=7).chooser()
    drawn = [choose(LOGITS[None, None]) for _ in range(2000)]
    found = {token: drawn.count(token) / len(drawn) for token in set(drawn)}
    assert found == pytest.approx({1: 8 / 14, 3: 4 / 14, 2: 2 / 14}, abs=0.03)


def test_what_is_excluded_is_never_drawn():
    logits = LOGITS.copy()
    logits[[1, 3]] = -np.inf
    assert likely(Sampling(), logits) == pytest.approx({0: 0.25, 1: 0, 2: 0.5, 3: 0, 4: 0.25})


@pytest.mark.parametrize("kind", ["plain", "appending", "sharing"])
def test_every_way_to_generate_draws_alike(build, tmp_path, kind):
    model = build(kind)
    expected = list(generate(ModelRunner(build("plain")), [3, 5, 7], 12, sampling=Sampling(seed=3)))
    OrtCpu().emit(model, tmp_path)
    runner = OrtCpu().open(tmp_path, threads=1)
    assert list(runner.generate([3, 5, 7], 12, sampling=Sampling(seed=3))) == expected
    assert list(runner.generate([3, 5, 7], 12, sampling=Sampling(seed=4))) != expected
    greedy = list(runner.generate([3, 5, 7], 12))
    assert greedy != expected
    for same in (GREEDY, Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-9)):
        assert list(runner.generate([3, 5, 7], 12, sampling=same)) == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature of 0 \(the likeliest token\) or more; found -0.1"),
        ({"temperature": math.nan}, "temperature .* found nan"),
        ({"temperature": math.inf}, "temperature .* found inf"),
        ({"top_k": -1}, "top-k of 1 or more tokens, or 0 for all; found -1"),
        ({"top_p": 0}, r"top-p above 0 and up to 1 \(all tokens\); found 0"),
        ({"top_p": 1.5}, "top-p .* found 1.5"),
        ({"seed": -1}, r"seed from 0 to 2\^64 - 1; found -1"),
    ],
)
def test_options_out_of_their_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)
