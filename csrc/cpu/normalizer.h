// The normaliser tau off reverse KL: a scalar solve for G(tau) = 1 between the ends of bracket.h (design §2).
#pragma once

#include <algorithm>
#include <cmath>

#include "../divergence.h"
#include "row.h"

namespace mod_fused {

constexpr int kMaxEvaluations = 32;
// Below this the model's error is its square, what float32 sums leave: tau moves without another evaluation, and the tiles'
// masses follow it by their slopes.
constexpr double kLastStep = 1e-3;
constexpr int kModelSteps = 60;
constexpr double kLeastRest = 1e-30;  // of tokens but s*: less may be the floors of exponentials

// s1 and s2 of the row at t, and of its tiles in scratch.
Row::RowSums Row::evaluate(const DivergenceLoops& loops, float base, float t) {
  for_tiles([&](int64_t tile) {
    const int64_t begin = tile * kTile;
    const MassSums part = loops.sums(scratch_.p() + begin, scratch_.u() + begin, tile_size(tile),
                                     (float)request_.alpha, base, t);
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

// G(tau) = 1. A step solves a model of G with two poles: s* exactly where it is, and everything else as the one pole that has
// its sum and slope (the secular equation of eigenvalue updates, solved the same way). The first step is from Z = 0, whose
// sums the deficits' loop has left; then one evaluation or two do where Newton takes four. The bracket stays; a step that
// leaves it bisects. Leaves log_norm_, and the tiles' masses.
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
  double residual = 0.0;  // log G of the model where a step ends; not 0 where the bracket is inverted by rounding
  const auto step = [&](const RowSums& rest, double t) {
    const bool pole = rest.s1 > kLeastRest && rest.s2 > 0.0;
    const double distance = pole ? std::max(divergence.pole(rest.s1 / rest.s2) - t, 0.0) : 0.0;
    const double weight = pole ? rest.s1 / power(t + distance) : 0.0;
    double left = low, right = high;
    for (int k = 0; k < kModelSteps && right - left > 1e-10 * std::fabs(right); ++k) {
      const double middle = between(left, right);
      (log_g(middle, weight * power(middle + distance)) > 0.0 ? left : right) = middle;
    }
    const double end = (float)between(left, right);  // as the keys will have it: a small alpha shows what is rounded off
    residual = log_g(end, weight * power(end + distance));
    return end;
  };

  // The sums leave s* out: next to its pole the others would drown in their rounding.
  scratch_.p()[best_] = 0.0f;
  scratch_.u()[best_] = kExcluded;
  float t = (float)between(low, high);
  if (total.fused && (!D::bounded || base > 0.0f)) {
    const int64_t tile = best_ / kTile, begin = tile * kTile;
    const MassSums part = loops.sums(scratch_.p() + begin, scratch_.u() + begin, tile_size(tile), (float)request_.alpha, base, base);
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
    // Back at the other end of the bracket the model would go round in circles.
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
