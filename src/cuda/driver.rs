//! The real driver: NVIDIA's driver API, opened at run time through `cudarc`, and nothing else of CUDA.
//!
//! `cudarc` panics when the driver's library, or a function in it, is missing: every way in goes through [`present`], which
//! looks for the library and refuses one older than CUDA 12.0, where all that is called here exists.

// With their paths: this file has another module's name when the emulator takes its place.
#[path = "driver/beside.rs"]
mod beside;
#[path = "driver/images.rs"]
mod images;
#[path = "driver/staging.rs"]
mod staging;

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_void};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::{DriverError, result, sys};

use super::failure::{Failure, Result};
use super::{Description, Loaded};
use images::{Choice, UNITS, Unit, inflated};
use staging::Staging;

/// What a call of the driver returns.
type Called<T, E = DriverError> = std::result::Result<T, E>;

/// Dynamic shared memory that a kernel may use without asking.
const SHARED_UNASKED: u32 = 48 << 10;

/// One open device. It is never closed: it is used until the process ends, which gives everything back.
pub(super) struct Driver {
    context: sys::CUcontext,
    /// Kernels and what is copied or set between them, in the order it was asked for.
    stream: sys::CUstream,
    /// Copies to the card that run beside the kernels.
    uploads: sys::CUstream,
    /// Copies from the card that run beside the kernels.
    downloads: sys::CUstream,
    functions: HashMap<&'static str, Function>,
    loaded: Vec<Loaded>,
    staging: Mutex<Staging>,
    description: Description,
}

/// A kernel, loaded.
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that it has been allowed so far.
    allowed: AtomicU32,
}

// SAFETY: contexts, streams and functions belong to the process; the driver's API may be called from any thread once the
// context is current there (`enter`), and everything mutable is atomic or behind the mutex.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// A point in the work of the stream.
#[derive(Debug)]
pub(super) struct Event(sys::CUevent);

// SAFETY: an event belongs to the process and may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

/// A point in the work of one stream that another one, or the program, waits for.
#[derive(Debug)]
pub(super) struct Fence(sys::CUevent);

// SAFETY: an event belongs to the process and may be used from any thread.
unsafe impl Send for Fence {}
// SAFETY: as above.
unsafe impl Sync for Fence {}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Driver({})", self.description.name)
    }
}

impl Driver {
    /// Is this device emulated on the CPU?
    pub const EMULATED: bool = false;

