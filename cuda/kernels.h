/// One parameter struct per kernel: the contract between `cuda/*.cu` and `src/cuda/`.
///
/// Plain C with fixed-width types. `build.rs` does not read this file; bindgen turns it, and only it, into
/// `src/cuda/sys.rs`, which is committed and compared in CI. `void *` operands hold elements of the kernel's type (its
/// name's suffix: f32, f16, bf16); everything else says its type. `M` rows of activations, `N` output features, `K` input
/// features, row-major.
#ifndef GLM_KERNELS_H
#define GLM_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
#define GLM_ASSERT_SIZE(type, size) static_assert(sizeof(type) == (size), #type " has another layout than Rust expects")
#else
#define GLM_ASSERT_SIZE(type, size) _Static_assert(sizeof(type) == (size), #type " has another layout than Rust expects")
#endif

// --- pointwise.cu -----------------------------------------------------------------------------------------------------

/// Threads of a block of the elementwise kernels; each owns 16 bytes of the widest operand.
#define GLM_POINTWISE_THREADS 256

/// `y = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))` of `n` elements.
struct GeluForward {
    void *y;
    const void *x;
    uint64_t n;
};
GLM_ASSERT_SIZE(struct GeluForward, 24);

/// `d *= gelu'(x)` of `n` elements, in place: `d` holds dy and becomes dx.
struct GeluBackward {
    void *d;
    const void *x;
    uint64_t n;
};
GLM_ASSERT_SIZE(struct GeluBackward, 24);

/// What `Dropout` does with what it has made: writes it, adds it to y, or writes what it took from x.
#define GLM_DROPOUT_WRITE 0
#define GLM_DROPOUT_ACCUMULATE 1
#define GLM_DROPOUT_REST 2

/// `d = mask x scale` of `n` elements; then `y = d`, `y += d` or `y = x - d`. Element `i` is kept when the uniform `i` of
/// the stream (`seed`, `stream`) is at least `p`; `scale` is `1 / (1 - p)`.
struct Dropout {
    void *y;
    const void *x;
    uint64_t n;
    uint64_t seed;
    uint64_t stream;
    float p;
    float scale;
    uint32_t then;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct Dropout, 56);

/// Turns the q and k parts of `qkv [M, heads, 3, head_dim]` in place; `sign` is 1, or -1 to turn back.
///
/// `positions [M, 2]`; `tables [position_count, head_dim / 2]` hold the cosines, then the sines. A position outside the
/// tables makes its half of the row's q and k NaN.
struct Rope {
    void *qkv;
    const int32_t *positions;
    const float *tables;
    uint32_t m;
    uint32_t heads;
    uint32_t head_dim;
    uint32_t position_count;
    float sign;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct Rope, 48);

/// `y += bound (2 u - 1)` of `n` elements, with the uniforms `u` of the stream (`seed`, `stream`).
struct Noise {
    void *y;
    uint64_t n;
    uint64_t seed;
    uint64_t stream;
    float bound;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct Noise, 40);

/// `y = x` of `n` elements in another type, rounded to nearest even; the kernel's name holds both types, from and to.
struct Cast {
    void *y;
    const void *x;
    uint64_t n;
};
GLM_ASSERT_SIZE(struct Cast, 24);

// --- norm.cu ----------------------------------------------------------------------------------------------------------

/// Elements of a row that one thread of the LayerNorm kernels holds in registers.
#define GLM_NORM_HELD 16
/// Threads of a block of the LayerNorm kernels at most; rows are at most `GLM_NORM_HELD * GLM_NORM_THREADS` wide.
#define GLM_NORM_THREADS 1024
/// Threads of a block of the kernels that add over rows.
#define GLM_COLUMN_THREADS 256

/// `y [M, N] = (x - mean) rstd weight + bias`, `stats [M, 2] = (mean, rstd)`, `rstd = 1 / sqrt(var + eps)`, of each row.
struct LayerNormForward {
    void *y;
    float *stats;
    const void *x;
    const float *weight;
    const float *bias;
    uint32_t m;
    uint32_t n;
    float eps;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct LayerNormForward, 56);

/// `dx [M, N] = rstd (g - mean(g) - xhat mean(g xhat))` with `g = dy weight` and `xhat = (x - mean) rstd`.
struct LayerNormBackwardInput {
    void *dx;
    const void *dy;
    const void *x;
    const float *weight;
    const float *stats;
    uint32_t m;
    uint32_t n;
};
GLM_ASSERT_SIZE(struct LayerNormBackwardInput, 48);

