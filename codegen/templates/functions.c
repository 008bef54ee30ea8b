//// power_of_two
// 2**n for -127 <= n <= 127; 2**-127 comes out as 0.
INLINE float power_of_two(int n)
{
    union { int32_t bits; float value; } power = {.bits = (n + 127) << 23};
    return power.value;
}

//// exponential
// exp(x), relative error about 1e-7; 0 below -87.3 (and for -inf), inf above 88.7.
INLINE float exponential(float x)
{
    const float n = rintf(x * 1.44269504f);
    const float r = fmaf(n, 1.90465421e-9f, fmaf(n, -0.693147182f, x));
    const float tail = fmaf(fmaf(fmaf(fmaf(1.39517116e-3f, r, 8.36959947e-3f), r, 4.16661873e-2f), r, 0.166665122f), r, 0.5f);
    const float fraction = fmaf(r * r, tail, r) + 1.0f;
    float result = (fraction + fraction) * power_of_two((int)n - 1);
    result = x < -87.33f ? 0.0f : result;
    return x > 88.722f ? INFINITY : result;
}

//// exponential2
// 2**x: as exact as exp, and exact for whole x.
INLINE float exponential2(float x)
{
    const float n = rintf(x);
    const float r = (x - n) * 0.693147181f;
    const float tail = fmaf(fmaf(fmaf(fmaf(1.39517116e-3f, r, 8.36959947e-3f), r, 4.16661873e-2f), r, 0.166665122f), r, 0.5f);
    const float fraction = fmaf(r * r, tail, r) + 1.0f;
    float result = (fraction + fraction) * power_of_two((int)n - 1);
    result = x < -126.0f ? 0.0f : result;
    return x >= 128.0f ? INFINITY : result;
}

//// exponential_difference
// exp(x - y); 0 where x is -inf, whatever y is. The difference is a fused product, so that x is rounded first where it is a product
// itself: weights that are computed again are then those of the sum in y, however large the scores are.
INLINE float exponential_difference(float x, float y)
{
    return exponential(fmaf(-1.0f, y == -INFINITY ? 0.0f : y, x));
}

//// rescaling
// exp(old - new) for a running maximum that moved; 1 while both are -inf.
INLINE float rescaling(float old, float new)
{
    return old == new ? 1.0f : exponential(old - new);
}

//// logarithm
// log(x), about 1 ulp; -inf at 0, nan below.
INLINE float logarithm(float x)
{
    const float scaled = x < 1.17549435e-38f ? x * 8388608.0f : x;
    union { float value; int32_t bits; } split = {.value = scaled};
    const int exponent = (split.bits - 0x3f3504f3) >> 23;
    split.bits -= exponent << 23;
    const float n = (float)(exponent - (x < 1.17549435e-38f ? 23 : 0));
    const float r = split.value - 1.0f;
    float tail = fmaf(6.91764206e-2f, r, -0.118328594f);
    tail = fmaf(tail, r, 0.118941717f);
    tail = fmaf(tail, r, -0.123787858f);
    tail = fmaf(tail, r, 0.142152801f);
    tail = fmaf(tail, r, -0.166694477f);
    tail = fmaf(tail, r, 0.200023875f);
    tail = fmaf(tail, r, -0.249999851f);
    tail = fmaf(tail, r, 0.333333075f);
    const float square = r * r;
    const float low = fmaf(n, -1.90465421e-9f, fmaf(square * r, tail, -0.5f * square));
    float result = fmaf(n, 0.693147182f, r + low);
    result = x == INFINITY ? INFINITY : result;
    result = x == 0.0f ? -INFINITY : result;
    return x >= 0.0f ? result : NAN;
}

//// log_of_one_plus
// log(1 + x), exact to a few ulp near 0: the rounding of 1 + x is divided out again.
INLINE float log_of_one_plus(float x)
{
    const float sum = 1.0f + x;
    const float rounded = sum - 1.0f;
    const float result = logarithm(sum) * (x / (rounded == 0.0f ? 1.0f : rounded));
    return rounded == 0.0f || x == INFINITY ? x : result;
}

//// exponential_minus_one
// exp(x) - 1, exact to a few ulp near 0.
INLINE float exponential_minus_one(float x)
{
    const float r = x;
    float near = fmaf(1.9841270e-4f, r, 1.38888889e-3f);
    near = fmaf(near, r, 8.33333333e-3f);
    near = fmaf(near, r, 4.16666667e-2f);
    near = fmaf(near, r, 0.166666667f);
    near = fmaf(near, r, 0.5f);
    near = fmaf(r * r, near, r);
    return fabsf(x) < 0.35f ? near : exponential(x) - 1.0f;
}

