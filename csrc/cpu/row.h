// One row of a call, from its logits to its token or log-probabilities. The functions are grouped below by the files that
// define them. A phase hands its results to the next in the scratch and in the members. A *key* is log pi* of a token up to a
// constant of the row; docs/concepts.md explains the other terms.
#pragma once

#include <cmath>
#include <functional>

#include "request.h"

namespace mod_fused {

// Logits further from 0 than this are reduced by a whole number, their level, before float32 rounds them.
constexpr double kFarLevel = 128.0;
constexpr double kSmallestLogRatio = -80.0;  // smaller log-ratios count as this

// Memory of a row: two floats per vocabulary entry, a third with a bias, and a few per tile. A thread keeps it between calls.
struct Scratch {
  // The two floats per entry, by the names of their contents. First they hold p and u (before that Q, see divergence.h), later
  // the keys and, for the filters, the candidates among the keys.
  float* p() const { return first_; }
  float* u() const { return first_ + capacity_; }
  float* keys() const { return first_; }
  float* candidates() const { return first_ + capacity_; }

  std::vector<PeakSum> logit_sums;     // [models][tiles]
  std::vector<TileMix> mixes;          // [tiles], as are the following
  std::vector<DeficitSums> deficits;
  std::vector<float> sums, slopes;     // sums of e^(key - peak of the tile); or s1 and s2
  std::vector<float> masses;           // for the race
  std::vector<int> counts;             // how many candidates
  std::vector<int64_t> weights;        // for top-p
  std::vector<float> unbiased;         // the keys before the bias

  void reserve(int64_t tiles, int models, bool per_token, bool biased);
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

 private:
  float* first_ = nullptr;
  int64_t capacity_ = 0;
};

// Calls body(first tile, end) so that the calls cover [0, tiles), on one thread or several.
using TileBody = std::function<void(int64_t, int64_t)>;
using TileRunner = std::function<void(int64_t, const TileBody&)>;

class Row {
 public:
  Row(const Request& request, int64_t index, Scratch& scratch, const TileRunner& run_tiles);
  void run();

 private:
  // The log-sum-exp of a model's logits in two parts: beside a level of 1e17 a double would lose the logarithm.
  struct ModelSum {
    double level = 0.0, log_sum = 0.0;  // the level is the peak after `sum_carefully`
    double log_norm() const { return level + log_sum; }
  };
  struct Candidate {
    int64_t token;
    double tilt;  // -sum v V
  };

  // row.cpp
  bool read_parameters();
  void exclude_implausible(int64_t tile, float excluded, float* x) const;
  bool sum_quickly(int model);
  bool sum_carefully(int model);
  bool sum_models();  // log-sum-exps that are needed; false if a model that counts holds NaN or +inf
  void sum_tile(int64_t tile);  // peak and sum of a tile's keys
  bool sum_tiles();             // log_norm_ of the row; false if no token is left or a key overflowed
  bool sum_keys();              // sum_tile on all tiles, then sum_tiles
  void finish(bool valid);

  // log_linear.cpp
  void collect_terms();
  bool log_linear_keys();    // stores the keys of the whole row in scratch
  bool candidate_keys();
  bool draw_log_linear();    // stores no keys
  bool sum_log_linear(float* level, bool* certain);

  // What the response so far does to the policies' log-ratios.
  struct Response {
    double shift = 0.0;            // added to them
    double log_mass = 0.0;         // of the divergences of own_mass.h
    double floor = kSmallestLogRatio;
    double tilt_scale = 1.0;       // kappa
  };

  // general.cpp; false if the row is invalid
  bool mix_general();
  Response response() const;
  template <class D> bool mix(D divergence, const DivergenceLoops& loops);

  // values.cpp; false if a value is NaN or +inf
  bool tile_tilt(int64_t tile, double* tilt) const;
  bool collect_candidates();
  const Candidate* first_candidate(int64_t token) const;

  // bracket.h
  struct Offsets {
    float levels[kMaxModels];   // subtracted from the logits: whole numbers, which keep differences of 16-bit logits exact
    double norms[kMaxModels];   // log-sum-exps of the reduced logits
    double shifts[kMaxModels];  // d = policy's logit - reference's logit + shift
  };
  struct Deficits {
    DeficitSums sums;  // s1 and s2 only if fused, and without the tile of s*
    float base;        // see divergence.h
    bool fused;
  };
  struct Bracket {
    double lower, upper;
  };
  Offsets offsets() const;
  template <class D> bool fuse(const D& divergence, const Offsets& offsets, DeficitTile* fused) const;
  void collect_fused(const DivergenceLoops& loops, DeficitTile fused, int64_t tile);
  void collect_buffered(const DivergenceLoops& loops, const Offsets& offsets, int64_t tile);
  void close_excesses(const DivergenceLoops& loops, double least);
  int64_t sum_deficits(DeficitSums* sum) const;
  template <class D>
  bool collect_deficits(const D& divergence, const DivergenceLoops& loops, bool in_one_loop, Deficits* total);
  template <class D> Bracket bracket(const D& divergence, const DeficitSums& total) const;