/// `partials [parts, 2, N]`: for each part of `rows_per_part` rows the sums of `dy xhat`, then of `dy`. `AddPartials`
/// with two outputs follows.
struct LayerNormBackwardParameters {
    float *partials;
    const void *dy;
    const void *x;
    const float *stats;
    uint32_t m;
    uint32_t n;
    uint32_t rows_per_part;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct LayerNormBackwardParameters, 48);

/// `partials [parts, N]`: for each part of `rows_per_part` rows of `dy [M, N]` their sum. `AddPartials` follows.
struct ColumnSums {
    float *partials;
    const void *dy;
    uint32_t m;
    uint32_t n;
    uint32_t rows_per_part;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct ColumnSums, 32);

/// `partials [parts, N]`: for each part of `rows_per_part` rows the sum of `x y factor [N]`. `AddPartials` follows.
struct ColumnProducts {
    float *partials;
    const void *x;
    const void *y;
    const float *factor;
    uint32_t m;
    uint32_t n;
    uint32_t rows_per_part;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct ColumnProducts, 48);

/// `first [N] += sum over parts of partials [parts, outputs, N]`, and `second [N]` likewise; parts in order. `outputs` is
/// the grid's height; `second` is not touched when it is 1.
struct AddPartials {
    float *first;
    float *second;
    const float *partials;
    uint32_t n;
    uint32_t parts;
};
GLM_ASSERT_SIZE(struct AddPartials, 32);

// --- dora.cu ----------------------------------------------------------------------------------------------------------

/// Threads of a block of the kernels of DoRA.
#define GLM_DORA_THREADS 256

/// `squares [N] = sum over k of w [N, K]^2`, a block for each row.
struct RowSquares {
    float *squares;
    const void *w;
    uint32_t n;
    uint32_t k;
};
GLM_ASSERT_SIZE(struct RowSquares, 24);

/// `norm_i^2 = squares_i + sum over j of b_ij (2 s p_ji + s^2 q_ij)`; `gain [N] = magnitude / norm`, `inverse [N] = 1 /
/// norm`. `b` and `q` are `[N, r]`, `p` is `[r, N]`.
struct DoraGain {
    float *gain;
    float *inverse;
    const float *magnitude;
    const float *squares;
    const float *b;
    const float *p;
    const float *q;
    uint32_t n;
    uint32_t r;
    float s;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct DoraGain, 72);

/// `y [M, N] = (gain [N] + shift) x + bias [N] + alpha * residual [M, N]`, or `y += ...` when `accumulate` is 1; bias and
/// residual may be null.
struct ScaleColumns {
    void *y;
    const void *x;
    const float *gain;
    const float *bias;
    const void *residual;
    uint32_t m;
    uint32_t n;
    float shift;
    float alpha;
    uint32_t accumulate;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct ScaleColumns, 64);

// --- rows.cu ----------------------------------------------------------------------------------------------------------

/// Threads of a block of the kernels that move rows.
#define GLM_ROWS_THREADS 256

/// `y [R, N] = x [rows, N]` for `R` row numbers into `x [M, N]`, also an embedding of token ids. A number outside of `x`
/// makes its row NaN. `x` is of y's type, or F32 and rounded: `gather_rounded_*`.
struct GatherRows {
    void *y;
    const void *x;
    const int32_t *rows;
    uint32_t r;
    uint32_t m;
    uint32_t n;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct GatherRows, 40);

/// `y [M, N] = 0`, then `y [rows, N] = x [R, N]` (F32, rounded to y's type); `rows` are distinct. A number outside of `y`
/// makes all of `y` NaN.
struct ScatterRows {
    void *y;
    const float *x;
    const int32_t *rows;
    uint32_t r;
    uint32_t m;
    uint32_t n;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct ScatterRows, 40);

/// `dw [ids, N] += dy [M, N]`, the rows of one id in order. An id outside of `dw [V, N]` has no row to be added to: the
/// forward pass has made its row NaN.
struct EmbeddingBackward {
    float *dw;
    const void *dy;
    const int32_t *ids;
    uint32_t m;
    uint32_t v;
    uint32_t n;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct EmbeddingBackward, 40);

// --- optim.cu ---------------------------------------------------------------------------------------------------------

/// Threads of a block of the optimizer's kernels.
#define GLM_OPTIM_THREADS 256
/// Elements of one chunk at most: one block's work.
#define GLM_CHUNK 16384
/// Blocks of `count_non_finite`, whatever the number of elements.
#define GLM_NON_FINITE_BLOCKS 256

