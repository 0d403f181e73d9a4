//! The parameter structs of the kernels, made from `cuda/kernels.h` by `scripts/bindings.sh`: edit that header.
//!
//! The assertions hold Rust to the layout that the C compiler uses.
#![allow(dead_code, clippy::all, rustdoc::all)]

pub const GLM_POINTWISE_THREADS: u32 = 256;
pub const GLM_DROPOUT_WRITE: u32 = 0;
pub const GLM_DROPOUT_ACCUMULATE: u32 = 1;
pub const GLM_DROPOUT_REST: u32 = 2;
pub const GLM_NORM_HELD: u32 = 16;
pub const GLM_NORM_THREADS: u32 = 1024;
pub const GLM_COLUMN_THREADS: u32 = 256;
pub const GLM_DORA_THREADS: u32 = 256;
pub const GLM_ROWS_THREADS: u32 = 256;
pub const GLM_OPTIM_THREADS: u32 = 256;
pub const GLM_CHUNK: u32 = 16384;
pub const GLM_NON_FINITE_BLOCKS: u32 = 256;
pub const GLM_BLOCK_8BIT: u32 = 256;
pub const GLM_GEMM_TILE: u32 = 128;
pub const GLM_GEMM_SMALL_TILE: u32 = 64;
pub const GLM_GEMM_SMALL_DEPTH: u32 = 64;
pub const GLM_GEMM_THREADS: u32 = 128;
pub const GLM_GEMM_SHARED_BYTES: u32 = 49152;
pub const GLM_GEMM_SHARED_BYTES_SM75: u32 = 32768;
pub const GLM_GEMM_F32_SHARED_BYTES: u32 = 17408;
pub const GLM_GEMM_FEW_ROWS: u32 = 16;
pub const GLM_GEMM_FEW_OUTPUTS: u32 = 32;
pub const GLM_GEMM_FEW_THREADS: u32 = 256;
pub const GLM_GEMM_FEW_SHARED_BYTES: u32 = 18432;
pub const GLM_GEMM_SUM_THREADS: u32 = 256;
pub const GLM_LOSS_THREADS: u32 = 256;
pub const GLM_SOFTMAX_GRADIENT_WIDTH: u32 = 4096;
pub const GLM_NF4_TILE_COLUMNS: u32 = 128;
pub const GLM_NF4_TILE_ROWS: u32 = 128;
pub const GLM_NF4_TILE_ROWS_SHORT: u32 = 64;
pub const GLM_NF4_TILE_STEP: u32 = 64;
pub const GLM_NF4_TILE_THREADS: u32 = 128;
pub const GLM_NF4_TILE_SHARED: u32 = 42496;
pub const GLM_NF4_TILE_SHARED_SHORT: u32 = 26112;
pub const GLM_NF4_F32_TILE: u32 = 64;
pub const GLM_NF4_F32_THREADS: u32 = 256;
pub const GLM_NF4_F32_SHARED: u32 = 18496;
pub const GLM_NF4_FEW_THREADS: u32 = 256;
pub const GLM_NF4_FEW_SHARED: u32 = 33792;
pub const GLM_NF4_FEW_SHARED_32: u32 = 37888;
pub const GLM_ATTENTION_THREADS: u32 = 128;
pub const GLM_ATTENTION_QUERIES: u32 = 64;
pub const GLM_ATTENTION_SHARED_BYTES: u32 = 256;
pub const GLM_ATTENTION_TALL_QUERIES: u32 = 128;
pub const GLM_ATTENTION_TALL_SHARED_BYTES: u32 = 544;
pub const GLM_ATTENTION_F32_QUERIES: u32 = 16;
pub const GLM_ATTENTION_F32_TILE: u32 = 32;
pub const GLM_ATTENTION_F32_HEAD_DIM: u32 = 128;
pub const GLM_ATTENTION_DELTA_HEADS: u32 = 8;
pub const GLM_ATTENTION_BACKWARD_ROWS: u32 = 64;
pub const GLM_ATTENTION_BACKWARD_Q_SHARED_BYTES: u32 = 256;
pub const GLM_ATTENTION_BACKWARD_KV_SHARED_BYTES: u32 = 384;
pub const GLM_ATTENTION_BACKWARD_STATISTICS_BYTES: u32 = 512;
pub const GLM_ATTENTION_BACKWARD_F32_ROWS: u32 = 8;
pub const GLM_KV_APPEND_THREADS: u32 = 256;
pub const GLM_ATTENTION_CHUNK: u32 = 64;
pub const GLM_PREFIX_THREADS: u32 = 256;
pub const GLM_PREFIX_SPAN: u32 = 8;
#[doc = " `y = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))` of `n` elements."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct GeluForward {
    pub y: *mut core::ffi::c_void,
    pub x: *const core::ffi::c_void,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GeluForward"][::core::mem::size_of::<GeluForward>() - 24usize];
    ["Alignment of GeluForward"][::core::mem::align_of::<GeluForward>() - 8usize];
    ["Offset of field: GeluForward::y"][::core::mem::offset_of!(GeluForward, y) - 0usize];
    ["Offset of field: GeluForward::x"][::core::mem::offset_of!(GeluForward, x) - 8usize];
    ["Offset of field: GeluForward::n"][::core::mem::offset_of!(GeluForward, n) - 16usize];
};
#[doc = " `d *= gelu'(x)` of `n` elements, in place: `d` holds dy and becomes dx."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct GeluBackward {
    pub d: *mut core::ffi::c_void,
    pub x: *const core::ffi::c_void,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GeluBackward"][::core::mem::size_of::<GeluBackward>() - 24usize];
    ["Alignment of GeluBackward"][::core::mem::align_of::<GeluBackward>() - 8usize];
    ["Offset of field: GeluBackward::d"][::core::mem::offset_of!(GeluBackward, d) - 0usize];
    ["Offset of field: GeluBackward::x"][::core::mem::offset_of!(GeluBackward, x) - 8usize];
    ["Offset of field: GeluBackward::n"][::core::mem::offset_of!(GeluBackward, n) - 16usize];
};
#[doc = " `d = mask x scale` of `n` elements; then `y = d`, `y += d` or `y = x - d`. Element `i` is kept when the uniform `i` of\n the stream (`seed`, `stream`) is at least `p`; `scale` is `1 / (1 - p)`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Dropout {
    pub y: *mut core::ffi::c_void,
    pub x: *const core::ffi::c_void,
    pub n: u64,
    pub seed: u64,
    pub stream: u64,
    pub p: f32,
    pub scale: f32,
    pub then: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Dropout"][::core::mem::size_of::<Dropout>() - 56usize];
    ["Alignment of Dropout"][::core::mem::align_of::<Dropout>() - 8usize];
    ["Offset of field: Dropout::y"][::core::mem::offset_of!(Dropout, y) - 0usize];
    ["Offset of field: Dropout::x"][::core::mem::offset_of!(Dropout, x) - 8usize];
    ["Offset of field: Dropout::n"][::core::mem::offset_of!(Dropout, n) - 16usize];
    ["Offset of field: Dropout::seed"][::core::mem::offset_of!(Dropout, seed) - 24usize];
    ["Offset of field: Dropout::stream"][::core::mem::offset_of!(Dropout, stream) - 32usize];
    ["Offset of field: Dropout::p"][::core::mem::offset_of!(Dropout, p) - 40usize];
    ["Offset of field: Dropout::scale"][::core::mem::offset_of!(Dropout, scale) - 44usize];
    ["Offset of field: Dropout::then"][::core::mem::offset_of!(Dropout, then) - 48usize];
    ["Offset of field: Dropout::reserved"][::core::mem::offset_of!(Dropout, reserved) - 52usize];
};
#[doc = " Turns the q and k parts of `qkv [M, heads, 3, head_dim]` in place; `sign` is 1, or -1 to turn back.\n\n `positions [M, 2]`; `tables [position_count, head_dim / 2]` hold the cosines, then the sines. A position outside the\n tables makes its half of the row's q and k NaN."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Rope {
    pub qkv: *mut core::ffi::c_void,
    pub positions: *const i32,
    pub tables: *const f32,
    pub m: u32,
    pub heads: u32,
    pub head_dim: u32,
    pub position_count: u32,
    pub sign: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Rope"][::core::mem::size_of::<Rope>() - 48usize];
    ["Alignment of Rope"][::core::mem::align_of::<Rope>() - 8usize];
    ["Offset of field: Rope::qkv"][::core::mem::offset_of!(Rope, qkv) - 0usize];
    ["Offset of field: Rope::positions"][::core::mem::offset_of!(Rope, positions) - 8usize];
    ["Offset of field: Rope::tables"][::core::mem::offset_of!(Rope, tables) - 16usize];
    ["Offset of field: Rope::m"][::core::mem::offset_of!(Rope, m) - 24usize];
    ["Offset of field: Rope::heads"][::core::mem::offset_of!(Rope, heads) - 28usize];
    ["Offset of field: Rope::head_dim"][::core::mem::offset_of!(Rope, head_dim) - 32usize];
    ["Offset of field: Rope::position_count"][::core::mem::offset_of!(Rope, position_count) - 36usize];
    ["Offset of field: Rope::sign"][::core::mem::offset_of!(Rope, sign) - 40usize];
    ["Offset of field: Rope::reserved"][::core::mem::offset_of!(Rope, reserved) - 44usize];
};
#[doc = " `y += bound (2 u - 1)` of `n` elements, with the uniforms `u` of the stream (`seed`, `stream`)."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Noise {
    pub y: *mut core::ffi::c_void,
    pub n: u64,
    pub seed: u64,
    pub stream: u64,
    pub bound: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Noise"][::core::mem::size_of::<Noise>() - 40usize];
    ["Alignment of Noise"][::core::mem::align_of::<Noise>() - 8usize];
    ["Offset of field: Noise::y"][::core::mem::offset_of!(Noise, y) - 0usize];
    ["Offset of field: Noise::n"][::core::mem::offset_of!(Noise, n) - 8usize];
    ["Offset of field: Noise::seed"][::core::mem::offset_of!(Noise, seed) - 16usize];
    ["Offset of field: Noise::stream"][::core::mem::offset_of!(Noise, stream) - 24usize];
    ["Offset of field: Noise::bound"][::core::mem::offset_of!(Noise, bound) - 32usize];
    ["Offset of field: Noise::reserved"][::core::mem::offset_of!(Noise, reserved) - 36usize];
};
#[doc = " `y = x` of `n` elements in another type, rounded to nearest even; the kernel's name holds both types, from and to."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Cast {
    pub y: *mut core::ffi::c_void,
    pub x: *const core::ffi::c_void,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Cast"][::core::mem::size_of::<Cast>() - 24usize];
    ["Alignment of Cast"][::core::mem::align_of::<Cast>() - 8usize];
    ["Offset of field: Cast::y"][::core::mem::offset_of!(Cast, y) - 0usize];
    ["Offset of field: Cast::x"][::core::mem::offset_of!(Cast, x) - 8usize];
    ["Offset of field: Cast::n"][::core::mem::offset_of!(Cast, n) - 16usize];
};
#[doc = " `y [M, N] = (x - mean) rstd weight + bias`, `stats [M, 2] = (mean, rstd)`, `rstd = 1 / sqrt(var + eps)`, of each row."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LayerNormForward {
    pub y: *mut core::ffi::c_void,
    pub stats: *mut f32,
    pub x: *const core::ffi::c_void,
    pub weight: *const f32,
    pub bias: *const f32,
    pub m: u32,
    pub n: u32,
    pub eps: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LayerNormForward"][::core::mem::size_of::<LayerNormForward>() - 56usize];
    ["Alignment of LayerNormForward"][::core::mem::align_of::<LayerNormForward>() - 8usize];
    ["Offset of field: LayerNormForward::y"][::core::mem::offset_of!(LayerNormForward, y) - 0usize];
    ["Offset of field: LayerNormForward::stats"][::core::mem::offset_of!(LayerNormForward, stats) - 8usize];
    ["Offset of field: LayerNormForward::x"][::core::mem::offset_of!(LayerNormForward, x) - 16usize];
    ["Offset of field: LayerNormForward::weight"]
        [::core::mem::offset_of!(LayerNormForward, weight) - 24usize];
    ["Offset of field: LayerNormForward::bias"][::core::mem::offset_of!(LayerNormForward, bias) - 32usize];
    ["Offset of field: LayerNormForward::m"][::core::mem::offset_of!(LayerNormForward, m) - 40usize];
    ["Offset of field: LayerNormForward::n"][::core::mem::offset_of!(LayerNormForward, n) - 44usize];
    ["Offset of field: LayerNormForward::eps"][::core::mem::offset_of!(LayerNormForward, eps) - 48usize];
    ["Offset of field: LayerNormForward::reserved"]
        [::core::mem::offset_of!(LayerNormForward, reserved) - 52usize];
};
#[doc = " `dx [M, N] = rstd (g - mean(g) - xhat mean(g xhat))` with `g = dy weight` and `xhat = (x - mean) rstd`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LayerNormBackwardInput {
    pub dx: *mut core::ffi::c_void,
    pub dy: *const core::ffi::c_void,
    pub x: *const core::ffi::c_void,
    pub weight: *const f32,
    pub stats: *const f32,
    pub m: u32,
    pub n: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LayerNormBackwardInput"][::core::mem::size_of::<LayerNormBackwardInput>() - 48usize];
    ["Alignment of LayerNormBackwardInput"][::core::mem::align_of::<LayerNormBackwardInput>() - 8usize];
    ["Offset of field: LayerNormBackwardInput::dx"]
        [::core::mem::offset_of!(LayerNormBackwardInput, dx) - 0usize];
    ["Offset of field: LayerNormBackwardInput::dy"]
        [::core::mem::offset_of!(LayerNormBackwardInput, dy) - 8usize];
    ["Offset of field: LayerNormBackwardInput::x"]
        [::core::mem::offset_of!(LayerNormBackwardInput, x) - 16usize];
    ["Offset of field: LayerNormBackwardInput::weight"]
        [::core::mem::offset_of!(LayerNormBackwardInput, weight) - 24usize];
    ["Offset of field: LayerNormBackwardInput::stats"]
        [::core::mem::offset_of!(LayerNormBackwardInput, stats) - 32usize];
    ["Offset of field: LayerNormBackwardInput::m"]
        [::core::mem::offset_of!(LayerNormBackwardInput, m) - 40usize];
    ["Offset of field: LayerNormBackwardInput::n"]
        [::core::mem::offset_of!(LayerNormBackwardInput, n) - 44usize];
};
#[doc = " `partials [parts, 2, N]`: for each part of `rows_per_part` rows the sums of `dy xhat`, then of `dy`. `AddPartials`\n with two outputs follows."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LayerNormBackwardParameters {
    pub partials: *mut f32,
    pub dy: *const core::ffi::c_void,
    pub x: *const core::ffi::c_void,
    pub stats: *const f32,
    pub m: u32,
    pub n: u32,
    pub rows_per_part: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LayerNormBackwardParameters"][::core::mem::size_of::<LayerNormBackwardParameters>() - 48usize];
    ["Alignment of LayerNormBackwardParameters"]
        [::core::mem::align_of::<LayerNormBackwardParameters>() - 8usize];
    ["Offset of field: LayerNormBackwardParameters::partials"]
        [::core::mem::offset_of!(LayerNormBackwardParameters, partials) - 0usize];
    ["Offset of field: LayerNormBackwardParameters::dy"]
        [::core::mem::offset_of!(LayerNormBackwardParameters, dy) - 8usize];
    ["Offset of field: LayerNormBackwardParameters::x"]
        [::core::mem::offset_of!(LayerNormBackwardParameters, x) - 16usize];
    ["Offset of field: LayerNormBackwardParameters::stats"]
        [::core::mem::offset_of!(LayerNormBackwardParameters, stats) - 24usize];
    ["Offset of field: LayerNormBackwardParameters::m"]
        [::core::mem::offset_of!(LayerNormBackwardParameters, m) - 32usize];
    ["Offset of field: LayerNormBackwardParameters::n"]
        [::core::mem::offset_of!(LayerNormBackwardParameters, n) - 36usize];
    ["Offset of field: LayerNormBackwardParameters::rows_per_part"]
        [::core::mem::offset_of!(LayerNormBackwardParameters, rows_per_part) - 40usize];
    ["Offset of field: LayerNormBackwardParameters::reserved"]
        [::core::mem::offset_of!(LayerNormBackwardParameters, reserved) - 44usize];
};
#[doc = " `partials [parts, N]`: for each part of `rows_per_part` rows of `dy [M, N]` their sum. `AddPartials` follows."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct ColumnSums {
    pub partials: *mut f32,
    pub dy: *const core::ffi::c_void,
    pub m: u32,
    pub n: u32,
    pub rows_per_part: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ColumnSums"][::core::mem::size_of::<ColumnSums>() - 32usize];
    ["Alignment of ColumnSums"][::core::mem::align_of::<ColumnSums>() - 8usize];
    ["Offset of field: ColumnSums::partials"][::core::mem::offset_of!(ColumnSums, partials) - 0usize];
    ["Offset of field: ColumnSums::dy"][::core::mem::offset_of!(ColumnSums, dy) - 8usize];
    ["Offset of field: ColumnSums::m"][::core::mem::offset_of!(ColumnSums, m) - 16usize];
    ["Offset of field: ColumnSums::n"][::core::mem::offset_of!(ColumnSums, n) - 20usize];
    ["Offset of field: ColumnSums::rows_per_part"]
        [::core::mem::offset_of!(ColumnSums, rows_per_part) - 24usize];
    ["Offset of field: ColumnSums::reserved"][::core::mem::offset_of!(ColumnSums, reserved) - 28usize];
};
#[doc = " `partials [parts, N]`: for each part of `rows_per_part` rows the sum of `x y factor [N]`. `AddPartials` follows."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct ColumnProducts {
    pub partials: *mut f32,
    pub x: *const core::ffi::c_void,
    pub y: *const core::ffi::c_void,
    pub factor: *const f32,
    pub m: u32,
    pub n: u32,
    pub rows_per_part: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ColumnProducts"][::core::mem::size_of::<ColumnProducts>() - 48usize];
    ["Alignment of ColumnProducts"][::core::mem::align_of::<ColumnProducts>() - 8usize];
    ["Offset of field: ColumnProducts::partials"][::core::mem::offset_of!(ColumnProducts, partials) - 0usize];
    ["Offset of field: ColumnProducts::x"][::core::mem::offset_of!(ColumnProducts, x) - 8usize];
    ["Offset of field: ColumnProducts::y"][::core::mem::offset_of!(ColumnProducts, y) - 16usize];
    ["Offset of field: ColumnProducts::factor"][::core::mem::offset_of!(ColumnProducts, factor) - 24usize];
    ["Offset of field: ColumnProducts::m"][::core::mem::offset_of!(ColumnProducts, m) - 32usize];
    ["Offset of field: ColumnProducts::n"][::core::mem::offset_of!(ColumnProducts, n) - 36usize];
    ["Offset of field: ColumnProducts::rows_per_part"]
        [::core::mem::offset_of!(ColumnProducts, rows_per_part) - 40usize];
    ["Offset of field: ColumnProducts::reserved"]
        [::core::mem::offset_of!(ColumnProducts, reserved) - 44usize];
};
#[doc = " `first [N] += sum over parts of partials [parts, outputs, N]`, and `second [N]` likewise; parts in order. `outputs` is\n the grid's height; `second` is not touched when it is 1."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AddPartials {
    pub first: *mut f32,
    pub second: *mut f32,
    pub partials: *const f32,
    pub n: u32,
    pub parts: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AddPartials"][::core::mem::size_of::<AddPartials>() - 32usize];
    ["Alignment of AddPartials"][::core::mem::align_of::<AddPartials>() - 8usize];
    ["Offset of field: AddPartials::first"][::core::mem::offset_of!(AddPartials, first) - 0usize];
    ["Offset of field: AddPartials::second"][::core::mem::offset_of!(AddPartials, second) - 8usize];
    ["Offset of field: AddPartials::partials"][::core::mem::offset_of!(AddPartials, partials) - 16usize];
    ["Offset of field: AddPartials::n"][::core::mem::offset_of!(AddPartials, n) - 24usize];
    ["Offset of field: AddPartials::parts"][::core::mem::offset_of!(AddPartials, parts) - 28usize];
};
#[doc = " `squares [N] = sum over k of w [N, K]^2`, a block for each row."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RowSquares {
    pub squares: *mut f32,
    pub w: *const core::ffi::c_void,
    pub n: u32,
    pub k: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RowSquares"][::core::mem::size_of::<RowSquares>() - 24usize];
    ["Alignment of RowSquares"][::core::mem::align_of::<RowSquares>() - 8usize];
    ["Offset of field: RowSquares::squares"][::core::mem::offset_of!(RowSquares, squares) - 0usize];
    ["Offset of field: RowSquares::w"][::core::mem::offset_of!(RowSquares, w) - 8usize];
    ["Offset of field: RowSquares::n"][::core::mem::offset_of!(RowSquares, n) - 16usize];
    ["Offset of field: RowSquares::k"][::core::mem::offset_of!(RowSquares, k) - 20usize];
};
#[doc = " `norm_i^2 = squares_i + sum over j of b_ij (2 s p_ji + s^2 q_ij)`; `gain [N] = magnitude / norm`, `inverse [N] = 1 /\n norm`. `b` and `q` are `[N, r]`, `p` is `[r, N]`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct DoraGain {
    pub gain: *mut f32,
    pub inverse: *mut f32,
    pub magnitude: *const f32,
    pub squares: *const f32,
    pub b: *const f32,
    pub p: *const f32,
    pub q: *const f32,
    pub n: u32,
    pub r: u32,
    pub s: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of DoraGain"][::core::mem::size_of::<DoraGain>() - 72usize];
    ["Alignment of DoraGain"][::core::mem::align_of::<DoraGain>() - 8usize];
    ["Offset of field: DoraGain::gain"][::core::mem::offset_of!(DoraGain, gain) - 0usize];
    ["Offset of field: DoraGain::inverse"][::core::mem::offset_of!(DoraGain, inverse) - 8usize];
    ["Offset of field: DoraGain::magnitude"][::core::mem::offset_of!(DoraGain, magnitude) - 16usize];
    ["Offset of field: DoraGain::squares"][::core::mem::offset_of!(DoraGain, squares) - 24usize];
    ["Offset of field: DoraGain::b"][::core::mem::offset_of!(DoraGain, b) - 32usize];
    ["Offset of field: DoraGain::p"][::core::mem::offset_of!(DoraGain, p) - 40usize];
    ["Offset of field: DoraGain::q"][::core::mem::offset_of!(DoraGain, q) - 48usize];
    ["Offset of field: DoraGain::n"][::core::mem::offset_of!(DoraGain, n) - 56usize];
    ["Offset of field: DoraGain::r"][::core::mem::offset_of!(DoraGain, r) - 60usize];
    ["Offset of field: DoraGain::s"][::core::mem::offset_of!(DoraGain, s) - 64usize];
    ["Offset of field: DoraGain::reserved"][::core::mem::offset_of!(DoraGain, reserved) - 68usize];
};
#[doc = " `y [M, N] = (gain [N] + shift) x + bias [N] + alpha * residual [M, N]`, or `y += ...` when `accumulate` is 1; bias and\n residual may be null."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct ScaleColumns {
    pub y: *mut core::ffi::c_void,
    pub x: *const core::ffi::c_void,
    pub gain: *const f32,
    pub bias: *const f32,
    pub residual: *const core::ffi::c_void,
    pub m: u32,
    pub n: u32,
    pub shift: f32,
    pub alpha: f32,
    pub accumulate: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ScaleColumns"][::core::mem::size_of::<ScaleColumns>() - 64usize];
    ["Alignment of ScaleColumns"][::core::mem::align_of::<ScaleColumns>() - 8usize];
    ["Offset of field: ScaleColumns::y"][::core::mem::offset_of!(ScaleColumns, y) - 0usize];
    ["Offset of field: ScaleColumns::x"][::core::mem::offset_of!(ScaleColumns, x) - 8usize];
    ["Offset of field: ScaleColumns::gain"][::core::mem::offset_of!(ScaleColumns, gain) - 16usize];
    ["Offset of field: ScaleColumns::bias"][::core::mem::offset_of!(ScaleColumns, bias) - 24usize];
    ["Offset of field: ScaleColumns::residual"][::core::mem::offset_of!(ScaleColumns, residual) - 32usize];
    ["Offset of field: ScaleColumns::m"][::core::mem::offset_of!(ScaleColumns, m) - 40usize];
    ["Offset of field: ScaleColumns::n"][::core::mem::offset_of!(ScaleColumns, n) - 44usize];
    ["Offset of field: ScaleColumns::shift"][::core::mem::offset_of!(ScaleColumns, shift) - 48usize];
    ["Offset of field: ScaleColumns::alpha"][::core::mem::offset_of!(ScaleColumns, alpha) - 52usize];
    ["Offset of field: ScaleColumns::accumulate"]
        [::core::mem::offset_of!(ScaleColumns, accumulate) - 56usize];
    ["Offset of field: ScaleColumns::reserved"][::core::mem::offset_of!(ScaleColumns, reserved) - 60usize];
};
#[doc = " `y [R, N] = x [rows, N]` for `R` row numbers into `x [M, N]`, also an embedding of token ids. A number outside of `x`\n makes its row NaN. `x` is of y's type, or F32 and rounded: `gather_rounded_*`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct GatherRows {
    pub y: *mut core::ffi::c_void,
    pub x: *const core::ffi::c_void,
    pub rows: *const i32,
    pub r: u32,
    pub m: u32,
    pub n: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GatherRows"][::core::mem::size_of::<GatherRows>() - 40usize];
    ["Alignment of GatherRows"][::core::mem::align_of::<GatherRows>() - 8usize];
    ["Offset of field: GatherRows::y"][::core::mem::offset_of!(GatherRows, y) - 0usize];
    ["Offset of field: GatherRows::x"][::core::mem::offset_of!(GatherRows, x) - 8usize];
    ["Offset of field: GatherRows::rows"][::core::mem::offset_of!(GatherRows, rows) - 16usize];
    ["Offset of field: GatherRows::r"][::core::mem::offset_of!(GatherRows, r) - 24usize];
    ["Offset of field: GatherRows::m"][::core::mem::offset_of!(GatherRows, m) - 28usize];
    ["Offset of field: GatherRows::n"][::core::mem::offset_of!(GatherRows, n) - 32usize];
    ["Offset of field: GatherRows::reserved"][::core::mem::offset_of!(GatherRows, reserved) - 36usize];
};
#[doc = " `y [M, N] = 0`, then `y [rows, N] = x [R, N]` (F32, rounded to y's type); `rows` are distinct. A number outside of `y`\n makes all of `y` NaN."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct ScatterRows {
    pub y: *mut core::ffi::c_void,
    pub x: *const f32,
    pub rows: *const i32,
    pub r: u32,
    pub m: u32,
    pub n: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ScatterRows"][::core::mem::size_of::<ScatterRows>() - 40usize];
    ["Alignment of ScatterRows"][::core::mem::align_of::<ScatterRows>() - 8usize];
    ["Offset of field: ScatterRows::y"][::core::mem::offset_of!(ScatterRows, y) - 0usize];
    ["Offset of field: ScatterRows::x"][::core::mem::offset_of!(ScatterRows, x) - 8usize];
    ["Offset of field: ScatterRows::rows"][::core::mem::offset_of!(ScatterRows, rows) - 16usize];
    ["Offset of field: ScatterRows::r"][::core::mem::offset_of!(ScatterRows, r) - 24usize];
    ["Offset of field: ScatterRows::m"][::core::mem::offset_of!(ScatterRows, m) - 28usize];
    ["Offset of field: ScatterRows::n"][::core::mem::offset_of!(ScatterRows, n) - 32usize];
    ["Offset of field: ScatterRows::reserved"][::core::mem::offset_of!(ScatterRows, reserved) - 36usize];
};
#[doc = " `dw [ids, N] += dy [M, N]`, the rows of one id in order. An id outside of `dw [V, N]` has no row to be added to: the\n forward pass has made its row NaN."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct EmbeddingBackward {
    pub dw: *mut f32,
    pub dy: *const core::ffi::c_void,
    pub ids: *const i32,
    pub m: u32,
    pub v: u32,
    pub n: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of EmbeddingBackward"][::core::mem::size_of::<EmbeddingBackward>() - 40usize];
    ["Alignment of EmbeddingBackward"][::core::mem::align_of::<EmbeddingBackward>() - 8usize];
    ["Offset of field: EmbeddingBackward::dw"][::core::mem::offset_of!(EmbeddingBackward, dw) - 0usize];
    ["Offset of field: EmbeddingBackward::dy"][::core::mem::offset_of!(EmbeddingBackward, dy) - 8usize];
    ["Offset of field: EmbeddingBackward::ids"][::core::mem::offset_of!(EmbeddingBackward, ids) - 16usize];
    ["Offset of field: EmbeddingBackward::m"][::core::mem::offset_of!(EmbeddingBackward, m) - 24usize];
    ["Offset of field: EmbeddingBackward::v"][::core::mem::offset_of!(EmbeddingBackward, v) - 28usize];
    ["Offset of field: EmbeddingBackward::n"][::core::mem::offset_of!(EmbeddingBackward, n) - 32usize];
    ["Offset of field: EmbeddingBackward::reserved"]
        [::core::mem::offset_of!(EmbeddingBackward, reserved) - 36usize];
};
#[doc = " A piece of one parameter: at most `GLM_CHUNK` elements of the value, its gradient and its moments. `decay` is\n `1 - lr weight_decay`, or 1; `step_size` is `lr / (1 - beta1^t)`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AdamwChunk {
    pub p: *mut f32,
    pub g: *const f32,
    pub m: *mut f32,
    pub v: *mut f32,
    pub n: u32,
    pub decay: f32,
    pub step_size: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AdamwChunk"][::core::mem::size_of::<AdamwChunk>() - 48usize];
    ["Alignment of AdamwChunk"][::core::mem::align_of::<AdamwChunk>() - 8usize];
    ["Offset of field: AdamwChunk::p"][::core::mem::offset_of!(AdamwChunk, p) - 0usize];
    ["Offset of field: AdamwChunk::g"][::core::mem::offset_of!(AdamwChunk, g) - 8usize];
    ["Offset of field: AdamwChunk::m"][::core::mem::offset_of!(AdamwChunk, m) - 16usize];
    ["Offset of field: AdamwChunk::v"][::core::mem::offset_of!(AdamwChunk, v) - 24usize];
    ["Offset of field: AdamwChunk::n"][::core::mem::offset_of!(AdamwChunk, n) - 32usize];
    ["Offset of field: AdamwChunk::decay"][::core::mem::offset_of!(AdamwChunk, decay) - 36usize];
    ["Offset of field: AdamwChunk::step_size"][::core::mem::offset_of!(AdamwChunk, step_size) - 40usize];
    ["Offset of field: AdamwChunk::reserved"][::core::mem::offset_of!(AdamwChunk, reserved) - 44usize];
};
#[doc = " The scalars of an AdamW step that all parameters share, as in src/cpu/optim.rs."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AdamwFactors {
    pub clip: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub sqrt_correction2: f32,
    pub epsilon: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AdamwFactors"][::core::mem::size_of::<AdamwFactors>() - 24usize];
    ["Alignment of AdamwFactors"][::core::mem::align_of::<AdamwFactors>() - 4usize];
    ["Offset of field: AdamwFactors::clip"][::core::mem::offset_of!(AdamwFactors, clip) - 0usize];
    ["Offset of field: AdamwFactors::one_minus_beta1"]
        [::core::mem::offset_of!(AdamwFactors, one_minus_beta1) - 4usize];
    ["Offset of field: AdamwFactors::beta2"][::core::mem::offset_of!(AdamwFactors, beta2) - 8usize];
    ["Offset of field: AdamwFactors::one_minus_beta2"]
        [::core::mem::offset_of!(AdamwFactors, one_minus_beta2) - 12usize];
    ["Offset of field: AdamwFactors::sqrt_correction2"]
        [::core::mem::offset_of!(AdamwFactors, sqrt_correction2) - 16usize];
    ["Offset of field: AdamwFactors::epsilon"][::core::mem::offset_of!(AdamwFactors, epsilon) - 20usize];
};
#[doc = " One AdamW step over all chunks, one block each:\n `g = clip g; m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g g;\n p = decay p - step_size m / (sqrt(v) / sqrt_correction2 + epsilon)`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Adamw {
    pub chunks: *const AdamwChunk,
    pub factors: AdamwFactors,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Adamw"][::core::mem::size_of::<Adamw>() - 32usize];
    ["Alignment of Adamw"][::core::mem::align_of::<Adamw>() - 8usize];
    ["Offset of field: Adamw::chunks"][::core::mem::offset_of!(Adamw, chunks) - 0usize];
    ["Offset of field: Adamw::factors"][::core::mem::offset_of!(Adamw, factors) - 8usize];
};
#[doc = " A piece of one parameter of an optimizer with one moment: at most `GLM_CHUNK` elements. `m` may be null in `Sgd`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct MomentumChunk {
    pub p: *mut f32,
    pub g: *const f32,
    pub m: *mut f32,
    pub n: u32,
    pub rate: f32,
    pub decay: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of MomentumChunk"][::core::mem::size_of::<MomentumChunk>() - 40usize];
    ["Alignment of MomentumChunk"][::core::mem::align_of::<MomentumChunk>() - 8usize];
    ["Offset of field: MomentumChunk::p"][::core::mem::offset_of!(MomentumChunk, p) - 0usize];
    ["Offset of field: MomentumChunk::g"][::core::mem::offset_of!(MomentumChunk, g) - 8usize];
    ["Offset of field: MomentumChunk::m"][::core::mem::offset_of!(MomentumChunk, m) - 16usize];
    ["Offset of field: MomentumChunk::n"][::core::mem::offset_of!(MomentumChunk, n) - 24usize];
    ["Offset of field: MomentumChunk::rate"][::core::mem::offset_of!(MomentumChunk, rate) - 28usize];
    ["Offset of field: MomentumChunk::decay"][::core::mem::offset_of!(MomentumChunk, decay) - 32usize];
    ["Offset of field: MomentumChunk::reserved"][::core::mem::offset_of!(MomentumChunk, reserved) - 36usize];
};
#[doc = " One step of stochastic gradient descent over all chunks, one block each; `decay` is the weight decay:\n `g = clip g + decay p; m = momentum m + g; p -= rate m`, or `p -= rate g` in a chunk without m."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Sgd {
    pub chunks: *const MomentumChunk,
    pub clip: f32,
    pub momentum: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Sgd"][::core::mem::size_of::<Sgd>() - 16usize];
    ["Alignment of Sgd"][::core::mem::align_of::<Sgd>() - 8usize];
    ["Offset of field: Sgd::chunks"][::core::mem::offset_of!(Sgd, chunks) - 0usize];
    ["Offset of field: Sgd::clip"][::core::mem::offset_of!(Sgd, clip) - 8usize];
    ["Offset of field: Sgd::momentum"][::core::mem::offset_of!(Sgd, momentum) - 12usize];
};
#[doc = " The scalars of a Lion step that all parameters share, as in src/cpu/optim.rs."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LionFactors {
    pub clip: f32,
    pub beta1: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LionFactors"][::core::mem::size_of::<LionFactors>() - 24usize];
    ["Alignment of LionFactors"][::core::mem::align_of::<LionFactors>() - 4usize];
    ["Offset of field: LionFactors::clip"][::core::mem::offset_of!(LionFactors, clip) - 0usize];
    ["Offset of field: LionFactors::beta1"][::core::mem::offset_of!(LionFactors, beta1) - 4usize];
    ["Offset of field: LionFactors::one_minus_beta1"]
        [::core::mem::offset_of!(LionFactors, one_minus_beta1) - 8usize];
    ["Offset of field: LionFactors::beta2"][::core::mem::offset_of!(LionFactors, beta2) - 12usize];
    ["Offset of field: LionFactors::one_minus_beta2"]
        [::core::mem::offset_of!(LionFactors, one_minus_beta2) - 16usize];
    ["Offset of field: LionFactors::reserved"][::core::mem::offset_of!(LionFactors, reserved) - 20usize];
};
#[doc = " One Lion step over all chunks, one block each; `decay` is `1 - rate weight_decay`, or 1:\n `g = clip g; p = decay p - rate sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Lion {
    pub chunks: *const MomentumChunk,
    pub factors: LionFactors,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Lion"][::core::mem::size_of::<Lion>() - 32usize];
    ["Alignment of Lion"][::core::mem::align_of::<Lion>() - 8usize];
    ["Offset of field: Lion::chunks"][::core::mem::offset_of!(Lion, chunks) - 0usize];
    ["Offset of field: Lion::factors"][::core::mem::offset_of!(Lion, factors) - 8usize];
};
#[doc = " A piece of one tensor: at most `GLM_CHUNK` elements."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct FloatChunk {
    pub x: *mut f32,
    pub n: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of FloatChunk"][::core::mem::size_of::<FloatChunk>() - 16usize];
    ["Alignment of FloatChunk"][::core::mem::align_of::<FloatChunk>() - 8usize];
    ["Offset of field: FloatChunk::x"][::core::mem::offset_of!(FloatChunk, x) - 0usize];
    ["Offset of field: FloatChunk::n"][::core::mem::offset_of!(FloatChunk, n) - 8usize];
    ["Offset of field: FloatChunk::reserved"][::core::mem::offset_of!(FloatChunk, reserved) - 12usize];
};
#[doc = " `partials [chunks] = sum x^2` of each chunk, one block each."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SumOfSquares {
    pub partials: *mut f64,
    pub chunks: *const FloatChunk,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SumOfSquares"][::core::mem::size_of::<SumOfSquares>() - 16usize];
    ["Alignment of SumOfSquares"][::core::mem::align_of::<SumOfSquares>() - 8usize];
    ["Offset of field: SumOfSquares::partials"][::core::mem::offset_of!(SumOfSquares, partials) - 0usize];
    ["Offset of field: SumOfSquares::chunks"][::core::mem::offset_of!(SumOfSquares, chunks) - 8usize];
};
#[doc = " `x = 0` in each chunk, one block each."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct ZeroChunks {
    pub chunks: *const FloatChunk,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ZeroChunks"][::core::mem::size_of::<ZeroChunks>() - 8usize];
    ["Alignment of ZeroChunks"][::core::mem::align_of::<ZeroChunks>() - 8usize];
    ["Offset of field: ZeroChunks::chunks"][::core::mem::offset_of!(ZeroChunks, chunks) - 0usize];
};
#[doc = " What `count_non_finite` found in one block's part."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct NonFinite {
    pub first: u64,
    pub count: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of NonFinite"][::core::mem::size_of::<NonFinite>() - 16usize];
    ["Alignment of NonFinite"][::core::mem::align_of::<NonFinite>() - 8usize];
    ["Offset of field: NonFinite::first"][::core::mem::offset_of!(NonFinite, first) - 0usize];
    ["Offset of field: NonFinite::count"][::core::mem::offset_of!(NonFinite, count) - 8usize];
};
#[doc = " `found [GLM_NON_FINITE_BLOCKS]`: how many of the `n` elements of `x` are NaN or infinite in each block's part, and the\n index of the first (`n` when there is none). The parts lie in order."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct CountNonFinite {
    pub found: *mut NonFinite,
    pub x: *const core::ffi::c_void,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of CountNonFinite"][::core::mem::size_of::<CountNonFinite>() - 24usize];
    ["Alignment of CountNonFinite"][::core::mem::align_of::<CountNonFinite>() - 8usize];
    ["Offset of field: CountNonFinite::found"][::core::mem::offset_of!(CountNonFinite, found) - 0usize];
    ["Offset of field: CountNonFinite::x"][::core::mem::offset_of!(CountNonFinite, x) - 8usize];
    ["Offset of field: CountNonFinite::n"][::core::mem::offset_of!(CountNonFinite, n) - 16usize];
};
#[doc = " What the 256 codes of the two moments mean, ascending, and the midpoints between neighbours; element 255 of those is\n not read."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Maps8bit {
    pub m: [f32; 256usize],
    pub m_midpoints: [f32; 256usize],
    pub v: [f32; 256usize],
    pub v_midpoints: [f32; 256usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Maps8bit"][::core::mem::size_of::<Maps8bit>() - 4096usize];
    ["Alignment of Maps8bit"][::core::mem::align_of::<Maps8bit>() - 4usize];
    ["Offset of field: Maps8bit::m"][::core::mem::offset_of!(Maps8bit, m) - 0usize];
    ["Offset of field: Maps8bit::m_midpoints"][::core::mem::offset_of!(Maps8bit, m_midpoints) - 1024usize];
    ["Offset of field: Maps8bit::v"][::core::mem::offset_of!(Maps8bit, v) - 2048usize];
    ["Offset of field: Maps8bit::v_midpoints"][::core::mem::offset_of!(Maps8bit, v_midpoints) - 3072usize];
};
#[doc = " A piece of one parameter as `AdamwChunk`, whose moments are `map[codes] absmax`: `m` and `v [n]` are codes, `m_absmax`\n and `v_absmax [ceil(n / GLM_BLOCK_8BIT)]` the largest magnitude of each block."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Adamw8bitChunk {
    pub p: *mut f32,
    pub g: *const f32,
    pub m: *mut u8,
    pub v: *mut u8,
    pub m_absmax: *mut f32,
    pub v_absmax: *mut f32,
    pub n: u32,
    pub decay: f32,
    pub step_size: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Adamw8bitChunk"][::core::mem::size_of::<Adamw8bitChunk>() - 64usize];
    ["Alignment of Adamw8bitChunk"][::core::mem::align_of::<Adamw8bitChunk>() - 8usize];
    ["Offset of field: Adamw8bitChunk::p"][::core::mem::offset_of!(Adamw8bitChunk, p) - 0usize];
    ["Offset of field: Adamw8bitChunk::g"][::core::mem::offset_of!(Adamw8bitChunk, g) - 8usize];
    ["Offset of field: Adamw8bitChunk::m"][::core::mem::offset_of!(Adamw8bitChunk, m) - 16usize];
    ["Offset of field: Adamw8bitChunk::v"][::core::mem::offset_of!(Adamw8bitChunk, v) - 24usize];
    ["Offset of field: Adamw8bitChunk::m_absmax"]
        [::core::mem::offset_of!(Adamw8bitChunk, m_absmax) - 32usize];
    ["Offset of field: Adamw8bitChunk::v_absmax"]
        [::core::mem::offset_of!(Adamw8bitChunk, v_absmax) - 40usize];
    ["Offset of field: Adamw8bitChunk::n"][::core::mem::offset_of!(Adamw8bitChunk, n) - 48usize];
    ["Offset of field: Adamw8bitChunk::decay"][::core::mem::offset_of!(Adamw8bitChunk, decay) - 52usize];
    ["Offset of field: Adamw8bitChunk::step_size"]
        [::core::mem::offset_of!(Adamw8bitChunk, step_size) - 56usize];
    ["Offset of field: Adamw8bitChunk::reserved"]
        [::core::mem::offset_of!(Adamw8bitChunk, reserved) - 60usize];
};
#[doc = " The step of `Adamw` over all chunks, one block each, on moments that are dequantised before and quantised after it."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Adamw8bit {
    pub chunks: *const Adamw8bitChunk,
    pub maps: *const Maps8bit,
    pub factors: AdamwFactors,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Adamw8bit"][::core::mem::size_of::<Adamw8bit>() - 40usize];
    ["Alignment of Adamw8bit"][::core::mem::align_of::<Adamw8bit>() - 8usize];
    ["Offset of field: Adamw8bit::chunks"][::core::mem::offset_of!(Adamw8bit, chunks) - 0usize];
    ["Offset of field: Adamw8bit::maps"][::core::mem::offset_of!(Adamw8bit, maps) - 8usize];
    ["Offset of field: Adamw8bit::factors"][::core::mem::offset_of!(Adamw8bit, factors) - 16usize];
};
#[doc = " `c [M, N] = alpha * op(a) op(b) + beta * c + bias [N] + gamma * residual [M, N]`, summed in float32.\n\n `gemm_<layout>_<types>`: layout nt takes a [M, K] and b [N, K], nn a [M, K] and b [K, N], tn a [K, M] and\n b [K, N]; types are those of a, b and c, t the kernel's and f float32, rounded to the kernel's type before\n it is multiplied. `gemm_<layout>_f32` computes in float32. c is not read when beta is 0; `bias` and\n `residual`, of c's type, may be null. Rows of c and of the residual begin `stride` elements apart.\n\n Type i (b only; int8.cu, and `gemm_<layout>_i_f32`): int8, each row of b as it lies in memory times its number of `scales`,\n rounded to the kernel's type before it is multiplied.\n\n With `splits` above 1 K is cut into as many parts and a kernel only writes the sums of its part, to\n `partial [splits, M, N]`; `gemm_sum` of c's type then makes c of them."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Gemm {
    pub c: *mut core::ffi::c_void,
    pub a: *const core::ffi::c_void,
    pub b: *const core::ffi::c_void,
    pub bias: *const f32,
    pub residual: *const core::ffi::c_void,
    pub partial: *mut f32,
    pub scales: *const f32,
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub stride: i32,
    pub splits: i32,
    pub alpha: f32,
    pub beta: f32,
    pub gamma: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Gemm"][::core::mem::size_of::<Gemm>() - 88usize];
    ["Alignment of Gemm"][::core::mem::align_of::<Gemm>() - 8usize];
    ["Offset of field: Gemm::c"][::core::mem::offset_of!(Gemm, c) - 0usize];
    ["Offset of field: Gemm::a"][::core::mem::offset_of!(Gemm, a) - 8usize];
    ["Offset of field: Gemm::b"][::core::mem::offset_of!(Gemm, b) - 16usize];
    ["Offset of field: Gemm::bias"][::core::mem::offset_of!(Gemm, bias) - 24usize];
    ["Offset of field: Gemm::residual"][::core::mem::offset_of!(Gemm, residual) - 32usize];
    ["Offset of field: Gemm::partial"][::core::mem::offset_of!(Gemm, partial) - 40usize];
    ["Offset of field: Gemm::scales"][::core::mem::offset_of!(Gemm, scales) - 48usize];
    ["Offset of field: Gemm::m"][::core::mem::offset_of!(Gemm, m) - 56usize];
    ["Offset of field: Gemm::n"][::core::mem::offset_of!(Gemm, n) - 60usize];
    ["Offset of field: Gemm::k"][::core::mem::offset_of!(Gemm, k) - 64usize];
    ["Offset of field: Gemm::stride"][::core::mem::offset_of!(Gemm, stride) - 68usize];
    ["Offset of field: Gemm::splits"][::core::mem::offset_of!(Gemm, splits) - 72usize];
    ["Offset of field: Gemm::alpha"][::core::mem::offset_of!(Gemm, alpha) - 76usize];
    ["Offset of field: Gemm::beta"][::core::mem::offset_of!(Gemm, beta) - 80usize];
    ["Offset of field: Gemm::gamma"][::core::mem::offset_of!(Gemm, gamma) - 84usize];
};
#[doc = " `out [rows, columns] = codes [rows, columns] * scales [rows]`, rounded once to T."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Int8Dequantize {
    pub out: *mut core::ffi::c_void,
    pub codes: *const i8,
    pub scales: *const f32,
    pub rows: u32,
    pub columns: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Int8Dequantize"][::core::mem::size_of::<Int8Dequantize>() - 32usize];
    ["Alignment of Int8Dequantize"][::core::mem::align_of::<Int8Dequantize>() - 8usize];
    ["Offset of field: Int8Dequantize::out"][::core::mem::offset_of!(Int8Dequantize, out) - 0usize];
    ["Offset of field: Int8Dequantize::codes"][::core::mem::offset_of!(Int8Dequantize, codes) - 8usize];
    ["Offset of field: Int8Dequantize::scales"][::core::mem::offset_of!(Int8Dequantize, scales) - 16usize];
    ["Offset of field: Int8Dequantize::rows"][::core::mem::offset_of!(Int8Dequantize, rows) - 24usize];
    ["Offset of field: Int8Dequantize::columns"][::core::mem::offset_of!(Int8Dequantize, columns) - 28usize];
};
#[doc = " Takes `logits [R, width]`, those of classes `start .. start + width`, into the running `statistics [R, 3]`\n of each row: the largest logit, the sum of exponentials relative to it, the target's logit. The chunk that\n starts at 0 begins anew.\n\n A logit that is NaN, or a target outside `0 .. vocabulary`, makes the sum NaN and so the loss."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SoftmaxStatistics {
    pub statistics: *mut f32,
    pub logits: *const f32,
    pub targets: *const i32,
    pub vocabulary: i32,
    pub start: i32,
    pub width: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SoftmaxStatistics"][::core::mem::size_of::<SoftmaxStatistics>() - 40usize];
    ["Alignment of SoftmaxStatistics"][::core::mem::align_of::<SoftmaxStatistics>() - 8usize];
    ["Offset of field: SoftmaxStatistics::statistics"]
        [::core::mem::offset_of!(SoftmaxStatistics, statistics) - 0usize];
    ["Offset of field: SoftmaxStatistics::logits"]
        [::core::mem::offset_of!(SoftmaxStatistics, logits) - 8usize];
    ["Offset of field: SoftmaxStatistics::targets"]
        [::core::mem::offset_of!(SoftmaxStatistics, targets) - 16usize];
    ["Offset of field: SoftmaxStatistics::vocabulary"]
        [::core::mem::offset_of!(SoftmaxStatistics, vocabulary) - 24usize];
    ["Offset of field: SoftmaxStatistics::start"]
        [::core::mem::offset_of!(SoftmaxStatistics, start) - 28usize];
    ["Offset of field: SoftmaxStatistics::width"]
        [::core::mem::offset_of!(SoftmaxStatistics, width) - 32usize];
};
#[doc = " `logits [R, width] = scale * (softmax - onehot)` in place, for classes `start .. start + width`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SoftmaxGradient {
    pub logits: *mut f32,
    pub statistics: *const f32,
    pub targets: *const i32,
    pub start: i32,
    pub width: i32,
    pub scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SoftmaxGradient"][::core::mem::size_of::<SoftmaxGradient>() - 40usize];
    ["Alignment of SoftmaxGradient"][::core::mem::align_of::<SoftmaxGradient>() - 8usize];
    ["Offset of field: SoftmaxGradient::logits"][::core::mem::offset_of!(SoftmaxGradient, logits) - 0usize];
    ["Offset of field: SoftmaxGradient::statistics"]
        [::core::mem::offset_of!(SoftmaxGradient, statistics) - 8usize];
    ["Offset of field: SoftmaxGradient::targets"]
        [::core::mem::offset_of!(SoftmaxGradient, targets) - 16usize];
    ["Offset of field: SoftmaxGradient::start"][::core::mem::offset_of!(SoftmaxGradient, start) - 24usize];
    ["Offset of field: SoftmaxGradient::width"][::core::mem::offset_of!(SoftmaxGradient, width) - 28usize];
    ["Offset of field: SoftmaxGradient::scale"][::core::mem::offset_of!(SoftmaxGradient, scale) - 32usize];
};
#[doc = " `loss = sum over rows of largest + ln(sum) - target` of `statistics [R, 3]`, in float64."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LossSum {
    pub loss: *mut f64,
    pub statistics: *const f32,
    pub rows: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LossSum"][::core::mem::size_of::<LossSum>() - 24usize];
    ["Alignment of LossSum"][::core::mem::align_of::<LossSum>() - 8usize];
    ["Offset of field: LossSum::loss"][::core::mem::offset_of!(LossSum, loss) - 0usize];
    ["Offset of field: LossSum::statistics"][::core::mem::offset_of!(LossSum, statistics) - 8usize];
    ["Offset of field: LossSum::rows"][::core::mem::offset_of!(LossSum, rows) - 16usize];
};
#[doc = " A frozen 4-bit matrix W [N, K] in the layout that nf4.cuh draws, or some of its rows. Element [n, k] is\n `table[code] * scale(n, k / 64)`, the scale being `absmax` (flat) or `map[absmax_codes] * absmax + offset`.\n K is a multiple of 64; rows are padded to a multiple of 32."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4Weight {
    pub codes: *const u32,
    pub absmax_codes: *const u8,
    pub absmax: *const f32,
    pub map: *const f32,
    pub offset: f32,
    pub first: u32,
    pub outputs: u32,
    pub inputs: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4Weight"][::core::mem::size_of::<Nf4Weight>() - 48usize];
    ["Alignment of Nf4Weight"][::core::mem::align_of::<Nf4Weight>() - 8usize];
    ["Offset of field: Nf4Weight::codes"][::core::mem::offset_of!(Nf4Weight, codes) - 0usize];
    ["Offset of field: Nf4Weight::absmax_codes"][::core::mem::offset_of!(Nf4Weight, absmax_codes) - 8usize];
    ["Offset of field: Nf4Weight::absmax"][::core::mem::offset_of!(Nf4Weight, absmax) - 16usize];
    ["Offset of field: Nf4Weight::map"][::core::mem::offset_of!(Nf4Weight, map) - 24usize];
    ["Offset of field: Nf4Weight::offset"][::core::mem::offset_of!(Nf4Weight, offset) - 32usize];
    ["Offset of field: Nf4Weight::first"][::core::mem::offset_of!(Nf4Weight, first) - 36usize];
    ["Offset of field: Nf4Weight::outputs"][::core::mem::offset_of!(Nf4Weight, outputs) - 40usize];
    ["Offset of field: Nf4Weight::inputs"][::core::mem::offset_of!(Nf4Weight, inputs) - 44usize];
};
#[doc = " `codes`: 4-bit codes of T source [n], n a multiple of 64, in blocks of 64 (the even element in the high nibble), `absmax`\n [n / 64]: the largest magnitude of each. Equal to src/quant to the bit. `bad` is added the number of blocks with NaN or\n infinity; their absmax is not finite."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4Quantize {
    pub codes: *mut u8,
    pub absmax: *mut f32,
    pub bad: *mut u32,
    pub source: *const core::ffi::c_void,
    pub n: u64,
    pub order: u64,
    pub midpoints: [f32; 15usize],
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4Quantize"][::core::mem::size_of::<Nf4Quantize>() - 112usize];
    ["Alignment of Nf4Quantize"][::core::mem::align_of::<Nf4Quantize>() - 8usize];
    ["Offset of field: Nf4Quantize::codes"][::core::mem::offset_of!(Nf4Quantize, codes) - 0usize];
    ["Offset of field: Nf4Quantize::absmax"][::core::mem::offset_of!(Nf4Quantize, absmax) - 8usize];
    ["Offset of field: Nf4Quantize::bad"][::core::mem::offset_of!(Nf4Quantize, bad) - 16usize];
    ["Offset of field: Nf4Quantize::source"][::core::mem::offset_of!(Nf4Quantize, source) - 24usize];
    ["Offset of field: Nf4Quantize::n"][::core::mem::offset_of!(Nf4Quantize, n) - 32usize];
    ["Offset of field: Nf4Quantize::order"][::core::mem::offset_of!(Nf4Quantize, order) - 40usize];
    ["Offset of field: Nf4Quantize::midpoints"][::core::mem::offset_of!(Nf4Quantize, midpoints) - 48usize];
    ["Offset of field: Nf4Quantize::reserved"][::core::mem::offset_of!(Nf4Quantize, reserved) - 108usize];
};
#[doc = " `offset` [1]: the mean of absmax [n], in the order of additions of src/quant/nested.rs."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4Mean {
    pub offset: *mut f32,
    pub absmax: *const f32,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4Mean"][::core::mem::size_of::<Nf4Mean>() - 24usize];
    ["Alignment of Nf4Mean"][::core::mem::align_of::<Nf4Mean>() - 8usize];
    ["Offset of field: Nf4Mean::offset"][::core::mem::offset_of!(Nf4Mean, offset) - 0usize];
    ["Offset of field: Nf4Mean::absmax"][::core::mem::offset_of!(Nf4Mean, absmax) - 8usize];
    ["Offset of field: Nf4Mean::n"][::core::mem::offset_of!(Nf4Mean, n) - 16usize];
};
#[doc = " Double quantisation: `codes` [n] and `nested` [ceil(n / 256)] with absmax[b] ~ map[codes[b]] * nested[b / 256] + offset."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4QuantizeAbsmax {
    pub codes: *mut u8,
    pub nested: *mut f32,
    pub absmax: *const f32,
    pub offset: *const f32,
    pub map: *const f32,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4QuantizeAbsmax"][::core::mem::size_of::<Nf4QuantizeAbsmax>() - 48usize];
    ["Alignment of Nf4QuantizeAbsmax"][::core::mem::align_of::<Nf4QuantizeAbsmax>() - 8usize];
    ["Offset of field: Nf4QuantizeAbsmax::codes"][::core::mem::offset_of!(Nf4QuantizeAbsmax, codes) - 0usize];
    ["Offset of field: Nf4QuantizeAbsmax::nested"]
        [::core::mem::offset_of!(Nf4QuantizeAbsmax, nested) - 8usize];
    ["Offset of field: Nf4QuantizeAbsmax::absmax"]
        [::core::mem::offset_of!(Nf4QuantizeAbsmax, absmax) - 16usize];
    ["Offset of field: Nf4QuantizeAbsmax::offset"]
        [::core::mem::offset_of!(Nf4QuantizeAbsmax, offset) - 24usize];
    ["Offset of field: Nf4QuantizeAbsmax::map"][::core::mem::offset_of!(Nf4QuantizeAbsmax, map) - 32usize];
    ["Offset of field: Nf4QuantizeAbsmax::n"][::core::mem::offset_of!(Nf4QuantizeAbsmax, n) - 40usize];
};
#[doc = " Codes between the row-major layout `plain` of bitsandbytes, [N, K / 2] bytes, and `packed`, the layout of Nf4Weight.\n Packed codes are renumbered: nibble c of `numbers` is the packed number of code c when packing, and the code of packed\n number c when unpacking."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4Pack {
    pub packed: *mut u32,
    pub plain: *mut u8,
    pub numbers: u64,
    pub outputs: u32,
    pub inputs: u32,
    pub zero: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4Pack"][::core::mem::size_of::<Nf4Pack>() - 40usize];
    ["Alignment of Nf4Pack"][::core::mem::align_of::<Nf4Pack>() - 8usize];
    ["Offset of field: Nf4Pack::packed"][::core::mem::offset_of!(Nf4Pack, packed) - 0usize];
    ["Offset of field: Nf4Pack::plain"][::core::mem::offset_of!(Nf4Pack, plain) - 8usize];
    ["Offset of field: Nf4Pack::numbers"][::core::mem::offset_of!(Nf4Pack, numbers) - 16usize];
    ["Offset of field: Nf4Pack::outputs"][::core::mem::offset_of!(Nf4Pack, outputs) - 24usize];
    ["Offset of field: Nf4Pack::inputs"][::core::mem::offset_of!(Nf4Pack, inputs) - 28usize];
    ["Offset of field: Nf4Pack::zero"][::core::mem::offset_of!(Nf4Pack, zero) - 32usize];
    ["Offset of field: Nf4Pack::reserved"][::core::mem::offset_of!(Nf4Pack, reserved) - 36usize];
};
#[doc = " Scales (flat, or 8-bit codes) between the row-major order of blocks `plain` [N, K / 64] and that of Nf4Weight."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4PackAbsmax {
    pub packed: *mut core::ffi::c_void,
    pub plain: *mut core::ffi::c_void,
    pub outputs: u32,
    pub inputs: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4PackAbsmax"][::core::mem::size_of::<Nf4PackAbsmax>() - 24usize];
    ["Alignment of Nf4PackAbsmax"][::core::mem::align_of::<Nf4PackAbsmax>() - 8usize];
    ["Offset of field: Nf4PackAbsmax::packed"][::core::mem::offset_of!(Nf4PackAbsmax, packed) - 0usize];
    ["Offset of field: Nf4PackAbsmax::plain"][::core::mem::offset_of!(Nf4PackAbsmax, plain) - 8usize];
    ["Offset of field: Nf4PackAbsmax::outputs"][::core::mem::offset_of!(Nf4PackAbsmax, outputs) - 16usize];
    ["Offset of field: Nf4PackAbsmax::inputs"][::core::mem::offset_of!(Nf4PackAbsmax, inputs) - 20usize];
};
#[doc = " `out` [N, K] = values[code] * scale, both f32, rounded once to T: what bitsandbytes computes."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4Dequantize {
    pub out: *mut core::ffi::c_void,
    pub w: Nf4Weight,
    pub values: [f32; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4Dequantize"][::core::mem::size_of::<Nf4Dequantize>() - 120usize];
    ["Alignment of Nf4Dequantize"][::core::mem::align_of::<Nf4Dequantize>() - 8usize];
    ["Offset of field: Nf4Dequantize::out"][::core::mem::offset_of!(Nf4Dequantize, out) - 0usize];
    ["Offset of field: Nf4Dequantize::w"][::core::mem::offset_of!(Nf4Dequantize, w) - 8usize];
    ["Offset of field: Nf4Dequantize::values"][::core::mem::offset_of!(Nf4Dequantize, values) - 56usize];
};
#[doc = " The 16 values as bytes for PRMT (nf4.cuh), of T; T of a value is its table entry times `stretch`, and\n `absmax * pre` is the scale that is rounded to T, `post` what the sums are multiplied by: stretch * pre * post = 1."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4Planes {
    pub low: [u32; 4usize],
    pub high: [u32; 4usize],
    pub pre: f32,
    pub post: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4Planes"][::core::mem::size_of::<Nf4Planes>() - 40usize];
    ["Alignment of Nf4Planes"][::core::mem::align_of::<Nf4Planes>() - 4usize];
    ["Offset of field: Nf4Planes::low"][::core::mem::offset_of!(Nf4Planes, low) - 0usize];
    ["Offset of field: Nf4Planes::high"][::core::mem::offset_of!(Nf4Planes, high) - 16usize];
    ["Offset of field: Nf4Planes::pre"][::core::mem::offset_of!(Nf4Planes, pre) - 32usize];
    ["Offset of field: Nf4Planes::post"][::core::mem::offset_of!(Nf4Planes, post) - 36usize];
};
#[doc = " Forward: `out` [M, N] = in [M, K] Wᵀ + lora_scale * u [M, rank] lora [N, rank]ᵀ + bias [N] + alpha * residual [M, N].\n Backward: `out` [M, K] = in [M, N] W + lora_scale * u [M, rank] lora [rank, K] + alpha * residual [M, K]; no bias.\n Without `out` the sums go, without bias and residual, to `partial` [splits, M, N or K]."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4Linear {
    pub out: *mut core::ffi::c_void,
    pub partial: *mut f32,
    pub in_: *const core::ffi::c_void,
    pub bias: *const f32,
    pub residual: *const core::ffi::c_void,
    pub u: *const core::ffi::c_void,
    pub lora: *const f32,
    pub w: Nf4Weight,
    pub planes: Nf4Planes,
    pub values: [f32; 16usize],
    pub m: u32,
    pub rank: u32,
    pub splits: u32,
    pub alpha: f32,
    pub lora_scale: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4Linear"][::core::mem::size_of::<Nf4Linear>() - 232usize];
    ["Alignment of Nf4Linear"][::core::mem::align_of::<Nf4Linear>() - 8usize];
    ["Offset of field: Nf4Linear::out"][::core::mem::offset_of!(Nf4Linear, out) - 0usize];
    ["Offset of field: Nf4Linear::partial"][::core::mem::offset_of!(Nf4Linear, partial) - 8usize];
    ["Offset of field: Nf4Linear::in_"][::core::mem::offset_of!(Nf4Linear, in_) - 16usize];
    ["Offset of field: Nf4Linear::bias"][::core::mem::offset_of!(Nf4Linear, bias) - 24usize];
    ["Offset of field: Nf4Linear::residual"][::core::mem::offset_of!(Nf4Linear, residual) - 32usize];
    ["Offset of field: Nf4Linear::u"][::core::mem::offset_of!(Nf4Linear, u) - 40usize];
    ["Offset of field: Nf4Linear::lora"][::core::mem::offset_of!(Nf4Linear, lora) - 48usize];
    ["Offset of field: Nf4Linear::w"][::core::mem::offset_of!(Nf4Linear, w) - 56usize];
    ["Offset of field: Nf4Linear::planes"][::core::mem::offset_of!(Nf4Linear, planes) - 104usize];
    ["Offset of field: Nf4Linear::values"][::core::mem::offset_of!(Nf4Linear, values) - 144usize];
    ["Offset of field: Nf4Linear::m"][::core::mem::offset_of!(Nf4Linear, m) - 208usize];
    ["Offset of field: Nf4Linear::rank"][::core::mem::offset_of!(Nf4Linear, rank) - 212usize];
    ["Offset of field: Nf4Linear::splits"][::core::mem::offset_of!(Nf4Linear, splits) - 216usize];
    ["Offset of field: Nf4Linear::alpha"][::core::mem::offset_of!(Nf4Linear, alpha) - 220usize];
    ["Offset of field: Nf4Linear::lora_scale"][::core::mem::offset_of!(Nf4Linear, lora_scale) - 224usize];
    ["Offset of field: Nf4Linear::reserved"][::core::mem::offset_of!(Nf4Linear, reserved) - 228usize];
};
#[doc = " `out` [M, width] = Σ_s partial [s, M, width] + bias + alpha * residual, in order of s."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4Finish {
    pub out: *mut core::ffi::c_void,
    pub partial: *const f32,
    pub bias: *const f32,
    pub residual: *const core::ffi::c_void,
    pub m: u32,
    pub width: u32,
    pub splits: u32,
    pub alpha: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4Finish"][::core::mem::size_of::<Nf4Finish>() - 48usize];
    ["Alignment of Nf4Finish"][::core::mem::align_of::<Nf4Finish>() - 8usize];
    ["Offset of field: Nf4Finish::out"][::core::mem::offset_of!(Nf4Finish, out) - 0usize];
    ["Offset of field: Nf4Finish::partial"][::core::mem::offset_of!(Nf4Finish, partial) - 8usize];
    ["Offset of field: Nf4Finish::bias"][::core::mem::offset_of!(Nf4Finish, bias) - 16usize];
    ["Offset of field: Nf4Finish::residual"][::core::mem::offset_of!(Nf4Finish, residual) - 24usize];
    ["Offset of field: Nf4Finish::m"][::core::mem::offset_of!(Nf4Finish, m) - 32usize];
    ["Offset of field: Nf4Finish::width"][::core::mem::offset_of!(Nf4Finish, width) - 36usize];
    ["Offset of field: Nf4Finish::splits"][::core::mem::offset_of!(Nf4Finish, splits) - 40usize];
    ["Offset of field: Nf4Finish::alpha"][::core::mem::offset_of!(Nf4Finish, alpha) - 44usize];
};
#[doc = " As Nf4Linear forward, for few rows: `in` [M, K] with M up to the 8, 16 or 32 of the kernel's name."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Nf4Few {
    pub out: *mut core::ffi::c_void,
    pub partial: *mut f32,
    pub in_: *const core::ffi::c_void,
    pub bias: *const f32,
    pub residual: *const core::ffi::c_void,
    pub u: *const core::ffi::c_void,
    pub lora: *const f32,
    pub w: Nf4Weight,
    pub values: [f32; 16usize],
    pub scale: f32,
    pub m: u32,
    pub rank: u32,
    pub splits: u32,
    pub alpha: f32,
    pub lora_scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Nf4Few"][::core::mem::size_of::<Nf4Few>() - 192usize];
    ["Alignment of Nf4Few"][::core::mem::align_of::<Nf4Few>() - 8usize];
    ["Offset of field: Nf4Few::out"][::core::mem::offset_of!(Nf4Few, out) - 0usize];
    ["Offset of field: Nf4Few::partial"][::core::mem::offset_of!(Nf4Few, partial) - 8usize];
    ["Offset of field: Nf4Few::in_"][::core::mem::offset_of!(Nf4Few, in_) - 16usize];
    ["Offset of field: Nf4Few::bias"][::core::mem::offset_of!(Nf4Few, bias) - 24usize];
    ["Offset of field: Nf4Few::residual"][::core::mem::offset_of!(Nf4Few, residual) - 32usize];
    ["Offset of field: Nf4Few::u"][::core::mem::offset_of!(Nf4Few, u) - 40usize];
    ["Offset of field: Nf4Few::lora"][::core::mem::offset_of!(Nf4Few, lora) - 48usize];
    ["Offset of field: Nf4Few::w"][::core::mem::offset_of!(Nf4Few, w) - 56usize];
    ["Offset of field: Nf4Few::values"][::core::mem::offset_of!(Nf4Few, values) - 104usize];
    ["Offset of field: Nf4Few::scale"][::core::mem::offset_of!(Nf4Few, scale) - 168usize];
    ["Offset of field: Nf4Few::m"][::core::mem::offset_of!(Nf4Few, m) - 172usize];
    ["Offset of field: Nf4Few::rank"][::core::mem::offset_of!(Nf4Few, rank) - 176usize];
    ["Offset of field: Nf4Few::splits"][::core::mem::offset_of!(Nf4Few, splits) - 180usize];
    ["Offset of field: Nf4Few::alpha"][::core::mem::offset_of!(Nf4Few, alpha) - 184usize];
    ["Offset of field: Nf4Few::lora_scale"][::core::mem::offset_of!(Nf4Few, lora_scale) - 188usize];
};
#[doc = " `context = softmax(mask(q kᵀ / sqrt(d))) v`, and `log_sum_exp = ln Σ exp` of every query.\n\n `context [B Q, heads d]`, `log_sum_exp [B, heads, Q]` (0 for a query with uniform weights), `qkv [B Q, heads 3 d]`\n (rotated q, k, v of head 0, then of head 1, ...). Key j of head h of sequence b stands at\n `keys + b key_batch_stride + j key_row_stride + h key_head_stride`, its value at the same place of `values`: beside\n the queries in `qkv`, or in a cache. Query i stands at position `key_count - queries + i`. `spans [B, 2]`: start and\n context of each sequence; key j is visible to the query at position i when both are at least start and\n `j < context || j <= i`. `prefix_keys`, `prefix_values [heads, prefix, d]` are visible to every query; those of sequence b\n begin at `b prefix_batch_stride`, which is 0 when all share them. A query before\n start sees the prefix only, and without a prefix all keys with equal weights. `scale` is `log2 e / sqrt(d)`:\n the softmax is made of powers of two. Strides count elements."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttentionForward {
    pub context: *mut core::ffi::c_void,
    pub log_sum_exp: *mut f32,
    pub qkv: *const core::ffi::c_void,
    pub keys: *const core::ffi::c_void,
    pub values: *const core::ffi::c_void,
    pub prefix_keys: *const core::ffi::c_void,
    pub prefix_values: *const core::ffi::c_void,
    pub spans: *const i32,
    pub key_batch_stride: u64,
    pub prefix_batch_stride: u64,
    pub key_row_stride: u32,
    pub key_head_stride: u32,
    pub queries: u32,
    pub key_count: u32,
    pub heads: u32,
    pub head_dim: u32,
    pub prefix: u32,
    pub scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttentionForward"][::core::mem::size_of::<AttentionForward>() - 112usize];
    ["Alignment of AttentionForward"][::core::mem::align_of::<AttentionForward>() - 8usize];
    ["Offset of field: AttentionForward::context"]
        [::core::mem::offset_of!(AttentionForward, context) - 0usize];
    ["Offset of field: AttentionForward::log_sum_exp"]
        [::core::mem::offset_of!(AttentionForward, log_sum_exp) - 8usize];
    ["Offset of field: AttentionForward::qkv"][::core::mem::offset_of!(AttentionForward, qkv) - 16usize];
    ["Offset of field: AttentionForward::keys"][::core::mem::offset_of!(AttentionForward, keys) - 24usize];
    ["Offset of field: AttentionForward::values"]
        [::core::mem::offset_of!(AttentionForward, values) - 32usize];
    ["Offset of field: AttentionForward::prefix_keys"]
        [::core::mem::offset_of!(AttentionForward, prefix_keys) - 40usize];
    ["Offset of field: AttentionForward::prefix_values"]
        [::core::mem::offset_of!(AttentionForward, prefix_values) - 48usize];
    ["Offset of field: AttentionForward::spans"][::core::mem::offset_of!(AttentionForward, spans) - 56usize];
    ["Offset of field: AttentionForward::key_batch_stride"]
        [::core::mem::offset_of!(AttentionForward, key_batch_stride) - 64usize];
    ["Offset of field: AttentionForward::prefix_batch_stride"]
        [::core::mem::offset_of!(AttentionForward, prefix_batch_stride) - 72usize];
    ["Offset of field: AttentionForward::key_row_stride"]
        [::core::mem::offset_of!(AttentionForward, key_row_stride) - 80usize];
    ["Offset of field: AttentionForward::key_head_stride"]
        [::core::mem::offset_of!(AttentionForward, key_head_stride) - 84usize];
    ["Offset of field: AttentionForward::queries"]
        [::core::mem::offset_of!(AttentionForward, queries) - 88usize];
    ["Offset of field: AttentionForward::key_count"]
        [::core::mem::offset_of!(AttentionForward, key_count) - 92usize];
    ["Offset of field: AttentionForward::heads"][::core::mem::offset_of!(AttentionForward, heads) - 96usize];
    ["Offset of field: AttentionForward::head_dim"]
        [::core::mem::offset_of!(AttentionForward, head_dim) - 100usize];
    ["Offset of field: AttentionForward::prefix"]
        [::core::mem::offset_of!(AttentionForward, prefix) - 104usize];
    ["Offset of field: AttentionForward::scale"][::core::mem::offset_of!(AttentionForward, scale) - 108usize];
};
#[doc = " `delta[b, h, i] = Σ_c d_context[b, i, h, c] context[b, i, h, c]`.\n\n `delta [B, heads, S]`, `d_context` and `context [B S, heads d]`; `rows` is B S."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttentionDelta {
    pub delta: *mut f32,
    pub d_context: *const core::ffi::c_void,
    pub context: *const core::ffi::c_void,
    pub rows: u32,
    pub queries: u32,
    pub heads: u32,
    pub head_dim: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttentionDelta"][::core::mem::size_of::<AttentionDelta>() - 40usize];
    ["Alignment of AttentionDelta"][::core::mem::align_of::<AttentionDelta>() - 8usize];
    ["Offset of field: AttentionDelta::delta"][::core::mem::offset_of!(AttentionDelta, delta) - 0usize];
    ["Offset of field: AttentionDelta::d_context"]
        [::core::mem::offset_of!(AttentionDelta, d_context) - 8usize];
    ["Offset of field: AttentionDelta::context"][::core::mem::offset_of!(AttentionDelta, context) - 16usize];
    ["Offset of field: AttentionDelta::rows"][::core::mem::offset_of!(AttentionDelta, rows) - 24usize];
    ["Offset of field: AttentionDelta::queries"][::core::mem::offset_of!(AttentionDelta, queries) - 28usize];
    ["Offset of field: AttentionDelta::heads"][::core::mem::offset_of!(AttentionDelta, heads) - 32usize];
    ["Offset of field: AttentionDelta::head_dim"]
        [::core::mem::offset_of!(AttentionDelta, head_dim) - 36usize];
};
#[doc = " The gradient of `AttentionForward` over keys of the same rows: three kernels, each of which writes its own part.\n\n `dqkv [B S, heads 3 d]`: written, still rotated; q by one kernel, k and v by another. `d_prefix_keys` and\n `d_prefix_values [heads, prefix, d]`, of each sequence or of all: added to by the third. `d_context [B S, heads d]`, `qkv [B S, heads 3 d]`,\n `log_sum_exp` and `delta [B, heads, S]`; the rest as in `AttentionForward`; `size` is B."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttentionBackward {
    pub dqkv: *mut core::ffi::c_void,
    pub d_prefix_keys: *mut f32,
    pub d_prefix_values: *mut f32,
    pub d_context: *const core::ffi::c_void,
    pub qkv: *const core::ffi::c_void,
    pub log_sum_exp: *const f32,
    pub delta: *const f32,
    pub prefix_keys: *const core::ffi::c_void,
    pub prefix_values: *const core::ffi::c_void,
    pub spans: *const i32,
    pub prefix_batch_stride: u64,
    pub size: u32,
    pub queries: u32,
    pub heads: u32,
    pub head_dim: u32,
    pub prefix: u32,
    pub scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttentionBackward"][::core::mem::size_of::<AttentionBackward>() - 112usize];
    ["Alignment of AttentionBackward"][::core::mem::align_of::<AttentionBackward>() - 8usize];
    ["Offset of field: AttentionBackward::dqkv"][::core::mem::offset_of!(AttentionBackward, dqkv) - 0usize];
    ["Offset of field: AttentionBackward::d_prefix_keys"]
        [::core::mem::offset_of!(AttentionBackward, d_prefix_keys) - 8usize];
    ["Offset of field: AttentionBackward::d_prefix_values"]
        [::core::mem::offset_of!(AttentionBackward, d_prefix_values) - 16usize];
    ["Offset of field: AttentionBackward::d_context"]
        [::core::mem::offset_of!(AttentionBackward, d_context) - 24usize];
    ["Offset of field: AttentionBackward::qkv"][::core::mem::offset_of!(AttentionBackward, qkv) - 32usize];
    ["Offset of field: AttentionBackward::log_sum_exp"]
        [::core::mem::offset_of!(AttentionBackward, log_sum_exp) - 40usize];
    ["Offset of field: AttentionBackward::delta"]
        [::core::mem::offset_of!(AttentionBackward, delta) - 48usize];
    ["Offset of field: AttentionBackward::prefix_keys"]
        [::core::mem::offset_of!(AttentionBackward, prefix_keys) - 56usize];
    ["Offset of field: AttentionBackward::prefix_values"]
        [::core::mem::offset_of!(AttentionBackward, prefix_values) - 64usize];
    ["Offset of field: AttentionBackward::spans"]
        [::core::mem::offset_of!(AttentionBackward, spans) - 72usize];
    ["Offset of field: AttentionBackward::prefix_batch_stride"]
        [::core::mem::offset_of!(AttentionBackward, prefix_batch_stride) - 80usize];
    ["Offset of field: AttentionBackward::size"][::core::mem::offset_of!(AttentionBackward, size) - 88usize];
    ["Offset of field: AttentionBackward::queries"]
        [::core::mem::offset_of!(AttentionBackward, queries) - 92usize];
    ["Offset of field: AttentionBackward::heads"]
        [::core::mem::offset_of!(AttentionBackward, heads) - 96usize];
    ["Offset of field: AttentionBackward::head_dim"]
        [::core::mem::offset_of!(AttentionBackward, head_dim) - 100usize];
    ["Offset of field: AttentionBackward::prefix"]
        [::core::mem::offset_of!(AttentionBackward, prefix) - 104usize];
    ["Offset of field: AttentionBackward::scale"]
        [::core::mem::offset_of!(AttentionBackward, scale) - 108usize];
};
#[doc = " Copies k and v of `qkv [B Q, heads 3 d]` behind the `past` positions of a cache `[B, capacity, heads d]`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct KvAppend {
    pub keys: *mut core::ffi::c_void,
    pub values: *mut core::ffi::c_void,
    pub qkv: *const core::ffi::c_void,
    pub rows: u32,
    pub queries: u32,
    pub past: u32,
    pub capacity: u32,
    pub heads: u32,
    pub head_dim: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of KvAppend"][::core::mem::size_of::<KvAppend>() - 48usize];
    ["Alignment of KvAppend"][::core::mem::align_of::<KvAppend>() - 8usize];
    ["Offset of field: KvAppend::keys"][::core::mem::offset_of!(KvAppend, keys) - 0usize];
    ["Offset of field: KvAppend::values"][::core::mem::offset_of!(KvAppend, values) - 8usize];
    ["Offset of field: KvAppend::qkv"][::core::mem::offset_of!(KvAppend, qkv) - 16usize];
    ["Offset of field: KvAppend::rows"][::core::mem::offset_of!(KvAppend, rows) - 24usize];
    ["Offset of field: KvAppend::queries"][::core::mem::offset_of!(KvAppend, queries) - 28usize];
    ["Offset of field: KvAppend::past"][::core::mem::offset_of!(KvAppend, past) - 32usize];
    ["Offset of field: KvAppend::capacity"][::core::mem::offset_of!(KvAppend, capacity) - 36usize];
    ["Offset of field: KvAppend::heads"][::core::mem::offset_of!(KvAppend, heads) - 40usize];
    ["Offset of field: KvAppend::head_dim"][::core::mem::offset_of!(KvAppend, head_dim) - 44usize];
};
#[doc = " `AttentionForward` of one query for each sequence, over keys split into `chunks` chunks.\n\n The first `ceil(prefix / GLM_ATTENTION_CHUNK)` chunks are of the prefix, the others of the cache `[B, capacity, heads d]`.\n With more than one, `partial [B, heads, chunks, d + 2]` is written: `Σ p v`, then the largest score (times log2 e) and\n `Σ p`; `context` and `log_sum_exp` are left to `AttentionCombine`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttentionDecode {
    pub partial: *mut f32,
    pub context: *mut core::ffi::c_void,
    pub log_sum_exp: *mut f32,
    pub qkv: *const core::ffi::c_void,
    pub keys: *const core::ffi::c_void,
    pub values: *const core::ffi::c_void,
    pub prefix_keys: *const core::ffi::c_void,
    pub prefix_values: *const core::ffi::c_void,
    pub spans: *const i32,
    pub prefix_batch_stride: u64,
    pub key_count: u32,
    pub capacity: u32,
    pub heads: u32,
    pub head_dim: u32,
    pub prefix: u32,
    pub scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttentionDecode"][::core::mem::size_of::<AttentionDecode>() - 104usize];
    ["Alignment of AttentionDecode"][::core::mem::align_of::<AttentionDecode>() - 8usize];
    ["Offset of field: AttentionDecode::partial"][::core::mem::offset_of!(AttentionDecode, partial) - 0usize];
    ["Offset of field: AttentionDecode::context"][::core::mem::offset_of!(AttentionDecode, context) - 8usize];
    ["Offset of field: AttentionDecode::log_sum_exp"]
        [::core::mem::offset_of!(AttentionDecode, log_sum_exp) - 16usize];
    ["Offset of field: AttentionDecode::qkv"][::core::mem::offset_of!(AttentionDecode, qkv) - 24usize];
    ["Offset of field: AttentionDecode::keys"][::core::mem::offset_of!(AttentionDecode, keys) - 32usize];
    ["Offset of field: AttentionDecode::values"][::core::mem::offset_of!(AttentionDecode, values) - 40usize];
    ["Offset of field: AttentionDecode::prefix_keys"]
        [::core::mem::offset_of!(AttentionDecode, prefix_keys) - 48usize];
    ["Offset of field: AttentionDecode::prefix_values"]
        [::core::mem::offset_of!(AttentionDecode, prefix_values) - 56usize];
    ["Offset of field: AttentionDecode::spans"][::core::mem::offset_of!(AttentionDecode, spans) - 64usize];
    ["Offset of field: AttentionDecode::prefix_batch_stride"]
        [::core::mem::offset_of!(AttentionDecode, prefix_batch_stride) - 72usize];
    ["Offset of field: AttentionDecode::key_count"]
        [::core::mem::offset_of!(AttentionDecode, key_count) - 80usize];
    ["Offset of field: AttentionDecode::capacity"]
        [::core::mem::offset_of!(AttentionDecode, capacity) - 84usize];
    ["Offset of field: AttentionDecode::heads"][::core::mem::offset_of!(AttentionDecode, heads) - 88usize];
    ["Offset of field: AttentionDecode::head_dim"]
        [::core::mem::offset_of!(AttentionDecode, head_dim) - 92usize];
    ["Offset of field: AttentionDecode::prefix"][::core::mem::offset_of!(AttentionDecode, prefix) - 96usize];
    ["Offset of field: AttentionDecode::scale"][::core::mem::offset_of!(AttentionDecode, scale) - 100usize];
};
#[doc = " Joins the chunks of `AttentionDecode`: `context [B, heads d]`, `log_sum_exp [B, heads]`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttentionCombine {
    pub context: *mut core::ffi::c_void,
    pub log_sum_exp: *mut f32,
    pub partial: *const f32,
    pub spans: *const i32,
    pub chunks: u32,
    pub key_count: u32,
    pub heads: u32,
    pub head_dim: u32,
    pub prefix: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttentionCombine"][::core::mem::size_of::<AttentionCombine>() - 56usize];
    ["Alignment of AttentionCombine"][::core::mem::align_of::<AttentionCombine>() - 8usize];
    ["Offset of field: AttentionCombine::context"]
        [::core::mem::offset_of!(AttentionCombine, context) - 0usize];
    ["Offset of field: AttentionCombine::log_sum_exp"]
        [::core::mem::offset_of!(AttentionCombine, log_sum_exp) - 8usize];
    ["Offset of field: AttentionCombine::partial"]
        [::core::mem::offset_of!(AttentionCombine, partial) - 16usize];
    ["Offset of field: AttentionCombine::spans"][::core::mem::offset_of!(AttentionCombine, spans) - 24usize];
    ["Offset of field: AttentionCombine::chunks"]
        [::core::mem::offset_of!(AttentionCombine, chunks) - 32usize];
    ["Offset of field: AttentionCombine::key_count"]
        [::core::mem::offset_of!(AttentionCombine, key_count) - 36usize];
    ["Offset of field: AttentionCombine::heads"][::core::mem::offset_of!(AttentionCombine, heads) - 40usize];
    ["Offset of field: AttentionCombine::head_dim"]
        [::core::mem::offset_of!(AttentionCombine, head_dim) - 44usize];
    ["Offset of field: AttentionCombine::prefix"]
        [::core::mem::offset_of!(AttentionCombine, prefix) - 48usize];
    ["Offset of field: AttentionCombine::reserved"]
        [::core::mem::offset_of!(AttentionCombine, reserved) - 52usize];
};
#[doc = " Keys or values of one layer out of a prefix's table: `y [B, heads, P, d] = table [P, columns]`, of which row p holds\n those of position p from column `first` on, head after head; then dropout.\n\n Element `i` of `[B, P, columns]` is kept when the stream's uniform `i` is at least `p`, and times `scale = 1 / (1 - p)`\n then. B is `size`, P is `length`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct PrefixHeads {
    pub y: *mut core::ffi::c_void,
    pub table: *const f32,
    pub seed: u64,
    pub stream: u64,
    pub size: u32,
    pub length: u32,
    pub heads: u32,
    pub head_dim: u32,
    pub columns: u32,
    pub first: u32,
    pub p: f32,
    pub scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PrefixHeads"][::core::mem::size_of::<PrefixHeads>() - 64usize];
    ["Alignment of PrefixHeads"][::core::mem::align_of::<PrefixHeads>() - 8usize];
    ["Offset of field: PrefixHeads::y"][::core::mem::offset_of!(PrefixHeads, y) - 0usize];
    ["Offset of field: PrefixHeads::table"][::core::mem::offset_of!(PrefixHeads, table) - 8usize];
    ["Offset of field: PrefixHeads::seed"][::core::mem::offset_of!(PrefixHeads, seed) - 16usize];
    ["Offset of field: PrefixHeads::stream"][::core::mem::offset_of!(PrefixHeads, stream) - 24usize];
    ["Offset of field: PrefixHeads::size"][::core::mem::offset_of!(PrefixHeads, size) - 32usize];
    ["Offset of field: PrefixHeads::length"][::core::mem::offset_of!(PrefixHeads, length) - 36usize];
    ["Offset of field: PrefixHeads::heads"][::core::mem::offset_of!(PrefixHeads, heads) - 40usize];
    ["Offset of field: PrefixHeads::head_dim"][::core::mem::offset_of!(PrefixHeads, head_dim) - 44usize];
    ["Offset of field: PrefixHeads::columns"][::core::mem::offset_of!(PrefixHeads, columns) - 48usize];
    ["Offset of field: PrefixHeads::first"][::core::mem::offset_of!(PrefixHeads, first) - 52usize];
    ["Offset of field: PrefixHeads::p"][::core::mem::offset_of!(PrefixHeads, p) - 56usize];
    ["Offset of field: PrefixHeads::scale"][::core::mem::offset_of!(PrefixHeads, scale) - 60usize];
};
#[doc = " The gradient of `PrefixHeads`: `d_table [P, columns]` is added `Σ_b` of `dy [B, heads, P, d]` behind the same dropout."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct PrefixHeadsBackward {
    pub d_table: *mut f32,
    pub dy: *const f32,
    pub seed: u64,
    pub stream: u64,
    pub size: u32,
    pub length: u32,
    pub heads: u32,
    pub head_dim: u32,
    pub columns: u32,
    pub first: u32,
    pub p: f32,
    pub scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PrefixHeadsBackward"][::core::mem::size_of::<PrefixHeadsBackward>() - 64usize];
    ["Alignment of PrefixHeadsBackward"][::core::mem::align_of::<PrefixHeadsBackward>() - 8usize];
    ["Offset of field: PrefixHeadsBackward::d_table"]
        [::core::mem::offset_of!(PrefixHeadsBackward, d_table) - 0usize];
    ["Offset of field: PrefixHeadsBackward::dy"][::core::mem::offset_of!(PrefixHeadsBackward, dy) - 8usize];
    ["Offset of field: PrefixHeadsBackward::seed"]
        [::core::mem::offset_of!(PrefixHeadsBackward, seed) - 16usize];
    ["Offset of field: PrefixHeadsBackward::stream"]
        [::core::mem::offset_of!(PrefixHeadsBackward, stream) - 24usize];
    ["Offset of field: PrefixHeadsBackward::size"]
        [::core::mem::offset_of!(PrefixHeadsBackward, size) - 32usize];
    ["Offset of field: PrefixHeadsBackward::length"]
        [::core::mem::offset_of!(PrefixHeadsBackward, length) - 36usize];
    ["Offset of field: PrefixHeadsBackward::heads"]
        [::core::mem::offset_of!(PrefixHeadsBackward, heads) - 40usize];
    ["Offset of field: PrefixHeadsBackward::head_dim"]
        [::core::mem::offset_of!(PrefixHeadsBackward, head_dim) - 44usize];
    ["Offset of field: PrefixHeadsBackward::columns"]
        [::core::mem::offset_of!(PrefixHeadsBackward, columns) - 48usize];
    ["Offset of field: PrefixHeadsBackward::first"]
        [::core::mem::offset_of!(PrefixHeadsBackward, first) - 52usize];
    ["Offset of field: PrefixHeadsBackward::p"][::core::mem::offset_of!(PrefixHeadsBackward, p) - 56usize];
    ["Offset of field: PrefixHeadsBackward::scale"]
        [::core::mem::offset_of!(PrefixHeadsBackward, scale) - 60usize];
};
#[doc = " `y = tanh(x)` of `n` elements."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Tanh {
    pub y: *mut f32,
    pub x: *const f32,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Tanh"][::core::mem::size_of::<Tanh>() - 24usize];
    ["Alignment of Tanh"][::core::mem::align_of::<Tanh>() - 8usize];
    ["Offset of field: Tanh::y"][::core::mem::offset_of!(Tanh, y) - 0usize];
    ["Offset of field: Tanh::x"][::core::mem::offset_of!(Tanh, x) - 8usize];
    ["Offset of field: Tanh::n"][::core::mem::offset_of!(Tanh, n) - 16usize];
};
#[doc = " The gradient of `Tanh` in place, from its output: `d *= 1 - y^2`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TanhBackward {
    pub d: *mut f32,
    pub y: *const f32,
    pub n: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of TanhBackward"][::core::mem::size_of::<TanhBackward>() - 24usize];
    ["Alignment of TanhBackward"][::core::mem::align_of::<TanhBackward>() - 8usize];
    ["Offset of field: TanhBackward::d"][::core::mem::offset_of!(TanhBackward, d) - 0usize];
    ["Offset of field: TanhBackward::y"][::core::mem::offset_of!(TanhBackward, y) - 8usize];
    ["Offset of field: TanhBackward::n"][::core::mem::offset_of!(TanhBackward, n) - 16usize];
};
#[doc = " One m16n8k16 product per block, registers as they are: d = a b + c. a: (blocks, 32 lanes, 4), b: (blocks, 32, 2), c and\n d: (blocks, 32, 4)."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LaneMapMma {
    pub d: *mut f32,
    pub a: *const u32,
    pub b: *const u32,
    pub c: *const f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LaneMapMma"][::core::mem::size_of::<LaneMapMma>() - 32usize];
    ["Alignment of LaneMapMma"][::core::mem::align_of::<LaneMapMma>() - 8usize];
    ["Offset of field: LaneMapMma::d"][::core::mem::offset_of!(LaneMapMma, d) - 0usize];
    ["Offset of field: LaneMapMma::a"][::core::mem::offset_of!(LaneMapMma, a) - 8usize];
    ["Offset of field: LaneMapMma::b"][::core::mem::offset_of!(LaneMapMma, b) - 16usize];
    ["Offset of field: LaneMapMma::c"][::core::mem::offset_of!(LaneMapMma, c) - 24usize];
};
#[doc = " One ldmatrix per block. tiles: (blocks, 4 tiles, 8 rows, 8 columns), r: (blocks, 32 lanes, 4 or 2 registers)."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LaneMapLdmatrix {
    pub r: *mut u32,
    pub tiles: *const u16,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LaneMapLdmatrix"][::core::mem::size_of::<LaneMapLdmatrix>() - 16usize];
    ["Alignment of LaneMapLdmatrix"][::core::mem::align_of::<LaneMapLdmatrix>() - 8usize];
    ["Offset of field: LaneMapLdmatrix::r"][::core::mem::offset_of!(LaneMapLdmatrix, r) - 0usize];
    ["Offset of field: LaneMapLdmatrix::tiles"][::core::mem::offset_of!(LaneMapLdmatrix, tiles) - 8usize];
};
#[doc = " Bit functions, packed arithmetic, conversions, shuffles, votes. x: (blocks, 32 lanes, 3), r: (blocks, 32 lanes, 24)."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LaneMapBits {
    pub r: *mut u32,
    pub x: *const u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LaneMapBits"][::core::mem::size_of::<LaneMapBits>() - 16usize];
    ["Alignment of LaneMapBits"][::core::mem::align_of::<LaneMapBits>() - 8usize];
    ["Offset of field: LaneMapBits::r"][::core::mem::offset_of!(LaneMapBits, r) - 0usize];
    ["Offset of field: LaneMapBits::x"][::core::mem::offset_of!(LaneMapBits, x) - 8usize];
};
