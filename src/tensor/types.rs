//! Where tensors live, what their elements are, and how many.

use std::fmt;

use half::{bf16, f16};

use super::Tensor;
use crate::error::Result;

/// Where a tensor lives and computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// Host memory; the definition of every operation.
    #[default]
    Cpu,
    /// The CUDA device of this number.
    Cuda(u8),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Where a model computes, and in which type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compute {
    /// Where.
    pub device: Device,
    /// The type of activations and of frozen dense weights.
    pub dtype: DType,
}

impl Compute {
    /// On the CPU.
    pub const fn cpu(dtype: DType) -> Self {
        Self {
            device: Device::Cpu,
            dtype,
        }
    }

    /// Zeros in the compute type: activations and their gradients.
    ///
    /// # Errors
    /// The device has no room.
    pub fn zeros(self, shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::zeros_on(self.device, self.dtype, shape)
    }

    /// Zeros in the type that sums are kept in: statistics, parameters that train, their gradients.
    ///
    /// # Errors
    /// The device has no room.
    pub fn accumulators(self, shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::zeros_on(self.device, self.dtype.accumulator(), shape)
    }

    /// Zeros of I32: token ids, positions, row numbers.
    ///
    /// # Errors
    /// The device has no room.
    pub fn indices(self, shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::zeros_on(self.device, DType::I32, shape)
    }
}

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// 64-bit float: gradient checks.
    F64,
    /// 32-bit float: compute on the CPU, adapters, optimizer state.
    F32,
    /// IEEE 16-bit float: checkpoints; compute on CUDA devices.
    F16,
    /// bfloat16: checkpoints; compute on CUDA devices.
    BF16,
    /// 64-bit signed integer: stored token ids.
    I64,
    /// 32-bit signed integer: token ids, positions, row numbers.
    I32,
    /// Byte: 4-bit codes in pairs, quantised scales, flags.
    U8,
    /// Signed byte: the type of 4- and 8-bit codes in the files of others.
    I8,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::U8 | DType::I8 => 1,
        }
    }

    /// Is this a floating-point type?
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
    }

    /// The type that sums of this type are kept in, and parameters that train: F64 for F64, else F32.
    pub const fn accumulator(self) -> DType {
        match self {
            DType::F64 => DType::F64,
            _ => DType::F32,
        }
    }

    /// PyTorch's name, as in `torch_dtype`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F64 => "float64",
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::I64 => "int64",
            DType::I32 => "int32",
            DType::U8 => "uint8",
            DType::I8 => "int8",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that can be a tensor's element.
pub trait Element: bytemuck::Pod + Send + Sync + fmt::Debug + 'static {
    /// The matching [`DType`].
    const DTYPE: DType;
}

macro_rules! elements {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}
elements!(f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, u8 => U8, i8 => I8);

/// The extents of a tensor, at most four.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    extents: [usize; 4],
    rank: usize,
}

impl Shape {
    /// Panics when there are more than four extents: no tensor of this crate has.
    pub fn new(extents: &[usize]) -> Self {
        assert!(
            extents.len() <= 4,
            "a shape has at most 4 extents, not {}",
            extents.len()
        );
        let mut e = [1; 4];
        e[..extents.len()].copy_from_slice(extents);
        Self {
            extents: e,
            rank: extents.len(),
        }
    }

    /// The extents, outermost first.
    pub fn extents(&self) -> &[usize] {
        &self.extents[..self.rank]
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.extents().iter().product()
    }

    /// `[rows, columns]` with all but the last extent folded into the rows.
    pub fn rows_and_columns(&self) -> (usize, usize) {
        match self.extents() {
            [] => (1, 1),
            [rows @ .., columns] => (rows.iter().product(), *columns),
        }
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.extents())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.extents())
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(extents: [usize; N]) -> Self {
        Self::new(&extents)
    }
}

impl From<&[usize]> for Shape {
    fn from(extents: &[usize]) -> Self {
        Self::new(extents)
    }
}