/// A piece of one parameter: at most `GLM_CHUNK` elements of the value, its gradient and its moments. `decay` is
/// `1 - lr weight_decay`, or 1; `step_size` is `lr / (1 - beta1^t)`.
struct AdamwChunk {
    float *p;
    const float *g;
    float *m;
    float *v;
    uint32_t n;
    float decay;
    float step_size;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct AdamwChunk, 48);

/// The scalars of an AdamW step that all parameters share, as in src/cpu/optim.rs.
struct AdamwFactors {
    float clip;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float sqrt_correction2;
    float epsilon;
};
GLM_ASSERT_SIZE(struct AdamwFactors, 24);

/// One AdamW step over all chunks, one block each:
/// `g = clip g; m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g g;
/// p = decay p - step_size m / (sqrt(v) / sqrt_correction2 + epsilon)`.
struct Adamw {
    const struct AdamwChunk *chunks;
    struct AdamwFactors factors;
};
GLM_ASSERT_SIZE(struct Adamw, 32);

/// A piece of one parameter of an optimizer with one moment: at most `GLM_CHUNK` elements. `m` may be null in `Sgd`.
struct MomentumChunk {
    float *p;
    const float *g;
    float *m;
    uint32_t n;
    float rate;
    float decay;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct MomentumChunk, 40);

/// One step of stochastic gradient descent over all chunks, one block each; `decay` is the weight decay:
/// `g = clip g + decay p; m = momentum m + g; p -= rate m`, or `p -= rate g` in a chunk without m.
struct Sgd {
    const struct MomentumChunk *chunks;
    float clip;
    float momentum;
};
GLM_ASSERT_SIZE(struct Sgd, 16);

/// The scalars of a Lion step that all parameters share, as in src/cpu/optim.rs.
struct LionFactors {
    float clip;
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct LionFactors, 24);

/// One Lion step over all chunks, one block each; `decay` is `1 - rate weight_decay`, or 1:
/// `g = clip g; p = decay p - rate sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g`.
struct Lion {
    const struct MomentumChunk *chunks;
    struct LionFactors factors;
};
GLM_ASSERT_SIZE(struct Lion, 32);

/// A piece of one tensor: at most `GLM_CHUNK` elements.
struct FloatChunk {
    float *x;
    uint32_t n;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct FloatChunk, 16);

/// `partials [chunks] = sum x^2` of each chunk, one block each.
struct SumOfSquares {
    double *partials;
    const struct FloatChunk *chunks;
};
GLM_ASSERT_SIZE(struct SumOfSquares, 16);

/// `x = 0` in each chunk, one block each.
struct ZeroChunks {
    const struct FloatChunk *chunks;
};
GLM_ASSERT_SIZE(struct ZeroChunks, 8);

/// What `count_non_finite` found in one block's part.
struct NonFinite {
    uint64_t first;
    uint64_t count;
};
GLM_ASSERT_SIZE(struct NonFinite, 16);

/// `found [GLM_NON_FINITE_BLOCKS]`: how many of the `n` elements of `x` are NaN or infinite in each block's part, and the
/// index of the first (`n` when there is none). The parts lie in order.
struct CountNonFinite {
    struct NonFinite *found;
    const void *x;
    uint64_t n;
};
GLM_ASSERT_SIZE(struct CountNonFinite, 24);

// --- optim_8bit.cu ----------------------------------------------------------------------------------------------------

/// Moments that share one scale in 8 bits; `GLM_CHUNK` is a multiple.
#define GLM_BLOCK_8BIT 256

/// What the 256 codes of the two moments mean, ascending, and the midpoints between neighbours; element 255 of those is
/// not read.
struct Maps8bit {
    float m[256];
    float m_midpoints[256];
    float v[256];
    float v_midpoints[256];
};
GLM_ASSERT_SIZE(struct Maps8bit, 4096);

/// A piece of one parameter as `AdamwChunk`, whose moments are `map[codes] absmax`: `m` and `v [n]` are codes, `m_absmax`
/// and `v_absmax [ceil(n / GLM_BLOCK_8BIT)]` the largest magnitude of each block.
struct Adamw8bitChunk {
    float *p;
    const float *g;
    uint8_t *m;
    uint8_t *v;
    float *m_absmax;
    float *v_absmax;
    uint32_t n;
    float decay;
    float step_size;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct Adamw8bitChunk, 64);

