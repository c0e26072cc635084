// Every divergence but reverse KL, in deficit form (design §2): Q and p once over the vocabulary, a scalar solve for tau
// over what they left, and the keys or masses at its solution.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../divergence.h"
#include "row.h"

namespace mod_fused {

namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kSmallestPrefixDifference = -40.0;
constexpr int kMaxEvaluations = 32;
// Below this the model's error is its square, what float32 sums leave: tau moves without another evaluation, and the tiles'
// masses follow it by their slopes.
constexpr double kLastStep = 1e-3;
constexpr int kModelSteps = 60;
constexpr double kLeastExponent = -1.0, kMostExponent = 30.0;  // of min Q where Jensen-Shannon keeps e^Q
constexpr double kLog2E = 1.4426950216293335;  // what the loops' float32 constant holds
constexpr double kMostFusedWeight = 100.0;  // times e^80 it is below kExcluded
constexpr double kWiden = 1e-4;
constexpr double kRounding = 1e-5;  // of float32 sums over a row
constexpr double kLeastTau = 1e-36;  // design §2: with Z = 0, where sup f' is finite
constexpr double kLeastRest = 1e-30;  // of tokens but s*: less may be the floors of exponentials
}  // namespace

bool Row::mix_general() {
  switch (request_.kind) {
    case Kind::forward_kl:
      return mix(ForwardKL(), loops_.forward_kl);
    case Kind::jsd:
      return mix(JensenShannon(), loops_.jsd);
    case Kind::alpha:
      if (request_.alpha < kSmallAlpha) return mix(SmallAlpha(request_.alpha), loops_.small_alpha);
      if (request_.alpha == 0.5) return mix(Alpha<true>(0.5), loops_.alpha_half);
      return mix(Alpha<false>(request_.alpha), loops_.alpha);
    case Kind::jeffrey:
      return mix(Jeffrey(), loops_.jeffrey);
    case Kind::reverse_kl:
      break;
  }
  return false;
}

// -sum v V of a tile, +inf where a value excludes the token or it is no candidate.
bool Row::tile_tilt(int64_t tile, double* tilt) const {
  const int64_t begin = tile * kTile;
  const int n = tile_size(tile);
  bool good = true;
  if (request_.value_ids) {
    std::fill(tilt, tilt + n, (double)kInfinity);
    for (const Candidate* c = first_candidate(begin); c != candidates_.data() + candidates_.size() && c->token < begin + n; ++c)
      tilt[c->token - begin] = c->tilt;
    return true;
  }
  alignas(64) float x[kTile];
  std::fill(tilt, tilt + n, 0.0);
  for (size_t j = 0; j < request_.values.size(); ++j) {
    if (value_weight(j) == 0.0) continue;
    loops_.load(values(j), begin, n, x);
    good &= !loops_.add_tilt(x, n, (float)value_weight(j), tilt);
  }
  return good;
}

// The candidates in the order of their ids.
bool Row::collect_candidates() {
  bool good = true;
  for (int64_t k = 0; k < request_.candidates; ++k) {
    if (candidate(k) < 0) continue;
    Candidate c{candidate(k), 0.0};
    for (size_t j = 0; j < request_.values.size(); ++j) {
      if (value_weight(j) == 0.0) continue;
      const float value = element(loops_, values(j), k);
      good &= value < kInfinity;
      c.tilt = value > -kInfinity ? c.tilt - (double)(float)value_weight(j) * value : (double)kInfinity;
    }
    candidates_.push_back(c);
  }
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  return good;
}

const Row::Candidate* Row::first_candidate(int64_t token) const {
  const auto before = [](const Candidate& c, int64_t t) { return c.token < t; };
  return std::lower_bound(candidates_.data(), candidates_.data() + candidates_.size(), token, before);
}

