//! The one tensor: owned, contiguous, row-major, without views, strides or broadcasting.
//!
//! A tensor's bytes are owned, or borrowed from a memory-mapped file that it keeps alive ([`Tensor::from_bytes`]): a
//! frozen weight is used where the checkpoint stores it. Operations on tensors live in [`crate::ops`].

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};

use crate::error::{Error, Result};

/// Where a tensor lives and computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// Host memory; the definition of every operation.
    #[default]
    Cpu,
}

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// 64-bit float: gradient checks.
    F64,
    /// 32-bit float: compute on the CPU, adapters, optimizer state.
    F32,
    /// IEEE 16-bit float: checkpoints.
    F16,
    /// bfloat16: checkpoints.
    BF16,
    /// 64-bit signed integer: stored token ids.
    I64,
    /// 32-bit signed integer: token ids, positions, row numbers.
    I32,
    /// Byte: 4-bit codes in pairs, quantised scales, flags.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::U8 => 1,
        }
    }

    /// Is this a floating-point type?
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
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
elements!(f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, u8 => U8);

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

/// A range of bytes inside something that stays alive as long as they are used: a memory-mapped file.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Bytes {
    /// The bytes `range` of `owner`. Panics when the range lies outside: callers check what files claim.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= (*owner).as_ref().len(),
            "byte range {range:?} outside its owner"
        );
        Self { owner, range }
    }

    /// The bytes themselves.
    pub fn as_slice(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Are there no bytes?
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({:?})", self.range)
    }
}

#[derive(Clone)]
enum Buffer {
    /// Owned host memory, in 8-byte words so that every element type is aligned.
    Host(Vec<u64>),
    /// Part of a mapped file.
    Mapped(Bytes),
}

/// A contiguous row-major array.
#[derive(Clone)]
pub struct Tensor {
    buffer: Buffer,
    shape: Shape,
    dtype: DType,
}

/// Counts owned buffers ever made: the test that a training step allocates nothing reads it.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// How many owned tensor buffers this process has made so far.
pub fn allocations() -> u64 {
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// Asks the system whether it would give `bytes` of memory: a refused allocation ends the process without a word of
/// ours. It refuses what this machine could never give; what it has already promised to others it may still promise.
///
/// # Errors
/// It would not; `place` and `remedy` go into the message.
pub fn check_memory(place: &str, bytes: u128, remedy: &str) -> Result<()> {
    let given = usize::try_from(bytes).is_ok_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok());
    if given {
        return Ok(());
    }
    let found = format!("a need of {:.1e} GB of memory", bytes as f64 / 1e9);
    Err(Error::input(place, found, "what this machine can give", remedy))
}

impl Tensor {
    /// A tensor of zeros.
    pub fn zeros(dtype: DType, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        let words = (shape.elements() * dtype.size()).div_ceil(8);
        Self {
            buffer: Buffer::Host(vec![0; words]),
            shape,
            dtype,
        }
    }

    /// A copy of `data`.
    pub fn from_slice<T: Element>(data: &[T], shape: impl Into<Shape>) -> Self {
        let mut tensor = Self::zeros(T::DTYPE, shape);
        tensor.as_mut_slice::<T>().copy_from_slice(data);
        tensor
    }

    /// Bytes of a mapped file, used in place; copied when the file stores them unaligned for `dtype`.
    ///
    /// # Errors
    /// The number of bytes is not that of `shape` and `dtype`.
    pub fn from_bytes(bytes: Bytes, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let expected = shape.elements() * dtype.size();
        if bytes.len() != expected {
            return Err(Error::Shape {
                operation: "Tensor::from_bytes",
                found: format!("{} bytes", bytes.len()),
                expected: format!("{expected} bytes for {dtype} {shape}"),
            });
        }
        if bytes.as_slice().as_ptr().align_offset(dtype.size()) != 0 {
            let mut tensor = Self::zeros(dtype, shape);
            tensor.bytes_mut().copy_from_slice(bytes.as_slice());
            return Ok(tensor);
        }
        Ok(Self {
            buffer: Buffer::Mapped(bytes),
            shape,
            dtype,
        })
    }