    /// Opens device `ordinal` and loads every kernel.
    pub fn open(ordinal: u8) -> Result<Driver> {
        let driver_version = present()?;
        let count = count()?;
        if usize::from(ordinal) >= count {
            return Err(Failure::Unavailable {
                found: format!("{count} device{}", if count == 1 { "" } else { "s" }),
                expected: format!("device {ordinal} among them"),
                remedy: format!("use --device cuda:0{}", up_to(count - 1)),
            });
        }
        let failed = |error| failed("open the device", error);
        let device = result::device::get(i32::from(ordinal)).map_err(failed)?;
        let description = describe(device, driver_version).map_err(failed)?;
        check(&description)?;
        // SAFETY: the device was given by the driver; the context is never released.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed)?;
        // SAFETY: the context was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed)?;
        let stream = || result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed);
        let (stream, uploads, downloads) = (stream()?, stream()?, stream()?);
        let mut functions = HashMap::new();
        let units = UNITS.iter();
        let loaded = units.map(|unit| load(unit, &description, &mut functions));
        let loaded = loaded.collect::<Result<_>>()?;
        Ok(Driver {
            context,
            stream,
            uploads,
            downloads,
            functions,
            loaded,
            staging: Mutex::default(),
            description,
        })
    }

    /// How many devices there are.
    pub fn device_count() -> Result<usize> {
        present()?;
        count()
    }

    pub fn describe(&self) -> Description {
        self.description.clone()
    }

    pub fn loaded(&self) -> Vec<Loaded> {
        self.loaded.clone()
    }

    /// Free and total bytes.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(|e| failed("ask for free memory", e))?;
        Ok((free as u64, total as u64))
    }

    /// Plain device memory, contents unspecified.
    pub fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: whoever reads the memory has written it before.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(address) => Ok(address),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (free, total) = self.memory()?;
                Err(Failure::OutOfMemory {
                    asked: bytes as u64,
                    free,
                    total,
                })
            }
            Err(error) => Err(failed("allocate", error)),
        }
    }

    /// Frees what [`Driver::allocate`] gave, when the device has finished with it.
    pub fn free(&self, address: u64) {
        // A failure is one of earlier work: the next call that can return it does.
        if self.synchronize().is_ok() {
            // SAFETY: the address came from `allocate` and is freed once, by its owner.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    /// Copies to the device in the stream's order; returns when `from` may be reused.
    pub fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        self.enter()?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: Memory checks that `from` fits the allocation at `to`.
        unsafe { staging.upload(self.stream, to, from) }
    }

    /// Copies from the device; returns when everything asked before is done and `to` is filled.
    pub fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: Memory checks that `to` fits the allocation at `from`.
        unsafe { staging.download(self.stream, from, to) }
    }

    /// Copies within the device, in the stream's order.
    pub fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: Memory checks both ranges; they are of two allocations.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.map_err(|e| failed("copy", e))
    }

    /// Sets bytes to 0, in the stream's order.
    pub fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: Memory checks the range.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }.map_err(|e| failed("zero", e))
    }

    /// Launches a kernel in the stream's order.
    ///
    /// # Safety
    /// `params` are the kernel's, and every pointer in them is good for what the kernel does with it.
    // SAFETY: as above.
    pub unsafe fn launch(
        &self,
        kernel: &str,
        blocks: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        params: *const c_void,
        _params_bytes: usize,
    ) -> Result<()> {
        let Some(function) = self.functions.get(kernel) else {
            let (major, minor) = self.description.capability;
            return Err(Failure::Call {
                code: "no such kernel".into(),
                what: format!("this program has no {kernel} for compute capability {major}.{minor}"),
            });
        };
        self.enter()?;
        if shared_bytes > SHARED_UNASKED && shared_bytes > function.allowed.load(Ordering::Relaxed) {
            let what = format!("allow {kernel} {shared_bytes} bytes of shared memory");
            let limit = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function's module is never unloaded.
            unsafe { result::function::set_function_attribute(function.handle, limit, shared_bytes as i32) }
                .map_err(|e| failed(what, e))?;
            function.allowed.fetch_max(shared_bytes, Ordering::Relaxed);
        }
        let [x, y, z] = blocks;
        // SAFETY: the driver reads the parameters, whose size it knows from the kernel, before it returns, and writes
        // nothing there; the caller answers for them.
        unsafe {
            result::launch_kernel(
                function.handle,
                (x, y, z),
                (threads, 1, 1),
                shared_bytes,
                self.stream,
                &mut [params.cast_mut()],
            )
        }
        .map_err(|e| failed(format!("launch {kernel}"), e))
    }

    /// Waits until everything asked of the device is done.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        for stream in [self.stream, self.uploads, self.downloads] {
            // SAFETY: streams live as long as the process.
            unsafe { result::stream::synchronize(stream) }.map_err(|e| failed("wait for the device", e))?;
        }
        Ok(())
    }

    /// Marks the present end of the stream.
    pub fn record(&self) -> Result<Event> {
        self.enter()?;
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = Event(result::event::create(flags).map_err(|e| failed("create an event", e))?);
        // SAFETY: event and stream are of the same context and alive.
        unsafe { result::event::record(event.0, self.stream) }.map_err(|e| failed("record an event", e))?;
        Ok(event)
    }

    /// Milliseconds between two marks; waits for the second.
    pub fn elapsed_ms(&self, from: &Event, to: &Event) -> Result<f32> {
        self.enter()?;
        // SAFETY: both events are alive and were recorded on the stream when they were made.
        unsafe {
            result::event::synchronize(to.0)
                .and_then(|()| result::event::elapsed(from.0, to.0))
                .map_err(|e| failed("measure time", e))
        }
    }

    /// Makes the device's context the calling thread's.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context is never released.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| failed("enter the context", e))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record`, destroyed once. The driver keeps what a pending record needs.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// Is there a driver that has every function used here? Returns the CUDA version it supports.
