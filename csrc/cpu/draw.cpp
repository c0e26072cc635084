// From keys or masses to a token: temperature, filters and the two-level race (docs/concepts.md).

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "row.h"

namespace mod_fused {

namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
}

bool Row::draw_from_keys() {
  const float* keys = scratch_.keys();
  const float* unbiased = request_.bias.data ? scratch_.unbiased.data() : keys;
  for_tiles([&](int64_t tile) {
    if (request_.mask.data) apply_mask(tile);
    scratch_.mixes[tile].peak = loops_.filters.peak(keys + tile * kTile, tile_size(tile));
  });
  if (request_.bias.data && !add_bias()) return false;
  float peak = -kInfinity;
  for (const TileMix& mix : scratch_.mixes) peak = std::max(peak, mix.peak);
  if (!(std::fabs(peak) < kInfinity)) return false;
  if (temperature_ == 0.0f) {
    int64_t tile = 0;
    while (scratch_.mixes[tile].peak != peak) ++tile;
    token_ = std::find(keys + tile * kTile, keys + request_.vocab, peak) - keys;  // the first of equal keys
    token_key_ = unbiased[token_];
    return true;
  }
  const float beta = inverse_temperature();
  const float log_min_p = std::log(min_p_);
  float least = -kInfinity;
  if (top_k_ > 0 && top_k_ < request_.vocab) least = top_k_cut(peak);
  if (top_p_ < 1.0) least = std::max(least, top_p_cut(peak, least));
  const auto token_masses = [&](int64_t tile, float* mass) {
    return loops_.filters.kept_masses(keys + tile * kTile, tile_size(tile), peak, beta, least, log_min_p, mass);
  };
  for_tiles([&](int64_t tile) {
    const float highest = scratch_.mixes[tile].peak;
    alignas(64) float mass[kTile];
    const bool kept = highest >= least && (highest - peak) * beta >= log_min_p;
    scratch_.masses[tile] = kept ? token_masses(tile, mass) : 0.0f;
  });
  if (!race(token_masses)) return false;
  token_key_ = unbiased[token_];
  propose(((double)keys[token_] - peak) * beta);
  return true;
}

void Row::propose(double log_mass) {
  if (!request_.proposal_logprobs) return;
  double sum = 0.0;
  for (float mass : scratch_.masses) sum += mass;
  log_proposal_ = std::min(log_mass - std::log(sum), 0.0);
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
