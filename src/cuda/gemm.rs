//! Products with dense matrices and with 8-bit ones: which kernel of `cuda/gemm*.cu` and `cuda/int8.cu` computes one, and with how
//! many blocks.

use std::ffi::c_void;
use std::ptr;

use super::sys::{self, Gemm};
use super::{Grid, SCRATCH, blocks, describe, device, launch_named, size};
use crate::error::{Error, Result};
use crate::quant::RowInt8;
use crate::tensor::{DType, Device, Tensor};

/// As many blocks as keep a card busy: K is cut to get there. Not asked of the card, so that results do not
/// depend on it.
const ENOUGH_BLOCKS: usize = 256;
/// From as many large tiles on they are preferred, though they may leave some multiprocessors idle.
const ENOUGH_LARGE_TILES: usize = 96;
/// Slices of K that a part should have at least, lest adding up the parts costs more than it saves.
const SLICES_OF_A_PART: usize = 4;

/// Which operands are stored transposed: `c = a bᵀ`, `a b` or `aᵀ b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `a [M, K]`, `b [N, K]`.
    Nt,
    /// `a [M, K]`, `b [K, N]`.
    Nn,
    /// `a [K, M]`, `b [K, N]`.
    Tn,
}

/// The matrix of a product with activations, `[N, K]`.
#[derive(Clone, Copy)]
pub(crate) enum Matrix<'a> {
    /// Of the compute type, or of f32 when it trains.
    Dense(&'a Tensor),
    /// In 8 bits.
    Int8(&'a RowInt8),
}

/// Some rows of a [`Matrix`], as `Gemm` takes them for its b.
pub(super) struct Rows {
    pub address: *const c_void,
    /// Of 8-bit rows.
    pub scales: *const f32,
    /// U8 stands for codes.
    pub dtype: DType,
}

impl Matrix<'_> {
    pub(super) fn extents(&self) -> (usize, usize) {
        match self {
            Matrix::Dense(w) => w.shape().rows_and_columns(),
            Matrix::Int8(w) => w.shape().rows_and_columns(),
        }
    }

    /// The rows from `start` on.
    pub(super) fn rows_from(&self, start: usize) -> Rows {
        let (_, k) = self.extents();
        match self {
            Matrix::Dense(w) => Rows {
                address: w.device_ptr().wrapping_byte_add(start * k * w.dtype().size()),
                scales: ptr::null(),
                dtype: w.dtype(),
            },
            Matrix::Int8(w) => Rows {
                address: w.codes.device_ptr().wrapping_byte_add(start * k),
                scales: w.scales.device_ptr().cast::<f32>().wrapping_add(start),
                dtype: DType::U8,
            },
        }
    }
}

/// What varies between kernels of one product.
struct Variant {
    /// Between the stem of the name and the type: empty, `_small`.
    name: &'static str,
    tile: usize,
    shared_bytes: u32,
    splits: usize,
}

/// The stem of the kernel's name and the type that it computes in, if there is one that computes in `compute` for operands a, b
/// and c of `types`; U8 stands for 8-bit codes. Without an operand of 16 bits or codes it computes in f32, but for `a b` with a head that trains.
fn stem(layout: Layout, compute: DType, types: [DType; 3]) -> Option<(&'static str, DType)> {
    use DType::{F32, U8};
    use Layout::{Nn, Nt, Tn};
    let compute = if types == [F32; 3] && layout != Nn {
        F32
    } else {
        compute
    };
    if !matches!(compute, F32 | DType::F16 | DType::BF16) {
        return None;
    }
    let letter = |dtype| match dtype {
        F32 => Some('f'),
        U8 => Some('i'),
        dtype => (dtype == compute).then_some('t'),
    };
    let [a, b, c] = types.map(letter);
    let name = match (layout, [a?, b?, c?]) {
        (Nt, ['f', 'f', 'f']) => "gemm_nt",
        (Nn, ['f', 'f', 'f']) if compute == F32 => "gemm_nn",
        (Nn, ['f', 'f', 'f']) => "gemm_nn_fff",
        (Tn, ['f', 'f', 'f']) => "gemm_tn",
        (Nt, ['f', 'i', 'f']) if compute == F32 => "gemm_nt_i",
        (Nn, ['f', 'i', 'f']) if compute == F32 => "gemm_nn_i",
        (Nn, ['f', 'i', 'f']) => "gemm_nn_fif",
        (Nt, ['t', 't', 't']) => "gemm_nt_ttt",
        (Nt, ['t', 'f', 't']) => "gemm_nt_tft",
        (Nt, ['t', 't', 'f']) => "gemm_nt_ttf",
        (Nt, ['t', 'f', 'f']) => "gemm_nt_tff",
        (Nt, ['t', 'i', 't']) => "gemm_nt_tit",
        (Nt, ['t', 'i', 'f']) => "gemm_nt_tif",
        (Nn, ['t', 't', 't']) => "gemm_nn_ttt",
        (Nn, ['t', 'f', 't']) => "gemm_nn_tft",
        (Nn, ['f', 't', 'f']) => "gemm_nn_ftf",
        (Nn, ['t', 'i', 't']) => "gemm_nn_tit",
        (Tn, ['t', 't', 'f']) => "gemm_tn_ttf",
        (Tn, ['f', 't', 'f']) => "gemm_tn_ftf",
        _ => return None,
    };
    Some((name, compute))
}

