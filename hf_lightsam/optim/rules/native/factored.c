/* Movements whose second moments are means over the rows and over the columns of a matrix; called by factored.py.

   A list of n matrices is given by their rows and columns and by pointers to their first elements: float32, rows one after
   the other. Work is dealt out in strips of some rows of one matrix; first[k] is the number of the first strip of matrix
   k, and first[n] that of all. row_start[k] is where matrix k begins in a list of all rows, and column_start[k] where it
   does in a list of all strips' columns. In that a vector has no place: it is a matrix of one row, whose second moments
   are kept in full. No result depends on the number of threads. */

#include "kernels.h"

typedef struct {
    int64_t matrix, row, end;
} Strip;

static Strip find(int64_t number, int64_t n, const int64_t *rows, const int64_t *strips, const int64_t *first) {
    int64_t matrix = owner(number, n, first), row = (number - first[matrix]) * strips[matrix];
    return (Strip){matrix, row, least(row + strips[matrix], rows[matrix])};
}

static int is_vector(int64_t k, const int64_t *column_start) { return column_start[k] == column_start[k + 1]; }

/* row_sums = sums of the squares in each row; column_sums = in each column of each strip */
void sums(int64_t n, const int64_t *rows, const int64_t *columns, const int64_t *strips, const int64_t *first,
          const int64_t *row_start, const int64_t *column_start, float *const *gradients, double *row_sums,
          float *column_sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t number = 0; number < first[n]; number++) {
        Strip strip = find(number, n, rows, strips, first);
        int64_t k = strip.matrix, width = columns[k], summed = is_vector(k, column_start) ? 0 : width;
        float *restrict sum = column_sums + column_start[k] + (number - first[k]) * summed;
        for (int64_t j = 0; j < summed; j++)
            sum[j] = 0;
        for (int64_t row = strip.row; row < strip.end; row++) {
            const float *restrict g = gradients[k] + row * width;
            for (int64_t j = 0; j < summed; j++)
                sum[j] += g[j] * g[j];
            row_sums[row_start[k] + row] = sum_of_squares(g, width);
        }
    }
}

/* row_moments, column_moments = old * themselves + taken * means of squares;
   row_factors, column_factors = scales[k] / sqrt(row / mean of rows), 1 / sqrt(column), and scales[k] of a vector.
   column_factors take the place of the sums in a matrix's first strip. */
void take_up(int64_t n, const int64_t *rows, const int64_t *columns, const int64_t *first, const int64_t *row_start,
             const int64_t *column_start, const double *row_sums, float *column_sums, float *const *row_moments,
             float *const *column_moments, const double *scales, float *row_factors, double old, double taken,
             float smallest, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < n; k++) {
        int64_t height = rows[k], width = columns[k];
        float *restrict sum = column_sums + column_start[k], *restrict c = column_moments[k];
        float *restrict factor = row_factors + row_start[k];
        if (is_vector(k, column_start)) {
            factor[0] = scales[k];
            continue;
        }
        for (int64_t strip = 1; strip < first[k + 1] - first[k]; strip++)
            for (int64_t j = 0; j < width; j++)
                sum[j] += sum[strip * width + j];
        for (int64_t j = 0; j < width; j++) {
            c[j] = old * c[j] + taken * sum[j] / height;
            sum[j] = 1 / sqrtf(c[j] > smallest ? c[j] : smallest);
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

/* moments = (1 - share) * themselves + share * gradients, kept in bfloat16, or the gradients where there are none;
   targets = origins + row_factors * column_factors * moments. A vector's own second moments are taken up here. */
void move(int64_t n, const int64_t *rows, const int64_t *columns, const int64_t *strips, const int64_t *first,
          const int64_t *row_start, const int64_t *column_start, float *const *origins, float *const *gradients,
          float *const *targets, uint16_t *const *moments, float *const *seconds, const float *row_factors,
          const float *column_factors, double old, double taken, float smallest, double share, int threads) {
    int is_small = share < 0.5; /* as torch's lerp: from the end that is nearer */
    float part = is_small ? share : share - 1, held = old, squared = taken;
    int64_t weights = 0;
    for (int64_t k = 0; k < n; k++)
        weights += rows[k] * columns[k];
    int is_streamed = weights > STREAMED;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t number = 0; number < first[n]; number++) {
        Strip strip = find(number, n, rows, strips, first);
        int64_t k = strip.matrix, width = columns[k];
        float *restrict c = is_vector(k, column_start) ? seconds[k] : 0;
        float moved[TILE], of_vector[TILE];
        for (int64_t row = strip.row; row < strip.end; row++) {
            const float *restrict x = origins[k] + row * width, *restrict g = gradients[k] + row * width;
            uint16_t *restrict m = moments[k] ? moments[k] + row * width : 0;
            float factor = row_factors[row_start[k] + row];
            for (int64_t tile = 0; tile < width; tile += TILE) {
                int64_t length = least(TILE, width - tile);
                const float *column = c ? of_vector : column_factors + column_start[k] + tile;
                if (c)
                    for (int64_t j = 0; j < length; j++) {
                        int64_t i = tile + j;
                        c[i] = held * c[i] + squared * g[i] * g[i];
                        of_vector[j] = 1 / sqrtf(c[i] > smallest ? c[i] : smallest);
                    }
                if (m)
                    for (int64_t j = 0; j < length; j++) {
                        int64_t i = tile + j;
                        float kept = of_bfloat16(m[i]), momentum = (is_small ? kept : g[i]) + part * (g[i] - kept);
                        m[i] = to_bfloat16(momentum);
                        moved[j] = x[i] + factor * column[j] * momentum;
                    }
                else
                    for (int64_t j = 0; j < length; j++)
                        moved[j] = x[tile + j] + factor * column[j] * g[tile + j];
                put(targets[k] + row * width + tile, moved, length, is_streamed);
            }
        }
        fence();
    }
}
