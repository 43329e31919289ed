/* Movements whose second moments are means over the rows and over the columns of a matrix; called by factored.py.

   A list of n matrices is given by their rows and columns and by pointers to their first elements: float32, rows one after
   the other. Work is dealt out in strips of some rows of one matrix; first[k] is the number of the first strip of matrix
   k, and first[n] that of all. row_start[k] is where matrix k begins in a list of all rows, and column_start[k] where it
   does in a list of all strips' columns. No result depends on the number of threads. */

#include "kernels.h"

typedef struct {
    int64_t matrix, row, end;
} Strip;

static Strip find(int64_t number, int64_t n, const int64_t *rows, const int64_t *strips, const int64_t *first) {
    int64_t matrix = owner(number, n, first), row = (number - first[matrix]) * strips[matrix];
    return (Strip){matrix, row, least(row + strips[matrix], rows[matrix])};
}

/* row_sums = sums of the squares in each row; column_sums = in each column of each strip */
void sums(int64_t n, const int64_t *rows, const int64_t *columns, const int64_t *strips, const int64_t *first,
          const int64_t *row_start, const int64_t *column_start, float *const *gradients, double *row_sums,
          float *column_sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t number = 0; number < first[n]; number++) {
        Strip strip = find(number, n, rows, strips, first);
        int64_t k = strip.matrix, width = columns[k];
        float *restrict sum = column_sums + column_start[k] + (number - first[k]) * width;
        for (int64_t j = 0; j < width; j++)
            sum[j] = 0;
        for (int64_t row = strip.row; row < strip.end; row++) {
            const float *restrict g = gradients[k] + row * width;
            for (int64_t j = 0; j < width; j++)
                sum[j] += g[j] * g[j];
            row_sums[row_start[k] + row] = sum_of_squares(g, width);
        }
    }
}

/* row_moments, column_moments = old * themselves + taken * means of squares;
   row_factors, column_factors = scales[k] / sqrt(row / mean of rows), 1 / sqrt(column). A matrix without row_moments is a
   vector, of which there is one row. column_factors take the place of the sums in a matrix's first strip. */
void take_up(int64_t n, const int64_t *rows, const int64_t *columns, const int64_t *first, const int64_t *row_start,
             const int64_t *column_start, const double *row_sums, float *column_sums, float *const *row_moments,
             float *const *column_moments, const double *scales, float *row_factors, double old, double taken,
             float smallest, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < n; k++) {
        int64_t height = rows[k], width = columns[k];
        float *restrict sum = column_sums + column_start[k], *restrict c = column_moments[k];
        float *restrict factor = row_factors + row_start[k];
        for (int64_t strip = 1; strip < first[k + 1] - first[k]; strip++)
            for (int64_t j = 0; j < width; j++)
                sum[j] += sum[strip * width + j];
        for (int64_t j = 0; j < width; j++) {
            c[j] = old * c[j] + taken * sum[j] / height;
            sum[j] = 1 / sqrtf(fmaxf(c[j], smallest));
        }
        if (!row_moments[k]) {
            factor[0] = scales[k];
            continue;
        }
        double mean = 0;
        for (int64_t i = 0; i < height; i++) {
            row_moments[k][i] = old * row_moments[k][i] + taken * row_sums[row_start[k] + i] / width;
            mean += row_moments[k][i];
        }
        mean = fmax(mean / height, smallest);
        for (int64_t i = 0; i < height; i++)
            factor[i] = scales[k] / sqrt(fmax(row_moments[k][i] / mean, smallest));
    }
}

static inline float of_bfloat16(uint16_t half) {
    union {
        uint32_t bits;
        float value;
    } both = {(uint32_t)half << 16};
    return both.value;
}

/* To the nearest, ties to even; of numbers, not of NaN. */
static inline uint16_t to_bfloat16(float value) {
    union {
        float value;
        uint32_t bits;
    } both = {value};
    return (both.bits + 0x7FFF + ((both.bits >> 16) & 1)) >> 16;
}

/* moments = themselves + share * (gradients - themselves), kept in bfloat16, or the gradients where there are none;
   targets = origins + row_factors * column_factors * moments */
void move(int64_t n, const int64_t *rows, const int64_t *columns, const int64_t *strips, const int64_t *first,
          const int64_t *row_start, const int64_t *column_start, float *const *origins, float *const *gradients,
          float *const *targets, uint16_t *const *moments, const float *row_factors, const float *column_factors,
          float share, int threads) {
    int64_t weights = 0;
    for (int64_t k = 0; k < n; k++)
        weights += rows[k] * columns[k];
    int is_streamed = weights > STREAMED;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t number = 0; number < first[n]; number++) {
        Strip strip = find(number, n, rows, strips, first);
        int64_t k = strip.matrix, width = columns[k];
        const float *restrict column = column_factors + column_start[k];
        float moved[TILE];
        for (int64_t row = strip.row; row < strip.end; row++) {
            const float *restrict x = origins[k] + row * width, *restrict g = gradients[k] + row * width;
            uint16_t *restrict m = moments[k] ? moments[k] + row * width : 0;
            float factor = row_factors[row_start[k] + row];
            for (int64_t tile = 0; tile < width; tile += TILE) {
                int64_t length = least(TILE, width - tile);
                if (m)
                    for (int64_t i = tile; i < tile + length; i++) {
                        float kept = of_bfloat16(m[i]), momentum = kept + share * (g[i] - kept);
                        m[i] = to_bfloat16(momentum);
                        moved[i - tile] = x[i] + factor * column[i] * momentum;
                    }
                else
                    for (int64_t i = tile; i < tile + length; i++)
                        moved[i - tile] = x[i] + factor * column[i] * g[i];
                put(targets[k] + row * width + tile, moved, length, is_streamed);
            }
        }
        fence();
    }
}
