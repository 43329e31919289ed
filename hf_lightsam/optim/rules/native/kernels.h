/* What the kernels here share; see __init__.py. */

#include <math.h>
#include <stdint.h>
#ifdef __SSE__
#include <immintrin.h>
#endif

#define TILE 128           /* weights that wait in a first-level cache to be written */
#define LANES 64           /* sums side by side: one alone would wait for each of its additions */
#define STREAMED (1 << 23) /* weights: what is larger than caches, 32 MiB, is written past them, without a read */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Which of n tensors a piece of work belongs to: first[k] is the number of the first piece of tensor k. */
static inline int64_t owner(int64_t number, int64_t n, const int64_t *first) {
    int64_t low = 0, high = n;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (first[middle] <= number)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static inline double sum_of_squares(const float *restrict x, int64_t length) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] += x[i + lane] * x[i + lane];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    double sum = lanes[0];
    for (; i < length; i++)
        sum += (double)(x[i] * x[i]);
    return sum;
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