impl Variant {
    fn choose(turing: bool, compute: DType, [m, n, k]: [usize; 3]) -> Self {
        let staged = if turing {
            sys::GLM_GEMM_SHARED_BYTES_SM75
        } else {
            sys::GLM_GEMM_SHARED_BYTES
        };
        let tiles = |side: usize| m.div_ceil(side) * n.div_ceil(side);
        let (large, small) = (sys::GLM_GEMM_TILE as usize, sys::GLM_GEMM_SMALL_TILE as usize);
        if compute != DType::F32 && m.min(n) > small && tiles(large) >= ENOUGH_LARGE_TILES {
            return Self {
                name: "",
                tile: large,
                shared_bytes: staged,
                splits: 1,
            };
        }
        let slices = k.div_ceil(sys::GLM_GEMM_SMALL_DEPTH as usize);
        let room = SCRATCH / (m * n * size_of::<f32>()).max(1);
        let splits = (ENOUGH_BLOCKS / tiles(small).max(1))
            .min(slices / SLICES_OF_A_PART)
            .min(room)
            .max(1);
        let (name, shared_bytes) = if compute == DType::F32 {
            ("", sys::GLM_GEMM_F32_SHARED_BYTES)
        } else {
            ("_small", staged)
        };
        Self {
            name,
            tile: small,
            shared_bytes,
            splits,
        }
    }
}

