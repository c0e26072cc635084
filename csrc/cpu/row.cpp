#include "row.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

namespace mod_fused {

namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::align_val_t kAlignment{64};
constexpr double kLeastSum = 1e-20;  // below it, what float32 cuts off could show
}  // namespace

void Scratch::reserve(int64_t tiles, int models, bool per_token, bool biased) {
  logit_sums.resize((size_t)(tiles * models));
  mixes.resize((size_t)tiles);
  deficits.resize((size_t)tiles);
  sums.resize((size_t)tiles);
  slopes.resize((size_t)tiles);
  masses.resize((size_t)tiles);
  counts.resize((size_t)tiles);
  weights.resize((size_t)tiles);
  if (biased) unbiased.resize((size_t)(tiles * kTile));
  const int64_t needed = per_token ? tiles * kTile : 0;
  if (needed > capacity_) {
    ::operator delete(first_, kAlignment);
    first_ = nullptr;
    capacity_ = 0;
    first_ = static_cast<float*>(::operator new(sizeof(float) * 2 * (size_t)needed, kAlignment));
    capacity_ = needed;
  }
}

Scratch::~Scratch() { ::operator delete(first_, kAlignment); }

Row::Row(const Request& request, int64_t index, Scratch& scratch, const TileRunner& run_tiles)
    : request_(request),
      b_(index),
      scratch_(scratch),
      run_tiles_(run_tiles),
      loops_(tile_loops()),
      tiles_((request.vocab + kTile - 1) / kTile) {}

// Sets the entries of a tile's tokens that plausibility excludes.
void Row::exclude_implausible(int64_t tile, float excluded, float* x) const {
  const int n = tile_size(tile);
  alignas(64) float logit[kTile];
  loops_.load(logits(plausibility_model_), tile * kTile, n, logit);
  const float peak = (float)model_sums_[plausibility_model_].level;
  for (int i = 0; i < n; ++i) x[i] = logit[i] - peak >= log_plausibility_ ? x[i] : excluded;
}

bool Row::read_parameters() {
  bool good = true;
  if (request_.plausibility_model != kNoModel) {
    const double share = request_.plausibility[b_];
    if (share != 0.0) plausibility_model_ = request_.plausibility_model;
    log_plausibility_ = (float)std::log(share);  // out of range: no logit is above it, and no token is left
  }
  const int policies = request_.models - (request_.reference ? 1 : 0);
  for (int i = 0; i < policies; ++i) good &= std::isfinite((float)request_.weights[b_][i]);
  for (size_t j = 0; j < request_.values.size(); ++j) good &= std::isfinite((float)value_weight(j));
  if (request_.reference && request_.log_linear()) {
    double sum = 0.0;
    for (int model = 1; model < request_.models; ++model) sum += policy_weight(model);
    own_coefficient_ = std::fabs(1.0 - sum) <= request_.weight_rounding ? 0.0 : 1.0 - sum;
    good &= std::isfinite((float)own_coefficient_);
  }
  for (int64_t k = 0; k < request_.candidates; ++k) good &= candidate(k) >= -1 && candidate(k) < request_.vocab;
  if (sampling()) {
    temperature_ = request_.temperature[b_];
    top_k_ = request_.top_k[b_];
    top_p_ = request_.top_p[b_];
    min_p_ = request_.min_p[b_];
    good &= temperature_ >= 0.0f && std::isfinite(temperature_) && top_k_ >= 0;
    good &= top_p_ > 0.0 && top_p_ <= 1.0 && min_p_ >= 0.0f && min_p_ <= 1.0f;
  }
  return good;
}

// The log-sum-exp of a model's logits in one loop, relative to the peak of the first tile. False if that does not suffice: a
// logit is not finite, or that peak is too far from 0 or from the other logits.
bool Row::sum_quickly(int model) {
  const Source x = logits(model);
  PeakSum* parts = scratch_.logit_sums.data() + model * tiles_;
  const float first = loops_.peak_sum(x, 0, tile_size(0)).peak;
  const float level = std::isfinite(first) ? first : 0.0f;
  if (std::fabs(level) > kFarLevel) return false;
  for_tiles([&](int64_t tile) { parts[tile].sum = loops_.sum_from(x, tile * kTile, tile_size(tile), level); });
  double sum = 0.0;
  for (int64_t tile = 0; tile < tiles_; ++tile) sum += parts[tile].sum;
  model_sums_[model] = {level, std::log(sum)};
  return std::isfinite(sum) && sum > kLeastSum;
}

