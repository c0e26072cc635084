// Mask and bias on keys; top-k and top-p: the least key that each keeps.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "../scalar_math.h"
#include "row.h"

namespace mod_fused {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kFixedPoint = 0x1p40f;
constexpr uint32_t kBuckets = 2048;
constexpr double kMargin = 1e-3;  // far more than float32's rounding of an exponent

}  // namespace

void Row::apply_mask(int64_t tile) const {
  const Mask& mask = request_.mask;
  const int64_t begin = tile * kTile;
  const int n = tile_size(tile);
  const char* row = mask.data + b_ * mask.row_bytes;
  float* key = scratch_.keys() + begin;
  if (mask.contiguous() && mask.packed) {
    loops_.filters.mask_bits(reinterpret_cast<const int32_t*>(row) + begin / 32, n, key);
  } else if (mask.contiguous()) {
    loops_.filters.mask_bytes(reinterpret_cast<const uint8_t*>(row) + begin, n, key);
  } else {
    for (int i = 0; i < n; ++i) key[i] = mask.allows(b_, begin + i) ? key[i] : -kInfinity;
  }
}

bool Row::add_bias() {
  const Source bias = request_.bias.row(b_, 1.0f);
  for_tiles([&](int64_t tile) {
    alignas(64) float x[kTile];
    const int n = tile_size(tile);
    loops_.load(bias, tile * kTile, n, x);
    scratch_.slopes[tile] = loops_.filters.highest_bias(scratch_.keys() + tile * kTile, x, n);
  });
  float highest = -kInfinity;
  for (float of_tile : scratch_.slopes) {
    if (std::isnan(of_tile)) return false;
    highest = std::max(highest, of_tile);
  }
  if (highest == -kInfinity) return false;  // no token is left
  for_tiles([&](int64_t tile) {
    alignas(64) float x[kTile];
    const int64_t begin = tile * kTile;
    const int n = tile_size(tile);
    float* key = scratch_.keys() + begin;
    std::copy(key, key + n, scratch_.unbiased.data() + begin);
    loops_.load(bias, begin, n, x);
    loops_.filters.add_bias(x, n, (float)level_, highest, key);
    scratch_.mixes[tile].peak = loops_.filters.peak(key, n);
  });
  return true;
}

void Row::collect(float least) {
  for_tiles([&](int64_t tile) {
    const int64_t begin = tile * kTile;
    scratch_.counts[tile] = scratch_.mixes[tile].peak >= least
                                ? loops_.filters.above(scratch_.keys() + begin, tile_size(tile), least, scratch_.candidates() + begin)
                                : 0;
  });
}