/// The step of `Adamw` over all chunks, one block each, on moments that are dequantised before and quantised after it.
struct Adamw8bit {
    const struct Adamw8bitChunk *chunks;
    const struct Maps8bit *maps;
    struct AdamwFactors factors;
};
GLM_ASSERT_SIZE(struct Adamw8bit, 40);

// --- gemm.cu ----------------------------------------------------------------------------------------------------------

/// Side of the square tile of c that a block of `gemm_*_{f16,bf16}` computes.
#define GLM_GEMM_TILE 128
/// That of `gemm_*_small_*` and of `gemm_*_f32`.
#define GLM_GEMM_SMALL_TILE 64
/// Depth of the slices of K that `gemm_*_small_*` and `gemm_*_f32` take at a time: parts of K begin at its
/// multiples.
#define GLM_GEMM_SMALL_DEPTH 64
/// Threads of a block of every `gemm_*` on tiles.
#define GLM_GEMM_THREADS 128
/// Shared memory of a block of `gemm_*_{f16,bf16}` and `gemm_*_small_*`: three stages of 16 KiB.
#define GLM_GEMM_SHARED_BYTES 49152
/// On Turing two stages, so that two blocks fit: it has no copies under way that a third would be for.
#define GLM_GEMM_SHARED_BYTES_SM75 32768
/// Shared memory of a block of `gemm_*_f32`: two stages.
#define GLM_GEMM_F32_SHARED_BYTES 17408
/// Most rows that `gemm_few_*` takes.
#define GLM_GEMM_FEW_ROWS 16
/// Outputs, threads and shared memory of a block of `gemm_few_*`.
#define GLM_GEMM_FEW_OUTPUTS 32
#define GLM_GEMM_FEW_THREADS 256
#define GLM_GEMM_FEW_SHARED_BYTES 18432
/// Threads, each with one element of c, of a block of `gemm_sum_*`.
#define GLM_GEMM_SUM_THREADS 256

/// `c [M, N] = alpha * op(a) op(b) + beta * c + bias [N] + gamma * residual [M, N]`, summed in float32.
///
/// `gemm_<layout>_<types>`: layout nt takes a [M, K] and b [N, K], nn a [M, K] and b [K, N], tn a [K, M] and
/// b [K, N]; types are those of a, b and c, t the kernel's and f float32, rounded to the kernel's type before
/// it is multiplied. `gemm_<layout>_f32` computes in float32. c is not read when beta is 0; `bias` and
/// `residual`, of c's type, may be null. Rows of c and of the residual begin `stride` elements apart.
///
/// Type i (b only; int8.cu, and `gemm_<layout>_i_f32`): int8, each row of b as it lies in memory times its number of `scales`,
/// rounded to the kernel's type before it is multiplied.
///
/// With `splits` above 1 K is cut into as many parts and a kernel only writes the sums of its part, to
/// `partial [splits, M, N]`; `gemm_sum` of c's type then makes c of them.
struct Gemm {
    void *c;
    const void *a;
    const void *b;
    const float *bias;
    const void *residual;
    float *partial;
    const float *scales;
    int32_t m;
    int32_t n;
    int32_t k;
    int32_t stride;
    int32_t splits;
    float alpha;
    float beta;
    float gamma;
};
GLM_ASSERT_SIZE(Gemm, 88);

// --- int8.cu ----------------------------------------------------------------------------------------------------------

/// `out [rows, columns] = codes [rows, columns] * scales [rows]`, rounded once to T.
struct Int8Dequantize {
    void *out;
    const int8_t *codes;
    const float *scales;
    uint32_t rows;
    uint32_t columns;
};
GLM_ASSERT_SIZE(struct Int8Dequantize, 32);

// --- loss.cu ----------------------------------------------------------------------------------------------------------

/// Threads of a block of `softmax_statistics`, which has one row, of `softmax_gradient` and of `loss_sum`.
#define GLM_LOSS_THREADS 256
/// Logits of a block of `softmax_gradient`.
#define GLM_SOFTMAX_GRADIENT_WIDTH 4096

/// Takes `logits [R, width]`, those of classes `start .. start + width`, into the running `statistics [R, 3]`
/// of each row: the largest logit, the sum of exponentials relative to it, the target's logit. The chunk that
/// starts at 0 begins anew.
///
/// A logit that is NaN, or a target outside `0 .. vocabulary`, makes the sum NaN and so the loss.
struct SoftmaxStatistics {
    float *statistics;
    const float *logits;
    const int32_t *targets;
    int32_t vocabulary;
    int32_t start;
    int32_t width;
};
GLM_ASSERT_SIZE(SoftmaxStatistics, 40);

