// One call of the op as plain data: the binding fills it from tensors, and rows read it.
#pragma once

#include <stdint.h>

#include <vector>

#include "tiles.h"

namespace mod_fused {

constexpr int kMaxModels = 9;  // reference and at most 8 policies

// In place of the model whose peak plausibility looks at.
constexpr int kNoModel = -1;

// A tensor [B, n] with contiguous rows.
struct Rows {
  const char* data = nullptr;
  DType dtype = DType::float32;
  int64_t row_bytes = 0;

  Source row(int64_t b, float scale) const { return {data + b * row_bytes, dtype, scale}; }
};

// A parameter with one entry for all rows or one per row.
template <class T> struct PerRow {
  std::vector<T> entries;
  const T& operator[](int64_t b) const { return entries[entries.size() == 1 ? 0 : (size_t)b]; }
};

// `width` numbers for all rows together, or for each row.
struct PerRowVector {
  std::vector<double> entries;
  int width = 0;
  const double* operator[](int64_t b) const {
    return entries.data() + ((int64_t)entries.size() == width ? 0 : b * width);
  }
};

struct Mask {
  const char* data = nullptr;  // null: everything is allowed
  bool packed = false;
  int64_t row_bytes = 0, element_bytes = 0;

  bool allows(int64_t b, int64_t token) const {
    const char* row = data + b * row_bytes;
    if (!packed) return row[token * element_bytes] != 0;
    const int32_t word = *reinterpret_cast<const int32_t*>(row + (token / 32) * element_bytes);
    return ((uint32_t)word >> (token % 32)) & 1u;
  }
  bool contiguous() const { return element_bytes == (packed ? 4 : 1); }
};

struct Request {
  int64_t rows = 0, vocab = 0;
  int models = 0;          // tensors of logits, reference first if there is one
  bool reference = true;
  Rows logits[kMaxModels];
  float scales[kMaxModels];
  PerRowVector weights;    // of the policies
  double weight_rounding = 0x1p-40;  // under reverse KL a 1 - sum w no larger than this counts as 0
  int64_t divergence = kReverseKL;   // its number
  double alpha = 0.0;
  bool exact = true;       // normalizer: "exact", or "zero"

  std::vector<Rows> values;
  PerRowVector value_weights;
  const int64_t* value_ids = nullptr;  // candidates, [B, candidates]; null: values are dense
  int64_t candidates = 0, value_ids_row = 0, value_ids_column = 0;  // strides in elements

  std::vector<double> prefix;      // [B, models], or empty
  std::vector<double> own_prefix;  // [B], or empty: the mixture's
  PerRow<double> plausibility;     // 0: off
  int plausibility_model = kNoModel;

  PerRow<float> temperature, min_p;
  PerRow<double> top_p;
  PerRow<int64_t> top_k, position;
  PerRow<uint64_t> seeds;  // one per row
  Mask mask;
  Rows bias;             // data null: none
  bool filters = false;  // some row has a mask, bias, top-k, top-p or min-p
  bool model_logprobs = false, proposal_logprobs = false;

  bool log_linear() const { return divergence == kReverseKL; }

  // Outputs: `log_probs` [B, V] only, or all others.
  float* log_probs = nullptr;
  int64_t* tokens = nullptr;
  float* logprobs = nullptr;
  bool* valid = nullptr;
  float* token_model_logprobs = nullptr;  // [B, models]
  float* token_proposal_logprobs = nullptr;
};

// Runs every row of a request, on torch's threads.
void run(const Request& request);

}  // namespace mod_fused
