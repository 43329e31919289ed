/* What an ascent does to each weight, in one pass over memory; called by native.py, which says what is meant.

   A list of n tensors is given by their sizes and by pointers to their first elements: float32, dense, laid out alike in
   all lists. Work is dealt out in blocks, each of one tensor; first[k] is the number of the first block of tensor k, and
   first[n] that of all blocks. So no result depends on the number of threads. */

#include <math.h>
#include <stdint.h>
#ifdef __SSE__
#include <immintrin.h>
#endif

#define BLOCK 4096         /* weights that a thread takes at a time */
#define TILE 128           /* those of them that wait in a first-level cache to be written */
#define LANES 64           /* sums side by side: one alone would wait for each of its additions */
#define STREAMED (1 << 11) /* blocks: what is larger than caches, 32 MiB, is written past them, without a read */

typedef struct {
    int64_t tensor, start, length;
} Block;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static Block find(int64_t number, int64_t n, const int64_t *sizes, const int64_t *first) {
    int64_t low = 0, high = n;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (first[middle] <= number)
            low = middle;
        else
            high = middle;
    }
    int64_t start = (number - first[low]) * BLOCK;
    return (Block){low, start, least(BLOCK, sizes[low] - start)};
}

#if defined(__AVX512F__)
#define WIDTH 16
#define STREAM(to, from) _mm512_stream_ps(to, _mm512_loadu_ps(from))
#elif defined(__AVX__)
#define WIDTH 8
#define STREAM(to, from) _mm256_stream_ps(to, _mm256_loadu_ps(from))
#elif defined(__SSE__)
#define WIDTH 4
#define STREAM(to, from) _mm_stream_ps(to, _mm_loadu_ps(from))
#endif

static inline void put(float *restrict to, const float *restrict from, int64_t length, int is_streamed) {
    int64_t i = 0;
#ifdef STREAM
    if (is_streamed && (uintptr_t)to % (WIDTH * sizeof(float)) == 0)
        for (; i + WIDTH <= length; i += WIDTH)
            STREAM(to + i, from + i);
#endif
    for (; i < length; i++)
        to[i] = from[i];
}

/* Has what was streamed arrive before what is written after it. */
static inline void fence(void) {
#ifdef STREAM
    _mm_sfence();
#endif
}

/* partial[b] = sum of the squares in block b */
void squares(int64_t n, const int64_t *sizes, const int64_t *first, float *const *gradients, double *partial,
             int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t number = 0; number < first[n]; number++) {
        Block block = find(number, n, sizes, first);
        const float *restrict g = gradients[block.tensor] + block.start;
        float lanes[LANES] = {0};
        int64_t i = 0;
        for (; i + LANES <= block.length; i += LANES)
            for (int lane = 0; lane < LANES; lane++)
                lanes[lane] += g[i + lane] * g[i + lane];
        for (int half = LANES / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; lane++)
                lanes[lane] += lanes[lane + half];
        double sum = lanes[0];
        for (; i < block.length; i++)
            sum += (double)(g[i] * g[i]);
        partial[number] = sum;
    }
}

/* targets = origins + scale * gradients */
void scaled(int64_t n, const int64_t *sizes, const int64_t *first, float *const *origins, float *const *gradients,
            float *const *targets, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t number = 0; number < first[n]; number++) {
        Block block = find(number, n, sizes, first);
        const float *restrict x = origins[block.tensor] + block.start;
        const float *restrict g = gradients[block.tensor] + block.start;
        float *w = targets[block.tensor] + block.start, moved[TILE];
        for (int64_t tile = 0; tile < block.length; tile += TILE) {
            int64_t length = least(TILE, block.length - tile);
            for (int64_t j = 0; j < length; j++)
                moved[j] = x[tile + j] + scale * g[tile + j];
            put(w + tile, moved, length, first[n] > STREAMED);
        }
        fence();
    }
}

/* sums += gradients^2; targets = origins + lr * gradients / sqrt(sums) */
void adagrad(int64_t n, const int64_t *sizes, const int64_t *first, float *const *origins, float *const *gradients,
             float *const *targets, float *const *sums, float lr, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t number = 0; number < first[n]; number++) {
        Block block = find(number, n, sizes, first);
        const float *restrict x = origins[block.tensor] + block.start;
        const float *restrict g = gradients[block.tensor] + block.start;
        float *restrict u = sums[block.tensor] + block.start;
        float *w = targets[block.tensor] + block.start, moved[TILE];
        for (int64_t tile = 0; tile < block.length; tile += TILE) {
            int64_t length = least(TILE, block.length - tile);
            for (int64_t j = 0; j < length; j++) {
                int64_t i = tile + j;
                u[i] += g[i] * g[i];
                moved[j] = x[i] + lr * g[i] / sqrtf(u[i]);
            }
            put(w + tile, moved, length, first[n] > STREAMED);
        }
        fence();
    }
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
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t number = 0; number < first[n]; number++) {
        Block block = find(number, n, sizes, first);
        const float *restrict x = origins[block.tensor] + block.start;
        const float *restrict g = gradients[block.tensor] + block.start;
        float *restrict r = firsts[block.tensor] + block.start;
        float *restrict u = seconds[block.tensor] + block.start;
        float *w = targets[block.tensor] + block.start, moved[TILE];
        float rate = rates[block.tensor], root = roots[block.tensor];
        for (int64_t tile = 0; tile < block.length; tile += TILE) {
            int64_t length = least(TILE, block.length - tile);
            for (int64_t j = 0; j < length; j++) {
                int64_t i = tile + j;
                r[i] = keep1 * r[i] - add1 * g[i];
                u[i] = keep2 * u[i] + add2 * g[i] * g[i];
                moved[j] = x[i] - rate * r[i] / (sqrtf(u[i]) * root + eps);
            }
            put(w + tile, moved, length, first[n] > STREAMED);
        }
        fence();
    }
}
