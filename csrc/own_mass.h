// The divergences of a whole response, measured from the mixture's own mass m of the response so far: as in
// mod_fused/torch_kernels/own_mass.py, which derives them. Each is the divergence whose derivative is f'(m x), its deficit
// scaled by kappa so that float32 holds it. Forward KL and alpha need none: their f' is a power.
//
//   deficit(d)    y = kappa q(d + log m)
//   of_policy(d)  the same of d less log kappa alone, which float32 holds: a policy's log-ratio
//   log_ratio(y)  log H(y / kappa) - log m
//   log_slope(y)  log of minus its ratio's slope
#pragma once

#include "divergence.h"

namespace mod_fused {

constexpr double kLargestExponent = 80.0, kLargestPrefixExponent = 40.0, kLargestLogScale = 70.0;

// What the two have in common: no Stieltjes form.
struct OfMass : StoresDeficit {
  static constexpr bool clamped = true, stieltjes = false, linear = false;
  double supremum() const { return 0.0; }

 protected:
  explicit OfMass(double log_mass) : log_mass_(log_mass) {}
  template <class D> static MOD_FUSED_MEMBER void ratio_of(const D& d, float y, float* h, float* fall) {
    const float log_ratio = d.log_ratio(y);
    *h = exp2_near(not_above(not_below(1.44269504f * log_ratio, -126.0f), 127.0f));
    *fall = exp_near(d.log_slope(y) - log_ratio);
  }
  double log_mass_;
};

// kappa = max(1, m).
struct JensenShannonOfMass : OfMass {
  static constexpr int number = JensenShannon::number;
  static constexpr bool bounded = true;
  static bool takes(double) { return true; }
  explicit JensenShannonOfMass(double log_mass)
      : OfMass(log_mass),
        above_(log_mass > 0.0),
        scale_(exp(above_ ? (log_mass < kLargestLogScale ? log_mass : kLargestLogScale) : 0.0)),
        inverse_(exp(above_ ? -log_mass : 0.0)) {}

  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const { return of_policy(above_ ? d : d + Real(log_mass_)); }
  template <class Real> MOD_FUSED_MEMBER Real of_policy(Real d) const {
    const Real whole = above_ ? d + Real(log_mass_) : d, scaled = Real(scale_) * base_.deficit(whole);
    // q is e^-(d + log m) there: m q is e^-d, however large m is.
    const Real power = exp_near(d < Real(-kLargestExponent) ? Real(kLargestExponent) : -d);
    return (above_ & (whole > 16)) ? power : scaled;
  }
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real y) const {
    const Real q = y * Real(inverse_), t = q < Real(1e-4) ? Real(1e-4) : q;
    // log(expm1(q) / q) keeps its digits where m is so large that q underflows.
    const Real rest = q < Real(1e-4) ? Real(0.5) * q : -base_.log_ratio(t) - log_of(t);
    // log m first: y + log m is small where both are large.
    const Real below = -(y + Real(log_mass_)) - log_of(JensenShannon::one_minus_exp(y));
    return above_ ? -log_of(y) - rest : below;
  }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real y) const {
    return above_ ? y * Real(inverse_) + 2 * log_ratio(y) : base_.log_slope(y) - Real(log_mass_);
  }
  MOD_FUSED_MEMBER void ratio(float y, float* h, float* fall) const { ratio_of(*this, y, h, fall); }
  MOD_FUSED_MEMBER float log_power(float y) const { return log_ratio(y); }
  // `fall` is 1 / (kappa (1 - e^-q)).
  double pole(double s) const {
    const double part = s * inverse_ < 1.0 - 1e-12 ? s * inverse_ : 1.0 - 1e-12;
    return part < 1e-9 ? s : -log1p(-part) / inverse_;
  }

 private:
  JensenShannon base_{0.0};
  bool above_;
  double scale_, inverse_;
};

// kappa = min(1, m).
struct JeffreyOfMass : OfMass {
  static constexpr int number = Jeffrey::number;
  static constexpr bool bounded = false;
  static bool takes(double) { return true; }
  explicit JeffreyOfMass(double log_mass)
      : OfMass(log_mass),
        above_(log_mass > 0.0 ? log_mass : 0.0),
        scale_(exp(log_mass < 0.0 ? log_mass : 0.0)),
        inverse_(exp(log_mass < 0.0 ? (log_mass > -kLargestLogScale ? -log_mass : kLargestLogScale) : 0.0)) {}

  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const { return of_policy(d + Real(above_)); }
  template <class Real> MOD_FUSED_MEMBER Real of_policy(Real d) const {
    const Real power = exp_near(d < Real(-kLargestExponent) ? Real(kLargestExponent) : -d);
    return power - Real(scale_) * (d + Real(log_mass_ - above_) + 1);
  }
  // v = 1/x solves v + log v = q + 1; from 1e15 on it is q, and 1 / (m x) is y.
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real y) const {
    const Real most = Real(1e15), q = y * Real(inverse_);
    const Real z = 1 + (q < most ? q : most), v = Jeffrey::wright_omega(z);
    // log m first: q + log m is small where both are large.
    const Real near = z > 0 ? -log_of(v) - Real(log_mass_) : (v - 1) - (q + Real(log_mass_));
    return q < most ? near : -log_of(q < most ? Real(1) : y);
  }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real y) const {
    const Real log_ratio = this->log_ratio(y), log_x = log_ratio + Real(log_mass_);
    const Real size = log_x > 0 ? log_x : -log_x;
    return 2 * log_ratio + Real(above_) - ((log_x > 0 ? log_x : Real(0)) + log1p_unit(exp_near(-size)));
  }
  MOD_FUSED_MEMBER void ratio(float y, float* h, float* fall) const { ratio_of(*this, y, h, fall); }
  MOD_FUSED_MEMBER float log_power(float y) const { return log_ratio(y); }
  // `fall` is 1 / (kappa (1 + v)).
  double pole(double s) const { return scale_ < 1e-15 * s ? s : base_.pole(s / scale_) * scale_; }

 private:
  Jeffrey base_{0.0};
  double above_, scale_, inverse_;
};

using DivergencesOfMass = DivergenceList<JensenShannonOfMass, JeffreyOfMass>;

template <class... D, class... E> DivergenceList<D..., E...> joined(DivergenceList<D...>, DivergenceList<E...>);
// All that have loops.
using LoopDivergences = decltype(joined(Divergences(), DivergencesOfMass()));

}  // namespace mod_fused