// The same relative to each tile's own peak. False if the logits hold NaN or +inf.
bool Row::sum_carefully(int model) {
  const Source x = logits(model);
  PeakSum* parts = scratch_.logit_sums.data() + model * tiles_;
  for_tiles([&](int64_t tile) { parts[tile] = loops_.peak_sum(x, tile * kTile, tile_size(tile)); });
  double peak = -kInfinity, sum = 0.0;
  for (int64_t tile = 0; tile < tiles_; ++tile) peak = std::fmax(peak, (double)parts[tile].peak);
  bool broken = peak == kInfinity;
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    broken |= std::isnan(parts[tile].sum);
    if (parts[tile].peak > -kInfinity) sum += parts[tile].sum * std::exp(parts[tile].peak - peak);
  }
  model_sums_[model] = {peak, broken ? std::numeric_limits<double>::quiet_NaN() : std::log(sum)};
  return !broken;
}

bool Row::sum_models() {
  bool good = true;
  for (int model = 0; model < request_.models; ++model) {
    const bool counted = counts(model);
    const bool plausible = model == plausibility_model_;
    // The log-linear sum checks its tensors itself, but with candidates it reads only their logits.
    const bool needed = request_.model_logprobs || plausible || (counted && (!request_.log_linear() || request_.value_ids));
    if (!needed || (!plausible && sum_quickly(model))) continue;
    good &= sum_carefully(model) || !(counted || plausible);
  }
  return good;
}

void Row::sum_tile(int64_t tile) {
  const PeakSum part = loops_.peak_sum({scratch_.keys() + tile * kTile, DType::float32, 1.0f}, 0, tile_size(tile));
  scratch_.mixes[tile].peak = part.peak;
  scratch_.sums[tile] = part.sum;
}

bool Row::sum_keys() {
  for_tiles([&](int64_t tile) { sum_tile(tile); });
  return sum_tiles();
}

bool Row::sum_tiles() {
  double peak = -kInfinity, sum = 0.0;
  for (const TileMix& mix : scratch_.mixes) peak = std::fmax(peak, (double)mix.peak);
  if (!std::isfinite(peak)) return false;
  for (int64_t tile = 0; tile < tiles_; ++tile)
    if (scratch_.sums[tile] != 0.0f) sum += scratch_.sums[tile] * std::exp(scratch_.mixes[tile].peak - peak);
  level_ = peak;
  log_norm_ = std::log(sum);
  return std::isfinite(log_norm_);
}

void Row::run() {
  bool good = read_parameters();
  if (request_.own_prefix.size() && !request_.log_linear()) good &= std::isfinite(request_.own_prefix[(size_t)b_]);
  if (good && request_.prefix.size() && !request_.log_linear())
    for (int model = 0; model < request_.models; ++model)
      good &= !counts(model) || std::isfinite(request_.prefix[(size_t)(b_ * request_.models + model)]);
  good = good && sum_models();
  if (good && request_.log_linear()) {
    collect_terms();
    const bool whole_row = !sampling() || filters() || request_.value_ids || plausibility_model_ != kNoModel;
    good = whole_row ? log_linear_keys() && (!sampling() || draw_from_keys()) : draw_log_linear();
  } else if (good) {
    good = mix_general();
  }
  finish(good);
}

void Row::finish(bool valid) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (!sampling()) {
    float* out = request_.log_probs + b_ * request_.vocab;
    for_tiles([&](int64_t tile) {
      const int64_t begin = tile * kTile;
      const int n = tile_size(tile);
      if (valid) loops_.normalised(scratch_.keys() + begin, n, level_, log_norm_, out + begin);
      else std::fill(out + begin, out + begin + n, nan);
    });
    return;
  }
  request_.valid[b_] = valid;
  request_.tokens[b_] = valid ? token_ : 0;
  request_.logprobs[b_] = valid ? (float)(token_key_ - level_ - log_norm_) : nan;
  if (request_.proposal_logprobs) request_.token_proposal_logprobs[b_] = valid ? (float)log_proposal_ : nan;
  if (!request_.model_logprobs) return;
  for (int model = 0; model < request_.models; ++model) {
    float* out = request_.token_model_logprobs + b_ * request_.models + model;
    const ModelSum& sum = model_sums_[model];
    *out = valid ? (float)(element(loops_, logits(model), token_) - sum.level - sum.log_sum) : nan;
  }
}

}  // namespace mod_fused
