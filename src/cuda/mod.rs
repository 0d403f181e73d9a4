//! The CUDA device: the launch geometry of every kernel, device memory, and the driver below them.
//!
//! Three drivers have one interface: the real one (`driver.rs`, feature `cuda`), the emulator (`driver_emu.rs`, feature
//! `emu`, which wins when both are on) and none. Nothing above this file knows which. All kernels of a device go to one
//! stream in the order they were asked for; copies from and to page-locked memory run beside it, and the memory that takes part
//! in one keeps the order (`pending.rs`). [`crate::ops`] has checked shapes and types before it calls a wrapper here.

pub(crate) mod attention;
pub(crate) mod dora;
mod failure;
#[cfg(feature = "emu")]
mod faults;
pub(crate) mod gemm;
pub(crate) mod int8;
mod lane_maps;
pub(crate) mod loss;
mod memory;
pub(crate) mod nf4;
pub(crate) mod nf4_linear;
pub(crate) mod norm;
pub(crate) mod optim;
mod pending;
mod pinned;
pub(crate) mod pointwise;
pub(crate) mod prefix;
pub(crate) mod rows;
mod sys;

#[cfg(feature = "emu")]
#[path = "driver_emu.rs"]
mod driver;
#[cfg(all(feature = "cuda", not(feature = "emu")))]
mod driver;
// Not used, but compiled and tested: one build of the tests is enough for both.
#[cfg(not(any(feature = "cuda", feature = "emu")))]
#[path = "driver_none.rs"]
mod driver;
#[cfg(all(feature = "cuda", feature = "emu"))]
#[path = "driver.rs"]
#[allow(dead_code)]
mod driver_cuda;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use driver::{Driver, Fence};
use failure::Failure;

use crate::error::{Error, Result};
use crate::tensor::{DType, Device as Place, Tensor};

#[cfg(feature = "emu")]
pub use driver::{Landing, copies_under_way, land_copies};
#[cfg(feature = "emu")]
pub use faults::{allocations, fail_allocation};
pub use lane_maps::{LaneMap, lane_maps};
pub(crate) use memory::Memory;
pub(crate) use pinned::Pinned;

/// Bytes of scratch that every device reserves when it is opened, for kernels that work in two passes.
pub const SCRATCH: usize = 32 << 20;

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The product's name.
    pub name: String,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// Bytes of device memory.
    pub total_bytes: u64,
    /// The CUDA version that the driver supports: major, minor.
    pub driver_version: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
}

/// One file of kernels, as a device runs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The file's name without its extension.
    pub unit: String,
    /// What of it was loaded: machine code for some architecture, or PTX that the driver translated.
    pub code: String,
    /// How many kernels it holds.
    pub kernels: usize,
}

/// An open device; there is one for each ordinal in a process.
#[derive(Debug)]
pub(crate) struct Device {
    ordinal: u8,
    driver: Driver,
    scratch: Mutex<OnceLock<u64>>,
    /// Why the compute stream could not be made to wait for a copy: nothing that it does can be trusted since.
    astray: OnceLock<Failure>,
    synchronous: bool,
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    /// Blocks along x, y and z.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// Memory for a kernel's partial results; held until the kernel that reads them has been launched.
pub(crate) struct Scratch<'a> {
    device: &'a Device,
    address: u64,
    _held: MutexGuard<'a, OnceLock<u64>>,
}

impl Scratch<'_> {
    /// [`SCRATCH`] bytes, 256-byte aligned.
    pub fn pointer(&self) -> *mut c_void {
        self.address as *mut c_void
    }

    /// Copies host bytes to `at..`, after everything launched before has finished with it.
    ///
    /// # Errors
    /// They do not fit, or the copy fails.
    pub fn upload(&self, operation: &'static str, at: usize, from: &[u8]) -> Result<()> {
        check_scratch(operation, at + from.len())?;
        let to = self.address + at as u64;
        self.device.call(operation, |driver| driver.upload(to, from))
    }

    /// Copies `at..` to the host, after everything launched before has finished.
    ///
    /// # Errors
    /// There are fewer bytes, or something launched before failed.
    pub fn download(&self, operation: &'static str, at: usize, to: &mut [u8]) -> Result<()> {
        check_scratch(operation, at + to.len())?;
        let from = self.address + at as u64;
        self.device.call(operation, |driver| driver.download(from, to))
    }
}

/// Do `bytes` bytes fit the scratch memory?
pub(crate) fn check_scratch(operation: &'static str, bytes: usize) -> Result<()> {
    if bytes <= SCRATCH {
        return Ok(());
    }
    Err(Error::Shape {
        operation,
        found: format!("partial results of {bytes} bytes"),
        expected: format!("at most {SCRATCH}"),
    })
}