/// `logits [R, width] = scale * (softmax - onehot)` in place, for classes `start .. start + width`.
struct SoftmaxGradient {
    float *logits;
    const float *statistics;
    const int32_t *targets;
    int32_t start;
    int32_t width;
    float scale;
};
GLM_ASSERT_SIZE(SoftmaxGradient, 40);

/// `loss = sum over rows of largest + ln(sum) - target` of `statistics [R, 3]`, in float64.
struct LossSum {
    double *loss;
    const float *statistics;
    int32_t rows;
};
GLM_ASSERT_SIZE(LossSum, 24);

// --- nf4.cu -----------------------------------------------------------------------------------------------------------

/// A frozen 4-bit matrix W [N, K] in the layout that nf4.cuh draws, or some of its rows. Element [n, k] is
/// `table[code] * scale(n, k / 64)`, the scale being `absmax` (flat) or `map[absmax_codes] * absmax + offset`.
/// K is a multiple of 64; rows are padded to a multiple of 32.
struct Nf4Weight {
    const uint32_t *codes;       // [ceil(N / 32), K / 32, 128] words of 8 codes
    const uint8_t *absmax_codes; // [ceil(N / 32), ceil(K / 256), 32, 4]; null: the scales are flat
    const float *absmax;         // flat: as absmax_codes; else one for every 256 blocks of 64, in row-major order
    const float *map;            // [256], what absmax_codes mean
    float offset;                // mean of the scales
    uint32_t first;              // row of the matrix that is row 0 here, a multiple of 32
    uint32_t outputs;            // N: rows used
    uint32_t inputs;             // K
};
GLM_ASSERT_SIZE(struct Nf4Weight, 48);

/// `codes`: 4-bit codes of T source [n], n a multiple of 64, in blocks of 64 (the even element in the high nibble), `absmax`
/// [n / 64]: the largest magnitude of each. Equal to src/quant to the bit. `bad` is added the number of blocks with NaN or
/// infinity; their absmax is not finite.
struct Nf4Quantize {
    uint8_t *codes;
    float *absmax;
    uint32_t *bad;
    const void *source;
    uint64_t n;
    uint64_t order;      // nibble r: the code of the table's r-th smallest value
    float midpoints[15]; // between neighbours in that order
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct Nf4Quantize, 112);

/// `offset` [1]: the mean of absmax [n], in the order of additions of src/quant/nested.rs.
struct Nf4Mean {
    float *offset;
    const float *absmax;
    uint64_t n;
};
GLM_ASSERT_SIZE(struct Nf4Mean, 24);

/// Double quantisation: `codes` [n] and `nested` [ceil(n / 256)] with absmax[b] ~ map[codes[b]] * nested[b / 256] + offset.
struct Nf4QuantizeAbsmax {
    uint8_t *codes;
    float *nested;
    const float *absmax;
    const float *offset; // [1]
    const float *map;    // [256], ascending
    uint64_t n;
};
GLM_ASSERT_SIZE(struct Nf4QuantizeAbsmax, 48);

/// Codes between the row-major layout `plain` of bitsandbytes, [N, K / 2] bytes, and `packed`, the layout of Nf4Weight.
/// Packed codes are renumbered: nibble c of `numbers` is the packed number of code c when packing, and the code of packed
/// number c when unpacking.
struct Nf4Pack {
    uint32_t *packed;
    uint8_t *plain;
    uint64_t numbers;
    uint32_t outputs;
    uint32_t inputs;
    uint32_t zero; // the code of zero (plain), for the rows that pad
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct Nf4Pack, 40);

/// Scales (flat, or 8-bit codes) between the row-major order of blocks `plain` [N, K / 64] and that of Nf4Weight.
struct Nf4PackAbsmax {
    void *packed;
    void *plain;
    uint32_t outputs;
    uint32_t inputs;
};
GLM_ASSERT_SIZE(struct Nf4PackAbsmax, 24);

/// `out` [N, K] = values[code] * scale, both f32, rounded once to T: what bitsandbytes computes.
struct Nf4Dequantize {
    void *out;
    struct Nf4Weight w;
    float values[16]; // by packed number
};
GLM_ASSERT_SIZE(struct Nf4Dequantize, 120);

// --- nf4_linear.cu ----------------------------------------------------------------------------------------------------

/// The 16 values as bytes for PRMT (nf4.cuh), of T; T of a value is its table entry times `stretch`, and
/// `absmax * pre` is the scale that is rounded to T, `post` what the sums are multiplied by: stretch * pre * post = 1.
struct Nf4Planes {
    uint32_t low[4];  // low bytes: numbers 0 to 7, then 8 to 15
    uint32_t high[4]; // high bytes
    float pre;
    float post; // a power of two
};
GLM_ASSERT_SIZE(struct Nf4Planes, 40);

