// Every divergence but reverse KL, by deficits (docs/concepts.md): Q and p over the vocabulary (bracket.h), the search for tau
// (normalizer.h), and the keys or masses at its solution.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../divergence.h"
#include "bracket.h"
#include "normalizer.h"
#include "row.h"

namespace mod_fused {

namespace {
constexpr double kSmallestPrefixDifference = -40.0;
constexpr double kLeastTau = 1e-36f;  // with Z = 0 and a finite sup f' a smaller tau makes the row invalid
}

// The range of float32, the same in every backend; mod_fused/torch_kernels/own_mass.py derives what the mixture's own mass does.
Row::Response Row::response() const {
  Response result;
  if (request_.prefix.empty()) return result;
  const double* prefix = request_.prefix.data() + b_ * request_.models;
  const bool linear = request_.divergence == JensenShannon::number;  // its deficit, for log-ratios far below 0
  double least = std::numeric_limits<double>::infinity();  // of the policies that count
  for (int model = 1; model < request_.models; ++model)
    if (counts(model)) least = std::min(least, prefix[model] - prefix[0]);
  if (request_.own_prefix.empty()) {
    if (!linear) result.shift = std::max(0.0, kSmallestPrefixDifference - least);
    return result;
  }
  const double alpha = request_.divergence == Alpha<false>::number ? request_.alpha : 1.0;
  const double log_mass = request_.own_prefix[(size_t)b_] - prefix[0];
  if (linear) least = std::max(least, 0.0);
  double log_scale = alpha * std::min(log_mass, least + kLargestPrefixExponent / alpha);
  result.floor = -kLargestExponent / alpha;
  if (linear) {
    log_scale = std::max(log_scale, 0.0);
    result.log_mass = log_mass < 0.0 ? log_mass : log_scale;
    result.floor = -kExcluded;
  } else if (request_.divergence == Jeffrey::number) {
    log_scale = std::min(log_scale, 0.0);
    // Beyond 600 H is log-linear, and its double would underflow.
    result.log_mass = log_scale < 0.0 ? log_scale : std::min(log_mass, 600.0);
  }
  log_scale = alpha == 1.0 ? (float)log_scale : log_scale;  // as the loops get it
  result.shift = -log_scale / alpha;
  result.tilt_scale = std::exp(std::clamp(log_scale, -kLargestLogScale * 8.0, kLargestLogScale));
  return result;
}

bool Row::mix_general() {
  response_ = response();
  bool good = false;
  const auto mix_by = [&](const auto& divergence) {
    using D = std::decay_t<decltype(divergence)>;
    good = mix(divergence, loops_.divergences[LoopDivergences::place<D>()]);
  };
  parameter_ = (float)response_.log_mass;
  if (!request_.own_prefix.empty() && DivergencesOfMass::visit(request_.divergence, parameter_, mix_by)) return good;
  parameter_ = (float)request_.alpha;
  Divergences::visit(request_.divergence, request_.alpha, mix_by);
  return good;
}

template <class D> bool Row::mix(D divergence, const DivergenceLoops& loops) {
  if (request_.value_ids && !collect_candidates()) return false;
  Deficits total;
  if (!collect_deficits(divergence, loops, true, &total)) return false;
  divergence.measure_from(total.base);
  double tau;
  if (request_.exact) {
    tau = solve(divergence, loops, total, bracket(divergence, total.sums));
    if (!std::isfinite(log_norm_)) return false;
  } else {
    double sum = 0.0;
    for (int model = 1; model < request_.models; ++model) sum += policy_weight(model);
    tau = (float)(divergence.supremum() * (1.0 - sum) + total.sums.least);
    if (!std::isfinite(tau) || (D::bounded && !(tau > kLeastTau))) return false;
  }

  const float t = (float)divergence.shift(tau), base = total.base;
  // With Z = 0 masses may overflow: use their logarithms, without the constant, which normalising removes.
  const float constant = request_.exact ? (float)divergence.constant(tau) : 0.0f;
  if (!request_.exact || !sampling() || filters() || temperature_ != 1.0f) {
    for_tiles([&](int64_t tile) {
      alignas(64) float key[kTile];
      const int64_t begin = tile * kTile;
      const int n = tile_size(tile);
      loops.keys(scratch_.p() + begin, scratch_.u() + begin, n, parameter_, base, t, constant, key);
      std::memcpy(scratch_.keys() + begin, key, sizeof(float) * (size_t)n);
    });
    if (!request_.exact && !sum_keys()) return false;
    return !sampling() || draw_from_keys();
  }
  std::copy(scratch_.sums.begin(), scratch_.sums.begin() + tiles_, scratch_.masses.begin());
  const bool drawn = race([&](int64_t tile, float* mass) {
    const int64_t begin = tile * kTile;
    loops.masses(scratch_.p() + begin, scratch_.u() + begin, tile_size(tile), parameter_, base, t, mass);
  });
  if (!drawn) return false;
  float key;
  loops.keys(scratch_.p() + token_, scratch_.u() + token_, 1, parameter_, base, t, constant, &key);
  token_key_ = key;
  log_proposal_ = std::min(token_key_ - level_ - log_norm_, 0.0);
  return true;
}

}  // namespace mod_fused