fn present() -> Result<(u32, u32)> {
    // SAFETY: opens and closes a library; its initialisers are NVIDIA's.
    if !unsafe { sys::is_culib_present() } {
        return Err(Failure::Unavailable {
            found: "no NVIDIA driver on this machine".into(),
            expected: "driver 525 or newer".into(),
            remedy: "install it, or use --device cpu".into(),
        });
    }
    let mut version = 0;
    // SAFETY: may be called before anything else, and exists in every driver; `version` is written.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    if version < 12_000 {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(Failure::Unavailable {
            found: match asked {
                sys::CUresult::CUDA_SUCCESS => format!("an NVIDIA driver for CUDA {major}.{minor}"),
                error => format!("an NVIDIA driver that does not answer ({error:?})"),
            },
            expected: "driver 525 (CUDA 12.0) or newer".into(),
            remedy: "update the driver, or use --device cpu".into(),
        });
    }
    let version = version as u32;
    Ok((version / 1000, version % 1000 / 10))
}

/// The number of devices, at least one.
fn count() -> Result<usize> {
    let none = |found: &str, remedy: &str| Failure::Unavailable {
        found: found.into(),
        expected: "a graphics card that the driver can use".into(),
        remedy: remedy.into(),
    };
    let no_card = || {
        let found = "an NVIDIA driver, but no card";
        none(
            found,
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu",
        )
    };
    use sys::CUresult as Code;
    let count = result::init()
        .and_then(|()| result::device::get_count())
        .map_err(|error| match error.0 {
            Code::CUDA_ERROR_NO_DEVICE => no_card(),
            Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => none(
                "an NVIDIA library and kernel module of different versions",
                "restart the machine",
            ),
            Code::CUDA_ERROR_STUB_LIBRARY => none(
                "the toolkit's stub library in place of the driver",
                "take the stubs folder out of LD_LIBRARY_PATH",
            ),
            Code::CUDA_ERROR_UNKNOWN => none(
                "an NVIDIA driver that does not start",
                "restart the machine, or reload its module nvidia_uvm",
            ),
            _ => failed("start the driver", error),
        })?;
    match usize::try_from(count) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(no_card()),
    }
}

fn describe(device: sys::CUdevice, driver_version: (u32, u32)) -> Called<Description> {
    use sys::CUdevice_attribute as Attribute;
    // SAFETY: the device was given by the driver.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) }.map(|n| n.max(0) as u32);
    Ok(Description {
        name: result::device::get_name(device)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        total_bytes: unsafe { result::device::total_mem(device) }? as u64,
        driver_version,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
    })
}

/// Can this card, under this driver, run the kernels at all?
fn check(description: &Description) -> Result<()> {
    let Description {
        name,
        capability: (major, minor),
        driver_version,
        ..
    } = description;
    let unavailable = |found: String, expected: &str, remedy: &str| {
        Err(Failure::Unavailable {
            found,
            expected: expected.into(),
            remedy: remedy.into(),
        })
    };
    if (*major, *minor) < (7, 5) {
        return unavailable(
            format!("{name} of compute capability {major}.{minor}"),
            "7.5 or newer (GeForce RTX 20, T4)",
            "use another card, or --device cpu",
        );
    }
    if *major >= 12 && *driver_version < (12, 8) {
        let (cuda_major, cuda_minor) = driver_version;
        return unavailable(
            format!("{name} with a driver for CUDA {cuda_major}.{cuda_minor}"),
            "driver 570 (CUDA 12.8) or newer",
            "update the driver, or use --device cpu",
        );
    }
    Ok(())
}