// The largest candidate such that it and all larger ones together weigh at least `needed`; -inf if all candidates weigh less.
// The first round sorts them into buckets by equal steps of the key, later rounds by the bits in which the remaining keys
// differ. Sums of integers do not depend on the order. The candidates are overwritten.
template <class Weigh> float Row::rank(float peak, int64_t needed, const Weigh& weigh) {
  const FilterLoops& loops = loops_.filters;
  const auto for_candidates = [&](const auto& body) {
    for (int64_t tile = 0; tile < tiles_; ++tile)
      if (scratch_.counts[tile] > 0) body(scratch_.candidates() + tile * kTile, &scratch_.counts[tile]);
  };
  uint32_t buckets[kTile];
  int64_t weights[kTile], sums[kBuckets];
  // Keeps only the candidates of the bucket that `needed` falls into. Returns the bucket, or -1 if there is none.
  const auto narrow = [&](uint32_t last, const auto& sort) {
    std::fill(sums, sums + last + 1, 0);
    for_candidates([&](const float* key, const int* n) {
      weigh(key, *n, weights);
      sort(key, *n);
      for (int i = 0; i < *n; ++i) sums[buckets[i]] += weights[i];
    });
    uint32_t bucket = last;
    for (; bucket > 0 && sums[bucket] < needed; --bucket) needed -= sums[bucket];
    if (sums[bucket] < needed) return int64_t{-1};
    for_candidates([&](float* key, int* n) {
      sort(key, *n);
      *n = loops.pick(buckets, bucket, *n, key);
    });
    return (int64_t)bucket;
  };

  float least = peak;
  const auto find_least = [&](const float* key, const int* n) { least = std::min(least, loops.least(key, *n)); };
  for_candidates(find_least);
  const float scale = (float)(kBuckets - 2) / (peak - least);
  if (scale > 0.0f && scale < kInfinity) {
    if (narrow(kBuckets - 1, [&](const float* key, int n) { loops.spread(key, n, least, scale, buckets); }) < 0)
      return -kInfinity;
    least = peak;
    for_candidates(find_least);
  }
  uint32_t base = ordered(least), range = ordered(peak) - base;
  for (;;) {
    int shift = 0;
    while (range >> shift >= kBuckets) ++shift;
    const int64_t bucket = narrow(range >> shift, [&](const float* key, int n) { loops.buckets(key, n, base, shift, buckets); });
    if (bucket < 0) return -kInfinity;
    base += (uint32_t)bucket << shift;
    if (shift == 0) return unordered(base);
    range = (1u << shift) - 1;
  }
}

// The k-th largest key. The least of any k keys is a lower bound of it: first of k tiles' peaks, then of k peaks of their groups.
// Few keys are above the bound, and only those become candidates.
float Row::top_k_cut(float peak) {
  const auto count = [](const float*, int n, int64_t* weights) { std::fill(weights, weights + n, 1); };
  float bound = kLowest;
  if (top_k_ <= tiles_) {
    for (int64_t tile = 0; tile < tiles_; ++tile) scratch_.slopes[tile] = scratch_.mixes[tile].peak;
    const auto kth = scratch_.slopes.begin() + (top_k_ - 1);
    std::nth_element(scratch_.slopes.begin(), kth, scratch_.slopes.end(), std::greater<float>());
    bound = std::max(bound, *kth);
  }
  if (top_k_ <= tiles_ * kGroups) {
    for_tiles([&](int64_t tile) {
      const int64_t begin = tile * kTile;
      scratch_.counts[tile] = 0;
      if (!(scratch_.mixes[tile].peak >= bound)) return;
      float peaks[kGroups];
      const int groups = loops_.filters.group_peaks(scratch_.keys() + begin, tile_size(tile), peaks);
      scratch_.counts[tile] = loops_.filters.above(peaks, groups, bound, scratch_.candidates() + begin);
    });
    bound = std::max(bound, rank(peak, top_k_, count));
  }
  if (bound == peak) return bound;
  collect(bound);
  return rank(peak, top_k_, count);
}

float Row::top_p_cut(float peak, float least) {
  const float beta = inverse_temperature();
  for_tiles([&](int64_t tile) {
    const bool needed = scratch_.mixes[tile].peak >= least && scratch_.mixes[tile].peak > -kInfinity;
    scratch_.weights[tile] =
        needed ? loops_.filters.fixed_mass(scratch_.keys() + tile * kTile, tile_size(tile), least, peak, beta) : 0;
  });
  int64_t total = 0;
  for (int64_t weight : scratch_.weights) total += weight;
  const int64_t needed = (int64_t)std::ceil(top_p_ * (double)total);
  // All tokens lighter than this together weigh so little that top-p drops them.
  const double light = std::max((double)(total - needed) / request_.vocab, 1.0) / kFixedPoint;
  const double bound = peak + (std::log(light) - kMargin) / beta;
  collect((float)std::max({bound, (double)least, (double)kLowest}));
  return rank(peak, needed, [&](const float* key, int n, int64_t* weights) {
    loops_.filters.fixed_masses(key, n, peak, beta, weights);
  });
}

}  // namespace mod_fused