/// The product that `gemm` describes, apart from `splits` and `partial`, of operands a, b and c of `types`, computed in `compute`
/// if one of them is narrower than f32.
///
/// # Errors
/// There is no kernel for these types, or the driver refuses.
///
/// # Safety
/// The pointers in `gemm` are of device `ordinal` and good for the matrices it describes.
// SAFETY: as above.
pub(super) unsafe fn multiply(
    ordinal: u8,
    operation: &'static str,
    layout: Layout,
    compute: DType,
    types: [DType; 3],
    gemm: Gemm,
) -> Result<()> {
    let Some((stem, compute)) = stem(layout, compute, types) else {
        let [a, b, c] = types;
        return Err(Error::Shape {
            operation,
            found: format!("a product {layout:?} of {a} and {b} into {c}"),
            expected: "types for which there is a kernel (cuda/gemm.cu)".into(),
        });
    };
    let extents = [gemm.m, gemm.n, gemm.k].map(|extent| extent as usize);
    let [m, n, k] = extents;

    if few(stem, &gemm) {
        let kernel = format!("gemm_few{}_{}", &stem["gemm_nt".len()..], suffix(compute));
        let grid = Grid {
            blocks: [blocks(operation, n, sys::GLM_GEMM_FEW_OUTPUTS as usize)?, 1, 1],
            threads: sys::GLM_GEMM_FEW_THREADS,
            shared_bytes: sys::GLM_GEMM_FEW_SHARED_BYTES,
        };
        // SAFETY: the caller's promise; `few` has checked the kernel's limits.
        return unsafe { launch_named(ordinal, operation, &kernel, grid, &gemm) };
    }

    let variant = Variant::choose(describe(ordinal)?.capability < (8, 0), compute, extents);
    let kernel = format!("{stem}{}_{}", variant.name, suffix(compute));
    let tiles = m.div_ceil(variant.tile) * n.div_ceil(variant.tile);
    let grid = Grid {
        blocks: [
            blocks(operation, tiles, 1)?,
            blocks(operation, variant.splits, 1)?,
            1,
        ],
        threads: sys::GLM_GEMM_THREADS,
        shared_bytes: variant.shared_bytes,
    };
    if variant.splits == 1 {
        let gemm = Gemm { splits: 1, ..gemm };
        // SAFETY: the caller's promise.
        return unsafe { launch_named(ordinal, operation, &kernel, grid, &gemm) };
    }
    let scratch = device(ordinal)?.scratch()?;
    let gemm = Gemm {
        splits: size(operation, variant.splits)?,
        partial: scratch.pointer().cast(),
        ..gemm
    };
    let sum = Grid {
        blocks: [
            blocks(operation, m * n, sys::GLM_GEMM_SUM_THREADS as usize)?,
            1,
            1,
        ],
        threads: sys::GLM_GEMM_SUM_THREADS,
        shared_bytes: 0,
    };
    let into = format!("gemm_sum_{}", suffix(types[2]));
    debug_assert!(k > 0 && variant.splits * m * n * size_of::<f32>() <= SCRATCH);
    // SAFETY: the caller's promise; `choose` leaves no more parts than the scratch memory has room for, and
    // it is held until the kernel that reads them has been launched.
    unsafe {
        launch_named(ordinal, operation, &kernel, grid, &gemm)?;
        launch_named(ordinal, operation, &into, sum, &gemm)
    }
}

/// Is it a product for `gemm_few`, with few rows and a matrix that is read 16 bytes at a time?
fn few(stem: &str, gemm: &Gemm) -> bool {
    let unit = match stem {
        "gemm_nt_ttt" | "gemm_nt_ttf" => 8,
        "gemm_nt_tit" | "gemm_nt_tif" => 16,
        _ => return false,
    };
    gemm.m <= sys::GLM_GEMM_FEW_ROWS as i32
        && gemm.k % unit == 0
        && gemm.a.align_offset(16) == 0
        && gemm.b.align_offset(16) == 0
}

fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

/// The number of the device that `tensor` lives on.
///
/// # Errors
/// It lives on the host.
pub(super) fn ordinal(operation: &'static str, tensor: &Tensor) -> Result<u8> {
    match tensor.device() {
        Device::Cuda(ordinal) => Ok(ordinal),
        Device::Cpu => Err(Error::Shape {
            operation,
            found: "a tensor on the CPU".into(),
            expected: "one on a CUDA device".into(),
        }),
    }
}

/// `c [M, N] = op(a) op(b)` by addresses, to which callers add what they want.
pub(super) fn product(
    operation: &'static str,
    [m, n, k]: [usize; 3],
    a: *const c_void,
    b: *const c_void,
    c: *mut c_void,
) -> Result<Gemm> {
    Ok(Gemm {
        c,
        a,
        b,
        bias: ptr::null(),
        residual: ptr::null(),
        partial: ptr::null_mut(),
        scales: ptr::null(),
        m: size(operation, m)?,
        n: size(operation, n)?,
        k: size(operation, k)?,
        stride: size(operation, n)?,
        splits: 1,
        alpha: 1.0,
        beta: 0.0,
        gamma: 0.0,
    })
}

