"""What every test shares: it reaches no network, and random examples are the same on every run."""

from __future__ import annotations

import os

import hypothesis

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

hypothesis.settings.register_profile("qc", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("qc")
