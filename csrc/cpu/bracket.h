// For all divergences but reverse KL: Q and p over the vocabulary, and the bracket of tau (docs/concepts.md).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../divergence.h"
#include "row.h"

namespace mod_fused {

constexpr double kLeastExponent = -1.0, kMostExponent = 30.0;  // range of min Q in which Jensen-Shannon stores e^Q
constexpr double kLog2E = 1.4426950216293335;  // the value of the loops' float32 constant
constexpr double kMostFusedWeight = 100.0;  // times e^80 it is below kExcluded
constexpr double kRounding = 1e-5;  // of float32 sums over a row

inline Row::Offsets Row::offsets() const {
  Offsets result;
  for (int model = 0; model < request_.models; ++model) {
    const ModelSum& sum = model_sums_[model];
    result.levels[model] = std::fabs(sum.log_norm()) > kFarLevel ? (float)std::nearbyint(sum.log_norm()) : 0.0f;
    result.norms[model] = (sum.level - result.levels[model]) + sum.log_sum;
  }
  const double* prefix = request_.prefix.empty() ? nullptr : request_.prefix.data() + b_ * request_.models;
  for (int model = 1; model < request_.models; ++model) {
    const double difference = prefix ? prefix[model] - prefix[0] + response_.shift : 0.0;
    result.shifts[model] = result.norms[0] - result.norms[model] + difference;
  }
  return result;
}

// Prepares the usual case, one loop per tile. False for tensors that are scaled, of several dtypes, more than kMaxFused, far
// from 0 or tilted by values: those go through buffers.
template <class D> bool Row::fuse(const D& divergence, const Offsets& offsets, DeficitTile* fused) const {
  if (!request_.values.empty() || plausibility_model_ != kNoModel) return false;
  double weight_sum = 0.0;
  for (int model = 0; model < request_.models; ++model) {
    if (!counts(model)) continue;
    if (request_.scales[model] != 1.0f || request_.logits[model].dtype != request_.logits[0].dtype) return false;
    if (offsets.levels[model] != 0.0f) return false;
    if (model == 0) continue;
    if (fused->count == kMaxFused) return false;
    fused->offsets[fused->count] = (float)(divergence.factor() * kLog2E * offsets.shifts[model]);
    fused->weights[fused->count++] = (float)policy_weight(model);
    weight_sum += std::fabs(policy_weight(model));
    // pi_ref is above e^-80, so only a prefix can make a ratio exceed e^80.
    fused->careful |= std::fabs(offsets.shifts[model] - (offsets.norms[0] - offsets.norms[model])) > 4.0;
  }
  fused->dtype = request_.logits[0].dtype;
  fused->log_norm = (float)offsets.norms[0];
  fused->log_norm_offset = (float)(-offsets.norms[0] * kLog2E);
  fused->factor = (float)(divergence.factor() * kLog2E);
  fused->limit = D::clamped ? std::fabs(fused->factor * (float)response_.floor) : std::min(115.0f, (float)(80.0 / weight_sum - 1.0));
  return fused->count > 0 && weight_sum <= kMostFusedWeight;
}

// p and u of a tile in one loop.
inline void Row::collect_fused(const DivergenceLoops& loops, DeficitTile fused, int64_t tile) {
  const int64_t begin = tile * kTile, offset = begin * (fused.dtype == DType::float32 ? 4 : 2);
  int count = 0;
  for (int model = 0; model < request_.models; ++model) {
    if (!counts(model)) continue;
    const void* data = static_cast<const char*>(logits(model).data) + offset;
    if (model == 0) fused.ref = data;
    else fused.policies[count++] = data;
  }
  scratch_.deficits[tile] =
      loops.deficits(fused, tile_size(tile), parameter_, scratch_.p() + begin, scratch_.u() + begin);
}

// p and Q of a tile, one tensor after the other.
inline void Row::collect_buffered(const DivergenceLoops& loops, const Offsets& offsets, int64_t tile) {
  const int64_t begin = tile * kTile;
  const int n = tile_size(tile);
  float* q = scratch_.u() + begin;
  alignas(64) float ref[kTile], other[kTile];
  const auto load = [&](int model, float* out) {
    loops_.load(logits(model), begin, n, out);
    const float level = offsets.levels[model];
    for (int i = 0; i < n && level != 0.0f; ++i) out[i] -= level;
  };
  load(0, ref);
  std::memset(q, 0, sizeof(float) * (size_t)n);
  for (int model = 1; model < request_.models; ++model) {
    if (!counts(model)) continue;
    load(model, other);
    loops.add_deficit(ref, other, n, parameter_, (float)offsets.shifts[model], (float)response_.floor,
                      (float)policy_weight(model), q);
  }
  if (plausibility_model_ != kNoModel) exclude_implausible(tile, kExcluded, q);
  const bool tilted = !request_.values.empty();
  alignas(64) double tilt[kTile];
  scratch_.mixes[tile].broken = tilted && !tile_tilt(tile, tilt);
  scratch_.deficits[tile] =
      loops_.close_deficit(ref, tilted ? tilt : nullptr, n, (float)offsets.norms[0], scratch_.p() + begin, q);
}

// Turns the Q of collect_buffered into u, once min Q is known.
inline void Row::close_excesses(const DivergenceLoops& loops, double least) {
  const bool tilted = !request_.values.empty();
  for_tiles([&](int64_t tile) {
    alignas(64) double tilt[kTile];
    if (tilted) tile_tilt(tile, tilt);
    loops.excesses(scratch_.u() + tile * kTile, tilted ? tilt : nullptr, tile_size(tile), parameter_, least);
  });
}

// Sums over the row's tiles. Returns the tile of min Q, or -1 if a value is NaN or +inf, or min Q is out of range.
inline int64_t Row::sum_deficits(DeficitSums* sum) const {
  *sum = {kExcluded, 0.0, 0.0, 0.0, 0.0};
  int64_t best_tile = 0;
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    const DeficitSums& part = scratch_.deficits[tile];
    if (scratch_.mixes[tile].broken) return -1;
    if (part.least < sum->least) {
      sum->least = part.least;
      best_tile = tile;
    }
    sum->mass += part.mass;
    sum->first += part.first;
    sum->s1 += part.s1;
    sum->s2 += part.s2;
  }
  return std::fabs(sum->least) < (double)kExcluded ? best_tile : -1;
}