  // normalizer.h
  struct RowSums {
    double s1, s2;
  };
  RowSums evaluate(const DivergenceLoops& loops, float base, float t);
  template <class D>
  double solve(const D& divergence, const DivergenceLoops& loops, const Deficits& total, Bracket ends);

  // draw.cpp
  bool draw_from_keys();
  bool race(const std::function<void(int64_t, float*)>& token_masses);  // reads the tiles' masses in scratch.masses
  void propose(double log_mass);  // of the token, on the scale of scratch.masses

  // filters.cpp
  void apply_mask(int64_t tile) const;
  bool add_bias();                           // to the keys, whose peaks it stores; false if it is NaN or +inf
  float top_k_cut(float peak);               // the least key that top-k keeps; -inf keeps all
  float top_p_cut(float peak, float least);  // the least key that top-p keeps, of the keys >= least
  void collect(float least);                 // makes the keys >= least candidates
  template <class Weigh> float rank(float peak, int64_t needed, const Weigh& weigh);

  template <class F> void for_tiles(const F& body) {
    run_tiles_(tiles_, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) body(tile);
    });
  }
  int tile_size(int64_t tile) const {
    const int64_t left = request_.vocab - tile * kTile;
    return left < kTile ? (int)left : kTile;
  }
  Source logits(int model) const { return request_.logits[model].row(b_, request_.scales[model]); }
  Source values(size_t j) const { return request_.values[j].row(b_, 1.0f); }
  // A weight below the normal numbers of float32 counts as 0.
  static double normal(double weight) { return std::fabs(weight) < 0x1p-126 ? 0.0 : weight; }
  double policy_weight(int model) const { return normal(request_.weights[b_][model - (request_.reference ? 1 : 0)]); }
  bool counts(int model) const {
    return request_.reference && model == 0 ? own_coefficient_ != 0.0 : policy_weight(model) != 0.0;
  }
  double value_weight(size_t j) const { return normal(request_.value_weights[b_][j]); }
  int64_t candidate(int64_t k) const {
    return request_.value_ids[b_ * request_.value_ids_row + k * request_.value_ids_column];
  }
  bool sampling() const { return request_.log_probs == nullptr; }
  // Finite for the smallest temperatures too, so that 0 times it is 0; 1 for temperature 0.
  float inverse_temperature() const { return temperature_ > 1e-38f ? 1.0f / temperature_ : temperature_ > 0.0f ? 1e38f : 1.0f; }
  bool filters() const { return request_.mask.data || request_.bias.data || top_k_ > 0 || top_p_ < 1.0 || min_p_ > 0.0f; }

  const Request& request_;
  const int64_t b_;
  Scratch& scratch_;
  const TileRunner& run_tiles_;
  const TileLoops& loops_;
  const int64_t tiles_;
  int plausibility_model_ = kNoModel;  // kNoModel where the row's plausibility is off
  float log_plausibility_ = 0.0f;

  Response response_;
  float parameter_ = 0.0f;        // of the divergence's loops
  double own_coefficient_ = 1.0;  // the reference's under reverse KL: 1 - sum w, or 0 if that is only rounding
  float temperature_ = 1.0f, min_p_ = 0.0f;
  double top_p_ = 1.0;
  int64_t top_k_ = 0;
  std::vector<Term> terms_;            // the log-linear sum: models, then values
  size_t model_terms_ = 0;
  ModelSum model_sums_[kMaxModels];    // only those that are needed
  int64_t best_ = 0;                   // s*, and pi_ref of it
  double best_mass_ = 0.0;
  std::vector<Candidate> candidates_;  // of value_ids, sorted by token; not for reverse KL
  double level_ = 0.0, log_norm_ = 0.0;  // log pi* = (key - level) - log_norm
  int64_t token_ = 0;
  double token_key_ = 0.0;
  double log_proposal_ = 0.0;  // of the token after temperature and filters; 0 at temperature 0
};

// One element of a row as float32, scaled.
inline float element(const TileLoops& loops, const Source& x, int64_t i) {
  float out;
  loops.load(x, i, 1, &out);
  return out;
}

}  // namespace mod_fused
