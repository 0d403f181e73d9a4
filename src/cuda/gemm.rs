//! Products of dense matrices: which kernel of `cuda/gemm*.cu` computes one, and with how many blocks.

use std::ffi::c_void;
use std::ptr;

use super::sys::{self, Gemm};
use super::{Grid, SCRATCH, blocks, describe, device, launch_named, size};
use crate::error::{Error, Result};
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

/// What varies between kernels of one product.
struct Variant {
    /// Between the stem of the name and the type: empty, `_small`.
    name: &'static str,
    tile: usize,
    shared_bytes: u32,
    splits: usize,
}

/// The stem of the kernel's name and the type that it computes in, if there is one for operands a, b and c of
/// `types`.
fn stem(layout: Layout, types: [DType; 3]) -> Option<(&'static str, DType)> {
    use DType::F32;
    use Layout::{Nn, Nt, Tn};
    let compute = types.into_iter().find(|&dtype| dtype != F32).unwrap_or(F32);
    if compute == F32 {
        let name = match layout {
            Nt => "gemm_nt",
            Nn => "gemm_nn",
            Tn => "gemm_tn",
        };
        return Some((name, F32));
    }
    if !matches!(compute, DType::F16 | DType::BF16) || types.iter().any(|&t| t != compute && t != F32) {
        return None;
    }
    let name = match (layout, types.map(|dtype| dtype == F32)) {
        (Nt, [false, false, false]) => "gemm_nt_ttt",
        (Nt, [false, true, false]) => "gemm_nt_tft",
        (Nt, [false, false, true]) => "gemm_nt_ttf",
        (Nt, [false, true, true]) => "gemm_nt_tff",
        (Nn, [false, false, false]) => "gemm_nn_ttt",
        (Nn, [false, true, false]) => "gemm_nn_tft",
        (Nn, [true, false, true]) => "gemm_nn_ftf",
        (Tn, [false, false, true]) => "gemm_tn_ttf",
        (Tn, [true, false, true]) => "gemm_tn_ftf",
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

/// The product that `gemm` describes, apart from `splits` and `partial`, of operands a, b and c of `types`.
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
    types: [DType; 3],
    gemm: Gemm,
) -> Result<()> {
    let Some((stem, compute)) = stem(layout, types) else {
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
    matches!(stem, "gemm_nt_ttt" | "gemm_nt_ttf")
        && gemm.m <= sys::GLM_GEMM_FEW_ROWS as i32
        && gemm.k % 8 == 0
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
        m: size(operation, m)?,
        n: size(operation, n)?,
        k: size(operation, k)?,
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
    w: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<(f64, &Tensor)>,
    y: &mut Tensor,
) -> Result<()> {
    const OPERATION: &str = "linear";
    let (m, k) = x.shape().rows_and_columns();
    let (n, _) = w.shape().rows_and_columns();
    let types = [x.dtype(), w.dtype(), y.dtype()];
    let mut gemm = product(
        OPERATION,
        [m, n, k],
        x.device_ptr(),
        w.device_ptr(),
        y.device_ptr_mut(),
    )?;
    if let Some(bias) = bias {
        gemm.bias = bias.device_ptr().cast();
    }
    if let Some((alpha, residual)) = residual {
        (gemm.gamma, gemm.residual) = (alpha as f32, residual.device_ptr());
    }
    // SAFETY: ops::linear has checked that x is [M, K], w [N, K], y and residual [M, N] of one type and bias
    // N numbers of f32, all on one device.
    unsafe { multiply(ordinal(OPERATION, x)?, OPERATION, Layout::Nt, types, gemm) }
}

/// `dx [M, K] = dy [M, N] W + alpha * residual`.
///
/// # Errors
/// As [`linear`].
pub(crate) fn linear_backward_input(
    dy: &Tensor,
    w: &Tensor,
    residual: Option<(f64, &Tensor)>,
    dx: &mut Tensor,
) -> Result<()> {
    const OPERATION: &str = "linear_backward_input";
    let (m, n) = dy.shape().rows_and_columns();
    let (_, k) = w.shape().rows_and_columns();
    let types = [dy.dtype(), w.dtype(), dx.dtype()];
    let mut gemm = product(
        OPERATION,
        [m, k, n],
        dy.device_ptr(),
        w.device_ptr(),
        dx.device_ptr_mut(),
    )?;
    if let Some((alpha, residual)) = residual {
        (gemm.gamma, gemm.residual) = (alpha as f32, residual.device_ptr());
    }
    // SAFETY: ops::linear_backward_input has checked that dy is [M, N], w [N, K], dx and residual [M, K] of
    // one type, all on one device.
    unsafe { multiply(ordinal(OPERATION, dy)?, OPERATION, Layout::Nn, types, gemm) }
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
    unsafe { multiply(ordinal(OPERATION, c)?, OPERATION, layout, types, gemm) }
}