//// hyperbolic_tangent
// tanh(x), about 2 ulp.
INLINE float hyperbolic_tangent(float x)
{
    const float square = x * x;
    float tail = fmaf(-5.90583682e-3f, square, 2.0805357e-2f);
    tail = fmaf(tail, square, -5.37866764e-2f);
    tail = fmaf(tail, square, 0.133319587f);
    tail = fmaf(tail, square, -0.333332986f);
    const float near = fmaf(x * square, tail, x);
    const float far = 1.0f - 2.0f / (exponential(2.0f * fabsf(x)) + 1.0f);
    return fabsf(x) < 0.6f ? near : copysignf(far, x);
}

//// sigmoid
INLINE float sigmoid(float x)
{
    return 1.0f / (1.0f + exponential(-x));
}

//// softplus
// log(1 + exp(x)) without overflow.
INLINE float softplus(float x)
{
    return (x > 0.0f ? x : 0.0f) + log_of_one_plus(exponential(-fabsf(x)));
}

//// log_sigmoid
// log(sigmoid(x)) without overflow.
INLINE float log_sigmoid(float x)
{
    return (x < 0.0f ? x : 0.0f) - log_of_one_plus(exponential(-fabsf(x)));
}

//// log_of_sum
// log(exp(a) + exp(b)); -inf where both are -inf.
INLINE float log_of_sum(float a, float b)
{
    const float larger = a > b ? a : b;
    const float gap = a == b ? 0.0f : fabsf(a - b);
    return larger + log_of_one_plus(exponential(-gap));
}

//// silu
INLINE float silu(float x)
{
    return x / (1.0f + exponential(-x));
}

//// error_function
// erf(x), about 2 ulp.
INLINE float error_function(float x)
{
    const float square = x * x;
    float near = fmaf(7.88910911e-5f, square, -8.02083814e-4f);
    near = fmaf(near, square, 5.18953521e-3f);
    near = fmaf(near, square, -2.68544443e-2f);
    near = fmaf(near, square, 0.112836003f);
    near = fmaf(near, square, -0.37612626f);
    near = fmaf(near, square, 0.128379107f);
    near = fmaf(near, x, x);
    const float size = fabsf(x) < 4.0f ? fabsf(x) : 4.0f;
    float decay = fmaf(4.31421495e-6f, size, -3.79298872e-5f);
    decay = fmaf(decay, size, -8.88485447e-5f);
    decay = fmaf(decay, size, 3.0394753e-3f);
    decay = fmaf(decay, size, -2.28525698e-2f);
    decay = fmaf(decay, size, 0.105433516f);
    decay = fmaf(decay, size, 0.635536432f);
    decay = fmaf(decay, size, 1.12857115f);
    const float far = 1.0f - exponential(-size * decay);
    return fabsf(x) < 1.0f ? near : x != x ? x : copysignf(far, x);
}

//// gelu
INLINE float gelu(float x)
{
    return 0.5f * x * (1.0f + error_function(0.707106781f * x));
}

//// gelu_tanh
INLINE float gelu_tanh(float x)
{
    return 0.5f * x * (1.0f + hyperbolic_tangent(0.797884561f * fmaf(0.044715f * x * x, x, x)));
}

//// circle
// sin(x + quarters * pi / 2); the argument is reduced in double, good to |x| of 1e9.
INLINE float circle(float x, int quarters)
{
    const double turns = rint((double)x * 0.63661977236758134);
    const float r = (float)((double)x - turns * 1.5707963267948966);
    const int quarter = (int)turns + quarters;
    const float square = r * r;
    float sine = fmaf(2.71756403e-6f, square, -1.98392561e-4f);
    sine = fmaf(sine, square, 8.33332911e-3f);
    sine = fmaf(sine, square, -0.166666672f);
    sine = fmaf(r * square, sine, r);
    float cosine = fmaf(-2.72032992e-7f, square, 2.47994358e-5f);
    cosine = fmaf(cosine, square, -1.38888834e-3f);
    cosine = fmaf(cosine, square, 4.16666679e-2f);
    cosine = fmaf(square * square, cosine, fmaf(-0.5f, square, 1.0f));
    const float result = quarter & 1 ? cosine : sine;
    return quarter & 2 ? -result : result;
}

