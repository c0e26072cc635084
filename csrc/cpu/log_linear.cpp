// Reverse KL, with or without a reference: log pi* is a weighted sum of logits and values, up to a constant.

#include <algorithm>
#include <cmath>
#include <limits>

#include "../scalar_math.h"
#include "row.h"

namespace mod_fused {

namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLeastSum = 1e-20;  // below it, what float32 cuts off could show
constexpr float kLeastMass = 1e-33f;
}

// The reference, then the policies, then the values: every backend adds the terms in this order, so that rounding is the same.
void Row::collect_terms() {
  for (int model = 0; model < request_.models; ++model) {
    const bool own = request_.reference && model == 0;
    if (counts(model)) terms_.push_back({logits(model), (float)(own ? own_coefficient_ : policy_weight(model))});
  }
  model_terms_ = terms_.size();
  for (size_t j = 0; j < request_.values.size(); ++j)
    if (value_weight(j) != 0.0) terms_.push_back({values(j), (float)value_weight(j)});
}

// Tile sums of exp(key - level) in one loop over the logits; the level is the peak of the first tile. Sets `certain` to false
// if that level is too far from 0 or from the other tiles' keys. Returns false if a tensor holds NaN or +inf.
bool Row::sum_log_linear(float* level, bool* certain) {
  const Term* terms = terms_.data();
  const int count = (int)terms_.size();
  alignas(64) float first[kTile];
  const TileMix mix = loops_.log_linear(terms, count, 0, tile_size(0), first);
  if (mix.broken) return false;
  *level = mix.peak > -kInfinity ? mix.peak : 0.0f;
  *certain = std::fabs(*level) <= kFarLevel;
  if (!*certain) return true;
  for_tiles([&](int64_t tile) {
    const int n = tile_size(tile);
    KeySum part = loops_.log_linear_sum(terms, count, tile * kTile, n, *level);
    scratch_.mixes[tile].broken = false;
    if (!std::isfinite(part.sum) || part.least == -kInfinity) {
      alignas(64) float key[kTile];
      scratch_.mixes[tile] = loops_.log_linear(terms, count, tile * kTile, n, key);
      part.sum = loops_.sum_exp(key, n, *level, 1.0f);
    }
    scratch_.sums[tile] = part.sum;
  });
  double sum = 0.0;
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    if (scratch_.mixes[tile].broken) return false;
    sum += scratch_.sums[tile];
  }
  *certain = std::isfinite(sum) && sum > kLeastSum;
  level_ = *level;
  log_norm_ = std::log(sum);
  return true;
}

// The usual case: the keys of one tile at a time are on the stack, and the winning tile is computed again.
bool Row::draw_log_linear() {
  const Term* terms = terms_.data();
  const int count = (int)terms_.size();
  alignas(64) float key[kTile];
  float level = 0.0f, beta = 1.0f;
  bool certain = false;
  if (temperature_ == 1.0f) {
    if (!sum_log_linear(&level, &certain)) return false;
    // A sum this small is only the least values of exp2_of, which should be 0.
    for (int64_t tile = 0; tile < tiles_; ++tile)
      scratch_.masses[tile] = scratch_.sums[tile] > kLeastMass ? scratch_.sums[tile] : 0.0f;
  }
  if (!certain) {
    beta = inverse_temperature();
    for_tiles([&](int64_t tile) {
      alignas(64) float keys[kTile];
      const int n = tile_size(tile);
      const TileMix mix = loops_.log_linear(terms, count, tile * kTile, n, keys);
      scratch_.mixes[tile] = mix;
      const bool empty = !(mix.peak > -kInfinity);
      scratch_.sums[tile] = empty ? 0.0f : loops_.sum_exp(keys, n, mix.peak, 1.0f);
      scratch_.masses[tile] = beta == 1.0f ? scratch_.sums[tile]
                              : empty      ? 0.0f
                                           : loops_.sum_exp(keys, n, mix.peak, beta);
    });
    level = -kInfinity;
    for (const TileMix& mix : scratch_.mixes) {
      if (mix.broken) return false;
      level = std::max(level, mix.peak);
    }
    if (!(level > -kInfinity)) return false;
    double sum = 0.0;
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const double below = (double)scratch_.mixes[tile].peak - level;
      if (scratch_.sums[tile] > 0.0f) sum += scratch_.sums[tile] * std::exp(below);
      scratch_.masses[tile] *= std::exp((float)below * beta);
    }
    level_ = level;
    log_norm_ = std::log(sum);
  }
  if (temperature_ == 0.0f) {
    int64_t tile = 0;
    while (scratch_.mixes[tile].peak != level) ++tile;
    loops_.log_linear(terms, count, tile * kTile, tile_size(tile), key);
    token_ = tile * kTile + (std::find(key, key + tile_size(tile), level) - key);
    token_key_ = level;
    return true;
  }
  const bool drawn = race([&](int64_t tile, float* mass) {
    loops_.log_linear(terms, count, tile * kTile, tile_size(tile), key);
    loops_.exps(key, tile_size(tile), level, beta, mass);
  });
  if (!drawn) return false;
  token_key_ = key[token_ % kTile];
  propose((token_key_ - level) * beta);
  return true;
}

bool Row::log_linear_keys() {
  if (request_.value_ids && !candidate_keys()) return false;
  for_tiles([&](int64_t tile) {
    const int64_t begin = tile * kTile;
    const int n = tile_size(tile);
    float* key = scratch_.keys() + begin;
    TileMix& mix = scratch_.mixes[tile];
    mix.broken = false;
    if (!request_.value_ids) mix = loops_.log_linear(terms_.data(), (int)terms_.size(), begin, n, key);
    if (plausibility_model_ != kNoModel) {
      alignas(64) float x[kTile];
      exclude_implausible(tile, -kInfinity, key);
      // Plausibility may have excluded a key that overflowed. NaN or +inf in a tensor still makes the row invalid.
      bool broken = false;
      for (int i = 0; i < n; ++i) broken |= !(key[i] < kInfinity);
      for (size_t t = 0; t < terms_.size() && !request_.value_ids; ++t) {
        loops_.load(terms_[t].source, begin, n, x);
        for (int i = 0; i < n; ++i) broken |= !(x[i] < kInfinity);
      }
      mix.broken &= broken;
    }
    sum_tile(tile);
  });
  for (const TileMix& mix : scratch_.mixes)
    if (mix.broken) return false;
  return sum_tiles();
}

// The keys of the candidates, one by one; all other tokens are excluded. `sum_models` has checked the logits for NaN and +inf.
bool Row::candidate_keys() {
  std::fill(scratch_.keys(), scratch_.keys() + request_.vocab, -kInfinity);
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
    scratch_.keys()[token] = inside ? key : -kInfinity;
  }
  return good;
}

}  // namespace mod_fused