    /// The extents.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Extent number `i`.
    pub fn extent(&self, i: usize) -> usize {
        self.shape.extents()[i]
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the tensor lives.
    pub fn device(&self) -> Device {
        Device::Cpu
    }

    /// Bytes of host memory that this tensor owns (0 when it is mapped).
    pub fn owned_bytes(&self) -> usize {
        match &self.buffer {
            Buffer::Host(words) => words.len() * 8,
            Buffer::Mapped(_) => 0,
        }
    }

    /// Gives the tensor another shape within the memory it was made with; the contents become unspecified.
    ///
    /// This is how one workspace serves batches of every length without allocating.
    ///
    /// # Errors
    /// The shape needs more memory than the tensor has.
    pub fn resize(&mut self, shape: impl Into<Shape>) -> Result<()> {
        let shape = shape.into();
        let capacity = match &self.buffer {
            Buffer::Host(words) => words.len() * 8 / self.dtype.size(),
            Buffer::Mapped(bytes) => bytes.len() / self.dtype.size(),
        };
        if shape.elements() > capacity {
            return Err(Error::Shape {
                operation: "Tensor::resize",
                found: format!("{shape}"),
                expected: format!("at most {capacity} elements, as planned"),
            });
        }
        self.shape = shape;
        Ok(())
    }

    /// The raw bytes.
    pub fn bytes(&self) -> &[u8] {
        let n = self.elements() * self.dtype.size();
        match &self.buffer {
            Buffer::Host(words) => &bytemuck::cast_slice(words)[..n],
            Buffer::Mapped(bytes) => &bytes.as_slice()[..n],
        }
    }

    /// The raw bytes, to write. Panics on a mapped tensor: frozen weights are never written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let n = self.elements() * self.dtype.size();
        match &mut self.buffer {
            Buffer::Host(words) => &mut bytemuck::cast_slice_mut(words)[..n],
            Buffer::Mapped(_) => panic!("a mapped tensor is read-only"),
        }
    }

    /// The elements. Panics when `T` is not the tensor's type: [`crate::ops`] checks before.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        assert_eq!(
            self.dtype,
            T::DTYPE,
            "tensor holds {}, asked for {}",
            self.dtype,
            T::DTYPE
        );
        bytemuck::cast_slice(self.bytes())
    }

    /// The elements, to write. Panics when `T` is not the tensor's type or the tensor is mapped.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(
            self.dtype,
            T::DTYPE,
            "tensor holds {}, asked for {}",
            self.dtype,
            T::DTYPE
        );
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// Every element as f64, whatever the type: for tests, reports and checks.
    pub fn to_f64_vec(&self) -> Vec<f64> {
        match self.dtype {
            DType::F64 => self.as_slice::<f64>().to_vec(),
            DType::F32 => self.as_slice::<f32>().iter().map(|&x| f64::from(x)).collect(),
            DType::F16 => self.as_slice::<f16>().iter().map(|x| x.to_f64()).collect(),
            DType::BF16 => self.as_slice::<bf16>().iter().map(|x| x.to_f64()).collect(),
            DType::I64 => self.as_slice::<i64>().iter().map(|&x| x as f64).collect(),
            DType::I32 => self.as_slice::<i32>().iter().map(|&x| f64::from(x)).collect(),
            DType::U8 => self.as_slice::<u8>().iter().map(|&x| f64::from(x)).collect(),
        }
    }

    /// A copy in another floating-point type, rounded to nearest even.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        let mut out = Self::zeros(dtype, self.shape);
        macro_rules! convert {
            ($from:ty, $to:ty, $f:expr) => {
                for (o, x) in out
                    .as_mut_slice::<$to>()
                    .iter_mut()
                    .zip(self.as_slice::<$from>())
                {
                    *o = $f(*x);
                }
            };
        }
        match (self.dtype, dtype) {
            (a, b) if a == b => out.bytes_mut().copy_from_slice(self.bytes()),
            (DType::F16, DType::F32) => convert!(f16, f32, f16::to_f32),
            (DType::BF16, DType::F32) => convert!(bf16, f32, bf16::to_f32),
            (DType::F64, DType::F32) => convert!(f64, f32, |x: f64| x as f32),
            (DType::F32, DType::F16) => convert!(f32, f16, f16::from_f32),
            (DType::F32, DType::BF16) => convert!(f32, bf16, bf16::from_f32),
            (_, DType::F64) => out.as_mut_slice::<f64>().copy_from_slice(&self.to_f64_vec()),
            (_, DType::F16) => {
                let wide = self.to_f64_vec();
                for (o, x) in out.as_mut_slice::<f16>().iter_mut().zip(wide) {
                    *o = f16::from_f64(x);
                }
            }
            (_, DType::BF16) => {
                let wide = self.to_f64_vec();
                for (o, x) in out.as_mut_slice::<bf16>().iter_mut().zip(wide) {
                    *o = bf16::from_f64(x);
                }
            }
            (from, to) => panic!("no conversion from {from} to {to}"),
        }
        out
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {})", self.dtype, self.shape)
    }
}
