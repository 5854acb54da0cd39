"""The texts of the C kit: the digests of the files, and what a decoder can do beyond running once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qc.backends.kits.facts import Facts
from qc.backends.manifest import digest

__all__ = ["generates", "texts"]

_FILES = ("model.weights", "tokenizer.json")

_GENERATE = """
  // Appends tokens to the text.
  void feed(const std::vector<int64_t> &tokens) {
    require(qc_feed(get(), tokens.data(), static_cast<int64_t>(tokens.size())));
  }

  // Chooses the next token, greedily if no sampling is given.
  int64_t sample(qc_sampling *sampling = nullptr) {
    int64_t token = 0;
    require(qc_sample(get(), sampling, &token));
    return token;
  }

  // Logits behind the last token: QC_VOCABULARY numbers.
  const float *logits() const { return qc_logits(get()); }

  // Forgets the text.
  void reset() { require(qc_reset(get())); }
"""

_EXAMPLE_TEXT = """    std::vector<int64_t> tokens;
    for (int i = 2; i < count; i++) tokens.push_back(std::atoll(arguments[i]));
    for (int i = 0; i < 16; i++) {
      instance.feed(tokens);
      tokens = {instance.sample()};
      std::printf("%lld\\n", static_cast<long long>(tokens[0]));
    }"""

_EXAMPLE = """    std::printf("%zu bytes of working memory\\n", qc_memory(instance.get()));"""


def generates(directory: Path) -> bool:
    """Whether the library keeps a cache and generates text."""
    return "qc_feed" in (directory / "model.h").read_text("utf-8")


def texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """The texts that depend on the model."""
    text = generates(directory)
    files = [(n, digest(directory / n)) for n in _FILES if (directory / n).is_file()]
    return {
        "c_files": "\n".join(f'    {{"{n}", {f.bytes}ULL, "{f.sha256}"}},' for n, f in files),
        "cpp_generate": _GENERATE if text else "",
        "cpp_example": _EXAMPLE_TEXT if text else _EXAMPLE,
        "c_arguments": f" {facts.bos or 3} 17 200" if text else "",
    }
