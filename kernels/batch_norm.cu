// Batch norm of x: [n, c, s], forward and backward; the formulas stand in src/ops/batch_norm/mod.rs.
//
// Training takes two passes over x forward and two over x and dy backward. The first leaves a few
// numbers for each part of a channel in `partials`; the second begins by merging those of its
// channel, in each block anew and always in the same order, and then writes its part of the
// output. There are no atomics: the same input gives the same bits.
//
// Sums are kept in double, a chunk of values at a time; the values themselves are computed in
// float for all dtypes but double.

#include "common.cuh"

// Count, mean and sum of squared deviations of some values: merged as in Chan, Golub and LeVeque 1979.
struct Moments {
  double count, mean, m2;

  __device__ Moments with(const Moments &other) const {
    if (other.count == 0) {
      return *this;
    }
    const double total = count + other.count;
    const double delta = other.mean - mean;
    const double share = other.count / total;
    return {total, mean + delta * share, m2 + other.m2 + delta * delta * count * share};
  }
};

// Σg and Σg·(x - mean), where g is dy behind the activation.
struct Sums {
  double g, gx;

  __device__ Sums with(const Sums &other) const { return {g + other.g, gx + other.gx}; }
};

// How a channel is normalised: y = ((x - hi) - lo)·scale + shift. hi + lo is the mean as two
// numbers, so that x - mean is right to the last bit however far the mean is from zero.
template <typename R> struct Channel {
  R hi, lo, scale, shift;

  __device__ R centre(R x) const { return (x - hi) - lo; }
  __device__ R normalise(R x) const { return multiply_add(centre(x), scale, shift); }
};

template <typename R>
__device__ Channel<R> make_channel(const Problem &p, double mean, double rstd, const void *weight,
                                   const void *bias, int64_t channel) {
  const double w = weight ? load(weight, p.params_dtype, channel) : 1.0;
  const double b = bias ? load(bias, p.params_dtype, channel) : 0.0;
  const R hi = static_cast<R>(mean);
  return {hi, static_cast<R>(mean - hi), static_cast<R>(w * rstd), static_cast<R>(b)};
}

__device__ inline double rstd_of(const Problem &p, double var) { return 1.0 / sqrt(var + p.eps); }

// dy where the ReLU let through. The mask comes from y where there is one (a residual took part in
// it); else y is computed again from x, in the same steps, down to the rounding to its dtype. A NaN
// lets through, as in PyTorch.
template <typename T>
__device__ real_of<T> masked(const Problem &p, const Channel<real_of<T>> &channel, real_of<T> x,
                             const T *y, int64_t offset, real_of<T> dy) {
  if (!p.relu) {
    return dy;
  }
  const T out = y ? y[offset] : from_real<T>(channel.normalise(x));
  return to_real(out) <= 0 ? static_cast<real_of<T>>(0) : dy;
}

// partials[channel][split] = mean of (x - pivot), and the sum of squared deviations from it.
//
// The pivot is the channel's first value: a constant channel has exactly its value as mean, and the
// offset of the data costs no accuracy. An outlier in its place costs little: it cannot be further
// from the mean than √m standard deviations, so that x - pivot rounds to 2⁻²⁵·√m of one at most.
template <typename T> __device__ void stats(const T *x, double *partials, const Problem &p) {
  using R = real_of<T>;
  BN_SHARED(Moments, shared, [THREADS]);
  Values values(p);
  const R pivot = values.channel < p.c ? to_real(x[values.channel * p.s]) : R(0);
  Moments mine = {0, 0, 0};
  while (values.left >= CHUNK) {
    R shifted[CHUNK];
    R sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      shifted[i] = to_real(x[values.offset]) - pivot;
      values.next();
    }
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      sum += shifted[i];
    }
    const R mean = sum / CHUNK;
    R m2 = 0;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      m2 += (shifted[i] - mean) * (shifted[i] - mean);
    }
    mine = mine.with({CHUNK, mean, m2});
  }
  while (values.left > 0) {
    mine = mine.with({1, to_real(x[values.offset]) - pivot, 0});
    values.next();
  }
  const Moments all = combine(mine, shared, p.width);
  if (values.is_first) {
    double *partial = partials + (values.channel * p.splits + values.split) * 2;
    partial[0] = all.mean;
    partial[1] = all.m2;
  }
}

