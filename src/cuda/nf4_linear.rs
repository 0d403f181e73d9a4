//! Products with 4-bit weights: which kernel of `cuda/nf4_*.cu` computes one, and with how many blocks.

use std::ffi::c_void;
use std::ptr;

use super::gemm::ordinal;
use super::nf4::{extent, planes, values, weight};
use super::sys::{self, Nf4Few, Nf4Finish, Nf4Linear, Nf4Planes};
use super::{Grid, SCRATCH, blocks, device, launch};
use crate::error::{Error, Result};
use crate::quant::QuantTensor;
use crate::tensor::{DType, Tensor};

/// From as many tall tiles on they are preferred, though they may leave some multiprocessors idle: a tall tile reads the
/// weights half as often. Below, short tiles, and the reduction in parts.
const ENOUGH_TALL_TILES: usize = 96;
/// As many blocks of the short tile (4 warps) and of the kernels for few rows (8 warps) as keep a large card busy (H100: 132
/// multiprocessors). Not asked of the card, so that results do not depend on it.
const ENOUGH_SHORT_TILES: usize = 256;
const ENOUGH_FEW: usize = 128;
/// Elements of the reduced dimension that a warp should have at least, lest starting costs more than computing.
const LEAST_PART: usize = 256;

/// Which product.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

/// `scale * u matrix` beside a product: matrix is B `[N, r]`, transposed, forward, and A `[r, K]` backward, of f32.
#[derive(Clone, Copy)]
pub(crate) struct Adapter<'a> {
    pub scale: f64,
    pub u: &'a Tensor,
    pub matrix: &'a Tensor,
}

/// The operands of a product: `out [M, width] = in [M, reduced] op(W) + adapter + bias + alpha * residual`.
struct Operands<'a> {
    input: &'a Tensor,
    w: &'a QuantTensor,
    adapter: Option<Adapter<'a>>,
    bias: *const f32,
    residual: *const c_void,
    alpha: f32,
    out: *mut c_void,
    out_dtype: DType,
}

/// How a product is computed.
struct Plan {
    kernel: &'static str,
    /// Rows that the kernel for few rows takes; 0 for tiles.
    few: usize,
    grid: Grid,
    splits: usize,
}

impl Plan {
    /// For more than one part sums go through the scratch memory; with `whole` they must not.
    fn choose(
        operation: &'static str,
        direction: Direction,
        [m, width, reduced]: [usize; 3],
        whole: bool,
    ) -> Result<Self> {
        // Parts are worth at most as much traffic (8 bytes an element and part) as reading the weights takes.
        let splits = |enough: usize, tiles: usize, least: usize| {
            if whole {
                return 1;
            }
            (enough / tiles.max(1))
                .min(reduced / least)
                .min(reduced / (16 * m))
                .min(SCRATCH / (m * width * size_of::<f32>()))
                .max(1)
        };
        // The kernels for few rows waste least up to as many; one that takes more rows has more weights to a block.
        let few = [8, 16, 32].into_iter().find(|&rows| m <= rows);
        if let (Direction::Forward, Some(rows)) = (direction, few) {
            let across = rows / 8;
            let tiles = width.div_ceil(32 * across);
            let splits = splits(ENOUGH_FEW, tiles, LEAST_PART * 8 / across);
            return Ok(Self {
                kernel: ["nf4_few_8", "nf4_few_16", "nf4_few_32"][across / 2],
                few: rows,
                grid: Grid {
                    blocks: [blocks(operation, tiles, 1)?, blocks(operation, splits, 1)?, 1],
                    threads: sys::GLM_NF4_FEW_THREADS,
                    shared_bytes: if rows == 32 {
                        sys::GLM_NF4_FEW_SHARED_32
                    } else {
                        sys::GLM_NF4_FEW_SHARED
                    },
                },
                splits,
            });
        }
        let columns = width.div_ceil(sys::GLM_NF4_TILE_COLUMNS as usize);
        let tall = m.div_ceil(sys::GLM_NF4_TILE_ROWS as usize);
        let (kernel, rows, shared_bytes, splits) = if columns * tall >= ENOUGH_TALL_TILES {
            let kernel = match direction {
                Direction::Forward => "nf4_linear_forward",
                Direction::Backward => "nf4_linear_backward",
            };
            (kernel, tall, sys::GLM_NF4_TILE_SHARED, 1)
        } else {
            let kernel = match direction {
                Direction::Forward => "nf4_linear_forward_short",
                Direction::Backward => "nf4_linear_backward_short",
            };
            let rows = m.div_ceil(sys::GLM_NF4_TILE_ROWS_SHORT as usize);
            let splits = splits(ENOUGH_SHORT_TILES, columns * rows, LEAST_PART);
            (kernel, rows, sys::GLM_NF4_TILE_SHARED_SHORT, splits)
        };
        Ok(Self {
            kernel,
            few: 0,
            grid: Grid {
                blocks: [
                    blocks(operation, columns, 1)?,
                    grid_rows(operation, rows)?,
                    blocks(operation, splits, 1)?,
                ],
                threads: sys::GLM_NF4_TILE_THREADS,
                shared_bytes,
            },
            splits,
        })
    }
}

