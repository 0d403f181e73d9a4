//! Everything that can go wrong, one variant per kind of failure.
//!
//! A message names the place (file, flag, tensor), the value found, the value expected and the remedy, in one line.
//! [`Error::exit_code`] follows cargo: 2 for a wrong command line, 1 for everything else.

use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, worded for the person who has to mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused: `action` is an infinitive ("open", "write").
    #[error("{}: cannot {action}: {source}{}", path.display(), io_remedy(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as an infinitive.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file, flag or record holds something else than it must.
    #[error("{place}: found {found}, expected {expected}; {remedy}")]
    Input {
        /// File, `file:line`, tensor or flag.
        place: String,
        /// The value found.
        found: String,
        /// The value or range expected.
        expected: String,
        /// The one thing to do.
        remedy: String,
    },
    /// A device, or the host memory that it copies from and to, has no room.
    #[error("{place}: found {found}, expected enough of it; {remedy}")]
    OutOfMemory {
        /// Whose memory.
        place: String,
        /// What there is, and what was asked for.
        found: String,
        /// The one thing to do.
        remedy: &'static str,
    },
    /// Two tensors do not fit together: a bug in the program, or a file that was not checked.
    #[error("{operation}: found {found}, expected {expected}")]
    Shape {
        /// The operation of [`crate::ops`].
        operation: &'static str,
        /// The shapes found.
        found: String,
        /// The shapes expected.
        expected: String,
    },
    /// A loss, gradient or activation stopped being a number.
    #[error("step {step}: {what} is {value} (first seen in {layer}); {remedy}")]
    NonFinite {
        /// The optimizer step, counted from 1.
        step: u64,
        /// Loss, gradient norm, ...
        what: &'static str,
        /// `NaN` or `inf`.
        value: f64,
        /// The first layer in forward order whose values are not finite.
        layer: String,
        /// The one thing to do.
        remedy: String,
    },
    /// A CUDA call failed.
    #[error("{operation} on device cuda:{device}: {code}: {what}{hint}")]
    Device {
        /// The operation of [`crate::ops`], or what was asked of the driver.
        operation: &'static str,
        /// The device's number.
        device: u8,
        /// The code's name and number.
        code: String,
        /// What the driver says of it.
        what: String,
        /// Where to look.
        hint: &'static str,
    },
    /// The user asked to stop; everything was saved first.
    #[error("interrupted at step {step}; {saved}")]
    Interrupted {
        /// The last finished optimizer step.
        step: u64,
        /// Where the state is, and how to go on.
        saved: String,
    },
    /// The user asked to stop work that has no steps: what is kept, and how to go on.
    #[error("interrupted: {0}")]
    Stopped(String),
    /// The command line contradicts itself.
    #[error("{0}")]
    Usage(String),
}

impl Error {
    /// Wraps an I/O error with the path and the action that met it: `.map_err(Error::io(path, "open"))`.
    pub fn io(path: impl AsRef<Path>, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, action, source }
    }

    /// A file, flag or record that holds something else than it must.
    pub fn input(
        place: impl std::fmt::Display,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
        remedy: impl std::fmt::Display,
    ) -> Error {
        Error::Input {
            place: place.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
            remedy: remedy.to_string(),
        }
    }

    /// Did a device, or the host memory beside it, have no room? Then less may do.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::OutOfMemory { .. })
    }

    /// The process exit code: 2 for a wrong command line, 130 after Ctrl-C (128 + SIGINT), 1 for the rest.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Interrupted { .. } | Error::Stopped(_) => 130,
            _ => 1,
        }
    }
}

/// What helps against a refusal of the system; empty where nothing does for sure.
fn io_remedy(source: &std::io::Error) -> &'static str {
    use std::io::ErrorKind as Kind;
    match source.kind() {
        Kind::NotFound => "; check the path",
        Kind::PermissionDenied | Kind::ReadOnlyFilesystem => {
            "; check owner and permissions, or give another place"
        }
        Kind::IsADirectory => "; give a file, not a folder",
        Kind::NotADirectory => "; a part of the path is a file: give another path",
        Kind::StorageFull | Kind::FileTooLarge | Kind::QuotaExceeded => {
            "; make room, or write to another disk"
        }
        _ => "",
    }
}
