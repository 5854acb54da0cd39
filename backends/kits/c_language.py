"""The texts of the C kit: the digests of the files, and what a text model can do beyond running once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qc.backends.kits.c_embed import embedding
from qc.backends.kits.facts import Facts
from qc.backends.kits.text_tables import TEXT_FILE, text_tables
from qc.backends.manifest import digest

__all__ = ["generates", "texts", "write_tables"]

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

_EXAMPLE_TEXT = """    qc::Text text(arguments[1]);
    const std::set<int64_t> stop = {STOP};
    std::vector<int64_t> tokens = text.encode(count > 2 ? arguments[2] : "");
    for (int i = 0; i < 16; i++) {
      instance.feed(tokens);
      tokens = {instance.sample()};
      if (stop.count(tokens[0])) break;
      std::printf("%s", text.decode(tokens[0]).c_str());
    }
    std::printf("\\n");"""

_EXAMPLE_TOKENS = """    std::vector<int64_t> tokens;
    for (int i = 2; i < count; i++) tokens.push_back(std::atoll(arguments[i]));
    for (int i = 0; i < 16; i++) {
      instance.feed(tokens);
      tokens = {instance.sample()};
      std::printf("%lld\\n", static_cast<long long>(tokens[0]));
    }"""

_EXAMPLE_SEARCH = """    qc::Text text(arguments[1]);
    const std::vector<float> question = instance.embed(text.encode(count > 2 ? arguments[2] : ""));
    std::ifstream lines(count > 3 ? arguments[3] : "");
    std::vector<std::pair<float, std::string>> found;
    for (std::string line; std::getline(lines, line);) {
      const std::vector<float> vector = instance.embed(text.encode(line));
      found.emplace_back(std::inner_product(vector.begin(), vector.end(), question.begin(), 0.0f), line);
    }
    std::sort(found.rbegin(), found.rend());
    for (const auto &[score, line] : found) std::printf("%6.3f  %s\\n", score, line.c_str());"""

_EXAMPLE = """    std::printf("%zu bytes of working memory\\n", qc_memory(instance.get()));"""


def generates(directory: Path) -> bool:
    """Whether the library keeps a cache and generates text."""
    return "qc_feed" in (directory / "model.h").read_text("utf-8")


def write_tables(facts: Facts, directory: Path) -> None:
    """Writes the tables of the tokenizer where the code of the kit knows its kind."""
    tables = text_tables(directory / "tokenizer.json", facts.bos) if facts.tokenizer else None
    if tables is not None:
        (directory / TEXT_FILE).write_bytes(tables)


_TEXT_NOTE = """\
`qc::Text` turns text into token ids and back by `../tokenizer.bin`, which holds the tables of the model's tokenizer."""

_TOKENS_NOTE = """\
Token ids go in and come out. For text take a tokenizer library that reads `../tokenizer.json`, such as
[tokenizers-cpp](https://github.com/mlc-ai/tokenizers-cpp)."""


def texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """The texts that depend on the model."""
    generating, known = generates(directory), (directory / TEXT_FILE).is_file()
    names = ("model.weights", TEXT_FILE if known else "tokenizer.json")
    files = [(n, digest(directory / n)) for n in names if (directory / n).is_file()]
    embed = embedding(facts, directory) if known and not generating else None
    example, arguments = _EXAMPLE, ""
    if generating and known:
        example = _EXAMPLE_TEXT.replace("STOP", ", ".join(map(str, facts.stop)))
        arguments = ' "Once upon a time"'
    elif generating:
        example, arguments = _EXAMPLE_TOKENS, f" {facts.bos or 3} 17 200"
    elif embed is not None:
        example, arguments = _EXAMPLE_SEARCH, ' "a question" sentences.txt'
    return {
        "c_files": "\n".join(f'    {{"{n}", {f.bytes}ULL, "{f.sha256}"}},' for n, f in files),
        "cpp_methods": _GENERATE if generating else embed or "",
        "cpp_example": example,
        "c_arguments": arguments,
        "c_text_note": _TEXT_NOTE if known else _TOKENS_NOTE,
    }