/// The open device `ordinal`.
///
/// # Errors
/// There is none; the message says why and what to do.
pub(crate) fn device(ordinal: u8) -> Result<&'static Device> {
    static DEVICES: Mutex<BTreeMap<u8, &'static Device>> = Mutex::new(BTreeMap::new());
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = devices.get(&ordinal) {
        return Ok(device);
    }
    let driver = Driver::open(ordinal).map_err(|failure| worded("open", ordinal, failure, false))?;
    // A device is used until the process ends.
    let device: &'static Device = Box::leak(Box::new(Device {
        ordinal,
        driver,
        scratch: Mutex::default(),
        astray: OnceLock::new(),
        synchronous: std::env::var_os("GLMTUNE_SYNC").is_some_and(|value| value == "1"),
    }));
    devices.insert(ordinal, device);
    Ok(device)
}

/// Is the CUDA device of this program emulated on the CPU?
pub const fn emulated() -> bool {
    Driver::EMULATED
}

/// What device `ordinal` is.
///
/// # Errors
/// There is none; the message says why and what to do.
pub fn describe(ordinal: u8) -> Result<Description> {
    Ok(device(ordinal)?.driver.describe())
}

/// The kernels that device `ordinal` has loaded.
///
/// # Errors
/// There is no such device; the message says why and what to do.
pub fn loaded(ordinal: u8) -> Result<Vec<Loaded>> {
    Ok(device(ordinal)?.driver.loaded())
}

/// Free and total bytes of device `ordinal`.
///
/// # Errors
/// There is no such device.
pub fn memory_info(ordinal: u8) -> Result<(u64, u64)> {
    device(ordinal)?.call("memory", Driver::memory)
}

/// Bytes that tensors of this process hold on its devices: now, and at most since the last [`forget_peak`].
pub fn held_bytes() -> (u64, u64) {
    memory::held()
}

/// Starts to look for the peak of [`held_bytes`] anew.
pub fn forget_peak() {
    memory::forget_peak();
}

/// Bytes of the copies between host and device that run beside the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transfers {
    /// To the device: [`crate::ops::fetch`].
    pub fetched: u64,
    /// To the host: [`crate::ops::store`].
    pub stored: u64,
}

thread_local! {
    static TRANSFERS: Cell<Transfers> = const {
        Cell::new(Transfers {
            fetched: 0,
            stored: 0,
        })
    };
}

/// Bytes that this thread has asked to be copied beside the kernels so far.
pub fn transfers() -> Transfers {
    TRANSFERS.get()
}

fn count(part: impl FnOnce(&mut Transfers) -> &mut u64, bytes: usize) {
    let mut transfers = TRANSFERS.get();
    *part(&mut transfers) += bytes as u64;
    TRANSFERS.set(transfers);
}

/// How many devices there are.
///
/// # Errors
/// There is no driver, or it is too old.
pub fn device_count() -> Result<usize> {
    Driver::device_count().map_err(|failure| worded("count", 0, failure, false))
}

/// Waits until everything asked of device `ordinal` is done.
///
/// # Errors
/// Something of it failed.
pub fn synchronize(ordinal: u8) -> Result<()> {
    device(ordinal)?.call("synchronize", Driver::synchronize)
}

/// A point in the work of a device, to measure from.
#[derive(Debug)]
pub struct Event(driver::Event);

/// Marks the present end of the work of device `ordinal`.
///
/// # Errors
/// The driver refuses.
pub fn record(ordinal: u8) -> Result<Event> {
    device(ordinal)?.call("record", Driver::record).map(Event)
}

/// Milliseconds of device time between two marks; waits for the second.
///
/// # Errors
/// Something launched before it failed.
pub fn elapsed_ms(ordinal: u8, from: &Event, to: &Event) -> Result<f32> {
    device(ordinal)?.call("elapsed", |driver| driver.elapsed_ms(&from.0, &to.0))
}

/// Launches `operation` in its variant for `dtype`.
///
/// # Errors
/// There is no such kernel, or the driver refuses.
///
/// # Safety
/// `params` are the kernel's, and every pointer in them is good for what the kernel does with it.
// SAFETY: as above.
pub(crate) unsafe fn launch<P: Copy>(
    ordinal: u8,
    operation: &'static str,
    dtype: DType,
    grid: Grid,
    params: &P,
) -> Result<()> {
    let suffix = match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        other => {
            return Err(Error::Shape {
                operation,
                found: format!("{other} on a CUDA device"),
                expected: "float32, float16 or bfloat16".into(),
            });
        }
    };
    // SAFETY: the caller's promise.
    unsafe { launch_named(ordinal, operation, &format!("{operation}_{suffix}"), grid, params) }
}

