/* Movements that take each weight by itself, in one pass over memory; called by elementwise.py.

   A list of n tensors is given by their sizes and by pointers to their first elements: float32, dense, laid out alike in
   all lists. Work is dealt out in blocks, each of one tensor; first[k] is the number of the first block of tensor k, and
   first[n] that of all blocks. So no result depends on the number of threads. */

#include "kernels.h"

#define BLOCK 4096 /* weights that a thread takes at a time */

typedef struct {
    int64_t tensor, start, length;
} Block;

static Block find(int64_t number, int64_t n, const int64_t *sizes, const int64_t *first) {
    int64_t tensor = owner(number, n, first), start = (number - first[tensor]) * BLOCK;
    return (Block){tensor, start, least(BLOCK, sizes[tensor] - start)};
}

/* partial[b] = sum of the squares in block b */
void squares(int64_t n, const int64_t *sizes, const int64_t *first, float *const *gradients, double *partial,
             int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t number = 0; number < first[n]; number++) {
        Block block = find(number, n, sizes, first);
        partial[number] = sum_of_squares(gradients[block.tensor] + block.start, block.length);
    }
}

/* Writes what becomes of the weights to targets: each, for weight i of a block, sets moved[j] from its x[i] and g[i], and
   from what of_block declares. */
#define MOVE(of_block, each)                                                                                           \
    int is_streamed = first[n] > STREAMED / BLOCK;                                                                     \
    _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
    for (int64_t number = 0; number < first[n]; number++) {                                                            \
        Block block = find(number, n, sizes, first);                                                                   \
        const float *restrict x = origins[block.tensor] + block.start;                                                 \
        const float *restrict g = gradients[block.tensor] + block.start;                                               \
        float *w = targets[block.tensor] + block.start, moved[TILE];                                                   \
        of_block;                                                                                                      \
        for (int64_t tile = 0; tile < block.length; tile += TILE) {                                                    \
            int64_t length = least(TILE, block.length - tile);                                                         \
            for (int64_t j = 0; j < length; j++) {                                                                     \
                int64_t i = tile + j;                                                                                  \
                each;                                                                                                  \
            }                                                                                                          \
            put(w + tile, moved, length, is_streamed);                                                                 \
        }                                                                                                              \
        fence();                                                                                                       \
    }

/* targets = origins + scale * gradients */
void scaled(int64_t n, const int64_t *sizes, const int64_t *first, float *const *origins, float *const *gradients,
            float *const *targets, float scale, int threads) {
    MOVE(, moved[j] = x[i] + scale * g[i])
}

/* sums += gradients^2; targets = origins + lr * gradients / sqrt(sums) */
void adagrad(int64_t n, const int64_t *sizes, const int64_t *first, float *const *origins, float *const *gradients,
             float *const *targets, float *const *sums, float lr, int threads) {
    MOVE(float *restrict u = sums[block.tensor] + block.start,
         u[i] += g[i] * g[i];
         moved[j] = x[i] + lr * g[i] / sqrtf(u[i]))
}

/* steps += 1; firsts, seconds = averages of -gradients and of gradients^2, as torch keeps them where it maximizes;
   targets = origins - lr / c1 * firsts / (sqrt(seconds / c2) + eps), with c = 1 - beta^steps where they are corrected;
   rates and roots are room for n numbers each */
void adam(int64_t n, const int64_t *sizes, const int64_t *first, float *const *origins, float *const *gradients,
          float *const *targets, float *const *firsts, float *const *seconds, float *const *steps, double lr,
          double beta1, double beta2, float eps, int is_corrected, float *rates, float *roots, int threads) {
    float keep1 = beta1, keep2 = beta2, add1 = 1 - beta1, add2 = 1 - beta2;
    for (int64_t k = 0; k < n; k++) {
        steps[k][0] += 1;
        rates[k] = is_corrected ? lr / (1 - pow(beta1, steps[k][0])) : lr;
        roots[k] = is_corrected ? 1 / sqrt(1 - pow(beta2, steps[k][0])) : 1;
    }
    MOVE(float *restrict r = firsts[block.tensor] + block.start;
         float *restrict u = seconds[block.tensor] + block.start;
         float rate = rates[block.tensor];
         float root = roots[block.tensor],
         r[i] = keep1 * r[i] - add1 * g[i];
         u[i] = keep2 * u[i] + add2 * g[i] * g[i];
         moved[j] = x[i] - rate * r[i] / (sqrtf(u[i]) * root + eps))
}