/// The second extent of a grid.
fn grid_rows(operation: &'static str, rows: usize) -> Result<u32> {
    u16::try_from(rows).map(u32::from).map_err(|_| Error::Shape {
        operation,
        found: format!("{rows} tiles of rows"),
        expected: format!("at most {}", u16::MAX),
    })
}

/// `y [M, N] = x [M, K] Wᵀ + adapter + bias + alpha * residual`; without bias and residual `y` may be f32 when x is not.
///
/// # Errors
/// There is no kernel for these types, or the driver refuses.
pub(crate) fn linear(
    x: &Tensor,
    w: &QuantTensor,
    bias: Option<&Tensor>,
    residual: Option<(f64, &Tensor)>,
    adapter: Option<Adapter<'_>>,
    y: &mut Tensor,
) -> Result<()> {
    let operands = Operands {
        input: x,
        w,
        adapter,
        bias: bias.map_or(ptr::null(), |bias| bias.device_ptr().cast()),
        residual: residual.map_or(ptr::null(), |(_, residual)| residual.device_ptr()),
        alpha: residual.map_or(0.0, |(alpha, _)| alpha as f32),
        out_dtype: y.dtype(),
        out: y.device_ptr_mut(),
    };
    // SAFETY: ops::linear has checked that x is [M, K], w [N, K], y and residual [M, N], bias N numbers of f32, y of x's
    // type or (then without residual) of f32, the adapter's u [M, r] of x's type and matrix [N, r] of f32, all on one device;
    // w was placed there by super::nf4.
    unsafe { multiply("linear", Direction::Forward, &operands) }
}

/// `dx [M, K] = dy [M, N] W + adapter + alpha * residual`.
///
/// # Errors
/// As [`linear`].
pub(crate) fn linear_backward_input(
    dy: &Tensor,
    w: &QuantTensor,
    residual: Option<(f64, &Tensor)>,
    adapter: Option<Adapter<'_>>,
    dx: &mut Tensor,
) -> Result<()> {
    let operands = Operands {
        input: dy,
        w,
        adapter,
        bias: ptr::null(),
        residual: residual.map_or(ptr::null(), |(_, residual)| residual.device_ptr()),
        alpha: residual.map_or(0.0, |(alpha, _)| alpha as f32),
        out_dtype: dx.dtype(),
        out: dx.device_ptr_mut(),
    };
    // SAFETY: ops::linear_backward_input has checked that dy is [M, N], w [N, K], dx and residual [M, K], of one type, the
    // adapter's u [M, r] of dy's type and matrix [r, K] of f32, all on one device; w was placed there by super::nf4.
    unsafe { multiply("linear_backward_input", Direction::Backward, &operands) }
}

