//! Ctrl-C: the first one asks the run to stop after the current step, the second stops the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, Result};

/// A request to stop, looked at between steps.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    signals: Arc<AtomicU32>,
}

impl Interrupt {
    /// An interrupt that only [`Interrupt::request`] raises: for runs inside a program.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens for SIGINT, SIGTERM and SIGHUP. Once per process.
    ///
    /// # Errors
    /// The process listens already.
    pub fn listen() -> Result<Self> {
        let interrupt = Self::new();
        let signals = Arc::clone(&interrupt.signals);
        ctrlc::set_handler(move || {
            if signals.fetch_add(1, Ordering::Relaxed) > 0 {
                // Files are written beside their place and renamed: stopping here loses nothing that was saved.
                std::process::exit(130);
            }
            eprintln!("\nstopping after the work at hand; press Ctrl-C again to stop at once");
        })
        .map_err(|e| {
            Error::input(
                "signals",
                e,
                "one listener per process",
                "start the run in its own process",
            )
        })?;
        Ok(interrupt)
    }

    /// Asks the run to stop after the current step.
    pub fn request(&self) {
        self.signals.fetch_add(1, Ordering::Relaxed);
    }

    /// Looked at before the first step, where there is nothing to save yet.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if it was asked to stop.
    pub fn check(&self, step: u64) -> Result<()> {
        if !self.requested() {
            return Ok(());
        }
        let saved = "nothing new was there to save; the same command starts again (add --overwrite if it says that the \
                     folder is not empty)"
            .to_string();
        Err(Error::Interrupted { step, saved })
    }

    /// Was it asked to stop?
    pub fn requested(&self) -> bool {
        self.signals.load(Ordering::Relaxed) > 0
    }
}