// p and u over the row into scratch, and what the bracket needs of them.
template <class D> bool Row::collect_deficits(const D& divergence, const DivergenceLoops& loops, bool in_one_loop, Deficits* total) {
  constexpr bool clamped = D::clamped;
  double norms[kMaxModels], shifts[kMaxModels], lift = 0.0;
  float levels[kMaxModels];  // whole numbers, which leave differences of 16-bit logits exact
  for (int model = 0; model < request_.models; ++model) {
    const ModelSum& sum = model_sums_[model];
    levels[model] = std::fabs(sum.log_norm()) > kFarLevel ? (float)std::nearbyint(sum.log_norm()) : 0.0f;
    norms[model] = (sum.level - levels[model]) + sum.log_sum;
  }
  const auto load = [&](int model, int64_t begin, int n, float* out) {
    loops_.load(logits(model), begin, n, out);
    if (levels[model] == 0.0f) return;
    for (int i = 0; i < n; ++i) out[i] -= levels[model];
  };
  const double* prefix = request_.prefix.empty() ? nullptr : request_.prefix.data() + b_ * request_.models;
  for (int model = 1; model < request_.models && prefix && clamped; ++model)
    if (counts(model)) lift = std::max(lift, kSmallestPrefixDifference - (prefix[model] - prefix[0]));
  for (int model = 1; model < request_.models; ++model) {
    const double difference = prefix ? prefix[model] - prefix[0] + lift : 0.0;
    shifts[model] = norms[0] - norms[model] + difference;
  }
  if (request_.value_ids && !collect_candidates()) return false;
  const bool tilted = !request_.values.empty();

  // The usual case takes one loop a tile; scaled, mixed, many, tilted or far-off tensors go through buffers.
  DeficitTile fused{};
  bool fusable = in_one_loop && !tilted && request_.plausibility_model < 0;
  double weight_sum = 0.0;
  for (int model = 0; model < request_.models; ++model)
    if (counts(model)) {
      fusable &= request_.scales[model] == 1.0f && request_.logits[model].dtype == request_.logits[0].dtype;
      fusable &= levels[model] == 0.0f;
      if (model > 0 && fused.count == kMaxFused) fusable = false;
      if (model == 0 || !fusable) continue;
      fused.offsets[fused.count] = (float)(divergence.factor() * kLog2E * shifts[model]);
      fused.weights[fused.count++] = (float)policy_weight(model);
      weight_sum += std::fabs(policy_weight(model));
      // Ratios above e^80 take a prefix: pi_ref is larger than e^-80.
      fused.careful |= std::fabs(shifts[model] - (norms[0] - norms[model])) > 4.0;
    }
  fusable &= fused.count > 0 && weight_sum <= kMostFusedWeight;
  fused.dtype = request_.logits[0].dtype;
  fused.log_norm = (float)norms[0];
  fused.log_norm_offset = (float)(-norms[0] * kLog2E);
  fused.factor = (float)(divergence.factor() * kLog2E);
  fused.limit = clamped ? std::fabs(fused.factor) * 80.0f : std::min(115.0f, (float)(80.0 / weight_sum - 1.0));

  for_tiles([&](int64_t tile) {
    const int64_t begin = tile * kTile;
    const int n = tile_size(tile);
    float *p = scratch_.first + begin, *q = scratch_.second + begin;
    scratch_.mixes[tile].broken = false;
    if (fusable) {
      DeficitTile part = fused;
      const int64_t offset = begin * (fused.dtype == DType::float32 ? 4 : 2);
      int count = 0;
      for (int model = 0; model < request_.models; ++model) {
        if (!counts(model)) continue;
        const void* data = static_cast<const char*>(logits(model).data) + offset;
        if (model == 0) part.ref = data;
        else part.policies[count++] = data;
      }
      scratch_.deficits[tile] = loops.deficits(part, n, (float)request_.alpha, p, q);
      return;
    }
    alignas(64) float ref[kTile], other[kTile];
    load(0, begin, n, ref);
    std::memset(q, 0, sizeof(float) * (size_t)n);
    for (int model = 1; model < request_.models; ++model) {
      if (!counts(model)) continue;
      load(model, begin, n, other);
      loops.add_deficit(ref, other, n, (float)request_.alpha, (float)shifts[model], (float)policy_weight(model), q);
    }
    if (request_.plausibility_model >= 0) {
      loops_.load(logits(request_.plausibility_model), begin, n, other);
      const float peak = (float)model_sums_[request_.plausibility_model].level;
      for (int i = 0; i < n; ++i) q[i] = other[i] - peak >= request_.log_plausibility ? q[i] : kExcluded;
    }
    alignas(64) double tilt[kTile];
    scratch_.mixes[tile].broken = tilted && !tile_tilt(tile, tilt);
    scratch_.deficits[tile] = loops_.close_deficit(ref, tilted ? tilt : nullptr, n, fused.log_norm, p, q);
  });

  *total = {{kExcluded, 0.0, 0.0, 0.0, 0.0}, 0.0f, fusable};
  DeficitSums& sum = total->sums;
  int64_t best_tile = 0;
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    const DeficitSums& part = scratch_.deficits[tile];
    if (scratch_.mixes[tile].broken) return false;
    if (part.least < sum.least) {
      sum.least = part.least;
      best_tile = tile;
    }
    sum.mass += part.mass;
    sum.first += part.first;
    sum.s1 += part.s1;
    sum.s2 += part.s2;
  }
  if (!(std::fabs(sum.least) < (double)kExcluded)) return false;
  if (fusable) {
    total->base = (float)sum.least;
    sum.least = divergence.least_deficit(sum.least);
    sum.first = divergence.mean_deficit(sum.first);
    // Jensen-Shannon: e^Q holds too few digits of Q.
    if (!D::clamped && !(sum.least > kLeastExponent && sum.least < kMostExponent))
      return collect_deficits(divergence, loops, false, total);
    sum.s1 -= scratch_.deficits[best_tile].s1;
    sum.s2 -= scratch_.deficits[best_tile].s2;
  } else {
    for_tiles([&](int64_t tile) {
      alignas(64) double tilt[kTile];
      if (tilted) tile_tilt(tile, tilt);
      loops.excesses(scratch_.second + tile * kTile, tilted ? tilt : nullptr, tile_size(tile), (float)request_.alpha, sum.least);
    });
  }
  // s*, the first token of the support whose excess is 0.
  const float* p = scratch_.first + best_tile * kTile;
  const float* u = scratch_.second + best_tile * kTile;
  int best = 0;
  while (best < tile_size(best_tile) - 1 && !(p[best] > 0.0f && u[best] == total->base)) ++best;
  best_ = best_tile * kTile + best;
  best_mass_ = p[best];
  return true;
}