/// The product of `operands`.
///
/// # Errors
/// As [`linear`].
///
/// # Safety
/// The operands have the extents and types that their [`Direction`] says, and lie on one device.
// SAFETY: as above.
unsafe fn multiply(operation: &'static str, direction: Direction, operands: &Operands<'_>) -> Result<()> {
    let Operands { input, w, .. } = operands;
    let card = ordinal(operation, input)?;
    let (n, k) = w.shape.rows_and_columns();
    let m = input.shape().rows_and_columns().0;
    let (width, reduced) = match direction {
        Direction::Forward => (n, k),
        Direction::Backward => (k, n),
    };
    if m == 0 {
        return Ok(());
    }
    let compute = input.dtype();
    // Sums in f32 are what kernels write when they have no output of their own type.
    let sums = operands.out_dtype != compute;
    if sums && !operands.bias.is_null() {
        return Err(Error::Shape {
            operation,
            found: format!("{compute} into {} with a bias", operands.out_dtype),
            expected: "the same type, or no bias".into(),
        });
    }
    let book = w.quant_type;
    let adapter = operands.adapter;
    let rank = adapter.map_or(0, |adapter| adapter.u.shape().rows_and_columns().1);
    let mut params = Nf4Linear {
        out: operands.out,
        partial: ptr::null_mut(),
        in_: input.device_ptr(),
        bias: operands.bias,
        residual: operands.residual,
        u: adapter.map_or(ptr::null(), |adapter| adapter.u.device_ptr()),
        lora: adapter.map_or(ptr::null(), |adapter| adapter.matrix.device_ptr().cast()),
        w: weight(operation, w)?,
        planes: Nf4Planes {
            low: [0; 4],
            high: [0; 4],
            pre: 1.0,
            post: 1.0,
        },
        values: [0.0; 16],
        m: extent(operation, m)?,
        rank: extent(operation, rank)?,
        splits: 1,
        alpha: operands.alpha,
        lora_scale: adapter.map_or(0.0, |adapter| adapter.scale as f32),
        reserved: 0,
    };
    if compute == DType::F32 {
        params.values = values(book, compute).0;
        let tile = sys::GLM_NF4_F32_TILE as usize;
        let grid = Grid {
            blocks: [
                blocks(operation, width, tile)?,
                grid_rows(operation, m.div_ceil(tile))?,
                1,
            ],
            threads: sys::GLM_NF4_F32_THREADS,
            shared_bytes: sys::GLM_NF4_F32_SHARED,
        };
        let kernel = match direction {
            Direction::Forward => "nf4_linear_forward",
            Direction::Backward => "nf4_linear_backward",
        };
        // SAFETY: the caller's promise.
        return unsafe { launch(card, kernel, compute, grid, &params) };
    }

    let plan = Plan::choose(operation, direction, [m, width, reduced], sums)?;
    let scratch = if plan.splits > 1 {
        Some(device(card)?.scratch()?)
    } else {
        None
    };
    params.splits = extent(operation, plan.splits)?;
    if let Some(scratch) = &scratch {
        (params.out, params.partial) = (ptr::null_mut(), scratch.pointer().cast());
    } else if sums {
        (params.out, params.partial) = (ptr::null_mut(), operands.out.cast());
    }
    debug_assert!(plan.splits == 1 || plan.splits * m * width * size_of::<f32>() <= SCRATCH);
    if plan.few > 0 {
        let (values, stretch) = values(book, compute);
        let params = Nf4Few {
            out: params.out,
            partial: params.partial,
            in_: params.in_,
            bias: params.bias,
            residual: params.residual,
            u: params.u,
            lora: params.lora,
            w: params.w,
            values,
            scale: 1.0 / stretch,
            m: params.m,
            rank: params.rank,
            splits: params.splits,
            alpha: params.alpha,
            lora_scale: params.lora_scale,
        };
        // SAFETY: the caller's promise; the kernel takes up to `few` rows, and there are no more.
        unsafe { launch(card, plan.kernel, compute, plan.grid, &params)? };
    } else {
        params.planes = planes(book, compute);
        // SAFETY: the caller's promise; the parts fit into the scratch memory, see Plan::choose.
        unsafe { launch(card, plan.kernel, compute, plan.grid, &params)? };
    }
    let Some(scratch) = scratch else {
        return Ok(());
    };
    let finish = Nf4Finish {
        out: operands.out,
        partial: scratch.pointer().cast(),
        bias: operands.bias,
        residual: operands.residual,
        m: params.m,
        width: extent(operation, width)?,
        splits: params.splits,
        alpha: operands.alpha,
    };
    let grid = Grid {
        blocks: [blocks(operation, m * width, 1024)?, 1, 1],
        threads: 256,
        shared_bytes: 0,
    };
    // SAFETY: the caller's promise; the scratch memory is held until this kernel has been launched.
    unsafe { launch(card, "nf4_linear_finish", compute, grid, &finish) }
}