/// `y [M, N] = x [M, K] Wᵀ + bias + alpha * residual`.
///
/// # Errors
/// There is no kernel for these types, or the driver refuses.
pub(crate) fn linear(
    x: &Tensor,
    w: Matrix<'_>,
    bias: Option<&Tensor>,
    residual: Option<(f64, &Tensor)>,
    y: &mut Tensor,
) -> Result<()> {
    const OPERATION: &str = "linear";
    let (m, k) = x.shape().rows_and_columns();
    let (n, _) = w.extents();
    let w = w.rows_from(0);
    let types = [x.dtype(), w.dtype, y.dtype()];
    let mut gemm = Gemm {
        scales: w.scales,
        ..product(
            OPERATION,
            [m, n, k],
            x.device_ptr(),
            w.address,
            y.device_ptr_mut(),
        )?
    };
    if let Some(bias) = bias {
        gemm.bias = bias.device_ptr().cast();
    }
    if let Some((alpha, residual)) = residual {
        (gemm.gamma, gemm.residual) = (alpha as f32, residual.device_ptr());
    }
    // SAFETY: ops::linear has checked that x is [M, K], w [N, K], y and residual [M, N] of one type and bias
    // N numbers of f32, all on one device; 8-bit weights have N scales.
    unsafe {
        multiply(
            ordinal(OPERATION, x)?,
            OPERATION,
            Layout::Nt,
            x.dtype(),
            types,
            gemm,
        )
    }
}

/// `dx [M, K] = dy [M, N] W + alpha * residual`.
///
/// # Errors
/// As [`linear`].
pub(crate) fn linear_backward_input(
    dy: &Tensor,
    w: Matrix<'_>,
    residual: Option<(f64, &Tensor)>,
    dx: &mut Tensor,
) -> Result<()> {
    const OPERATION: &str = "linear_backward_input";
    let (m, n) = dy.shape().rows_and_columns();
    let (_, k) = w.extents();
    let w = w.rows_from(0);
    let types = [dy.dtype(), w.dtype, dx.dtype()];
    let mut gemm = Gemm {
        scales: w.scales,
        ..product(
            OPERATION,
            [m, k, n],
            dy.device_ptr(),
            w.address,
            dx.device_ptr_mut(),
        )?
    };
    if let Some((alpha, residual)) = residual {
        (gemm.gamma, gemm.residual) = (alpha as f32, residual.device_ptr());
    }
    // SAFETY: ops::linear_backward_input has checked that dy is [M, N], w [N, K], dx and residual [M, K] of
    // one type, all on one device; 8-bit weights have N scales.
    unsafe {
        multiply(
            ordinal(OPERATION, dy)?,
            OPERATION,
            Layout::Nn,
            dy.dtype(),
            types,
            gemm,
        )
    }
}

/// `c [M, N] = alpha * op(a) op(b) + beta * c`; `op` transposes when its flag is set.
///
/// Of 16-bit types there are: a bᵀ and a b into 16 bits, where b may be f32 (what trains), a bᵀ (b may be f32) and
/// aᵀ b into f32, and a b and aᵀ b into f32 with an a of f32.
///
/// # Errors
/// As [`linear`].
pub(crate) fn matmul(
    alpha: f64,
    a: (&Tensor, bool),
    b: (&Tensor, bool),
    beta: f64,
    c: &mut Tensor,
) -> Result<()> {
    const OPERATION: &str = "matmul";
    let layout = match (a.1, b.1) {
        (false, true) => Layout::Nt,
        (false, false) => Layout::Nn,
        (true, false) => Layout::Tn,
        (true, true) => {
            return Err(Error::Shape {
                operation: OPERATION,
                found: "two transposed operands".into(),
                expected: "at most one".into(),
            });
        }
    };
    let (m, n) = c.shape().rows_and_columns();
    let (rows, columns) = a.0.shape().rows_and_columns();
    let k = if a.1 { rows } else { columns };
    let types = [a.0.dtype(), b.0.dtype(), c.dtype()];
    let compute = types.into_iter().find(|&dtype| dtype != DType::F32);
    let compute = compute.unwrap_or(DType::F32);
    let gemm = Gemm {
        alpha: alpha as f32,
        beta: beta as f32,
        ..product(
            OPERATION,
            [m, n, k],
            a.0.device_ptr(),
            b.0.device_ptr(),
            c.device_ptr_mut(),
        )?
    };
    // SAFETY: ops::matmul has checked that op(a) is [M, K], op(b) [K, N] and c [M, N], all on one device;
    // `multiply` knows which types there are.
    unsafe { multiply(ordinal(OPERATION, c)?, OPERATION, layout, compute, types, gemm) }
}
