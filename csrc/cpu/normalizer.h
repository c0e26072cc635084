// For all divergences but reverse KL: the scalar search for tau with G(tau) = sum p H(tau + Q - min Q) = 1 in the bracket
// (docs/concepts.md).
#pragma once

#include <algorithm>
#include <cmath>

#include "../divergence.h"
#include "row.h"

namespace mod_fused {

constexpr int kMaxEvaluations = 32;
// Below this |log G| the model's error is about its square, the rounding of float32 sums. The last step then needs no further
// evaluation: the tiles' masses are moved to the new tau by their slopes.
constexpr double kLastStep = 1e-3;
constexpr int kModelSteps = 60;
constexpr double kLeastRest = 1e-30;  // a smaller sum over all tokens but s* may come from the least values of exp2_near

// Returns s1 and s2 of the row at t; stores those of its tiles in scratch.
Row::RowSums Row::evaluate(const DivergenceLoops& loops, float base, float t) {
  for_tiles([&](int64_t tile) {
    const int64_t begin = tile * kTile;
    const MassSums part = loops.sums(scratch_.p() + begin, scratch_.u() + begin, tile_size(tile),
                                     parameter_, base, t);
    scratch_.sums[tile] = part.s1;
    scratch_.slopes[tile] = part.s2;
  });
  RowSums sums{0.0, 0.0};
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    sums.s1 += scratch_.sums[tile];
    sums.s2 += scratch_.slopes[tile];
  }
  return sums;
}

// Returns tau with G(tau) = 1, and stores log_norm_ and the tiles' masses. A step solves a model of G with two poles: that of
// s*, and one for all other tokens, with their sum and slope. (Eigenvalue updates solve the same "secular equation".) The
// first step starts at Z = 0, whose sums the loop over the deficits has made. One or two evaluations then suffice, where
// Newton's method takes four. A step that would leave the bracket bisects it.
template <class D>
double Row::solve(const D& divergence, const DivergenceLoops& loops, const Deficits& total, Bracket ends) {
  double low = divergence.shift(ends.lower), high = divergence.shift(ends.upper);
  const float base = total.base;
  const double order = divergence.order();
  const auto power = [&](double y) {
    if constexpr (!D::stieltjes) return std::exp(divergence.log_ratio(y));
    else return order == 1.0 ? 1.0 / y : order == 2.0 ? 1.0 / (y * y) : std::pow(y, -order);
  };
  const auto log_g = [&](double t, double sum) { return divergence.constant(divergence.unshift(t)) + std::log(sum + best_mass_ * power(t)); };
  const auto between = [](double a, double b) { return D::bounded ? std::sqrt(a * b) : 0.5 * (a + b); };
  double residual = 0.0;  // log G of the model at the end of a step; not 0 if rounding has inverted the bracket
  const auto step = [&](const RowSums& rest, double t) {
    const bool pole = rest.s1 > kLeastRest && rest.s2 > 0.0;
    const double distance = pole ? std::max(divergence.pole(rest.s1 / rest.s2) - t, 0.0) : 0.0;
    const double weight = pole ? rest.s1 / power(t + distance) : 0.0;
    double left = low, right = high;
    for (int k = 0; k < kModelSteps && right - left > 1e-10 * std::fabs(right); ++k) {
      const double middle = between(left, right);
      (log_g(middle, weight * power(middle + distance)) > 0.0 ? left : right) = middle;
    }
    const double end = (float)between(left, right);  // float32, as the keys use it: with a small alpha the rounding shows
    residual = log_g(end, weight * power(end + distance));
    return end;
  };

  // s* is summed apart: beside its pole float32 loses the other tokens.
  scratch_.p()[best_] = 0.0f;
  scratch_.u()[best_] = kExcluded;
  float t = (float)between(low, high);
  if (total.fused && (!D::bounded || base > 0.0f)) {
    const int64_t tile = best_ / kTile, begin = tile * kTile;
    const MassSums part = loops.sums(scratch_.p() + begin, scratch_.u() + begin, tile_size(tile), parameter_, base, base);
    const RowSums rest{total.sums.s1 + part.s1, total.sums.s2 + part.s2};
    if (std::isfinite(rest.s1) && std::isfinite(rest.s2)) t = (float)step(rest, base);
  }
  double solution = t;
  bool low_known = false, high_known = false;
  for (int i = 0;; ++i) {
    const RowSums rest = evaluate(loops, base, t);
    log_norm_ = log_g(t, rest.s1);
    solution = t;
    (log_norm_ > 0.0 ? low : high) = t;
    (log_norm_ > 0.0 ? low_known : high_known) = true;
    const bool good = std::isfinite(log_norm_) && std::isfinite(rest.s2);
    double next = good ? step(rest, t) : between(low, high);
    // Bisect where the model returns to a known end of the bracket: it would alternate between the ends for ever.
    if ((float)next != t && ((low_known && (float)next <= low) || (high_known && (float)next >= high))) next = between(low, high);
    const bool last = std::fabs(log_norm_) < kLastStep && std::fabs(next - t) < kLastStep * (D::bounded ? t : 1.0);
    if (last) {
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        float& sum = scratch_.sums[tile];
        if (sum > 0.0f) sum *= (float)std::exp(-order * scratch_.slopes[tile] / sum * (next - t));
      }
      solution = next;
      log_norm_ = residual;
    }
    if (last || (float)next == t || i == kMaxEvaluations) break;
    t = (float)next;
  }
  scratch_.p()[best_] = (float)best_mass_;
  scratch_.u()[best_] = base;
  scratch_.sums[best_ / kTile] += (float)(best_mass_ * power(solution));
  return divergence.unshift(solution);
}

}  // namespace mod_fused