// Mean and variance of the thread's channel, from the partials of `stats`.
template <typename T>
__device__ void merge_stats(const T *x, const double *partials, const Problem &p,
                            const Values &values, Moments *shared, double *mean, double *var) {
  Moments mine = {0, 0, 0};
  if (values.channel < p.c) {
    for (int split = values.rank; split < p.splits; split += values.size) {
      const double *partial = partials + (values.channel * p.splits + split) * 2;
      const int64_t count = Values::begin_of(p, split + 1) - Values::begin_of(p, split);
      mine = mine.with({static_cast<double>(count), partial[0], partial[1]});
    }
  }
  const Moments all = combine(mine, shared, p.width);
  if (values.is_first) {
    *mean = to_real(x[values.channel * p.s]) + all.mean;
    *var = all.m2 / p.m;
    if (!p.remove_mean) {
      *var += *mean * *mean;
      *mean = 0;
    }
  }
}

// y, and saved[2][c] = mean and variance that were used. With `given_mean` these are given; else
// they come from `partials`.
template <typename T>
__device__ void forward(const T *x, const T *residual, const void *weight, const void *bias,
                        const void *given_mean, const void *given_var, const double *partials,
                        T *y, double *saved, const Problem &p) {
  using R = real_of<T>;
  BN_SHARED(Moments, shared, [THREADS]);
  BN_SHARED(Channel<R>, channels, [32]);
  Values values(p);
  double mean = 0, var = 0;
  if (given_mean) {
    if (values.is_first) {
      mean = load(given_mean, p.given_dtype, values.channel);
      var = load(given_var, p.given_dtype, values.channel);
    }
  } else {
    merge_stats(x, partials, p, values, shared, &mean, &var);
  }
  if (values.is_first) {
    channels[threadIdx.x] =
        make_channel<R>(p, mean, rstd_of(p, var), weight, bias, values.channel);
    if (values.split == 0) {
      saved[values.channel] = mean;
      saved[p.c + values.channel] = var;
    }
  }
  __syncthreads();
  const Channel<R> channel = channels[threadIdx.x % p.width];
#pragma unroll 4
  while (values.left > 0) {
    R v = channel.normalise(to_real(x[values.offset]));
    if (residual) {
      v += to_real(residual[values.offset]);
    }
    if (p.relu && v < 0) {
      v = 0;
    }
    y[values.offset] = from_real<T>(v);
    values.next();
  }
}

// partials[channel][split] = Σg, Σg·(x - mean).
template <typename T>
__device__ void backward_sums(const T *x, const T *dy, const T *y, const void *weight,
                              const void *bias, const double *saved, double *partials,
                              const Problem &p) {
  using R = real_of<T>;
  BN_SHARED(Sums, shared, [THREADS]);
  BN_SHARED(Channel<R>, channels, [32]);
  Values values(p);
  if (values.is_first) {
    channels[threadIdx.x] =
        make_channel<R>(p, saved[values.channel], rstd_of(p, saved[p.c + values.channel]), weight,
                        bias, values.channel);
  }
  __syncthreads();
  const Channel<R> channel = channels[threadIdx.x % p.width];
  Sums mine = {0, 0};
  while (values.left >= CHUNK) {
    R g[CHUNK], centred[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const R v = to_real(x[values.offset]);
      g[i] = masked(p, channel, v, y, values.offset, to_real(dy[values.offset]));
      centred[i] = channel.centre(v);
      values.next();
    }
    R sum_g = 0, sum_gx = 0;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      sum_g += g[i];
      sum_gx = multiply_add(g[i], centred[i], sum_gx);
    }
    mine = mine.with({sum_g, sum_gx});
  }
  while (values.left > 0) {
    const R v = to_real(x[values.offset]);
    const R g = masked(p, channel, v, y, values.offset, to_real(dy[values.offset]));
    mine = mine.with({g, g * channel.centre(v)});
    values.next();
  }
  const Sums all = combine(mine, shared, p.width);
  if (values.is_first) {
    double *partial = partials + (values.channel * p.splits + values.split) * 2;
    partial[0] = all.g;
    partial[1] = all.gx;
  }
}

