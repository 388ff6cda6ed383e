// Functions of a Vec, written once over its interface. Included inside the namespace and the target region of
// one instruction set, after its vec_*.h.

// 2^x, relative error 1.7e-7, for x < 127.5; less than -126 counts as that, so that nothing is subnormal
// (where it was, GELU took ten times as long); a NaN stays one. 2^r for -1/2 <= r <= 1/2 is 1 + r P(r), a
// minimax fit (as in gelu) of relative error 1.1e-7.
PACKEDBERT_INLINE Vec exp2(Vec x) {
  x = max(Vec::broadcast(-126.0f), x);
  const Vec n = round(x);
  const Vec r = x - n;
  Vec p = Vec::broadcast(0.0013264727f);
  p = fma(p, r, Vec::broadcast(0.0096715127f));
  p = fma(p, r, Vec::broadcast(0.0555073374f));
  p = fma(p, r, Vec::broadcast(0.2402224208f));
  p = fma(p, r, Vec::broadcast(0.6931469776f));
  return times_exp2(fma(p, r, Vec::broadcast(1.0f)), n);
}

// max(x, 0); a NaN stays one.
PACKEDBERT_INLINE Vec relu(Vec x) { return max(Vec::zero(), x); }

// x Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2. In this form nothing cancels for x << 0, and both
// infinities have their limits (-1e-37 and infinity); the direct one gives inf - inf. erfc(z) = t P(t)
// e^(-z^2) with t = 1 / (1 + 0.39 z) is the form of Abramowitz and Stegun 7.1.26 with one more term, fitted
// anew: a minimax fit (least squares in double, reweighted after Lawson) over 0 <= z <= 4.5, of absolute
// error 8.3e-9, where the handbook's coefficients leave 1.5e-7.
PACKEDBERT_INLINE Vec gelu(Vec x) {
  const Vec a = min(Vec::broadcast(13.0f), abs(x));  // the tail is 1e-37 and less from here on, and normal
  const Vec t = inverse(fma(a, Vec::broadcast(0.39f * 0.70710678118654752f), Vec::broadcast(1.0f)));
  Vec half_p = Vec::broadcast(0.5f * -0.22753712521463076f);
  half_p = fma(half_p, t, Vec::broadcast(0.5f * 0.8866643702002386f));
  half_p = fma(half_p, t, Vec::broadcast(0.5f * -0.6354002792271743f));
  half_p = fma(half_p, t, Vec::broadcast(0.5f * 0.6495593990468206f));
  half_p = fma(half_p, t, Vec::broadcast(0.5f * 0.09138841438536005f));
  half_p = fma(half_p, t, Vec::broadcast(0.5f * 0.23532521911067275f));
  const Vec tail = a * (half_p * t) * exp2(a * a * Vec::broadcast(-0.5f * kLog2E));
  return relu(x) - tail;
}

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
PACKEDBERT_INLINE Vec gelu_new(Vec x) {
  x = max(Vec::broadcast(-10.0f), x);  // the result is 1e-37 and less below, and the exponent 126 at most
  const Vec cubic = fma(x * x * x, Vec::broadcast(0.044715f), x);
  const Vec e = exp2(cubic * Vec::broadcast(-2.0f * 0.79788456080286536f * kLog2E));
  return x / (Vec::broadcast(1.0f) + e);
}
