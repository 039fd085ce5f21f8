// What the gradients of a row norm's weight and bias begin and end with.

#include "param_sums.cuh"

KERNEL rn_rows_f32(const double *saved, RowOf<float> *table, double eps, int64_t rows) {
  make_rows(saved, table, eps, rows);
}
KERNEL rn_rows_f64(const double *saved, RowOf<double> *table, double eps, int64_t rows) {
  make_rows(saved, table, eps, rows);
}

// dparams[2][c] of weight and bias, from the partials of all tiles: a warp for each channel.
KERNEL rn_params(const Pair *partials, void *dparams, Problem p) {
  const int lane = threadIdx.x % 32;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (channel >= p.c) {
    return; // the whole warp
  }
  const Pair *mine = partials + partial_at(p, channel / p.channels, 0) + channel % p.channels;
  Pair sum = {0, 0};
  for (int split = lane; split < p.splits; split += 32) {
    sum = sum + load_partial(mine + static_cast<int64_t>(split) * p.channels);
  }
  sum = sum_lanes(sum);
  if (lane == 0) {
    store(dparams, p.params_dtype, channel, sum.b);
    store(dparams, p.params_dtype, p.c + channel, sum.a);
  }
}
BN_EXPORT(rn_rows_f32)
BN_EXPORT(rn_rows_f64)
BN_EXPORT(rn_params)