/// Loads the machine code of `unit`, or else its PTX, and adds its kernels to `functions`.
fn load(
    unit: &Unit,
    description: &Description,
    functions: &mut HashMap<&'static str, Function>,
) -> Result<Loaded> {
    let Choice { cubin, ptx, kernels } = unit.choose(description.capability);
    let mut tried = Vec::new();
    let mut code = "no code".to_owned();
    let mut module = None;
    if let Some((arch, cubin)) = cubin {
        match load_cubin(cubin) {
            Ok(loaded) => module = Some((loaded, format!("machine code for sm_{arch}"))),
            Err(error) => {
                tried.push(format!("machine code for sm_{arch}: {}", said(error)));
                code = name(error);
            }
        }
    }
    if let (None, Some((base, ptx))) = (&module, ptx) {
        match load_ptx(ptx) {
            Ok(loaded) => module = Some((loaded, format!("PTX for compute_{base}"))),
            Err((error, log)) => {
                let log = log.lines().next().unwrap_or("no log");
                tried.push(format!("PTX for compute_{base}: {} ({log})", said(error)));
                code = name(error);
            }
        }
    }
    let Some((module, loaded)) = module else {
        let Description {
            name,
            capability: (major, minor),
            ..
        } = description;
        tried.push(format!("{name} has compute capability {major}.{minor}"));
        let what = format!("load the kernels of {}.cu: {}", unit.name, tried.join("; "));
        return Err(Failure::Call { code, what });
    };
    for &kernel in kernels {
        let symbol = CString::new(kernel).expect("a kernel's name has no zero byte");
        // SAFETY: the module was just loaded and is never unloaded.
        let handle = unsafe { result::module::get_function(module, symbol) }
            .map_err(|e| failed(format!("find {kernel} in {}.cu", unit.name), e))?;
        let allowed = AtomicU32::new(SHARED_UNASKED);
        functions.insert(kernel, Function { handle, allowed });
    }
    Ok(Loaded {
        unit: unit.name.into(),
        code: loaded,
        kernels: kernels.len(),
    })
}

fn load_cubin(packed: &[u8]) -> Called<sys::CUmodule> {
    let cubin = inflated(packed);
    // The driver reads 8-byte fields where they stand, and bytes may stand anywhere.
    let mut aligned = vec![0u64; cubin.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut aligned)[..cubin.len()].copy_from_slice(&cubin);
    // SAFETY: an ELF image as ptxas wrote it; the driver keeps no reference to it.
    unsafe { result::module::load_data(aligned.as_ptr().cast()) }
}

/// Also returns what the driver's compiler has to say when it fails.
fn load_ptx(packed: &[u8]) -> Called<sys::CUmodule, (DriverError, String)> {
    let text = CString::new(inflated(packed)).expect("PTX has no zero byte");
    let mut log = vec![0u8; 4096];
    let mut options = [
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
    ];
    // Each value is passed in the bits of a pointer.
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), log.len() as *mut c_void];
    let mut module = std::ptr::null_mut();
    // SAFETY: the text ends in a zero byte, the log is as long as the second option says, both arrays have two elements.
    let code = unsafe {
        sys::cuModuleLoadDataEx(
            &raw mut module,
            text.as_ptr().cast::<c_char>().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
    let log = String::from_utf8_lossy(&log[..end]).into_owned();
    code.result().map(|()| module).map_err(|error| (error, log))
}

fn failed(what: impl Into<String>, error: DriverError) -> Failure {
    if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        // Not only allocations take memory: a kernel's first launch may, for its code and its threads' own.
        let (free, total) = result::mem_get_info().unwrap_or((0, 0));
        return Failure::OutOfMemory {
            asked: 0,
            free: free as u64,
            total: total as u64,
        };
    }
    Failure::Call {
        code: name(error),
        what: format!("{}: {}", what.into(), said(error)),
    }
}

/// The error as `CUDA_ERROR_ILLEGAL_ADDRESS (700)`.
fn name(error: DriverError) -> String {
    format!("{:?} ({})", error.0, error.0 as u32)
}

/// What the driver says of the error.
fn said(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => "the driver does not know this error".into(),
    }
}

fn up_to(last: usize) -> String {
    match last {
        0 => String::new(),
        last => format!(" to cuda:{last}"),
    }
}

#[cfg(test)]
#[path = "driver/tests.rs"]
mod tests;
