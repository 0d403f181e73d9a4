//! How time is taken.
//!
//! Buffers are rotated so that no call finds its operands in a cache. On a device time is that between two events around many
//! calls; before the first of them the device is given copies to do, so that the host, which takes a few microseconds for a
//! launch, is ahead of it and only the device's time is seen. What a call costs the host stands beside it.

use std::time::Instant;

use crate::cuda;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// How long and how often to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Protocol {
    /// Measurements of each case; their median is reported.
    pub repeats: usize,
    /// Milliseconds that one measurement should take at least.
    pub repeat_ms: f64,
    /// Operands are copied until they have this many bytes together: more than any cache holds.
    pub rotate_bytes: usize,
    /// Side of the square matrices whose product is the ceiling of all products.
    pub side: usize,
}

impl Protocol {
    /// For figures.
    pub const FULL: Self = Self {
        repeats: 7,
        repeat_ms: 3.0,
        rotate_bytes: 256 << 20,
        side: 8192,
    };
    /// To see that everything runs.
    pub const QUICK: Self = Self {
        repeats: 2,
        repeat_ms: 0.1,
        rotate_bytes: 1 << 10,
        side: 128,
    };

    /// How many copies of an operand of `bytes` to rotate among. One that is larger than any cache sweeps it by itself.
    pub fn copies(&self, bytes: usize) -> usize {
        if bytes >= 2 * self.rotate_bytes {
            1
        } else {
            self.rotate_bytes.div_ceil(bytes.max(1)).clamp(4, 64)
        }
    }
}

/// What was measured: microseconds of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Times {
    /// The median of the measurements.
    pub us: f64,
    /// The fastest.
    pub min_us: f64,
    /// The slowest.
    pub max_us: f64,
    /// The host's part: checks and launches.
    pub host_us: f64,
    /// Measurements.
    pub repeats: usize,
    /// Calls in each.
    pub calls: usize,
}

/// The most time that the host may be ahead: a driver's queue holds about a thousand launches.
const AHEAD_MS: f64 = 2.0;
/// Bytes of one copy that keeps the device busy.
const BUSY_BYTES: usize = 128 << 20;

/// Takes times on one device.
pub struct Stopwatch {
    device: Device,
    protocol: Protocol,
    busy: Option<Busy>,
}

struct Busy {
    from: Tensor,
    to: Tensor,
    /// Milliseconds of one copy.
    ms: f64,
}

impl Stopwatch {
    /// # Errors
    /// The device has no room for the copies that keep it busy.
    pub fn new(device: Device, protocol: Protocol) -> Result<Self> {
        let mut watch = Self {
            device,
            protocol,
            busy: None,
        };
        // An emulated device has done everything before a launch returns.
        if device != Device::Cpu && !cuda::emulated() {
            let buffer = || Tensor::zeros_on(device, DType::U8, [BUSY_BYTES]);
            let (from, mut to) = (buffer()?, buffer()?);
            let mut copies = |n: usize| watch.span(n, &mut |_| to.copy_from(&from));
            copies(4)?;
            let ms = copies(16)?.0 / 16.0;
            watch.busy = Some(Busy { from, to, ms });
        }
        Ok(watch)
    }

    /// Measures `call`, which is given the number of the call: modulo `copies` that of its operands.
    ///
    /// # Errors
    /// Whatever `call` returns, and failures of the device.
    pub fn times(&mut self, copies: usize, call: &mut dyn FnMut(usize) -> Result<()>) -> Result<Times> {
        self.span(copies, call)?;
        let (ms, host_ms) = self.span(copies, call)?;
        let (each, host_each) = (ms / copies as f64, host_ms / copies as f64);
        let mut calls = (self.protocol.repeat_ms / each.max(1e-4)).ceil();
        if self.busy.is_some() {
            calls = calls.min(AHEAD_MS / host_each.max(1e-4));
        }
        // Whole rounds: every measurement meets the same operands.
        let calls = (calls as usize).div_ceil(copies).clamp(1, 4096) * copies;
        let ahead_ms = 1.25 * host_each * calls as f64;
        let mut spans = Vec::with_capacity(self.protocol.repeats);
        for _ in 0..self.protocol.repeats {
            self.keep_busy(ahead_ms.min(AHEAD_MS * 2.0))?;
            spans.push(self.span(calls, call)?);
        }
        spans.sort_by(|a, b| a.0.total_cmp(&b.0));
        let us = |ms: f64| 1e3 * ms / calls as f64;
        let mut host: Vec<f64> = spans.iter().map(|span| us(span.1)).collect();
        host.sort_by(f64::total_cmp);
        Ok(Times {
            us: median(&spans.iter().map(|span| us(span.0)).collect::<Vec<_>>()),
            min_us: us(spans[0].0),
            max_us: us(spans[spans.len() - 1].0),
            host_us: median(&host),
            repeats: spans.len(),
            calls,
        })
    }

    fn keep_busy(&mut self, ms: f64) -> Result<()> {
        let Some(busy) = &mut self.busy else { return Ok(()) };
        for _ in 0..(ms / busy.ms).ceil() as usize {
            busy.to.copy_from(&busy.from)?;
        }
        Ok(())
    }

    /// Milliseconds of `calls` calls, and of the host until the last was launched.
    fn span(&self, calls: usize, call: &mut dyn FnMut(usize) -> Result<()>) -> Result<(f64, f64)> {
        let mut run = || -> Result<f64> {
            let start = Instant::now();
            for i in 0..calls {
                call(i)?;
            }
            Ok(start.elapsed().as_secs_f64() * 1e3)
        };
        match self.device {
            Device::Cpu => run().map(|ms| (ms, ms)),
            Device::Cuda(ordinal) => {
                let from = cuda::record(ordinal)?;
                let host_ms = run()?;
                let to = cuda::record(ordinal)?;
                Ok((f64::from(cuda::elapsed_ms(ordinal, &from, &to)?), host_ms))
            }
        }
    }
}

/// The middle of sorted numbers; NaN of none.
pub fn median(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => 0.5 * (sorted[n / 2 - 1] + sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_operands_are_copied_until_no_cache_holds_them() {
        let full = Protocol::FULL;
        for (bytes, copies) in [
            (1 << 10, 64),
            (8 << 20, 32),
            (64 << 20, 4),
            (255 << 20, 4),
            (1 << 30, 1),
        ] {
            assert_eq!(full.copies(bytes), copies, "{bytes}");
        }
    }

    #[test]
    fn every_measurement_makes_whole_rounds() {
        let mut watch = Stopwatch::new(Device::Cpu, Protocol::QUICK).unwrap();
        let mut calls = [0; 5];
        let times = watch
            .times(5, &mut |i| {
                calls[i % 5] += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(calls, [calls[0]; 5]);
        assert!(times.calls.is_multiple_of(5) && times.min_us <= times.us && times.us <= times.max_us);
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
        assert!(median(&[]).is_nan());
    }
}
