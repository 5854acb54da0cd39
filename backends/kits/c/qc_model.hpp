// The model for C++17: checked when it is loaded, freed when it goes out of scope. Errors are exceptions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"
#include "qc_check.h"
#include "qc_text.h"

namespace qc {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(int code) {
  if (code != QC_OK) throw Error(qc_error(code));
}

// The weights. Any number of instances share them.
class Model {
 public:
  // Checks every file in `directory`, then maps the weights.
  explicit Model(const std::string &directory) {
    char message[4500];
    if (qc_check(directory.c_str(), message, sizeof message)) throw Error(message);
    qc_model *model = nullptr;
    require(qc_open((directory + "/model.weights").c_str(), &model));
    model_.reset(model);
  }
  const qc_model *get() const { return model_.get(); }

 private:
  struct Close {
    void operator()(qc_model *model) const { qc_close(model); }
  };
  std::unique_ptr<qc_model, Close> model_;
};

// Working memory. For one thread at a time.
class Instance {
 public:
  explicit Instance(const Model &model, int threads = 1) {
    qc_options options = {};
    options.threads = threads;
    qc_instance *instance = nullptr;
    require(qc_create(model.get(), nullptr, &options, &instance));
    instance_.reset(instance);
  }
  qc_instance *get() const { return instance_.get(); }

  // Runs once: the sizes of the dimensions, and one array per port, in the order of model.h.
  void run(const std::vector<int64_t> &dims, const std::vector<const void *> &inputs, const std::vector<void *> &outputs) {
    if (dims.size() != QC_DIMENSIONS) throw Error("expected " + std::to_string(QC_DIMENSIONS) + " dimensions");
    require(qc_run(get(), dims.data(), inputs.data(), outputs.data()));
  }
@@cpp_methods@@
 private:
  struct Destroy {
    void operator()(qc_instance *instance) const { qc_destroy(instance); }
  };
  std::unique_ptr<qc_instance, Destroy> instance_;
};

// Text to token ids and back. Any number of threads may share it.
class Text {
 public:
  explicit Text(const std::string &directory) : text_(qc_text_open((directory + "/tokenizer.bin").c_str())) {
    if (!text_) throw Error("tokenizer.bin: missing or not readable in " + directory);
  }

  // Token ids of a text in UTF-8, with those that texts start and end with.
  std::vector<int64_t> encode(const std::string &text) const {
    std::vector<int64_t> tokens(text.size() + 2);
    tokens.resize(static_cast<size_t>(qc_text_encode(text_.get(), text.data(), text.size(), tokens.data())));
    return tokens;
  }

  // What a token stands for: bytes, of which those of several tokens may make up one character.
  std::string decode(int64_t token) const {
    size_t size = 0;
    const char *bytes = qc_text_decode(text_.get(), token, &size);
    return std::string(bytes, size);
  }

 private:
  struct Close {
    void operator()(qc_text *text) const { qc_text_close(text); }
  };
  std::unique_ptr<qc_text, Close> text_;
};

}  // namespace qc