/// Forward: `out` [M, N] = in [M, K] Wᵀ + lora_scale * u [M, rank] lora [N, rank]ᵀ + bias [N] + alpha * residual [M, N].
/// Backward: `out` [M, K] = in [M, N] W + lora_scale * u [M, rank] lora [rank, K] + alpha * residual [M, K]; no bias.
/// Without `out` the sums go, without bias and residual, to `partial` [splits, M, N or K].
struct Nf4Linear {
    void *out; // or null; T
    float *partial;
    const void *in;
    const float *bias;    // or null
    const void *residual; // or null
    const void *u;        // T, or null
    const float *lora;
    struct Nf4Weight w;
    struct Nf4Planes planes;
    float values[16]; // by packed number; used by f32 kernels
    uint32_t m;
    uint32_t rank;
    uint32_t splits;
    float alpha;
    float lora_scale;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct Nf4Linear, 232);

/// `out` [M, width] = Σ_s partial [s, M, width] + bias + alpha * residual, in order of s.
struct Nf4Finish {
    void *out;
    const float *partial;
    const float *bias;    // or null
    const void *residual; // or null
    uint32_t m;
    uint32_t width;
    uint32_t splits;
    float alpha;
};
GLM_ASSERT_SIZE(struct Nf4Finish, 48);

/// Outputs (forward) or inputs (backward) that one thread block covers, rows of activations of the tall and of the short
/// variant, reduction steps, and bytes of shared memory.
#define GLM_NF4_TILE_COLUMNS 128
#define GLM_NF4_TILE_ROWS 128
#define GLM_NF4_TILE_ROWS_SHORT 64
#define GLM_NF4_TILE_STEP 64
#define GLM_NF4_TILE_THREADS 128
#define GLM_NF4_TILE_SHARED 42496
#define GLM_NF4_TILE_SHARED_SHORT 26112
/// The f32 kernels: 64 x 64 tiles.
#define GLM_NF4_F32_TILE 64
#define GLM_NF4_F32_THREADS 256
#define GLM_NF4_F32_SHARED 18496

// --- nf4_few.cu -------------------------------------------------------------------------------------------------------

/// As Nf4Linear forward, for few rows: `in` [M, K] with M up to the 8, 16 or 32 of the kernel's name.
struct Nf4Few {
    void *out; // or null; T
    float *partial;
    const void *in;
    const float *bias;    // or null
    const void *residual; // or null
    const void *u;        // T, or null
    const float *lora;
    struct Nf4Weight w;
    float values[16]; // by packed number, times stretch
    float scale;      // what sums are multiplied by: 1 / stretch
    uint32_t m;
    uint32_t rank;
    uint32_t splits;
    float alpha;
    float lora_scale;
};
GLM_ASSERT_SIZE(struct Nf4Few, 192);

#define GLM_NF4_FEW_THREADS 256
#define GLM_NF4_FEW_SHARED 33792
#define GLM_NF4_FEW_SHARED_32 37888

// --- attention.cu -----------------------------------------------------------------------------------------------------

/// Threads of a block of every `attention_*` but `attention_delta_*` (256).
#define GLM_ATTENTION_THREADS 128
/// Queries of a block of `attention_forward_d*`, and bytes of its shared memory for each element of a head.
#define GLM_ATTENTION_QUERIES 64
#define GLM_ATTENTION_SHARED_BYTES 256
/// Those of `attention_forward_tall_d128_*`.
#define GLM_ATTENTION_TALL_QUERIES 128
#define GLM_ATTENTION_TALL_SHARED_BYTES 544
/// Queries of a block of `attention_forward_f32`.
#define GLM_ATTENTION_F32_QUERIES 16
/// Keys or queries of a tile of every `attention_*_f32` on tiles, and the largest head that they take.
#define GLM_ATTENTION_F32_TILE 32
#define GLM_ATTENTION_F32_HEAD_DIM 128

