// One step of the smoothing of the importances (policies/smoothing.rs), all modules at once.

// Grid: one block.
const int SMOOTH_THREADS = 256;

extern "C" __global__ void __launch_bounds__(SMOOTH_THREADS) smooth(
    const double* importance, const double* factor, double* mean, double* uncertainty, int count, double beta1,
    double beta2) {
    int all_finite = 1;
    for (int k = threadIdx.x; k < count; k += SMOOTH_THREADS) {
        all_finite &= isfinite(importance[k] * factor[k]) ? 1 : 0;
    }
    // One module that overflowed spoils the step for all: their scores stay comparable.
    if (!__syncthreads_and(all_finite)) return;
    for (int k = threadIdx.x; k < count; k += SMOOTH_THREADS) {
        const double now = importance[k] * factor[k];
        const double smoothed = beta1 * mean[k] + (1.0 - beta1) * now;
        mean[k] = smoothed;
        uncertainty[k] = beta2 * uncertainty[k] + (1.0 - beta2) * fabs(now - smoothed);
    }
}
