// From keys or masses to a token: mask, temperature, filters and the two-level race (design §3, §4).

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "../scalar_math.h"
#include "row.h"

namespace mod_fused {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kFixedPoint = 0x1p40f;

// An unsigned integer with the order of the floats; equal for -0 and +0.
uint32_t ordered(float x) {
  const uint32_t bits = float_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float unordered(uint32_t x) { return bits_float(x & 0x80000000u ? x & 0x7fffffffu : ~x); }

// The largest key such that it and all larger ones weigh at least target(total weight), by three rounds of counting on its
// bits. The integer sums do not depend on their order. -inf where all keys weigh less; `weight(i)` must be 0 for tokens that
// are out.
template <class Weight, class Target>
float weighted_rank(const float* key, int64_t n, const Weight& weight, const Target& target) {
  const int shifts[] = {21, 10, 0}, widths[] = {11, 11, 10};
  std::vector<int64_t> buckets(2048, 0);
  for (int64_t i = 0; i < n; ++i) buckets[ordered(key[i]) >> shifts[0]] += weight(i);
  int64_t needed = target(std::accumulate(buckets.begin(), buckets.end(), int64_t{0}));
  std::vector<int64_t> left;  // the tokens that share the bits found so far
  uint32_t prefix = 0;
  for (int round = 0; round < 3; ++round) {
    uint32_t bucket = (1u << widths[round]) - 1;
    while (bucket > 0 && buckets[bucket] < needed) needed -= buckets[bucket--];
    if (buckets[bucket] < needed) return -kInfinity;
    prefix = (prefix << widths[round]) | bucket;
    if (round == 2) break;
    const auto shares = [&](int64_t i) { return ordered(key[i]) >> shifts[round] == prefix; };
    if (round == 0) {
      for (int64_t i = 0; i < n; ++i)
        if (shares(i)) left.push_back(i);
    } else {
      left.erase(std::remove_if(left.begin(), left.end(), [&](int64_t i) { return !shares(i); }), left.end());
    }
    std::fill(buckets.begin(), buckets.end(), 0);
    for (int64_t i : left)
      buckets[(ordered(key[i]) >> shifts[round + 1]) & ((1u << widths[round + 1]) - 1)] += weight(i);
  }
  return unordered(prefix);
}

}  // namespace

void Row::apply_mask(float* key) const {
  for (int64_t token = 0; token < request_.vocab; ++token)
    if (!request_.mask.allows(b_, token)) key[token] = -kInfinity;
}

float Row::cut(const float* key, float peak) {
  const int64_t vocab = request_.vocab;
  float least = -kInfinity;
  if (top_k_ > 0 && top_k_ < vocab)
    least = weighted_rank(key, vocab, [&](int64_t i) { return (int64_t)(key[i] > -kInfinity); },
                          [&](int64_t) { return top_k_; });
  if (top_p_ < 1.0) {
    float* mass = scratch_.second;
    for_tiles([&](int64_t tile) {
      loops_.exps(key + tile * kTile, tile_size(tile), peak, inverse_temperature(), mass + tile * kTile);
    });
    const auto fixed = [&](int64_t i) { return key[i] >= least ? (int64_t)(mass[i] * kFixedPoint) : int64_t{0}; };
    const auto target = [&](int64_t total) { return (int64_t)std::ceil(top_p_ * (double)total); };
    least = std::max(least, weighted_rank(key, vocab, fixed, target));
  }
  return least;
}

bool Row::draw_from_keys() {
  float* key = scratch_.first;
  if (request_.mask.data) apply_mask(key);
  const float* highest = std::max_element(key, key + request_.vocab);  // the first of equal keys
  const float peak = *highest;
  if (!(std::fabs(peak) < kInfinity)) return false;
  if (temperature_ == 0.0f) {
    token_ = highest - key;
    token_key_ = peak;
    return true;
  }
  const float beta = inverse_temperature();
  const float least = cut(key, peak);
  const float log_min_p = std::log(min_p_);
  const auto token_masses = [&](int64_t tile, float* mass) {
    const float* k = key + tile * kTile;
    const int n = tile_size(tile);
    loops_.exps(k, n, peak, beta, mass);
    for (int i = 0; i < n; ++i) mass[i] = k[i] >= least && (k[i] - peak) * beta >= log_min_p ? mass[i] : 0.0f;
  };
  for_tiles([&](int64_t tile) {
    alignas(64) float mass[kTile];
    token_masses(tile, mass);
    float sum = 0.0f;
    for (int i = 0; i < tile_size(tile); ++i) sum += mass[i];
    scratch_.masses[tile] = sum;
  });
  if (!race(token_masses)) return false;
  token_key_ = key[token_];
  return true;
}

bool Row::race(const std::function<void(int64_t, float*)>& token_masses) {
  const uint64_t seed = request_.seeds[b_], position = (uint64_t)request_.position[b_];
  int64_t winner = -1;
  float arrival = kInfinity;
  for (int64_t begin = 0; begin < tiles_; begin += kTile) {
    const int n = (int)std::min<int64_t>(kTile, tiles_ - begin);
    const RaceResult part = loops_.race(scratch_.masses.data() + begin, n, seed, position, (uint32_t)begin, 0);
    if (part.winner >= 0 && part.arrival < arrival) {
      winner = begin + part.winner;
      arrival = part.arrival;
    }
  }
  if (winner < 0) return false;
  alignas(64) float mass[kTile];
  token_masses(winner, mass);
  const RaceResult inside =
      loops_.race(mass, tile_size(winner), seed, position, (uint32_t)(winner * kTile), 1);
  if (inside.winner < 0) return false;
  token_ = winner * kTile + inside.winner;
  return true;
}

}  // namespace mod_fused