// s1 and s2 of the row at t, and of its tiles in scratch.
Row::RowSums Row::evaluate(const DivergenceLoops& loops, float base, float t) {
  for_tiles([&](int64_t tile) {
    const int64_t begin = tile * kTile;
    const MassSums part = loops.sums(scratch_.first + begin, scratch_.second + begin, tile_size(tile),
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

// The ends between which tau lies (design §2), a little apart: rounding inverts them where all policies agree.
template <class D> Row::Bracket Row::bracket(const D& divergence, const DeficitSums& total) const {
  const double log_mass = std::log((double)total.mass);
  Bracket ends;
  ends.upper = divergence.deficit(-log_mass);
  // E[D], and what the sums' rounding may have taken from it.
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
    ends.lower *= 1.0 - kWiden;
    ends.upper *= 1.0 + kWiden;
  } else {
    ends.lower -= kWiden;
    ends.upper += kWiden;
  }
  ends.upper = std::max(ends.upper, ends.lower);
  return ends;
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
  scratch_.first[best_] = 0.0f;
  scratch_.second[best_] = kExcluded;
  float t = (float)between(low, high);
  if (total.fused && (!D::bounded || base > 0.0f)) {
    const int64_t tile = best_ / kTile, begin = tile * kTile;
    const MassSums part = loops.sums(scratch_.first + begin, scratch_.second + begin, tile_size(tile), (float)request_.alpha, base, base);
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
  scratch_.first[best_] = (float)best_mass_;
  scratch_.second[best_] = base;
  scratch_.sums[best_ / kTile] += (float)(best_mass_ * power(solution));
  return divergence.unshift(solution);
}

template <class D> bool Row::mix(D divergence, const DivergenceLoops& loops) {
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
  // With Z = 0 the masses may be of any size: only their logarithms are safe, and less the constant that normalising removes.
  const float constant = request_.exact ? (float)divergence.constant(tau) : 0.0f;
  if (!request_.exact || !sampling() || filters() || temperature_ != 1.0f) {
    for_tiles([&](int64_t tile) {
      alignas(64) float key[kTile];
      const int64_t begin = tile * kTile;
      const int n = tile_size(tile);
      loops.keys(scratch_.first + begin, scratch_.second + begin, n, alpha, base, t, constant, key);
      std::memcpy(scratch_.first + begin, key, sizeof(float) * (size_t)n);
    });
    if (!request_.exact && !sum_keys()) return false;
    return !sampling() || draw_from_keys();
  }
  std::copy(scratch_.sums.begin(), scratch_.sums.begin() + tiles_, scratch_.masses.begin());
  const bool drawn = race([&](int64_t tile, float* mass) {
    const int64_t begin = tile * kTile;
    loops.masses(scratch_.first + begin, scratch_.second + begin, tile_size(tile), alpha, base, t, mass);
  });
  if (!drawn) return false;
  float key;
  loops.keys(scratch_.first + token_, scratch_.second + token_, 1, alpha, base, t, constant, &key);
  token_key_ = key;
  return true;
}

}  // namespace mod_fused
