// The tilt: what values, dense or of candidates, add to Q.

#include <algorithm>
#include <limits>

#include "row.h"

namespace mod_fused {

namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();
}

// -kappa sum v V of a tile's tokens; +inf where a value excludes the token, or the token is no candidate.
bool Row::tile_tilt(int64_t tile, double* tilt) const {
  const int64_t begin = tile * kTile;
  const int n = tile_size(tile);
  bool good = true;
  if (request_.value_ids) {
    std::fill(tilt, tilt + n, kInfinity);
    for (const Candidate* c = first_candidate(begin); c != candidates_.data() + candidates_.size() && c->token < begin + n; ++c)
      tilt[c->token - begin] = c->tilt * response_.tilt_scale;
    return true;
  }
  alignas(64) float x[kTile];
  std::fill(tilt, tilt + n, 0.0);
  for (size_t j = 0; j < request_.values.size(); ++j) {
    if (value_weight(j) == 0.0) continue;
    loops_.load(values(j), begin, n, x);
    good &= !loops_.add_tilt(x, n, (float)value_weight(j), tilt);
  }
  for (int i = 0; i < n && response_.tilt_scale != 1.0; ++i) tilt[i] *= response_.tilt_scale;
  return good;
}

// Collects the candidates, sorted by id.
bool Row::collect_candidates() {
  bool good = true;
  for (int64_t k = 0; k < request_.candidates; ++k) {
    if (candidate(k) < 0) continue;
    Candidate c{candidate(k), 0.0};
    for (size_t j = 0; j < request_.values.size(); ++j) {
      if (value_weight(j) == 0.0) continue;
      const float value = element(loops_, values(j), k);
      good &= value < kInfinity;
      c.tilt = value > -kInfinity ? c.tilt - (double)(float)value_weight(j) * value : kInfinity;
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

}  // namespace mod_fused