// dx, dresidual and dparams[2][c] (of weight and bias), as far as they are asked for. Without
// `partials` only what needs no sums: dx where the statistics were given, and dresidual.
template <typename T>
__device__ void backward(const T *x, const T *dy, const T *y, const void *weight, const void *bias,
                         const double *saved, const double *partials, T *dx, T *dresidual,
                         void *dparams, const Problem &p) {
  using R = real_of<T>;
  BN_SHARED(Sums, shared, [THREADS]);
  BN_SHARED(Channel<R>, channels, [32]);
  BN_SHARED(R, mean_gs, [32]);
  BN_SHARED(R, slopes, [32]);
  Values values(p);
  Sums mine = {0, 0};
  if (partials && values.channel < p.c) {
    for (int split = values.rank; split < p.splits; split += values.size) {
      const double *partial = partials + (values.channel * p.splits + split) * 2;
      mine = mine.with({partial[0], partial[1]});
    }
  }
  const Sums all = combine(mine, shared, p.width);
  if (values.is_first) {
    const double rstd = rstd_of(p, saved[p.c + values.channel]);
    channels[threadIdx.x] =
        make_channel<R>(p, saved[values.channel], rstd, weight, bias, values.channel);
    mean_gs[threadIdx.x] = static_cast<R>(p.remove_mean ? all.g / p.m : 0.0);
    slopes[threadIdx.x] = static_cast<R>(rstd * rstd * all.gx / p.m);
    if (dparams && values.split == 0) {
      store(dparams, p.params_dtype, values.channel, rstd * all.gx);
      store(dparams, p.params_dtype, p.c + values.channel, all.g);
    }
  }
  __syncthreads();
  const Channel<R> channel = channels[threadIdx.x % p.width];
  const R mean_g = mean_gs[threadIdx.x % p.width], slope = slopes[threadIdx.x % p.width];
#pragma unroll 4
  while (values.left > 0) {
    const R v = to_real(x[values.offset]);
    const R g = masked(p, channel, v, y, values.offset, to_real(dy[values.offset]));
    if (dx) {
      const R through_stats = p.training ? multiply_add(channel.centre(v), slope, mean_g) : R(0);
      dx[values.offset] = from_real<T>(channel.scale * (g - through_stats));
    }
    if (dresidual) {
      dresidual[values.offset] = from_real<T>(g);
    }
    values.next();
  }
}

// running = keep·running + take·new
template <typename T>
__device__ void move_towards(T *running, const double *value, double keep, double take, int64_t c) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i < c) {
    running[i] = static_cast<T>(keep * running[i] + take * value[i]);
  }
}

// Three blocks on a multiprocessor: 80 registers a thread, so that nothing spills.
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, 3)

#define KERNELS(NAME, T)                                                                           \
  KERNEL bn_stats_##NAME(const T *x, double *partials, Problem p) { stats(x, partials, p); }       \
  KERNEL bn_forward_##NAME(const T *x, const T *residual, const void *weight, const void *bias,    \
                           const void *given_mean, const void *given_var, const double *partials,  \
                           T *y, double *saved, Problem p) {                                       \
    forward(x, residual, weight, bias, given_mean, given_var, partials, y, saved, p);              \
  }                                                                                                \
  KERNEL bn_backward_sums_##NAME(const T *x, const T *dy, const T *y, const void *weight,          \
                                 const void *bias, const double *saved, double *partials,          \
                                 Problem p) {                                                      \
    backward_sums(x, dy, y, weight, bias, saved, partials, p);                                     \
  }                                                                                                \
  KERNEL bn_backward_##NAME(const T *x, const T *dy, const T *y, const void *weight,               \
                            const void *bias, const double *saved, const double *partials, T *dx,  \
                            T *dresidual, void *dparams, Problem p) {                              \
    backward(x, dy, y, weight, bias, saved, partials, dx, dresidual, dparams, p);                  \
  }                                                                                                \
  BN_EXPORT(bn_stats_##NAME)                                                                       \
  BN_EXPORT(bn_forward_##NAME)                                                                     \
  BN_EXPORT(bn_backward_sums_##NAME)                                                               \
  BN_EXPORT(bn_backward_##NAME)

KERNELS(f32, float)
KERNELS(f64, double)
KERNELS(f16, __half)
KERNELS(bf16, __nv_bfloat16)

KERNEL bn_running_f32(float *running, const double *value, double keep, double take, int64_t c) {
  move_towards(running, value, keep, take, c);
}
KERNEL bn_running_f64(double *running, const double *value, double keep, double take, int64_t c) {
  move_towards(running, value, keep, take, c);
}
BN_EXPORT(bn_running_f32)
BN_EXPORT(bn_running_f64)
