// The f-divergences (design §2): the three functions each is made of, as in mod_fused/divergence.py, and
// the form in which their inverse is summed over a vocabulary. Shared by host and device code; Real is
// float (vectorisable) or double.
//
//   deficit(d)    q = sup f' - f'(e^d)
//   log_ratio(q)  log H(q), H the inverse of q in ratio space
//   log_slope(q)  log(-H'(q))
//
// The three bounded ones are Stieltjes kernels: with x = excess(D) and t = shift(tau),
//
//   H(tau + D) = e^constant(tau) y^(-order),     y = distance(t, x) = t + x,     power(y, 1/y) = y^(-order),
//
// so that a sum over tokens costs a division each where order is 1 or 2, and no logarithm.
#pragma once

#include "scalar_math.h"

namespace mod_fused {

struct ForwardKL {
  static constexpr bool bounded = true, clamped = true, stieltjes = true;
  explicit ForwardKL(double = 0.0) {}
  double supremum() const { return 0.0; }

  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const { return exp_near(-d); }
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real q) const { return -log_of(q); }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real q) const { return -2 * log_of(q); }

  MOD_FUSED_MEMBER float excess(float d) const { return d; }
  MOD_FUSED_MEMBER float distance(float t, float x) const { return t + x; }
  MOD_FUSED_MEMBER float power(float, float r) const { return r; }
  MOD_FUSED_MEMBER float log_power(float t, float x) const { return -log_of(t + x); }
  double shift(double tau) const { return tau; }
  double unshift(double t) const { return t; }
  double constant(double) const { return 0.0; }
  double order() const { return 1.0; }
};

struct JensenShannon {
  static constexpr bool bounded = true, clamped = false, stieltjes = true;
  explicit JensenShannon(double = 0.0) {}
  double supremum() const { return 0.6931471805599453; }

  // softplus(-d); d may be -inf-free but of any size: linear where it is very negative.
  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const {
    const Real a = d < 0 ? d : -d;  // -|d|
    return (d < 0 ? -d : Real(0)) + log1p_unit(exp_near(a));
  }
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real q) const {
    return -(q + log_of(one_minus_exp(q)));
  }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real q) const {
    return -q - 2 * log_of(one_minus_exp(q));
  }

  // 1 / expm1(tau + D) = e^-tau / ((1 - e^-tau) + expm1(D))
  // Where expm1(D) would overflow H is e^-(tau + D), and 0 to a sum: there x is -D.
  MOD_FUSED_MEMBER float excess(float d) const {
    const float x = expm1_of(d);
    return d > 80.0f ? -d : x;
  }
  MOD_FUSED_MEMBER float distance(float t, float x) const { return x < 0.0f ? 1e37f : t + x; }
  MOD_FUSED_MEMBER float power(float, float r) const { return r; }
  MOD_FUSED_MEMBER float log_power(float t, float x) const {
    const float near = -log_of(distance(t, x));
    return x < 0.0f ? x : near;
  }
  double shift(double tau) const { return -expm1(-tau); }
  double unshift(double t) const { return -log1p(-t); }
  double constant(double tau) const { return -tau; }
  double order() const { return 1.0; }

 private:
  // 1 - e^-q; e^-q is 0 in float32 beyond 80.
  MOD_FUSED_MEMBER static float one_minus_exp(float q) { return -expm1_of(-(q > 80.0f ? 80.0f : q)); }
  MOD_FUSED_MEMBER static double one_minus_exp(double q) { return -expm1(-q); }
};

// alpha = 1/2 has a compile-time order: its kernel is a square.
template <bool half> struct Alpha {
  static constexpr bool bounded = true, clamped = true, stieltjes = true;
  float alpha, inverse;  // a, 1/a
  explicit Alpha(double a) : alpha((float)a), inverse((float)(1.0 / a)) {}
  double supremum() const { return 1.0 / alpha; }

  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const {
    return exp_near(-Real(alpha) * d) * Real(inverse);
  }
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real q) const {
    return -Real(inverse) * log_of(Real(alpha) * q);
  }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real q) const {
    return -(1 + Real(inverse)) * log_of(Real(alpha) * q);
  }

  // In units of 1/a, so that a small a does not overflow: H = (a tau + a D)^(-1/a).
  MOD_FUSED_MEMBER float excess(float d) const { return alpha * d; }
  MOD_FUSED_MEMBER float distance(float t, float x) const { return t + x; }
  MOD_FUSED_MEMBER float power(float y, float r) const {
    return half ? r * r : exp_of(-inverse * log_of(y));
  }
  MOD_FUSED_MEMBER float log_power(float t, float x) const { return -inverse * log_of(t + x); }
  double shift(double tau) const { return alpha * tau; }
  double unshift(double t) const { return t / alpha; }
  double constant(double) const { return 0.0; }
  double order() const { return half ? 2.0 : (double)inverse; }
};

// f' is unbounded: sup f' counts as 0, q = -f' takes any sign, and there is no pole.
struct Jeffrey {
  static constexpr bool bounded = false, clamped = true, stieltjes = false;
  explicit Jeffrey(double = 0.0) {}
  double supremum() const { return 0.0; }

  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const { return expm1_signed(-d) - d; }

  // v = 1/x solves v + log v = 1 + q; -log v alone cancels where v is large, v - z where v is small.
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real q) const {
    const Real z = 1 + q;
    const Real v = wright_omega(z);
    const Real far = -log_of(v), near = v - z;
    return z > 0 ? far : near;
  }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real q) const {
    const Real log_x = log_ratio(q);
    return 2 * log_x - ((log_x > 0 ? log_x : Real(0)) + log1p_unit(exp_of(log_x > 0 ? -log_x : log_x)));
  }

  MOD_FUSED_MEMBER float excess(float d) const { return d; }
  MOD_FUSED_MEMBER float distance(float t, float x) const { return t + x; }
  MOD_FUSED_MEMBER float log_power(float t, float x) const { return log_ratio(t + x); }
  double shift(double tau) const { return tau; }
  double unshift(double t) const { return t; }
  double constant(double) const { return 0.0; }

 private:
  // expm1 for d in [-80, 80]; below -80 the deficit is linear to the last bit.
  MOD_FUSED_MEMBER static float expm1_signed(float x) { return expm1_of(x < -80.0f ? -80.0f : x); }
  MOD_FUSED_MEMBER static double expm1_signed(double x) { return expm1(x); }

  // v + log v = z by two steps of Fritsch, Shafer and Crowley; below -80 as at -80, where v - z no longer shows it.
  template <class Real> MOD_FUSED_MEMBER static Real wright_omega(Real z) {
    z = z < -80 ? Real(-80) : z;
    const Real exp_z = exp_of(z > 1 ? Real(1) : z);
    const Real log_z = log_of(z < 1 ? Real(1) : z);
    const Real low = exp_z / (1 + Real(0.6) * exp_z), high = z - log_z * (z / (1 + z));
    Real v = z > 1 ? high : low;
    for (int i = 0; i < 2; ++i) {
      const Real step = (z - v - log_of(v)) / (1 + v);
      const Real twice = 2 * (1 + v + step * (1 + v) * Real(2.0 / 3.0));
      v = v * (1 + step * (twice - step) / (twice - 2 * step));
    }
    return v;
  }
};

}  // namespace mod_fused
