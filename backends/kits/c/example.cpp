// Runs the model: example DIRECTORY@@c_arguments@@
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "qc_model.hpp"

int main(int count, char **arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: %s DIRECTORY [WHAT]\n", arguments[0]);
    return 2;
  }
  try {
    qc::Model model(arguments[1]);
    qc::Instance instance(model);
@@cpp_example@@
  } catch (const qc::Error &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