/// `context = softmax(mask(q kᵀ / sqrt(d))) v`, and `log_sum_exp = ln Σ exp` of every query.
///
/// `context [B Q, heads d]`, `log_sum_exp [B, heads, Q]` (0 for a query with uniform weights), `qkv [B Q, heads 3 d]`
/// (rotated q, k, v of head 0, then of head 1, ...). Key j of head h of sequence b stands at
/// `keys + b key_batch_stride + j key_row_stride + h key_head_stride`, its value at the same place of `values`: beside
/// the queries in `qkv`, or in a cache. Query i stands at position `key_count - queries + i`. `spans [B, 2]`: start and
/// context of each sequence; key j is visible to the query at position i when both are at least start and
/// `j < context || j <= i`. `prefix_keys`, `prefix_values [heads, prefix, d]` are visible to every query; those of sequence b
/// begin at `b prefix_batch_stride`, which is 0 when all share them. A query before
/// start sees the prefix only, and without a prefix all keys with equal weights. `scale` is `log2 e / sqrt(d)`:
/// the softmax is made of powers of two. Strides count elements.
struct AttentionForward {
    void *context;
    float *log_sum_exp;
    const void *qkv;
    const void *keys;
    const void *values;
    const void *prefix_keys;
    const void *prefix_values;
    const int32_t *spans;
    uint64_t key_batch_stride;
    uint64_t prefix_batch_stride;
    uint32_t key_row_stride;
    uint32_t key_head_stride;
    uint32_t queries;
    uint32_t key_count;
    uint32_t heads;
    uint32_t head_dim;
    uint32_t prefix;
    float scale;
};
GLM_ASSERT_SIZE(struct AttentionForward, 112);

// --- attention_backward.cu --------------------------------------------------------------------------------------------

/// Heads of a block of `attention_delta_*`: a warp for each.
#define GLM_ATTENTION_DELTA_HEADS 8
/// Queries of a block of `attention_backward_q_d*`, keys of one of `attention_backward_{kv,prefix}_d*`.
#define GLM_ATTENTION_BACKWARD_ROWS 64
/// Bytes of shared memory for each element of a head, of q; of kv and prefix, which need some more for statistics.
#define GLM_ATTENTION_BACKWARD_Q_SHARED_BYTES 256
#define GLM_ATTENTION_BACKWARD_KV_SHARED_BYTES 384
#define GLM_ATTENTION_BACKWARD_STATISTICS_BYTES 512
/// Queries or keys of a block of `attention_backward_*_f32`.
#define GLM_ATTENTION_BACKWARD_F32_ROWS 8

/// `delta[b, h, i] = Σ_c d_context[b, i, h, c] context[b, i, h, c]`.
///
/// `delta [B, heads, S]`, `d_context` and `context [B S, heads d]`; `rows` is B S.
struct AttentionDelta {
    float *delta;
    const void *d_context;
    const void *context;
    uint32_t rows;
    uint32_t queries;
    uint32_t heads;
    uint32_t head_dim;
};
GLM_ASSERT_SIZE(struct AttentionDelta, 40);

/// The gradient of `AttentionForward` over keys of the same rows: three kernels, each of which writes its own part.
///
/// `dqkv [B S, heads 3 d]`: written, still rotated; q by one kernel, k and v by another. `d_prefix_keys` and
/// `d_prefix_values [heads, prefix, d]`, of each sequence or of all: added to by the third. `d_context [B S, heads d]`, `qkv [B S, heads 3 d]`,
/// `log_sum_exp` and `delta [B, heads, S]`; the rest as in `AttentionForward`; `size` is B.
struct AttentionBackward {
    void *dqkv;
    float *d_prefix_keys;
    float *d_prefix_values;
    const void *d_context;
    const void *qkv;
    const float *log_sum_exp;
    const float *delta;
    const void *prefix_keys;
    const void *prefix_values;
    const int32_t *spans;
    uint64_t prefix_batch_stride;
    uint32_t size;
    uint32_t queries;
    uint32_t heads;
    uint32_t head_dim;
    uint32_t prefix;
    float scale;
};
GLM_ASSERT_SIZE(struct AttentionBackward, 112);

// --- attention_decode.cu ----------------------------------------------------------------------------------------------

/// Threads of a block of `kv_append_*`.
#define GLM_KV_APPEND_THREADS 256
/// Keys of a chunk, one of which a block of `attention_decode_d*` takes.
#define GLM_ATTENTION_CHUNK 64

/// Copies k and v of `qkv [B Q, heads 3 d]` behind the `past` positions of a cache `[B, capacity, heads d]`.
struct KvAppend {
    void *keys;
    void *values;
    const void *qkv;
    uint32_t rows;
    uint32_t queries;
    uint32_t past;
    uint32_t capacity;
    uint32_t heads;
    uint32_t head_dim;
};
GLM_ASSERT_SIZE(struct KvAppend, 48);

