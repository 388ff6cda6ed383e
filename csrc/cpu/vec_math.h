// Functions of a Vec, written once over its interface. Included inside the namespace and the target region of
// one instruction set, after its vec_*.h.

// e^x, relative error 2e-7, for x clamped to [-87.3, 88.3] (so neither 0 nor infinity comes out); a NaN stays
// one. Range reduction and polynomial: expf of the Cephes library (S. L. Moshier,
// https://www.netlib.org/cephes).
PACKEDBERT_INLINE Vec exp(Vec x) {
  x = min(Vec::broadcast(88.3f), max(Vec::broadcast(-87.3f), x));
  // Adding 1.5 * 2^23 pushes the fraction out of the significand, as in vec_scalar.h's round.
  const Vec shift = Vec::broadcast(12582912.0f);
  const Vec n = fma(x, Vec::broadcast(1.44269504088896341f), shift) - shift;
  Vec r =
      fma(n, Vec::broadcast(-0.693359375f), x);  // x - n ln(2), ln(2) in two parts: the first one is exact
  r = fma(n, Vec::broadcast(2.12194440e-4f), r);
  Vec p = Vec::broadcast(1.9875691500e-4f);
  p = fma(p, r, Vec::broadcast(1.3981999507e-3f));
  p = fma(p, r, Vec::broadcast(8.3334519073e-3f));
  p = fma(p, r, Vec::broadcast(4.1665795894e-2f));
  p = fma(p, r, Vec::broadcast(1.6666665459e-1f));
  p = fma(p, r, Vec::broadcast(5.0000001201e-1f));
  const Vec e_r = fma(p, r * r, r) + Vec::broadcast(1.0f);
  return times_exp2(e_r, n);
}

// max(x, 0); a NaN stays one.
PACKEDBERT_INLINE Vec relu(Vec x) { return max(Vec::zero(), x); }

// x Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2. In this form nothing cancels for x << 0, and both
// infinities have their limits (0 and infinity); the direct one gives inf - inf. erfc(z) = t P(t) e^(-z^2)
// with t = 1 / (1 + 0.39 z) is the form of Abramowitz and Stegun 7.1.26 with one more term, fitted anew: a
// minimax fit (least squares in double, reweighted after Lawson) over 0 <= z <= 4.5, of absolute error
// 8.3e-9, where the handbook's coefficients leave 1.5e-7.
PACKEDBERT_INLINE Vec gelu(Vec x) {
  const Vec a = min(Vec::broadcast(14.0f), abs(x));  // e^-98 and less: the tail is 0 in float from here on
  const Vec one = Vec::broadcast(1.0f);
  const Vec t = one / fma(a, Vec::broadcast(0.39f * 0.70710678118654752f), one);
  Vec p = Vec::broadcast(-0.22753712521463076f);
  p = fma(p, t, Vec::broadcast(0.8866643702002386f));
  p = fma(p, t, Vec::broadcast(-0.6354002792271743f));
  p = fma(p, t, Vec::broadcast(0.6495593990468206f));
  p = fma(p, t, Vec::broadcast(0.09138841438536005f));
  p = fma(p, t, Vec::broadcast(0.23532521911067275f));
  const Vec half_a = a * Vec::broadcast(0.5f);
  const Vec tail = half_a * (p * t) * exp(Vec::zero() - half_a * a);
  return relu(x) - tail;
}

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
PACKEDBERT_INLINE Vec gelu_new(Vec x) {
  x = max(Vec::broadcast(-100.0f), x);  // the result is 0 from far above here on, and -inf / inf never occurs
  const Vec cubic = fma(x * x * x, Vec::broadcast(0.044715f), x);
  const Vec e = exp(cubic * Vec::broadcast(-2.0f * 0.79788456080286536f));
  return x / (Vec::broadcast(1.0f) + e);
}
