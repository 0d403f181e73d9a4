//! The one tensor: owned, contiguous, row-major, without views, strides or broadcasting.
//!
//! A tensor's bytes are owned, borrowed from a memory-mapped file that it keeps alive ([`Tensor::from_bytes`]: a frozen
//! weight is used where the checkpoint stores it), those of a scratch file ([`Tensor::from_scratch`]), or on a CUDA device. A planned tensor ([`ledger::Ledger::plan`]) has sizes only.
//! Operations on tensors live in [`crate::ops`].

mod buffer;
mod bytes;
pub mod ledger;
mod transfer;
mod types;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

pub use bytes::{Bytes, ScratchBytes};
pub use types::{Compute, DType, Device, Element, Shape};

use self::buffer::{Buffer, Planned, Scratch, Words};
use crate::cuda::Memory;
use crate::error::{Error, Result};

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
    // A plan asks for nothing.
    let given = ledger::planning()
        || usize::try_from(bytes).is_ok_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok());
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
        let bytes = shape.elements() * dtype.size();
        Self {
            buffer: if ledger::planning() {
                Buffer::Planned(Planned::new(Device::Cpu, bytes))
            } else {
                ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
                Buffer::Host(Words::zeroed(bytes))
            },
            shape,
            dtype,
        }
    }

    /// A frozen tensor of a mapped file that is not there: no memory, in plans only.
    pub fn planned_mapped(dtype: DType, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Self {
            buffer: Buffer::Planned(Planned::mapped(shape.elements() * dtype.size())),
            shape,
            dtype,
        }
    }

    /// Is the tensor part of a plan, without memory and without contents?
    pub fn is_planned(&self) -> bool {
        matches!(self.buffer, Buffer::Planned(_))
    }

    /// What the tensor will be on `device`, when this is a plan.
    fn planned_on(&self, device: Device, dtype: DType) -> Option<Self> {
        (ledger::planning() || self.is_planned()).then(|| Self {
            buffer: Buffer::Planned(Planned::new(device, self.elements() * dtype.size())),
            shape: self.shape,
            dtype,
        })
    }

    /// A tensor of zeros on `device`.
    ///
    /// # Errors
    /// The device has no room, or there is no such device.
    pub fn zeros_on(device: Device, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        match device {
            Device::Cpu => Ok(Self::zeros(dtype, shape)),
            Device::Cuda(_) if ledger::planning() => Ok(Self {
                buffer: Buffer::Planned(Planned::new(device, shape.elements() * dtype.size())),
                shape,
                dtype,
            }),
            Device::Cuda(ordinal) => {
                ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
                let bytes = shape.elements() * dtype.size();
                let mut memory = Memory::new(ordinal, bytes)?;
                memory.zero(bytes)?;
                Ok(Self {
                    buffer: Buffer::Cuda(Arc::new(memory)),
                    shape,
                    dtype,
                })
            }
        }
    }

    /// A copy of `data`.
    pub fn from_slice<T: Element>(data: &[T], shape: impl Into<Shape>) -> Self {
        let mut tensor = Self::zeros(T::DTYPE, shape);
        if !tensor.is_planned() {
            tensor.as_mut_slice::<T>().copy_from_slice(data);
        }
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

    /// A tensor in a scratch file, which is read and written where the file is mapped. A clone of it is an ordinary tensor.
    ///
    /// # Errors
    /// The number of bytes is not that of `shape` and `dtype`, or they are not aligned.
    pub fn from_scratch(bytes: Box<dyn ScratchBytes>, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let expected = shape.elements() * dtype.size();
        let found = bytes.as_slice();
        if found.len() != expected || found.as_ptr().align_offset(dtype.size()) != 0 {
            return Err(Error::Shape {
                operation: "Tensor::from_scratch",
                found: format!("{} bytes at {:p}", found.len(), found),
                expected: format!("{expected} aligned bytes for {dtype} {shape}"),
            });
        }
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            buffer: Buffer::Scratch(Scratch::new(bytes)),
            shape,
            dtype,
        })
    }

    /// A tensor in a scratch file that is not there, in plans only.
    pub fn planned_scratch(dtype: DType, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Self {
            buffer: Buffer::Planned(Planned::scratch(shape.elements() * dtype.size())),
            shape,
            dtype,
        }
    }

    /// Does the tensor lie in a scratch file?
    pub fn is_scratch(&self) -> bool {
        match &self.buffer {
            Buffer::Scratch(_) => true,
            Buffer::Planned(planned) => planned.is_of(ledger::Pool::Disk),
            _ => false,
        }
    }

    /// Says that the elements will be read soon: those of a scratch file begin to come from the disk.
    pub fn will_be_read(&self) {
        if let Buffer::Scratch(scratch) = &self.buffer {
            scratch.bytes.will_be_read();
        }
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
        match &self.buffer {
            Buffer::Cuda(memory) => Device::Cuda(memory.ordinal()),
            Buffer::Planned(planned) => planned.device,
            Buffer::Host(_) | Buffer::Mapped(_) | Buffer::Scratch(_) | Buffer::Pinned(_) => Device::Cpu,
        }
    }

    /// Bytes of memory or of a scratch file that this tensor owns (0 when it is of a mapped file).
    pub fn owned_bytes(&self) -> usize {
        match &self.buffer {
            Buffer::Host(words) => words.words.len() * 8,
            Buffer::Mapped(_) => 0,
            Buffer::Scratch(scratch) => scratch.bytes.as_slice().len(),
            Buffer::Pinned(pinned) => pinned.len(),
            Buffer::Cuda(memory) => memory.len(),
            Buffer::Planned(planned) => planned.owned(),
        }
    }

    /// The number of bytes of the elements.
    pub fn byte_len(&self) -> usize {
        self.elements() * self.dtype.size()
    }

    /// A copy on `device`, or the tensor itself when it lives there.
    ///
    /// # Errors
    /// The device has no room, or a copy fails.
    pub fn into_device(self, device: Device) -> Result<Self> {
        if self.device() == device {
            Ok(self)
        } else {
            self.to_device(device)
        }
    }

    /// A copy on `device`.
    ///
    /// # Errors
    /// The device has no room, or a copy fails.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        if let Some(planned) = self.planned_on(device, self.dtype) {
            return Ok(planned);
        }
        self.arrive()?;
        match (&self.buffer, device) {
            (Buffer::Cuda(memory), Device::Cpu) => {
                let mut host = Self::zeros(self.dtype, self.shape);
                memory.download(0, host.bytes_mut())?;
                Ok(host)
            }
            (Buffer::Cuda(_), Device::Cuda(_)) => self.to_device(Device::Cpu)?.to_device(device),
            (_, Device::Cpu) => {
                let mut host = Self::zeros(self.dtype, self.shape);
                host.bytes_mut().copy_from_slice(self.bytes());
                Ok(host)
            }
            (_, Device::Cuda(ordinal)) => {
                ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
                let mut memory = Memory::new(ordinal, self.byte_len())?;
                memory.upload(0, self.bytes())?;
                Ok(Self {
                    buffer: Buffer::Cuda(Arc::new(memory)),
                    shape: self.shape,
                    dtype: self.dtype,
                })
            }
        }
    }

    /// A copy on `device` in the floating-point type `dtype`, converted in pieces: a mapped tensor of any size needs no
    /// second copy in host memory on its way to a device.
    ///
    /// # Errors
    /// As [`Tensor::to_device`].
    pub fn to_device_as(&self, device: Device, dtype: DType) -> Result<Self> {
        if dtype == self.dtype {
            return self.to_device(device);
        }
        if let Some(planned) = self.planned_on(device, dtype) {
            return Ok(planned);
        }
        let Device::Cuda(ordinal) = device else {
            return Ok(self.to_dtype(dtype));
        };
        const PIECE: usize = 1 << 22;
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        let mut memory = Memory::new(ordinal, self.elements() * dtype.size())?;
        for (i, piece) in self.bytes().chunks(PIECE * self.dtype.size()).enumerate() {
            let mut source = Self::zeros(self.dtype, [piece.len() / self.dtype.size()]);
            source.bytes_mut().copy_from_slice(piece);
            let converted = source.to_dtype(dtype);
            memory.upload(i * PIECE * dtype.size(), converted.bytes())?;
        }
        Ok(Self {
            buffer: Buffer::Cuda(Arc::new(memory)),
            shape: self.shape,
            dtype,
        })
    }

    /// Overwrites every element with `data`, wherever the tensor lives. Panics when `T` is not the tensor's type.
    ///
    /// # Errors
    /// There are more or fewer elements, or the copy fails.
    pub fn write<T: Element>(&mut self, data: &[T]) -> Result<()> {
        assert_eq!(
            self.dtype,
            T::DTYPE,
            "tensor holds {}, given {}",
            self.dtype,
            T::DTYPE
        );
        if data.len() != self.elements() {
            return Err(Error::Shape {
                operation: "Tensor::write",
                found: format!("{} elements", data.len()),
                expected: format!("{} for {}", self.elements(), self.shape),
            });
        }
        self.write_bytes(bytemuck::cast_slice(data))
    }

    /// Copies every element of `from`, which has the same type and number of elements and may live elsewhere.
    ///
    /// # Errors
    /// Type or number differ, or the copy fails.
    pub fn copy_from(&mut self, from: &Tensor) -> Result<()> {
        if self.dtype != from.dtype || self.elements() != from.elements() {
            return Err(Error::Shape {
                operation: "Tensor::copy_from",
                found: format!("{from:?}"),
                expected: format!("{self:?}"),
            });
        }
        if self.is_planned() {
            return Ok(());
        }
        match (&mut self.buffer, &from.buffer) {
            (Buffer::Cuda(to), Buffer::Cuda(source)) if to.ordinal() == source.ordinal() => {
                exclusive(to).copy_from(source, from.byte_len())
            }
            (Buffer::Host(_) | Buffer::Scratch(_) | Buffer::Pinned(_), Buffer::Cuda(source)) => {
                source.download(0, self.bytes_mut())
            }
            (_, Buffer::Cuda(_)) => {
                let host = from.to_device(Device::Cpu)?;
                self.write_bytes(host.bytes())
            }
            _ => self.write_bytes(from.bytes()),
        }
    }

    /// `self[at..] = from[range]`, counted in elements, of a tensor of the same type in the same place.
    ///
    /// # Errors
    /// Type or place differ, a range lies outside its tensor, or the copy fails.
    pub fn copy_range(&mut self, at: usize, from: &Tensor, range: Range<usize>) -> Result<()> {
        let within = |start: usize, tensor: &Tensor| {
            let end = start.checked_add(range.len());
            end.is_some_and(|end| end <= tensor.elements())
        };
        let fits = within(at, self) && within(range.start, from);
        if self.dtype != from.dtype || self.device() != from.device() || !fits {
            return Err(Error::Shape {
                operation: "Tensor::copy_range",
                found: format!("{range:?} of {from:?}"),
                expected: format!("as many elements from {at} of {self:?}"),
            });
        }
        if self.is_planned() {
            return Ok(());
        }
        let size = self.dtype.size();
        let (at, start, bytes) = (at * size, range.start * size, range.len() * size);
        match (&mut self.buffer, &from.buffer) {
            (Buffer::Cuda(to), Buffer::Cuda(source)) => exclusive(to).copy_range(at, source, start, bytes),
            _ => {
                self.bytes_mut()[at..at + bytes].copy_from_slice(&from.bytes()[start..start + bytes]);
                Ok(())
            }
        }
    }

    fn write_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        if let Buffer::Cuda(memory) = &mut self.buffer {
            return exclusive(memory).upload(0, bytes);
        }
        if self.is_planned() {
            return Ok(());
        }
        self.bytes_mut().copy_from_slice(bytes);
        Ok(())
    }

    /// Sets every element to 0.
    ///
    /// # Errors
    /// The device refuses.
    pub fn zero(&mut self) -> Result<()> {
        let bytes = self.byte_len();
        if let Buffer::Cuda(memory) = &mut self.buffer {
            return exclusive(memory).zero(bytes);
        }
        if self.is_planned() {
            return Ok(());
        }
        self.bytes_mut().fill(0);
        Ok(())
    }

    /// Where a kernel reads the elements; it runs after a copy that writes them. Panics on a host tensor: [`crate::ops`] checks before.
    pub(crate) fn device_ptr(&self) -> *const std::ffi::c_void {
        match &self.buffer {
            Buffer::Cuda(memory) => memory.address() as *const _,
            _ => panic!("a host tensor where a kernel wants one of the device"),
        }
    }

    /// Where a kernel writes the elements; it runs after the copies that read or write them. Panics on a host tensor, and on one that a clone shares.
    pub(crate) fn device_ptr_mut(&mut self) -> *mut std::ffi::c_void {
        match &mut self.buffer {
            Buffer::Cuda(memory) => exclusive(memory).address_mut() as *mut _,
            _ => panic!("a host tensor where a kernel wants one of the device"),
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
            Buffer::Host(words) => words.words.len() * 8 / self.dtype.size(),
            Buffer::Mapped(bytes) => bytes.len() / self.dtype.size(),
            Buffer::Scratch(scratch) => scratch.bytes.as_slice().len() / self.dtype.size(),
            Buffer::Pinned(pinned) => pinned.len() / self.dtype.size(),
            Buffer::Cuda(memory) => memory.len() / self.dtype.size(),
            Buffer::Planned(planned) => planned.bytes / self.dtype.size(),
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

    /// The raw bytes, waiting for a copy that writes them. Panics on a device tensor, which has none on the host: see [`Tensor::to_device`].
    pub fn bytes(&self) -> &[u8] {
        let n = self.byte_len();
        match &self.buffer {
            Buffer::Host(words) => &bytemuck::cast_slice(&words.words)[..n],
            Buffer::Mapped(bytes) => &bytes.as_slice()[..n],
            Buffer::Scratch(scratch) => &scratch.bytes.as_slice()[..n],
            Buffer::Pinned(pinned) => &pinned.as_slice()[..n],
            Buffer::Cuda(_) => panic!("a device tensor has no bytes on the host"),
            Buffer::Planned(_) => panic!("a planned tensor has no bytes"),
        }
    }

    /// The raw bytes, to write, waiting for the copies that they are part of. Panics on a mapped tensor, since frozen weights
    /// are never written, and on a device tensor.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let n = self.byte_len();
        match &mut self.buffer {
            Buffer::Host(words) => &mut bytemuck::cast_slice_mut(&mut words.words)[..n],
            Buffer::Mapped(_) => panic!("a mapped tensor is read-only"),
            Buffer::Scratch(scratch) => &mut scratch.bytes.as_mut_slice()[..n],
            Buffer::Pinned(pinned) => &mut pinned.as_mut_slice()[..n],
            Buffer::Cuda(_) => panic!("a device tensor has no bytes on the host"),
            Buffer::Planned(_) => panic!("a planned tensor has no bytes"),
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

    /// A copy of the rows `rows`, elements of a vector. Panics when there are fewer.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        let mut extents = self.shape.extents().to_vec();
        let row = self.byte_len() / extents[0].max(1);
        extents[0] = rows.len();
        let mut out = Self::zeros(self.dtype, Shape::new(&extents));
        out.bytes_mut()
            .copy_from_slice(&self.bytes()[rows.start * row..rows.end * row]);
        out
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
            DType::I8 => self.as_slice::<i8>().iter().map(|&x| f64::from(x)).collect(),
        }
    }

    /// A copy in another floating-point type, rounded to nearest even.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        let mut out = Self::zeros(dtype, self.shape);
        if out.is_planned() || self.is_planned() {
            return self.planned_on(Device::Cpu, dtype).unwrap_or(out);
        }
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
            (DType::F16, DType::F32) => self.as_slice::<f16>().convert_to_f32_slice(out.as_mut_slice()),
            (DType::BF16, DType::F32) => convert!(bf16, f32, bf16::to_f32),
            (DType::F64, DType::F32) => convert!(f64, f32, |x: f64| x as f32),
            (DType::F32, DType::F16) => out.as_mut_slice::<f16>().convert_from_f32_slice(self.as_slice()),
            (DType::F32, DType::BF16) => convert!(f32, bf16, bf16::from_f32),
            (DType::F16, DType::BF16) => convert!(f16, bf16, |x: f16| bf16::from_f32(x.to_f32())),
            (DType::BF16, DType::F16) => convert!(bf16, f16, |x: bf16| f16::from_f32(x.to_f32())),
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

/// Memory that is about to be written. Panics when a clone shares it: only frozen tensors are cloned on a device.
fn exclusive(memory: &mut Arc<Memory>) -> &mut Memory {
    match Arc::get_mut(memory) {
        Some(memory) => memory,
        None => panic!("a device tensor that a clone shares is read-only"),
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {})", self.dtype, self.shape)
    }
}