//// squared
INLINE float squared(float x)
{
    return x * x;
}

//// cubed
INLINE float cubed(float x)
{
    return x * x * x;
}

//// fourth_power
INLINE float fourth_power(float x)
{
    return x * x * (x * x);
}

//// integer_power
// base ** exponent for exponent >= 0.
INLINE int64_t integer_power(int64_t base, int64_t exponent)
{
    int64_t result = 1;
    for (; exponent > 0; exponent >>= 1, base *= base)
        result *= exponent & 1 ? base : 1;
    return result;
}

//// floor_divide
// Rounds down, as in Python; 0 for a divisor of 0.
INLINE int64_t floor_divide(int64_t a, int64_t b)
{
    if (b == 0 || b == -1)
        return -b * -a;
    return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

//// floor_modulo
// Has the sign of the divisor, as in Python; 0 for a divisor of 0.
INLINE int64_t floor_modulo(int64_t a, int64_t b)
{
    if (b == 0 || b == -1)
        return 0;
    return a % b + (a % b != 0 && (a < 0) != (b < 0) ? b : 0);
}

//// floor_divide_int
// Rounds down; the divisor is positive.
INLINE int floor_divide_int(int a, int b)
{
    return a / b - (a % b < 0);
}

//// floor_modulo_int
// At least 0; the divisor is positive.
INLINE int floor_modulo_int(int a, int b)
{
    const int rest = a % b;
    return rest + (rest < 0 ? b : 0);
}

//// float_modulo
// Has the sign of the divisor, as in Python.
INLINE float float_modulo(float a, float b)
{
    const float rest = fmodf(a, b);
    return rest != 0.0f && (rest < 0.0f) != (b < 0.0f) ? rest + b : rest;
}

//// sign_of
INLINE float sign_of(float x)
{
    return (float)((x > 0.0f) - (x < 0.0f));
}

//// highest
// The larger number, for a running maximum: a nan in b is passed over.
INLINE float highest(float a, float b)
{
    return b > a ? b : a;
}

//// maximum
// The larger number; nan where either is nan.
INLINE float maximum(float a, float b)
{
    return a > b || a != a ? a : b;
}

//// minimum
// The smaller number; nan where either is nan.
INLINE float minimum(float a, float b)
{
    return a < b || a != a ? a : b;
}

//// sign_of_int
INLINE int sign_of_int(int64_t x)
{
    return (x > 0) - (x < 0);
}

//// maximum_int
INLINE int64_t maximum_int(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

//// minimum_int
INLINE int64_t minimum_int(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

//// from_float16
INLINE float from_float16(_Float16 half)
{
    return (float)half;
}

//// to_float16
INLINE _Float16 to_float16(float value)
{
    return (_Float16)value;
}

//// from_bfloat16
INLINE float from_bfloat16(uint16_t half)
{
    union { uint32_t bits; float value; } wide = {.bits = (uint32_t)half << 16};
    return wide.value;
}

//// to_bfloat16
// Rounds to nearest, ties to even; a nan stays one.
INLINE uint16_t to_bfloat16(float value)
{
    union { float value; uint32_t bits; } wide = {.value = value};
    const uint32_t rounded = wide.bits + 0x7fff + (wide.bits >> 16 & 1);
    return (uint16_t)((value != value ? wide.bits | 0x400000 : rounded) >> 16);
}

//// load_float32
LOAD_TILE(load_float32, float, )

//// load_float16
LOAD_TILE(load_float16, _Float16, from_float16)

//// load_bfloat16
LOAD_TILE(load_bfloat16, uint16_t, from_bfloat16)

//// LOAD_TILE
// Copies rows x columns elements of a tensor into a tile and fills the rest of the tile with 0. A transposed tile is loaded
// by giving the strides the other way round: then the tensor is read in the order of its memory, in blocks that are turned in registers.
#define LOAD_TILE(name, type, convert)                                                                                       \
    static void name(float *tile, int tile_rows, int tile_columns, int tile_stride, const type *source, int64_t row_stride,  \
                     int64_t column_stride, int rows, int columns)                                                           \
    {                                                                                                                        \
        int first = 0;                                                                                                       \
        if (row_stride == 1 && column_stride != 1)                                                                           \
            for (; first + 8 <= columns; first += 8) {                                                                       \
                int r = 0;                                                                                                   \
                for (; r + 8 <= rows; r += 8) {                                                                              \
                    float block[8][8];                                                                                       \
                    for (int c = 0; c < 8; c++)                                                                              \
                        for (int k = 0; k < 8; k++)                                                                          \
                            block[c][k] = convert(source[(first + c) * column_stride + r + k]);                              \
                    turn_block(tile + r * tile_stride + first, tile_stride, block[0], 8);                                    \
                }                                                                                                            \
                for (; r < rows; r++)                                                                                        \
                    for (int c = first; c < first + 8; c++)                                                                  \
                        tile[r * tile_stride + c] = convert(source[c * column_stride + r]);                                  \
            }                                                                                                                \
        for (int r = 0; r < tile_rows; r++) {                                                                                \
            const int inside = r < rows ? columns : 0;                                                                       \
            const type *const row = source + r * row_stride;                                                                 \
            if (column_stride == 1)                                                                                          \
                for (int c = 0; c < inside; c++)                                                                             \
                    tile[r * tile_stride + c] = convert(row[c]);                                                             \
            else                                                                                                             \
                for (int c = first; c < inside; c++)                                                                         \
                    tile[r * tile_stride + c] = convert(row[c * column_stride]);                                             \
            for (int c = inside; c < tile_columns; c++)                                                                      \
                tile[r * tile_stride + c] = 0.0f;                                                                            \
        }                                                                                                                    \
    }

//// turn_block
// out[r][c] = block[c][r], 8 x 8: three rounds in which the rows of each half are dealt out alternately.
INLINE void turn_block(float *out, int64_t out_stride, const float *block, int64_t block_stride)
{
    lanes8 row[8], dealt[8];
    UNROLL for (int r = 0; r < 8; r++)
        row[r] = *(const lanes8 *)(block + r * block_stride);
    UNROLL for (int round = 0; round < 3; round++) {
        UNROLL for (int r = 0; r < 4; r++) {
            dealt[2 * r] = deal(row[r], row[r + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            dealt[2 * r + 1] = deal(row[r], row[r + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        UNROLL for (int r = 0; r < 8; r++)
            row[r] = dealt[r];
    }
    UNROLL for (int r = 0; r < 8; r++)
        *(lanes8 *)(out + r * out_stride) = row[r];
}

//// deal
#if defined __clang__ || __GNUC__ >= 12
#define deal __builtin_shufflevector
#else
typedef int places8 __attribute__((vector_size(32)));
#define deal(a, b, ...) __builtin_shuffle(a, b, (places8){__VA_ARGS__})
#endif

//// load_column_float32
LOAD_COLUMN(load_column_float32, float, )

//// load_column_float16
LOAD_COLUMN(load_column_float16, _Float16, from_float16)

//// load_column_bfloat16
LOAD_COLUMN(load_column_bfloat16, uint16_t, from_bfloat16)

//// LOAD_COLUMN
// One column of a tile: tile[r * tile_stride] = source[r * row_stride], for the rows that there are.
#define LOAD_COLUMN(name, type, convert)                                                                                     \
    static void name(float *tile, int tile_stride, const type *source, int64_t row_stride, int rows)                         \
    {                                                                                                                        \
        if (row_stride == 1)                                                                                                 \
            for (int r = 0; r < rows; r++)                                                                                   \
                tile[r * tile_stride] = convert(source[r]);                                                                  \
        else                                                                                                                 \
            for (int r = 0; r < rows; r++)                                                                                   \
                tile[r * tile_stride] = convert(source[r * row_stride]);                                                     \
    }

//// ahead
// Memory that will be needed soon: rows of cache lines.
struct ahead {
    uintptr_t first;
    int64_t stride;
    int rows, lines;
};

//// next_tile
// The tile whose rows follow those of this one. An expert's weights are read once or twice, and come from memory.
INLINE struct ahead next_tile(const void *tile, int bytes, int64_t row_stride, int64_t column_stride, int rows, int columns)
{
    const uintptr_t first = (uintptr_t)tile + (uintptr_t)(rows * row_stride * bytes);
    if (row_stride == 1)
        return (struct ahead){first, column_stride * bytes, columns, (rows * bytes + 63) / 64};
    return (struct ahead){first, row_stride * bytes, column_stride == 1 ? rows : 0, (columns * bytes + 63) / 64};
}

//// product_ahead
// product in blocks of rows, which asks memory for a part of what is next before each of them: all at once would have to be waited for.
static void product_ahead(struct ahead next, float *out, int64_t out_row, const float *keep, int64_t keep_row, const float *left,
                          int64_t left_row, int64_t left_k, const float *right, int64_t right_k, int rows, int columns, int depth)
{
    const int share = (next.rows * next.lines * ROWS + rows - 1) / (rows > 0 ? rows : 1);
    int row = 0, line = 0;
    for (int r = 0; r < rows; r += ROWS) {
        for (int n = 0; n < share && row < next.rows; n++) {
            __builtin_prefetch((const void *)(next.first + (uintptr_t)(row * next.stride + line * 64)), 0, 2);
            line++;
            if (line == next.lines) {
                line = 0;
                row++;
            }
        }
        product(out + r * out_row, out_row, keep ? keep + r * keep_row : NULL, keep_row, left + r * left_row, left_row, left_k, right,
                right_k, rows - r < ROWS ? rows - r : ROWS, columns, depth);
    }
}

//// transpose
// out[c][r] = tile[r][c]
INLINE void transpose(float *out, int out_stride, const float *tile, int row_stride, int column_stride, int rows, int columns)
{
    int first = 0;
    if (column_stride == 1)
        for (; first + 8 <= rows; first += 8) {
            int c = 0;
            for (; c + 8 <= columns; c += 8)
                turn_block(out + c * out_stride + first, out_stride, tile + first * row_stride + c, row_stride);
            for (; c < columns; c++)
                for (int r = first; r < first + 8; r++)
                    out[c * out_stride + r] = tile[r * row_stride + c];
        }
    for (int r = first; r < rows; r++)
        for (int c = 0; c < columns; c++)
            out[c * out_stride + r] = tile[r * row_stride + c * column_stride];
}

//// allocate
// Aligned scratch memory; the process ends where there is none, as a kernel has no way to report it.
static void *allocate(int64_t bytes)
{
    void *const memory = aligned_alloc(64, (size_t)((bytes / 64 + 1) * 64));
    if (memory == NULL) {
        fprintf(stderr, "weft: out of memory for %lld bytes of scratch\n", (long long)bytes);
        abort();
    }
    return memory;
}

//// sum_of_lanes
// The sum of 16 partial sums, by halves.
INLINE float sum_of_lanes(const float *lanes)
{
    const lanes8 by_8 = *(const lanes8 *)lanes + *(const lanes8 *)(lanes + 8);
    const lanes4 low = {by_8[0], by_8[1], by_8[2], by_8[3]}, high = {by_8[4], by_8[5], by_8[6], by_8[7]};
    const lanes4 by_4 = low + high;
    return (by_4[0] + by_4[2]) + (by_4[1] + by_4[3]);
}

//// lanes8
typedef float lanes8 __attribute__((vector_size(32), aligned(4), may_alias));

//// lanes4
typedef float lanes4 __attribute__((vector_size(16), aligned(4), may_alias));

//// sum_of
// The sum of a row, in a fixed order.
INLINE float sum_of(const float *row, int count)
{
    vector total = {0};
    int c = 0;
    for (; c + LANES <= count; c += LANES)
        total += *(const vector *)(row + c);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            total[lane] += total[lane + half];
    float result = total[0];
    for (; c < count; c++)
        result += row[c];
    return result;
}

//// product
// out = keep * out + left . right on tiles: out[r][c], left[r][k] at any strides, right[k][c] with its columns side by side.
// keep is one factor a row; NULL starts from 0. Tiles are padded to whole vectors of columns. Every sum goes through k in order.
static void product(float *out, int64_t out_row, const float *keep, int64_t keep_row, const float *left, int64_t left_row,
                    int64_t left_k, const float *right, int64_t right_k, int rows, int columns, int depth)
{
    const int vectors = (columns + LANES - 1) / LANES, whole = rows - rows % ROWS;
    int v = whole > 0 ? 0 : vectors;
    if (ROWS == 8 && vectors % 2 == 1 && v + 3 <= vectors) {
        product_panel(ROWS, 3, out, out_row, keep, keep_row, left, left_row, left_k, right, right_k, whole, depth);
        v = 3;
    }
    for (; v + 2 <= vectors; v += 2)
        product_panel(ROWS, 2, out + v * LANES, out_row, keep, keep_row, left, left_row, left_k, right + v * LANES, right_k, whole, depth);
    if (v < vectors)
        product_panel(ROWS, 1, out + v * LANES, out_row, keep, keep_row, left, left_row, left_k, right + v * LANES, right_k, whole, depth);
    if (whole < rows)
        product_rest(out + whole * out_row, out_row, keep ? keep + whole * keep_row : NULL, keep_row, left + whole * left_row, left_row,
                     left_k, right, right_k, rows - whole, vectors, depth);
}

//// ROWS
// Rows of a block with two vectors of columns: their sums, two factors and a broadcast fill the registers that there are.
#if defined __AVX512F__
#define ROWS 8
#else
#define ROWS 6
#endif

//// unchanged
static const float unchanged = 1.0f;

//// product_panel
// A panel of columns: whole blocks of rows.
INLINE void product_panel(const int block, const int vectors, float *out, int64_t out_row, const float *keep, int64_t keep_row,
                          const float *left, int64_t left_row, int64_t left_k, const float *right, int64_t right_k, int rows, int depth)
{
    for (int r = 0; r + block <= rows; r += block)
        product_block(block, vectors, out + r * out_row, out_row, keep ? keep + r * keep_row : NULL, keep_row, left + r * left_row,
                      left_row, left_k, right, right_k, depth);
}

//// product_rest
// The rows that fill no block, by twos, and the last one with longer pieces of memory: as many sums at once as with more rows.
INLINE void product_rest(float *out, int64_t out_row, const float *keep, int64_t keep_row, const float *left, int64_t left_row,
                         int64_t left_k, const float *right, int64_t right_k, int rows, int vectors, int depth)
{
    const int even = rows & ~1;
    int v = 0;
    for (; v + 4 <= vectors; v += 4)
        product_panel(2, 4, out + v * LANES, out_row, keep, keep_row, left, left_row, left_k, right + v * LANES, right_k, even, depth);
    for (; v < vectors; v++)
        product_panel(2, 1, out + v * LANES, out_row, keep, keep_row, left, left_row, left_k, right + v * LANES, right_k, even, depth);
    if (even == rows)
        return;
    out += even * out_row;
    left += even * left_row;
    keep = keep ? keep + even * keep_row : NULL;
    for (v = 0; v + 8 <= vectors; v += 8)
        product_block(1, 8, out + v * LANES, out_row, keep, keep_row, left, left_row, left_k, right + v * LANES, right_k, depth);
    for (; v + 4 <= vectors; v += 4)
        product_block(1, 4, out + v * LANES, out_row, keep, keep_row, left, left_row, left_k, right + v * LANES, right_k, depth);
    for (; v < vectors; v++)
        product_block(1, 1, out + v * LANES, out_row, keep, keep_row, left, left_row, left_k, right + v * LANES, right_k, depth);
}

//// product_block
// The innermost block: every sum in a register, one broadcast number of `left` times a few vectors of `right`.
INLINE void product_block(const int rows, const int vectors, float *out, int64_t out_row, const float *keep, int64_t keep_row,
                          const float *left, int64_t left_row, int64_t left_k, const float *right, int64_t right_k, int depth)
{
    vector sum[8][8];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[r][v] = (vector){0};
    for (int k = 0; k < depth; k++) {
        vector factors[8];
        UNROLL for (int v = 0; v < vectors; v++)
            factors[v] = *(const vector *)(right + k * right_k + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const float factor = left[r * left_row + k * left_k];
            UNROLL for (int v = 0; v < vectors; v++)
                sum[r][v] += factor * factors[v];
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) {
            vector *const target = (vector *)(out + r * out_row + v * LANES);
            if (keep)
                sum[r][v] += keep[r * keep_row] * *target;
            *target = sum[r][v];
        }
}

//// INLINE
#define INLINE static inline __attribute__((always_inline))

//// UNROLL
#define UNROLL _Pragma("GCC unroll 8")

//// LANES
#define LANES ((int)(sizeof(vector) / sizeof(float)))

//// vector
#if defined __AVX512F__
typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));
#elif defined __AVX__
typedef float vector __attribute__((vector_size(32), aligned(4), may_alias));
#else
typedef float vector __attribute__((vector_size(16), aligned(4), may_alias));
#endif

//// first_of
#include <omp.h>

// Where the part of a member of a team begins: whole vectors along an axis, as even as can be.
static int first_of(int extent, int member, int team)
{
    return (int)((int64_t)(extent / 16) * member / team) * 16;
}
