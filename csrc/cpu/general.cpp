// Every divergence but reverse KL, by deficits (docs/concepts.md): Q and p over the vocabulary (bracket.h), the search for tau
// (normalizer.h), and the keys or masses at its solution.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../divergence.h"
#include "bracket.h"
#include "normalizer.h"
#include "row.h"

namespace mod_fused {

namespace {
constexpr double kLeastTau = 1e-36f;  // with Z = 0 and a finite sup f' a smaller tau makes the row invalid
}

bool Row::mix_general() {
  bool good = false;
  Divergences::visit(request_.divergence, request_.alpha, [&](const auto& divergence) {
    using D = std::decay_t<decltype(divergence)>;
    good = mix(divergence, loops_.divergences[Divergences::place<D>()]);
  });
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

  const float t = (float)divergence.shift(tau), alpha = (float)request_.alpha, base = total.base;
  // With Z = 0 masses may overflow: use their logarithms, without the constant, which normalising removes.
  const float constant = request_.exact ? (float)divergence.constant(tau) : 0.0f;
  if (!request_.exact || !sampling() || filters() || temperature_ != 1.0f) {
    for_tiles([&](int64_t tile) {
      alignas(64) float key[kTile];
      const int64_t begin = tile * kTile;
      const int n = tile_size(tile);
      loops.keys(scratch_.p() + begin, scratch_.u() + begin, n, alpha, base, t, constant, key);
      std::memcpy(scratch_.keys() + begin, key, sizeof(float) * (size_t)n);
    });
    if (!request_.exact && !sum_keys()) return false;
    return !sampling() || draw_from_keys();
  }
  std::copy(scratch_.sums.begin(), scratch_.sums.begin() + tiles_, scratch_.masses.begin());
  const bool drawn = race([&](int64_t tile, float* mass) {
    const int64_t begin = tile * kTile;
    loops.masses(scratch_.p() + begin, scratch_.u() + begin, tile_size(tile), alpha, base, t, mass);
  });
  if (!drawn) return false;
  float key;
  loops.keys(scratch_.p() + token_, scratch_.u() + token_, 1, alpha, base, t, constant, &key);
  token_key_ = key;
  return true;
}

}  // namespace mod_fused
