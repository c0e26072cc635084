// Shares a call among threads: whole rows where there are enough, otherwise the tiles of one row after the other. Both ways add
// the same tile sums in the same order, so the results do not depend on the choice.

#include <torch/csrc/stable/ops.h>

#include "row.h"

namespace mod_fused {

namespace {

// Logits below which waking another thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 14;

Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace

void run(const Request& request) {
  const int64_t tiles = (request.vocab + kTile - 1) / kTile;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t row_work = request.vocab * (request.models + (int64_t)request.values.size());
  // The log-linear draw without filters needs no memory per token.
  const bool whole_row = !request.log_linear() || request.log_probs || request.mask.data ||
                         request.value_ids || request.plausibility_model != kNoModel || request.filters;

  const TileRunner serial = [](int64_t count, const TileBody& body) { body(0, count); };
  const TileRunner parallel = [&](int64_t count, const TileBody& body) {
    torch::stable::parallel_for(0, count, (count + threads - 1) / threads, body);
  };
  const auto run_rows = [&](int64_t begin, int64_t end, const TileRunner& run_tiles) {
    Scratch& scratch = thread_scratch();
    scratch.reserve(tiles, request.models, whole_row, request.bias.data != nullptr);
    for (int64_t b = begin; b < end; ++b) Row(request, b, scratch, run_tiles).run();
  };

  if (threads == 1 || request.rows * row_work <= kSerialWork) {
    run_rows(0, request.rows, serial);
  } else if (request.rows >= threads) {
    torch::stable::parallel_for(0, request.rows, 1, [&](int64_t begin, int64_t end) { run_rows(begin, end, serial); });
  } else {
    run_rows(0, request.rows, parallel);
  }
}

}  // namespace mod_fused
