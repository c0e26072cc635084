// Reverse KL and its relatives: log pi* is a weighted sum of logits and values, up to a constant (design §2).

#include <algorithm>
#include <cmath>
#include <limits>

#include "../scalar_math.h"
#include "row.h"

namespace mod_fused {

namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
}

// c_0 l_0, then the policies, then the values: the order is part of the contract (design §3).
void Row::collect_terms() {
  double sum = 0.0;
  const int first = request_.reference ? 1 : 0;
  for (int model = first; model < request_.models; ++model) sum += policy_weight(model);
  if (request_.reference) terms_.push_back({logits(0), (float)(1.0 - sum)});
  for (int model = first; model < request_.models; ++model)
    if (policy_weight(model) != 0.0) terms_.push_back({logits(model), (float)policy_weight(model)});
  model_terms_ = terms_.size();
  for (size_t j = 0; j < request_.values.size(); ++j)
    if (value_weight(j) != 0.0) terms_.push_back({values(j), (float)value_weight(j)});
}

// The usual case. A tile's keys live on the stack; per tile two numbers are kept, and the winner's tile is mixed again.
bool Row::draw_log_linear() {
  const float beta = temperature_ > 0.0f ? 1.0f / temperature_ : 1.0f;
  const Term* terms = terms_.data();
  const int count = (int)terms_.size();
  for_tiles([&](int64_t tile) {
    alignas(64) float key[kTile];
    const int n = tile_size(tile);
    const TileMix mix = loops_.log_linear(terms, count, tile * kTile, n, key);
    scratch_.mixes[tile] = mix;
    const bool empty = !(mix.peak > -kInfinity);
    scratch_.sums[tile] = empty ? 0.0f : loops_.sum_exp(key, n, mix.peak, 1.0f);
    scratch_.masses[tile] = beta == 1.0f ? scratch_.sums[tile] : empty ? 0.0f : loops_.sum_exp(key, n, mix.peak, beta);
  });
  float peak = -kInfinity;
  for (const TileMix& mix : scratch_.mixes) {
    if (mix.broken) return false;
    peak = std::max(peak, mix.peak);
  }
  if (!(peak > -kInfinity)) return false;
  double sum = 0.0;
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    const double below = (double)scratch_.mixes[tile].peak - peak;
    if (scratch_.sums[tile] > 0.0f) sum += scratch_.sums[tile] * std::exp(below);
    scratch_.masses[tile] *= std::exp((float)below * beta);
  }
  log_norm_ = peak + std::log(sum);

  alignas(64) float key[kTile];
  if (temperature_ == 0.0f) {
    int64_t tile = 0;
    while (scratch_.mixes[tile].peak != peak) ++tile;
    loops_.log_linear(terms, count, tile * kTile, tile_size(tile), key);
    token_ = tile * kTile + (std::find(key, key + tile_size(tile), peak) - key);
    token_key_ = peak;
    return true;
  }
  const bool drawn = race([&](int64_t tile, float* mass) {
    loops_.log_linear(terms, count, tile * kTile, tile_size(tile), key);
    loops_.exps(key, tile_size(tile), peak, beta, mass);
  });
  if (drawn) token_key_ = key[token_ % kTile];
  return drawn;
}

bool Row::log_linear_keys() {
  float* keys = scratch_.first;
  if (request_.value_ids) {
    if (!candidate_keys()) return false;
  } else {
    for_tiles([&](int64_t tile) {
      scratch_.mixes[tile] =
          loops_.log_linear(terms_.data(), (int)terms_.size(), tile * kTile, tile_size(tile), keys + tile * kTile);
    });
    for (const TileMix& mix : scratch_.mixes)
      if (mix.broken) return false;
  }
  const int constrained = request_.plausibility_model;
  for_tiles([&](int64_t tile) {
    const int n = tile_size(tile);
    float* key = keys + tile * kTile;
    if (constrained >= 0) {
      alignas(64) float x[kTile];
      loops_.load(logits(constrained), tile * kTile, n, x);
      const float peak = (float)model_peaks_[constrained];
      for (int i = 0; i < n; ++i) key[i] = x[i] - peak >= request_.log_plausibility ? key[i] : -kInfinity;
    }
    const float peak = *std::max_element(key, key + n);
    scratch_.mixes[tile].peak = peak;
    scratch_.sums[tile] = peak > -kInfinity ? loops_.sum_exp(key, n, peak, 1.0f) : 0.0f;
  });
  float peak = -kInfinity;
  for (const TileMix& mix : scratch_.mixes) peak = std::max(peak, mix.peak);
  if (!(std::fabs(peak) < kInfinity)) return false;
  double sum = 0.0;
  for (int64_t tile = 0; tile < tiles_; ++tile)
    if (scratch_.sums[tile] > 0.0f) sum += scratch_.sums[tile] * std::exp((double)scratch_.mixes[tile].peak - peak);
  log_norm_ = peak + std::log(sum);
  return true;
}

// Everything is excluded but the candidates, which are few: one at a time. `sum_models` has looked for broken logits.
bool Row::candidate_keys() {
  std::fill(scratch_.first, scratch_.first + request_.vocab, -kInfinity);
  bool good = true;
  for (int64_t k = 0; k < request_.candidates; ++k) {
    const int64_t token = candidate(k);
    if (token < 0) continue;
    float key = 0.0f;
    bool inside = true;
    for (size_t t = 0; t < terms_.size(); ++t) {
      const float x = element(loops_, terms_[t].source, t < model_terms_ ? token : k);
      good &= x < kInfinity;
      inside &= x > -kInfinity;
      key = fused_multiply_add(terms_[t].weight, x, key);
    }
    scratch_.first[token] = inside ? key : -kInfinity;
  }
  return good;
}

}  // namespace mod_fused