// Stores p and u of the row in scratch, and their sums for the bracket.
template <class D>
bool Row::collect_deficits(const D& divergence, const DivergenceLoops& loops, bool in_one_loop, Deficits* total) {
  const Offsets offsets = this->offsets();
  DeficitTile fused{};
  total->fused = false;
  if constexpr (DivergencesOfMass::place<D>() < 0) total->fused = in_one_loop && fuse(divergence, offsets, &fused);
  for_tiles([&](int64_t tile) {
    scratch_.mixes[tile].broken = false;
    if (total->fused) collect_fused(loops, fused, tile);
    else collect_buffered(loops, offsets, tile);
  });
  DeficitSums& sum = total->sums;
  const int64_t best_tile = sum_deficits(&sum);
  if (best_tile < 0) return false;
  total->base = 0.0f;
  if (total->fused) {
    total->base = (float)sum.least;
    sum.least = divergence.least_deficit(sum.least);
    sum.first = divergence.mean_deficit(sum.first);
    // Jensen-Shannon: outside that range e^Q holds too few digits of Q.
    if (!D::clamped && !(sum.least > kLeastExponent && sum.least < kMostExponent))
      return collect_deficits(divergence, loops, false, total);
    sum.s1 -= scratch_.deficits[best_tile].s1;
    sum.s2 -= scratch_.deficits[best_tile].s2;
  } else {
    close_excesses(loops, sum.least);
  }
  // s* is the first token of the support with u = base, the least Q.
  const float* p = scratch_.p() + best_tile * kTile;
  const float* u = scratch_.u() + best_tile * kTile;
  int best = 0;
  while (best < tile_size(best_tile) - 1 && !(p[best] > 0.0f && u[best] == total->base)) ++best;
  best_ = best_tile * kTile + best;
  best_mass_ = p[best];
  return true;
}

// The ends between which tau lies (design §2). Where all policies agree they are one; what rounding then leaves of log G the
// solver takes off.
template <class D> Row::Bracket Row::bracket(const D& divergence, const DeficitSums& total) const {
  const double log_mass = std::log((double)total.mass);
  Bracket ends;
  ends.upper = divergence.deficit(-log_mass);
  // The mean of D = Q - min Q bounds tau from below (Jensen), less the rounding of the sums.
  const double mean = total.first / total.mass;
  const double mean_excess = mean - total.least + kRounding * (std::fabs(mean) + std::fabs(total.least));
  ends.lower = std::max(divergence.deficit(-std::log(best_mass_)), ends.upper - mean_excess);
  if (D::bounded) {
    double sum = 0.0;
    bool simplex = request_.values.empty() && request_.prefix.empty();
    for (int model = 1; model < request_.models; ++model) {
      sum += policy_weight(model);
      simplex &= policy_weight(model) >= 0.0;
    }
    if (simplex && std::fabs(sum - 1.0) < 1e-6) ends.upper = std::min(ends.upper, total.least);  // Z <= 0
  }
  ends.upper = std::max(ends.upper, ends.lower);
  return ends;
}

}  // namespace mod_fused