/// `AttentionForward` of one query for each sequence, over keys split into `chunks` chunks.
///
/// The first `ceil(prefix / GLM_ATTENTION_CHUNK)` chunks are of the prefix, the others of the cache `[B, capacity, heads d]`.
/// With more than one, `partial [B, heads, chunks, d + 2]` is written: `Σ p v`, then the largest score (times log2 e) and
/// `Σ p`; `context` and `log_sum_exp` are left to `AttentionCombine`.
struct AttentionDecode {
    float *partial;
    void *context;
    float *log_sum_exp;
    const void *qkv;
    const void *keys;
    const void *values;
    const void *prefix_keys;
    const void *prefix_values;
    const int32_t *spans;
    uint64_t prefix_batch_stride;
    uint32_t key_count;
    uint32_t capacity;
    uint32_t heads;
    uint32_t head_dim;
    uint32_t prefix;
    float scale;
};
GLM_ASSERT_SIZE(struct AttentionDecode, 104);

/// Joins the chunks of `AttentionDecode`: `context [B, heads d]`, `log_sum_exp [B, heads]`.
struct AttentionCombine {
    void *context;
    float *log_sum_exp;
    const float *partial;
    const int32_t *spans;
    uint32_t chunks;
    uint32_t key_count;
    uint32_t heads;
    uint32_t head_dim;
    uint32_t prefix;
    uint32_t reserved;
};
GLM_ASSERT_SIZE(struct AttentionCombine, 56);

// --- prefix.cu --------------------------------------------------------------------------------------------------------

/// Threads of a block of the kernels of a prefix, and the elements that one has of a row.
#define GLM_PREFIX_THREADS 256
#define GLM_PREFIX_SPAN 8

/// Keys or values of one layer out of a prefix's table: `y [B, heads, P, d] = table [P, columns]`, of which row p holds
/// those of position p from column `first` on, head after head; then dropout.
///
/// Element `i` of `[B, P, columns]` is kept when the stream's uniform `i` is at least `p`, and times `scale = 1 / (1 - p)`
/// then. B is `size`, P is `length`.
struct PrefixHeads {
    void *y;
    const float *table;
    uint64_t seed;
    uint64_t stream;
    uint32_t size;
    uint32_t length;
    uint32_t heads;
    uint32_t head_dim;
    uint32_t columns;
    uint32_t first;
    float p;
    float scale;
};
GLM_ASSERT_SIZE(struct PrefixHeads, 64);

/// The gradient of `PrefixHeads`: `d_table [P, columns]` is added `Σ_b` of `dy [B, heads, P, d]` behind the same dropout.
struct PrefixHeadsBackward {
    float *d_table;
    const float *dy;
    uint64_t seed;
    uint64_t stream;
    uint32_t size;
    uint32_t length;
    uint32_t heads;
    uint32_t head_dim;
    uint32_t columns;
    uint32_t first;
    float p;
    float scale;
};
GLM_ASSERT_SIZE(struct PrefixHeadsBackward, 64);

/// `y = tanh(x)` of `n` elements.
struct Tanh {
    float *y;
    const float *x;
    uint64_t n;
};
GLM_ASSERT_SIZE(struct Tanh, 24);

/// The gradient of `Tanh` in place, from its output: `d *= 1 - y^2`.
struct TanhBackward {
    float *d;
    const float *y;
    uint64_t n;
};
GLM_ASSERT_SIZE(struct TanhBackward, 24);

// --- lane_maps.cu -----------------------------------------------------------------------------------------------------

/// One m16n8k16 product per block, registers as they are: d = a b + c. a: (blocks, 32 lanes, 4), b: (blocks, 32, 2), c and
/// d: (blocks, 32, 4).
struct LaneMapMma {
    float *d;
    const uint32_t *a;
    const uint32_t *b;
    const float *c;
};
GLM_ASSERT_SIZE(struct LaneMapMma, 32);

/// One ldmatrix per block. tiles: (blocks, 4 tiles, 8 rows, 8 columns), r: (blocks, 32 lanes, 4 or 2 registers).
struct LaneMapLdmatrix {
    uint32_t *r;
    const uint16_t *tiles;
};
GLM_ASSERT_SIZE(struct LaneMapLdmatrix, 16);

/// Bit functions, packed arithmetic, conversions, shuffles, votes. x: (blocks, 32 lanes, 3), r: (blocks, 32 lanes, 24).
struct LaneMapBits {
    uint32_t *r;
    const uint32_t *x;
};
GLM_ASSERT_SIZE(struct LaneMapBits, 16);

#endif