/// Launches exactly `kernel` on behalf of `operation`.
///
/// # Errors
/// As [`launch`].
///
/// # Safety
/// As [`launch`].
// SAFETY: as above.
pub(crate) unsafe fn launch_named<P: Copy>(
    ordinal: u8,
    operation: &'static str,
    kernel: &str,
    grid: Grid,
    params: &P,
) -> Result<()> {
    let device = device(ordinal)?;
    if grid.blocks.contains(&0) {
        return Ok(());
    }
    device.call(operation, |driver| {
        let params = (&raw const *params).cast();
        // SAFETY: the caller's promise.
        unsafe {
            driver.launch(
                kernel,
                grid.blocks,
                grid.threads,
                grid.shared_bytes,
                params,
                size_of::<P>(),
            )
        }
    })?;
    if device.synchronous {
        device.call(operation, Driver::synchronize)?;
    }
    Ok(())
}

/// The number of the device that `tensor` lives on. Panics on a host tensor: [`crate::ops`] has looked.
fn ordinal(tensor: &Tensor) -> u8 {
    match tensor.device() {
        Place::Cuda(ordinal) => ordinal,
        Place::Cpu => panic!("a host tensor where a kernel wants one of the device"),
    }
}

/// `extent / per` rounded up, as a number of blocks.
///
/// # Errors
/// More blocks than a grid can have.
pub(crate) fn blocks(operation: &'static str, extent: usize, per: usize) -> Result<u32> {
    let blocks = extent.div_ceil(per);
    u32::try_from(blocks)
        .ok()
        .filter(|&blocks| blocks <= i32::MAX as u32)
        .ok_or_else(|| Error::Shape {
            operation,
            found: format!("{blocks} blocks for {extent} elements"),
            expected: format!("at most {} blocks", i32::MAX),
        })
}

/// A size as a kernel takes it.
///
/// # Errors
/// It is beyond 32 bits.
pub(crate) fn size(operation: &'static str, size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| Error::Shape {
        operation,
        found: format!("an extent of {size}"),
        expected: format!("at most {}", i32::MAX),
    })
}

impl Device {
    /// The device's scratch memory, for one caller at a time.
    ///
    /// # Errors
    /// The device has no room for it.
    pub fn scratch(&self) -> Result<Scratch<'_>> {
        let held = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let address = match held.get() {
            Some(&address) => address,
            None => {
                let address = self.call("scratch", |driver| driver.allocate(SCRATCH))?;
                *held.get_or_init(|| address)
            }
        };
        Ok(Scratch {
            device: self,
            address,
            _held: held,
        })
    }

    /// Device memory for a tensor, contents unspecified.
    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.call("allocate", |driver| {
            #[cfg(feature = "emu")]
            faults::count_allocation(|| {
                let (free, total) = driver.memory()?;
                let asked = bytes as u64;
                Err(Failure::OutOfMemory { asked, free, total })
            })?;
            // Drivers refuse to allocate nothing.
            driver.allocate(bytes.max(1))
        })
    }

    /// Page-locked host memory for a tensor, all 0.
    fn pin(&self, bytes: usize) -> Result<u64> {
        self.call("pin", |driver| {
            #[cfg(feature = "emu")]
            faults::count_allocation(|| Err(Failure::OutOfPinned { asked: bytes as u64 }))?;
            driver.pin(bytes.max(1))
        })
    }

    fn free(&self, address: u64) {
        self.driver.free(address);
    }

    /// What is asked of the device from now on runs after `fence`.
    fn join(&self, fence: &Fence) {
        if let Err(failure) = self.driver.join(fence) {
            let _ = self.astray.set(failure);
        }
    }

    fn call<T>(&self, operation: &'static str, f: impl FnOnce(&Driver) -> failure::Result<T>) -> Result<T> {
        let done = match self.astray.get() {
            Some(failure) => Err(failure.clone()),
            None => f(&self.driver),
        };
        done.map_err(|failure| worded(operation, self.ordinal, failure, self.synchronous))
    }
}

fn worded(operation: &'static str, ordinal: u8, failure: Failure, synchronous: bool) -> Error {
    match failure {
        Failure::Unavailable {
            found,
            expected,
            remedy,
        } => Error::input(format!("--device cuda:{ordinal}"), found, expected, remedy),
        Failure::OutOfMemory { asked, free, total } => {
            let mb = |bytes: u64| bytes as f64 / 1e6;
            Error::OutOfMemory {
                place: format!("memory of device cuda:{ordinal}"),
                found: format!(
                    "{:.1} MB free of {:.0} MB for {:.1} MB more",
                    mb(free),
                    mb(total),
                    mb(asked)
                ),
                remedy: "lower --micro-batch-size or --max-length, close what else uses the card, or use --device cpu",
            }
        }
        Failure::OutOfPinned { asked } => Error::OutOfMemory {
            place: "page-locked host memory".into(),
            found: format!("a refusal of {:.1} MB more", asked as f64 / 1e6),
            remedy: "close other programs, raise `ulimit -l`, or move less of the model off the card",
        },
        Failure::Call { code, what } => Error::Device {
            operation,
            device: ordinal,
            code,
            what,
            hint: if synchronous {
                ""
            } else {
                "; it may stem from an earlier operation: run again with GLMTUNE_SYNC=1 to see which"
            },
        },
    }
}
